import dataclasses
import json
import shutil

import numpy as np
import pytest
from study_results import make_result

from examples.miniature import evaluate as evaluating
from examples.miniature.data import LAYOUTS, NIM_SUM
from examples.miniature.evaluate import (
    DECODERS,
    RESULTS_FILE,
    Evaluation,
    evaluate,
    read_results,
    score,
    write_results,
)
from nap_decode import Decoder, MacroParallelScheduler, NapDecodeError, Sampler, demo


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """The embedded model as one of the study."""
    directory = tmp_path_factory.mktemp("models") / "embedded-0"
    shutil.copytree(demo.CHECKPOINT, directory)
    log = {"config": {"name": "embedded", "task": "nim_sum", "layout": "paths"}, "seed": 0}
    (directory / "training_log.json").write_text(json.dumps(log))
    return directory


@pytest.fixture(scope="session")
def evaluation(directory):
    return Evaluation(directory, batch=8)


def as_if(evaluation, layout):
    """The same model on the canvas of another layout."""
    other = object.__new__(Evaluation)
    other.__dict__ |= vars(evaluation) | {"layout": LAYOUTS[layout]}
    return other


def test_measuring(evaluation):
    result = evaluation.measure(DECODERS["parallel_forced"], 6, "test", 20)
    operands = NIM_SUM.sample(np.random.default_rng(30_000), 20)
    sampler = Sampler(
        evaluation.denoiser,
        decoder=Decoder(MacroParallelScheduler(tokens_per_step=6)),
        template=LAYOUTS["paths"].template,
    )
    output = sampler([NIM_SUM.prompt(row) for row in operands])
    answers = [str(answer) for answer in NIM_SUM.answer(operands)]
    assert result.correct == sum(a == text for a, text in zip(answers, output.summary, strict=True)) >= 18
    ends = [text.split()[-1] == a for a, paths in zip(answers, output.paths, strict=True) for text in paths]
    assert result.path_ends_correct == pytest.approx(np.mean(ends), abs=1e-4)
    assert result.forward_passes == output.forward_passes == 6
    assert result.tokens_per_forward == pytest.approx(np.mean(output.tokens_per_forward), abs=1e-3)
    assert 0 < result.arness_global < 1
    assert len(result.arness_blocks.split()) == 4


def test_scoring_tells_right_from_wrong(evaluation):
    """The answer counts where the layout has it, and nowhere else."""
    operands = NIM_SUM.sample(np.random.default_rng(1), 2)
    sampler = Sampler(
        evaluation.denoiser,
        decoder=Decoder(MacroParallelScheduler(tokens_per_step=12)),
        template=LAYOUTS["paths"].template,
    )
    output = sampler([NIM_SUM.prompt(row) for row in operands])
    slots = LAYOUTS["paths"].write(NIM_SUM, operands)
    slots[1, 33] = slots[1, 33] % 8 + 10  # a wrong answer, and one wrong path of six
    slots[0, 10] = slots[0, 10] % 8 + 10
    output.trace.tokens[output.canvas.decodable] = output.trace.tokens.new_tensor(slots.ravel())
    assert score(NIM_SUM, LAYOUTS["paths"], operands, output) == (1, pytest.approx(5 / 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_possible(evaluation, layout):
    """Whatever is called possible runs, and whatever is not is refused by the library."""
    other = as_if(evaluation, layout)
    refused = 0
    for decoder in other.decoders():
        for value in decoder.values if decoder.setting == "tokens_per_step" else decoder.values[:1]:
            if not value >= 3 and decoder.setting == "tokens_per_step":
                continue  # slow, and more steps are easier
            if other.is_possible(decoder, value):
                assert other.measure(decoder, value, "tune", 1).forward_passes >= 1
            elif "block_length" not in repr(
                decoder.make(other.denoiser, other.layout.template, value).decoder.scheduler
            ):
                raise AssertionError(f"{decoder.name} {value}")
            else:
                refused += 1
                if other.layout.name != "terse":
                    with pytest.raises(NapDecodeError, match="step"):
                        other.measure(decoder, value, "tune", 1)
    assert refused


def test_decoders_for_paths_are_not_for_chains(evaluation):
    names = {decoder.name for decoder in as_if(evaluation, "chain").decoders()}
    assert "parallel_forced" not in names
    assert "parallel_forced_thirds" in names
    assert [decoder.name for decoder in evaluation.decoders(["random"])] == ["random"]
    with pytest.raises(ValueError, match="there is no decoder any; there are any_order, "):
        evaluation.decoders(["any"])


def test_going_on(directory, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(directory, mine)
    options = {"names": ["any_order", "random"], "values": [12, 8]}
    first = evaluate(mine, splits={"tune": 3}, **options)
    assert [(r.decoder, r.value, r.split, r.problems) for r in first] == [
        (decoder, value, "tune", 3) for decoder in ("any_order", "random") for value in (12, 8)
    ]
    assert read_results(mine / RESULTS_FILE) == first
    assert "mine: tune random tokens_per_step 8: " in capsys.readouterr().out

    measured = []
    measure = Evaluation.measure

    def watch(self, decoder, value, split, problems):
        measured.append((decoder.name, value, split, problems))
        return measure(self, decoder, value, split, problems)

    monkeypatch.setattr(Evaluation, "measure", watch)
    write_results(first[:3], mine / RESULTS_FILE)
    assert evaluate(mine, splits={"tune": 3}, **options) == first  # the same problems, and the same tokens
    assert measured == [("random", 8, "tune", 3)]
    measured.clear()
    evaluate(mine, splits={"tune": 4, "test": 2}, names=["any_order"], values=[8])
    assert measured == [("any_order", 8, "tune", 4), ("any_order", 8, "test", 2)]

    def meanwhile(self, decoder, value, split, problems):  # another process measures the same model
        write_results([*read_results(mine / RESULTS_FILE), other], mine / RESULTS_FILE)
        return measure(self, decoder, value, split, problems)

    other = make_result(decoder="threshold", value=0.5)
    monkeypatch.setattr(Evaluation, "measure", meanwhile)
    evaluate(mine, splits={"test": 3}, names=["random"], values=[8])
    assert other in read_results(mine / RESULTS_FILE)


def test_the_splits_share_no_problem():
    """Nor do the seeds of training share problems."""
    seen = {}
    for split, base in evaluating.SPLITS.items():
        for seed in range(3):
            for row in NIM_SUM.sample(np.random.default_rng(base + seed), 700).tolist():
                assert seen.setdefault(tuple(row), (split, seed)) == (split, seed)
    assert len(seen) == 6 * 700


def test_results_survive_a_file(tmp_path, evaluation):
    result = evaluation.measure(DECODERS["threshold"], 0.9, "tune", 2)
    results = [result, dataclasses.replace(result, kind="a, b", arness_blocks="")]
    write_results(results, tmp_path / "results.csv")
    assert read_results(tmp_path / "results.csv") == results
    assert read_results(tmp_path / "none.csv") == []
