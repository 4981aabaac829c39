"""The pages of the study, from its results and from nothing else.

    python -m examples.miniature.report

Writes the tables between the marks ``<!-- study: NAME -->`` and ``<!-- end of study -->`` of the pages, and the
figures in docs/study/.  Needs ``pip install 'nap_decode[viz]'``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from examples.miniature.evaluate import Result, read_results
from examples.miniature.figures import draw_all
from examples.miniature.paper import paper_ablation_table, paper_gaps_table, paper_order_table
from examples.miniature.study import Study
from examples.miniature.tables import TABLES as OWN_TABLES

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
RESULTS = STUDY / "results.csv"
PAGES = (ROOT / "docs" / "study.md", ROOT / "docs" / "explanation.md")

TABLES = OWN_TABLES | {
    "paper gaps": paper_gaps_table,
    "paper ablation": paper_ablation_table,
    "paper order": paper_order_table,
}
_MARKED = re.compile(r"(<!-- study: ([\w ]+?)(?:, task (\w+))? -->\n).*?(<!-- end of study -->)", re.DOTALL)


def fill_in(page: str, results: Sequence[Result]) -> str:
    """The page with its tables renewed.

    Raises:
        KeyError: a mark that names no table.
    """

    def renew(match: re.Match[str]) -> str:
        start, name, task, end = match.groups()
        return f"{start}\n{TABLES[name](Study(results, task or 'nim_sum'))}\n\n{end}"

    return _MARKED.sub(renew, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=STUDY, help="directory of the figures")
    parser.add_argument("--print", action="store_true", help="print the tables, and leave the pages as they are")
    args = parser.parse_args()
    results = read_results(args.results)
    if args.print:
        for name, make in TABLES.items():
            print(f"\n{name}\n\n{make(Study(results))}")
    else:
        for page in PAGES:
            page.write_text(fill_in(page.read_text(), results))
    draw_all(results, args.figures)


if __name__ == "__main__":
    main()
