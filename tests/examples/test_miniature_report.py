import dataclasses
import math

import pytest

from examples.miniature import report
from examples.miniature.evaluate import DECODERS, Result, read_results
from examples.miniature.report import Estimate, Study, fill_in, gaps_table, layouts_table, table


def result(kind="paths", decoder="any_order", value=6, correct=50, seed=0, split="test", problems=100, **changes):
    return Result(
        **{
            "task": "nim_sum",
            "kind": kind,
            "seed": seed,
            "split": split,
            "decoder": decoder,
            "setting": DECODERS[decoder].setting,
            "value": value,
            "problems": problems,
            "correct": correct,
            "path_ends_correct": 0.5,
            "forward_passes": 6.0,
            "tokens_per_forward": 5.0,
            "arness_global": 0.25,
            "arness_local": 0.1,
            "arness_blocks": "0.500 0.250",
        }
        | changes
    )


def test_errors_of_an_estimate():
    # Seeds that agree: the binomial error of all problems.
    agreeing = Estimate.of([result(correct=50, seed=seed) for seed in range(3)])
    assert (agreeing.percent, agreeing.error) == (50, pytest.approx(100 * math.sqrt(0.25 / 300)))
    # Seeds that do not: the error of their mean, sd / sqrt(3).
    apart = Estimate.of([result(correct=correct, seed=seed) for seed, correct in enumerate((20, 50, 80))])
    assert (apart.percent, apart.error) == (pytest.approx(50), pytest.approx(30 / math.sqrt(3)))
    assert str(apart) == "50.0 ± 17.3"
    one = Estimate.of([result(correct=80)])
    assert one.error == pytest.approx(4.0)
    gap = one - apart
    assert (gap.percent, gap.error) == (pytest.approx(30), pytest.approx(math.hypot(4.0, 30 / math.sqrt(3))))


def test_decoders_are_chosen_on_one_set_and_reported_on_another():
    study = Study(
        [
            result(split="tune", decoder="any_order", correct=90),
            result(split="tune", decoder="parallel_forced", correct=80),
            result(split="tune", kind="chain", correct=70),
            result(split="tune", kind="chain_best", correct=60),
            result(split="test", decoder="any_order", correct=40),
            result(split="test", decoder="parallel_forced", correct=99),
            result(split="test", kind="chain", correct=30),
            result(split="test", kind="chain_best", correct=98),
            result(split="test", decoder="threshold", value=0.9, correct=100),
            result(split="test", task="clock", correct=0),
        ]
    )
    assert study.best(["paths"], list(DECODERS), 6) == ("paths", "any_order")
    assert study.best(["chain", "chain_best"], list(DECODERS), 6) == ("chain", "any_order")
    assert study.best(["short"], list(DECODERS), 6) is None
    lines = layouts_table(study).splitlines()
    assert lines[2] == "| three paths and a summary | - | - | - | - | 40.0 ± 4.9 | - | - | - |"
    gaps = gaps_table(study).splitlines()[2:]
    assert gaps[0].startswith("| same recipe | 6 | 40.0 ± 4.9 (any-order) | 30.0 ± 4.6 (long chain; any-order) |")
    assert gaps[0].endswith("| **10.0 ± 6.7** |")


def test_every_table_can_be_made_of_little():
    study = Study(
        [
            result(kind=kind, decoder=decoder.name, value=value, seed=seed, split=split)
            for kind in report.KIND_NAMES
            for decoder in DECODERS.values()
            for value in decoder.values
            for seed in (0, 1)
            for split in ("tune", "test")
        ]
    )
    assert report.findings(study).count("\n* ") == 3
    for make in report.TABLES.values():
        if make is report.findings:
            continue
        lines = make(study).splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
        assert make(Study([])).count("\n") >= 1  # nothing but a head
    cost = report.cost_table(study)
    assert cost.count("never") == 2 * len(report.KIND_NAMES)


def test_filling_in_a_page():
    end = "<!-- end of study -->"
    page = f"a\n<!-- study: effects -->\nold\n{end}\nb <!-- study: layouts, task clock -->\n{end}c"
    results = [result(), result(task="clock", kind="chain", split="tune"), result(task="clock", kind="chain")]
    filled = fill_in(page, results)
    assert "old" not in filled
    assert filled == fill_in(filled, results)
    assert f"-->\n\n{report.TABLES['effects'](Study(results))}\n\n<!-- end" in filled
    assert f"-->\n\n{layouts_table(Study(results, 'clock'))}\n\n<!-- end" in filled
    assert filled.startswith("a\n<!-- study: effects -->\n")
    assert filled.endswith("<!-- end of study -->c")
    with pytest.raises(KeyError):
        fill_in("<!-- study: nothing -->\n<!-- end of study -->", results)


def test_findings_say_which_way_it_came_out():
    def about(paths, forced):
        return report.findings(
            Study([result(kind="paths_best", correct=paths), result("paths_best", "parallel_forced", correct=forced)])
        )

    assert "6: better by 20.0 ± 6.9 points" in about(40, 60)
    assert "6: **worse** by 20.0 ± 6.9 points" in about(60, 40)
    assert "6: no different (-2.0 ± 7.1 points)" in about(52, 50)


def test_a_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_names():
    assert set(report.DECODER_NAMES) == set(DECODERS)
    assert len(set(report.DECODER_NAMES.values())) == len(DECODERS)


@pytest.mark.skipif(not report.RESULTS.exists(), reason="the study has not been run yet")
def test_the_pages_say_what_the_results_say():
    """No number of the study is typed: all of them come out of the results again."""
    results = read_results(report.RESULTS)
    assert results
    for page in report.PAGES:
        text = page.read_text()
        assert "<!-- study: " in text
        assert fill_in(text, results) == text
    # Another result makes another page, so that the comparison can fail.
    worse = [dataclasses.replace(result, correct=0) for result in results]
    assert fill_in(report.PAGES[0].read_text(), worse) != report.PAGES[0].read_text()
