from study_results import make_all_results, make_result

from examples.miniature import tables
from examples.miniature.study import KIND_NAMES, TOKENS_PER_STEP, Study


def test_a_table():
    assert tables.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_layouts_and_gaps_by_the_decoders_that_were_chosen():
    study = Study(
        [
            make_result(split=split, kind=kind, decoder=decoder, correct=correct)
            for split, kind, decoder, correct in (
                ("tune", "paths", "any_order", 90),
                ("tune", "paths", "parallel_forced", 80),
                ("tune", "chain", "any_order", 70),
                ("test", "paths", "any_order", 40),
                ("test", "paths", "parallel_forced", 99),
                ("test", "chain", "any_order", 30),
            )
        ]
    )
    lines = tables.layouts_table(study).splitlines()
    assert lines[2] == "| three paths and a summary | - | - | - | - | 40.0 ± 4.9 | - | - | - |"
    gaps = tables.gaps_table(study).splitlines()[2:]
    assert gaps[0].startswith("| same recipe | 6 | 40.0 ± 4.9 (any-order) | 30.0 ± 4.6 (long chain; any-order) |")
    assert gaps[0].endswith("| **+10.0 ± 6.7** |")


def test_trainings_by_the_decoder_of_their_kind():
    results = [make_result(seed=seed, correct=correct) for seed, correct in enumerate((40, 60))]
    results += [make_result(seed=1, value=8, correct=7), make_result(decoder="parallel_forced", correct=99)]
    results += [make_result(split="tune", value=value) for value in (6, 8)]
    assert tables.trainings_table(Study(results)).splitlines() == [
        "| written as | seed 0 | seed 1 |",
        "| --- | --- | --- |",
        "| three paths and a summary | -, 40, -, - | -, 60, 7, - |",
    ]


def test_differences():
    study = Study([make_result(correct=40), make_result("chain", correct=90), make_result("chain", value=8)])
    cells = tables.differences(lambda value: study.gap(("paths", "any_order"), ("chain", "any_order"), value))
    assert dict(zip(TOKENS_PER_STEP, cells, strict=True))[6] == "-50.0 ± 5.7"
    assert cells.count("-") == len(TOKENS_PER_STEP) - 1


def test_every_table_can_be_made_of_everything_and_of_nothing():
    study = Study(make_all_results())
    assert tables.findings(study).count("\n* ") == 3
    for make in tables.TABLES.values():
        if make is tables.findings:
            continue
        lines = make(study).splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
        assert make(Study([])).count("\n") >= 1  # nothing but a head
    kinds = len(study.kinds(KIND_NAMES))
    assert tables.cost_table(study).count("never") == 2 * kinds


def test_findings_say_which_way_it_came_out():
    def about(paths, forced):
        any_order = make_result(kind="paths_best", correct=paths)
        return tables.findings(Study([any_order, make_result("paths_best", "parallel_forced", correct=forced)]))

    assert "6: better by 20.0 ± 6.9 points" in about(40, 60)
    assert "6: **worse** by 20.0 ± 6.9 points" in about(60, 40)
    assert "6: not told apart (-2.0 ± 7.0 points)" in about(52, 50)
    assert "6: not told apart (+13.0 ± 6.9 points)" in about(50, 63)  # one standard error is nothing
