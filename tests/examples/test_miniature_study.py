import json
import math

import pytest
from study_results import make_result

from examples.miniature import study
from examples.miniature.evaluate import DECODERS, read_results
from examples.miniature.report import RESULTS
from examples.miniature.run import KINDS
from examples.miniature.study import Estimate, Study
from nap_decode import demo


def test_errors_of_an_estimate():
    # Seeds that agree: the binomial error of all problems.
    agreeing = Estimate.of([make_result(correct=50, seed=seed) for seed in range(3)])
    assert (agreeing.percent, agreeing.error) == (50, pytest.approx(100 * math.sqrt(0.25 / 302)))
    # Seeds that do not: the error of their mean, sd / sqrt(3).
    apart = Estimate.of([make_result(correct=correct, seed=seed) for seed, correct in enumerate((20, 50, 80))])
    assert (apart.percent, apart.error) == (pytest.approx(50), pytest.approx(30 / math.sqrt(3)))
    assert str(apart) == "50.0 ± 17.3"
    one = Estimate.of([make_result(correct=80)])
    assert one.error == pytest.approx(100 * math.sqrt(81 * 21 / 102**3))
    gap = one - apart
    assert (gap.percent, gap.error) == (pytest.approx(30), pytest.approx(math.hypot(one.error, apart.error)))
    assert f"{gap:+}" == "+30.0 ± 17.8"
    # That nothing went wrong does not mean that nothing can.
    assert str(Estimate.of([make_result(correct=100)])) == "100.0 ± 1.0"


def test_decoders_are_compared_model_by_model():
    """Models differ by far more than what a decoder does to each of them."""
    results = Study(
        [
            make_result(decoder=decoder, seed=seed, correct=correct - loss, problems=1000)
            for decoder, losses in (("any_order", (0, 0, 0)), ("parallel_forced", (20, 30, 40)))
            for seed, (correct, loss) in enumerate(zip((900, 500, 100), losses, strict=True))
        ]
        + [make_result("chain", seed=seed, correct=correct, problems=1000) for seed, correct in enumerate((900, 500))]
    )
    effect = results.gap(("paths", "parallel_forced"), ("paths", "any_order"), 6)
    floor = sum(right * (3002 - right) / 3002**3 for right in (1501, 1411))  # that of all problems
    assert (effect.percent, effect.error) == (pytest.approx(-3.0), pytest.approx(100 * math.sqrt(floor)))
    wide = results.gap(("paths", "any_order"), ("chain", "any_order"), 6)
    assert wide.error == pytest.approx(math.hypot(40 / math.sqrt(3), 28.284271 / math.sqrt(2)))
    assert results.gap(("paths", "any_order"), ("short", "any_order"), 6) is None
    assert results.gap(("paths", "any_order"), ("paths", "random"), 6) is None
    uneven = Study([make_result(decoder="random", seed=1, correct=10), *results.results])
    assert uneven.gap(("paths", "random"), ("paths", "any_order"), 6).percent == pytest.approx(-40)


def test_decoders_are_chosen_on_one_set_and_reported_on_another():
    results = Study(
        [
            make_result(split="tune", decoder="any_order", correct=90),
            make_result(split="tune", decoder="parallel_forced", correct=80),
            make_result(split="tune", kind="chain", correct=70),
            make_result(split="tune", kind="chain_best", correct=60),
            make_result(split="test", decoder="any_order", correct=40),
            make_result(split="test", decoder="parallel_forced", correct=99),
            make_result(split="test", kind="chain", correct=30),
            make_result(split="test", kind="chain_best", correct=98),
            make_result(split="test", decoder="threshold", value=0.9, correct=100),
            make_result(split="test", task="clock", correct=0),
        ]
    )
    assert results.best(["paths"], list(DECODERS), 6) == ("paths", "any_order")
    assert results.best(["chain", "chain_best"], list(DECODERS), 6) == ("chain", "any_order")
    assert results.best(["short"], list(DECODERS), 6) is None
    kind, decoder, estimate = results.at_best(["paths"], 6)
    assert (kind, decoder, str(estimate)) == ("paths", "any_order", "40.0 ± 4.9")
    assert results.at_best(["paths"], 8) is None


def test_the_best_training():
    shares = {0: (90, 90, 90, 10), 1: (80, 80, 80, 80), 2: (100, 80, 70, 60)}
    results = [
        make_result(seed=seed, split="tune", decoder=decoder, value=value, correct=correct - loss)
        for seed, all_correct in shares.items()
        for value, correct in zip((4, 6, 8, 12), all_correct, strict=True)
        for decoder, loss in (("any_order", 10), ("left_to_right", 0), ("random", 9))
    ]
    results += [make_result(seed=2, split="test", value=value, correct=100) for value in (4, 6, 8, 12)]
    results += [make_result(seed=2, split="tune", decoder="threshold", value=4, correct=100)]
    assert Study(results).best_seed("paths") == 1
    with pytest.raises(ValueError, match="empty"):
        Study(results).best_seed("chain")


@pytest.mark.parametrize(
    ("kind", "checkpoint"), [("paths_best", demo.CHECKPOINT), ("chain_best", demo.CHAIN_CHECKPOINT)]
)
def test_the_embedded_models_are_the_best(kind, checkpoint):
    best = Study(read_results(RESULTS)).best_seed(kind)
    assert json.loads((checkpoint / "training_log.json").read_text())["seed"] == best


def test_the_mean_over_seeds():
    results = Study([make_result(seed=seed, forward_passes=passes) for seed, passes in enumerate((4.0, 7.0))])
    assert results.mean("forward_passes", "paths", "any_order", 6) == 5.5


def test_names():
    assert set(study.KIND_NAMES) == set(KINDS)
    assert set(study.DECODER_NAMES) == set(DECODERS)
    assert len(set(study.DECODER_NAMES.values())) == len(DECODERS)
    assert {*study.SAME_RECIPE, *study.PATHS, *study.CHAINS} == set(KINDS)
