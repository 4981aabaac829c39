from study_results import make_all_results, make_result

from examples.miniature import paper
from examples.miniature.study import Study


def rows(text):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_the_numbers_of_the_paper():
    numbers = paper.read_paper()
    assert len({(n.table, n.model, n.bench, n.training, n.decoder, n.tokens_per_step) for n in numbers}) == len(numbers)
    assert {n.table for n in numbers} == {"main", "ablation", "global_arness"}
    assert all(0 < n.percent < 100 for n in numbers)


def test_gaps_beside_those_of_the_paper():
    study = Study([make_result("paths", "parallel_forced", 4, 60), make_result("joined", value=4, correct=50)])
    gaps = rows(paper.paper_gaps_table(study))
    assert gaps["paper: Dream, GSM8K"]["4"] == "+14.4"
    assert gaps["paper: LLaDA, GPQA"]["4"] == "-"
    assert gaps["here: same recipe, less three solutions joined"]["4"] == "+10.0 ± 6.9"
    assert gaps["here: same recipe, less long chain"]["4"] == "-"


def test_the_ablation_beside_that_of_the_paper():
    study = Study([make_result("paths", "parallel_forced", 4, 30), make_result("paths", value=4, correct=50)])
    gaps = rows(paper.paper_ablation_table(study))
    assert gaps["paper: Dream, GSM8K, not fine-tuned"]["1"] == "-8.7"
    assert gaps["paper: Dream, GSM8K, trained on paths"]["4"] == "+3.5"
    assert gaps["here: trained on paths"]["4"] == "-20.0 ± 6.7"


def test_order_beside_that_of_the_paper():
    lines = paper.paper_order_table(Study(make_all_results())).splitlines()
    assert "| paper: LLaDA | not fine-tuned | Fast-dLLM | 87 |" in lines
    assert "| here | three paths | any-order | 25 |" in lines
