"""What works with the installed transformers, and that the page says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from releases import ATTENTION, CHECKS, COMPILED, FAMILIES, check, fill_in

DOCS = Path(__file__).parents[1] / "docs"
RECORD = json.loads((DOCS / "releases.json").read_text())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_does_what_the_page_says(name, attention):
    """Or decodes rightly and refuses in our own words, with a release that the page does not have."""
    found = {what: check(name, attention, what) for what in CHECKS if "compile" not in what}
    listed = RECORD["releases"].get(transformers.__version__)
    if listed is not None:
        said = {what: outcome for what, outcome in listed["families"][name][attention].items() if what in found}
        assert {what: outcome.partition(":")[0] for what, outcome in found.items()} == {
            what: outcome.partition(":")[0] for what, outcome in said.items()
        }


def test_the_page_shows_what_the_script_wrote():
    page = (DOCS / "releases.md").read_text()
    assert fill_in(page, RECORD) == page
    assert set(COMPILED) <= set(FAMILIES)
