import dataclasses
import re

import pytest
from study_results import make_result

from examples.miniature import report, tables
from examples.miniature.evaluate import read_results
from examples.miniature.report import fill_in
from examples.miniature.study import Study


def test_filling_in_a_page():
    end = "<!-- end of study -->"
    page = f"a\n<!-- study: effects -->\nold\n{end}\nb <!-- study: layouts, task clock -->\n{end}c"
    results = [
        make_result(),
        make_result(task="clock", kind="chain", split="tune"),
        make_result(task="clock", kind="chain"),
    ]
    filled = fill_in(page, results)
    assert "old" not in filled
    assert filled == fill_in(filled, results)
    assert f"-->\n\n{report.TABLES['effects'](Study(results))}\n\n<!-- end" in filled
    assert f"-->\n\n{tables.layouts_table(Study(results, 'clock'))}\n\n<!-- end" in filled
    assert filled.startswith("a\n<!-- study: effects -->\n")
    assert filled.endswith("<!-- end of study -->c")
    with pytest.raises(KeyError):
        fill_in("<!-- study: nothing -->\n<!-- end of study -->", results)


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


def test_no_number_of_the_page_is_typed():
    """Outside the marks, the page has none with a decimal point but those of its method."""
    text = (report.ROOT / "docs" / "study.md").read_text()
    typed = re.sub(r"<!-- study: .*?<!-- end of study -->", "", text, flags=re.DOTALL)
    found = set(re.findall(r"\b\d+\.\d+(?: %)?", typed))
    assert found <= {"0.86", "12.5 %", "2602.23225"}
