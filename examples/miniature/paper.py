"""The paper's tables beside those of the study.

The paper's numbers (arXiv 2602.23225) are in docs/study/paper.csv, a line for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.miniature.evaluate import read_lines
from examples.miniature.study import CHAINS, DECODER_NAMES, PATHS, TOKENS_PER_STEP, Estimate, Study
from examples.miniature.tables import differences, table

PAPER = Path(__file__).parents[2] / "docs" / "study" / "paper.csv"


@dataclass(frozen=True)
class Published:
    """One number of the paper.

    Args:
        table: ``"main"``, ``"ablation"`` or ``"global_arness"``.
        model: LLaDA or Dream.
        bench: what it was measured on.
        training: ``"base"`` for none, ``"chain"`` for long chains of thought, ``"paths"`` for NAP's data.
        decoder: how it was decoded.
        tokens_per_step: as it says.
        percent: accuracy, or the share that AR-ness is.
    """

    table: str
    model: str
    bench: str
    training: str
    decoder: str
    tokens_per_step: int
    percent: float


def read_paper(file: Path = PAPER) -> list[Published]:
    """All numbers."""
    return read_lines(file, Published)


def paper_gaps_table(study: Study) -> str:
    """Paths, parallel-forced, less long chains, any-order: the paper's main comparison; and the best of both."""
    published = {
        (number.model, number.bench, number.training, number.tokens_per_step): number.percent
        for number in read_paper()
        if number.table == "main"
    }
    rows = []
    for model, bench in dict.fromkeys(key[:2] for key in published):
        gaps = [
            f"{published[model, bench, 'paths', value] - published[model, bench, 'chain', value]:+.1f}"
            if (model, bench, "paths", value) in published
            else "-"
            for value in TOKENS_PER_STEP
        ]
        rows.append([f"paper: {model}, {bench}", *gaps])
    for name, chain in (("three solutions joined", "joined"), ("long chain", "chain")):
        cells = differences(partial(study.gap, ("paths", "parallel_forced"), (chain, "any_order")))
        rows.append([f"here: same recipe, less {name}", *cells])

    def best(value: int) -> Estimate | None:
        ours, theirs = study.at_best(PATHS, value), study.at_best(CHAINS, value)
        return ours[2] - theirs[2] if ours and theirs else None

    rows.append(["here: own recipes and decoders, less long chain", *differences(best)])
    return table(["tokens per step:", *map(str, TOKENS_PER_STEP)], rows)


def paper_ablation_table(study: Study) -> str:
    """What parallel-forced decoding adds to any-order decoding, on weights that were trained on paths and on others."""
    published = {
        (number.training, number.decoder, number.tokens_per_step): number.percent
        for number in read_paper()
        if number.table == "ablation"
    }
    rows = []
    for training, name in (("base", "not fine-tuned"), ("paths", "trained on paths")):
        gaps = [
            f"{published[training, 'parallel_forced', value] - published[training, 'any_order', value]:+.1f}"
            if (training, "any_order", value) in published
            else "-"
            for value in TOKENS_PER_STEP
        ]
        rows.append([f"paper: Dream, GSM8K, {name}", *gaps])
    for kind, decoder, name in (
        ("chain", "parallel_forced_thirds", "long chain"),
        ("joined", "parallel_forced_thirds", "three solutions joined"),
        ("paths", "parallel_forced", "trained on paths"),
        ("paths", "parallel_forced_shared", "trained on paths, last step shared"),
        ("paths_best", "parallel_forced", "trained on paths, own recipe"),
        ("paths_best", "parallel_forced_shared", "the same, last step shared"),
    ):
        cells = differences(partial(study.gap, (kind, decoder), (kind, "any_order")))
        rows.append([f"here: {name}", *cells])
    return table(["tokens per step:", *map(str, TOKENS_PER_STEP)], rows)


def paper_order_table(study: Study) -> str:
    """Global AR-ness@1 of any-order decoding."""
    training = {"base": "not fine-tuned", "chain": "long chains of thought"}
    rows = [
        [f"paper: {number.model}", training[number.training], number.decoder.replace("_", "-"), f"{number.percent:.0f}"]
        for number in read_paper()
        if number.table == "global_arness"
    ]
    for kind, name in (
        ("chain_best", "long chain"),
        ("joined", "three solutions joined"),
        ("paths_best", "three paths"),
    ):
        for decoder in ("any_order", "parallel_forced"):
            if study.cell(kind, decoder, 1):
                percent = f"{100 * study.mean('arness_global', kind, decoder, 1):.0f}"
                rows.append(["here", name, DECODER_NAMES[decoder], percent])
    return table(["model", "trained on", "decoder", "Global@1, %"], rows)
