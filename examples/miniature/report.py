"""Tables and figures of the study, from its results and from nothing else.

    python -m examples.miniature.report

Writes the tables between the marks ``<!-- study: NAME -->`` and ``<!-- end of study -->`` of docs/study.md and
README.md, and the figures in docs/study/.  Needs ``pip install 'nap_decode[viz]'``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.miniature.evaluate import DECODERS, Result, read_results

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
RESULTS = STUDY / "results.csv"
PAGES = (ROOT / "docs" / "study.md", ROOT / "README.md")
TOKENS_PER_STEP = (1, 2, 3, 4, 6, 8, 12, 18)
SAME_RECIPE = ("paths", "joined", "identical", "chain", "short", "terse")
"""Kinds that were trained by the same recipe."""
PATHS = ("paths", "paths_best")
CHAINS = ("chain", "chain_best")
FORCED = tuple(name for name in DECODERS if name.startswith("parallel_forced"))

KIND_NAMES = {
    "paths": "three paths and a summary",
    "joined": "three solutions joined",
    "identical": "one path three times",
    "chain": "long chain",
    "short": "short chain, padded",
    "terse": "short chain alone",
    "paths_best": "paths, own recipe",
    "chain_best": "long chain, own recipe",
}
DECODER_NAMES = {
    "any_order": "any-order",
    "parallel_forced": "parallel-forced",
    "parallel_forced_shared": "parallel-forced, last step shared",
    "parallel_forced_0.8": "parallel-forced, summary from 80 %",
    "parallel_forced_0": "parallel-forced, summary along",
    "parallel_forced_thirds": "parallel-forced, three thirds",
    "blocks_in_turn": "one path after the other",
    "semi_autoregressive_3": "semi-autoregressive, 3",
    "semi_autoregressive_6": "semi-autoregressive, 6",
    "semi_autoregressive_12": "semi-autoregressive, 12",
    "semi_autoregressive_18": "semi-autoregressive, 18",
    "left_to_right": "left to right",
    "random": "random order",
    "threshold": "threshold",
    "entropy_bounded": "entropy-bounded",
}


@dataclass(frozen=True)
class Estimate:
    """A share in percent with its standard error.

    Args:
        percent: mean over the seeds of training.
        error: the larger of two standard errors: that of the mean over seeds, each with problems of its own, and the
            binomial one.  (Three seeds may agree by chance, and all may be perfect.)
    """

    percent: float
    error: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Estimate:
        """Of one cell, from the results of its seeds."""
        shares = [result.correct / result.problems for result in results]
        seeds, mean = len(shares), sum(shares) / len(shares)
        binomial = mean * (1 - mean) / sum(result.problems for result in results)
        between = sum((share - mean) ** 2 for share in shares) / (seeds - 1) / seeds if seeds > 1 else 0.0
        return cls(100 * mean, 100 * math.sqrt(max(binomial, between)))

    def __str__(self) -> str:
        return f"{self.percent:.1f} ± {self.error:.1f}"

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two, whose models and so errors are independent."""
        return Estimate(self.percent - other.percent, math.hypot(self.error, other.error))


class Study:
    """The results, by what they are of.

    Args:
        results: of all models, decoders and splits.
        task: whose results to look at.
    """

    def __init__(self, results: Iterable[Result], task: str = "nim_sum") -> None:
        self.results = [result for result in results if result.task == task]

    def cell(self, kind: str, decoder: str, value: float, split: str = "test") -> list[Result]:
        """The results of all seeds."""
        return [
            result
            for result in self.results
            if (result.kind, result.decoder, result.value, result.split) == (kind, decoder, value, split)
        ]

    def estimate(self, kind: str, decoder: str, value: float, split: str = "test") -> Estimate | None:
        """Of the share of right answers; None if that was not measured."""
        results = self.cell(kind, decoder, value, split)
        return Estimate.of(results) if results else None

    def curve(self, kind: str, decoder: str) -> dict[int, Estimate]:
        """Estimates by tokens per step; empty for decoders that have none."""
        if DECODERS[decoder].setting != "tokens_per_step":
            return {}
        found = {value: self.estimate(kind, decoder, value) for value in TOKENS_PER_STEP}
        return {value: estimate for value, estimate in found.items() if estimate is not None}

    def best(self, kinds: Sequence[str], decoders: Sequence[str], value: float) -> tuple[str, str] | None:
        """Kind and decoder that answer most of the problems *set aside for choosing*."""
        found = {
            (kind, decoder): estimate.percent
            for kind in kinds
            for decoder in decoders
            if DECODERS[decoder].setting == "tokens_per_step"
            and (estimate := self.estimate(kind, decoder, value, "tune")) is not None
        }
        return max(found, key=lambda pair: found[pair]) if found else None

    def at_best(self, kinds: Sequence[str], value: float) -> tuple[str, str, Estimate] | None:
        """The best kind and decoder, and how they do on the problems to report by; None if that was not measured."""
        best = self.best(kinds, list(DECODERS), value)
        estimate = None if best is None else self.estimate(*best, value)
        return None if best is None or estimate is None else (*best, estimate)

    def kinds(self, names: Iterable[str]) -> list[str]:
        """Those of the names that there are results for."""
        present = {result.kind for result in self.results}
        return [name for name in names if name in present]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def layouts_table(study: Study) -> str:
    """Every kind by its best decoder."""

    def cell(kind: str, value: int) -> str:
        best = study.at_best([kind], value)
        return "-" if best is None else str(best[2])

    kinds = study.kinds([*SAME_RECIPE, "paths_best", "chain_best"])
    head = ["written as", *map(str, TOKENS_PER_STEP)]
    return table(head, ([KIND_NAMES[kind], *(cell(kind, value) for value in TOKENS_PER_STEP)] for kind in kinds))


def decoders_table(study: Study, kind: str) -> str:
    """Every decoder with a fixed number of steps, on one kind."""
    rows = []
    for decoder in DECODERS.values():
        cells = [study.estimate(kind, decoder.name, value) for value in TOKENS_PER_STEP]
        if decoder.setting == "tokens_per_step" and any(cells):
            rows.append([DECODER_NAMES[decoder.name], *map(_text, cells)])
    return table(["decoder", *map(str, TOKENS_PER_STEP)], rows)


def gaps_table(study: Study) -> str:
    """Paths less the best long chain, each by its best decoder."""
    rows = []
    for name, paths, chains in (
        ("same recipe", ["paths"], ["chain"]),
        ("same recipe, the paper's baseline", ["paths"], ["joined"]),
        ("best of both", PATHS, CHAINS),
    ):
        for value in (4, 6, 8):
            ours, theirs = study.at_best(paths, value), study.at_best(chains, value)
            if ours and theirs:
                (_, decoder, one), (kind, other_decoder, other) = ours, theirs
                paths_cell = f"{one} ({DECODER_NAMES[decoder]})"
                chain_cell = f"{other} ({KIND_NAMES[kind]}; {DECODER_NAMES[other_decoder]})"
                rows.append([name, str(value), paths_cell, chain_cell, f"**{one - other}**"])
    return table(["", "tokens per step", "paths", "baseline", "gap"], rows)


def effects_table(study: Study) -> str:
    """What comes from the data, what from the decoder."""
    rows = []
    for value in (2, 3, 4, 6, 8, 12):
        cells = [
            study.estimate("chain", "any_order", value),
            study.estimate("chain", "parallel_forced_thirds", value),
            study.estimate("paths", "any_order", value),
            study.estimate("paths", "parallel_forced_shared", value),
        ]
        if all(cells):
            chain, chain_forced, paths, paths_forced = (cell for cell in cells if cell is not None)
            effects = [paths - chain, chain_forced - chain, paths_forced - paths]
            rows.append([str(value), *map(str, [chain, chain_forced, paths, paths_forced, *effects])])
    head = ["tokens per step", "chain, any-order", "chain, forced", "paths, any-order", "paths, forced"]
    return table([*head, "data", "decoder on the chain", "decoder on paths"], rows)


def forced_table(study: Study) -> str:
    """Parallel-forced less any-order, on weights that were trained on paths."""
    rows = []
    for kind in study.kinds(PATHS):
        for decoder in FORCED:
            cells = []
            for value in TOKENS_PER_STEP:
                one, other = study.estimate(kind, decoder, value), study.estimate(kind, "any_order", value)
                cells.append("-" if one is None or other is None else f"{one - other}")
            if set(cells) != {"-"}:
                rows.append([KIND_NAMES[kind], DECODER_NAMES[decoder], *cells])
    return table(["trained on", "decoder", *map(str, TOKENS_PER_STEP)], rows)


def adaptive_table(study: Study) -> str:
    """Decoders that choose their number of steps."""
    rows = []
    for decoder in DECODERS.values():
        if decoder.setting == "tokens_per_step":
            continue
        for kind in study.kinds(KIND_NAMES):
            for value in decoder.values:
                results = study.cell(kind, decoder.name, value)
                if results:
                    passes, per_forward = (
                        sum(getattr(result, name) for result in results) / len(results)
                        for name in ("forward_passes", "tokens_per_forward")
                    )
                    setting = f"{DECODER_NAMES[decoder.name]}, {decoder.setting} {value:g}"
                    accuracy = str(Estimate.of(results))
                    rows.append([KIND_NAMES[kind], setting, f"{passes:.1f}", f"{per_forward:.1f}", accuracy])
    return table(["written as", "decoder", "forward passes", "tokens per forward pass", "exact answer"], rows)


def arness_table(study: Study, value: int) -> str:
    """How autoregressive each decoder is on each kind."""
    rows = []
    for kind in study.kinds(KIND_NAMES):
        for decoder in DECODERS.values():
            results = study.cell(kind, decoder.name, value) if decoder.setting == "tokens_per_step" else []
            if results:
                means = [
                    f"{sum(getattr(result, name) for result in results) / len(results):.2f}"
                    for name in ("arness_global", "arness_local", "path_ends_correct")
                ]
                blocks = zip(*(map(float, result.arness_blocks.split()) for result in results), strict=True)
                each = ", ".join(f"{sum(block) / len(block):.2f}" for block in blocks)
                rows.append([KIND_NAMES[kind], DECODER_NAMES[decoder.name], *means[:2], each or "-", means[2]])
    return table(["written as", "decoder", "Global@1", "Local@1", "of each block", "path ends right"], rows)


def cost_table(study: Study) -> str:
    """The fewest forward passes at which nearly all answers are right."""
    rows = []
    for kind in study.kinds(KIND_NAMES):
        for goal in (99.0, 90.0):
            reached = [
                (sum(result.forward_passes for result in test) / len(test), decoder.name, value)
                for decoder in DECODERS.values()
                for value in decoder.values
                if (tune := study.estimate(kind, decoder.name, value, "tune")) is not None
                and tune.percent >= goal
                and (test := study.cell(kind, decoder.name, value))
            ]
            if reached:
                passes, decoder_name, value = min(reached)
                setting = DECODERS[decoder_name].setting.replace("_", " ")
                how = f"{DECODER_NAMES[decoder_name]}, {setting} {value:g}"
                exact = _text(study.estimate(kind, decoder_name, value))
                rows.append([KIND_NAMES[kind], f"{goal:.0f} %", f"{passes:.1f}", how, exact])
            else:
                rows.append([KIND_NAMES[kind], f"{goal:.0f} %", "-", "never", "-"])
    return table(["written as", "goal", "forward passes", "decoder", "exact answer"], rows)


def summary_table(study: Study) -> str:
    """The embedded models' kinds, by the decoders that one would try first."""
    rows = []
    for kind, decoder in (
        ("paths_best", "parallel_forced"),
        ("paths_best", "parallel_forced_shared"),
        ("paths_best", "any_order"),
        ("chain_best", "any_order"),
        ("chain_best", "left_to_right"),
    ):
        cells = [study.estimate(kind, decoder, value) for value in TOKENS_PER_STEP]
        if any(cells):
            written = "parallel paths" if kind in PATHS else "long chains"
            rows.append([written, DECODER_NAMES[decoder], *map(_text, cells)])
    return table(["trained on", "decoder; tokens per step:", *map(str, TOKENS_PER_STEP)], rows)


def coverage_table(study: Study) -> str:
    """What there is."""
    rows = []
    for kind in study.kinds(KIND_NAMES):
        results = [result for result in study.results if result.kind == kind]
        seeds = sorted({result.seed for result in results})
        decoders = len({result.decoder for result in results})

        def count(split: str, results: list[Result] = results) -> str:
            of_seed = {result.seed: result.problems for result in results if result.split == split}
            return str(sum(of_seed.values()))

        rows.append(
            [KIND_NAMES[kind], f"`{kind}`", ", ".join(map(str, seeds)), str(decoders), count("tune"), count("test")]
        )
    head = ["written as", "configuration", "seeds", "decoders", "problems to choose by", "to report"]
    return table(head, rows)


def verdict(gap: Estimate) -> str:
    """What a gap says: more than two standard errors are a difference."""
    if abs(gap.percent) <= 2 * gap.error:
        return f"no different ({gap.percent:+.1f} ± {gap.error:.1f} points)"
    return f"{'better' if gap.percent > 0 else '**worse**'} by {abs(gap.percent):.1f} ± {gap.error:.1f} points"


def findings(study: Study) -> str:
    """The answer in a few sentences, whichever way it came out."""
    lines = []
    gaps, forced = [], []
    for value in (4, 6, 8):
        ours, theirs = study.at_best(PATHS, value), study.at_best(CHAINS, value)
        if ours and theirs:
            gaps.append(f"{ours[2]} against {theirs[2]} at {value} tokens per step")
    if gaps:
        lines.append(
            f"* **Data.** Written as paths, each by its best recipe and decoder, against the best long chain, exact "
            f"answers in percent: {'; '.join(gaps)}."
        )
    for value in TOKENS_PER_STEP:
        one = study.estimate("paths_best", "parallel_forced", value)
        other = study.estimate("paths_best", "any_order", value)
        if one and other:
            forced.append(f"{value}: {verdict(one - other)}")
    if forced:
        lines.append(
            "* **Decoder.** On weights that were trained on paths, parallel-forced decoding is, compared with "
            f"any-order, by tokens per step: {'; '.join(forced)}."
        )
    for name, kind in (("the same solutions joined without headers", "joined"), ("one path three times", "identical")):
        cells = []
        for value in (4, 6, 8):
            ours, theirs = study.at_best(["paths"], value), study.at_best([kind], value)
            if ours and theirs:
                cells.append(f"{value}: {verdict(ours[2] - theirs[2])}")
        if cells:
            lines.append(f"* **Against {name}**, same recipe, paths are by tokens per step: {'; '.join(cells)}.")
    return "\n".join(lines)


def vote_table(study: Study) -> str:
    """How many paths end in the right state, and how many answers are right: does the summary vote?"""
    rows = []
    for kind in study.kinds(["paths", "paths_best", "identical", "joined"]):
        for decoder in ("any_order", "parallel_forced_shared"):
            cells = []
            for value in TOKENS_PER_STEP:
                results = study.cell(kind, decoder, value)
                ends = 100 * sum(result.path_ends_correct for result in results) / max(len(results), 1)
                cells.append(f"{ends:.1f}, {Estimate.of(results).percent:.1f}" if results else "-")
            if set(cells) != {"-"}:
                rows.append([KIND_NAMES[kind], DECODER_NAMES[decoder], *cells])
    return table(["written as", "decoder", *map(str, TOKENS_PER_STEP)], rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "findings": findings,
    "summary": summary_table,
    "coverage": coverage_table,
    "layouts": layouts_table,
    "gaps": gaps_table,
    "decoders on paths": lambda study: decoders_table(study, "paths"),
    "decoders on paths_best": lambda study: decoders_table(study, "paths_best"),
    "decoders on chain": lambda study: decoders_table(study, "chain"),
    "decoders on chain_best": lambda study: decoders_table(study, "chain_best"),
    "effects": effects_table,
    "forced": forced_table,
    "adaptive": adaptive_table,
    "vote": vote_table,
    "arness": lambda study: arness_table(study, 1),
    "cost": cost_table,
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


def draw_accuracy(study: Study, file: Path) -> None:
    """Accuracy against tokens per step: the layouts, and the decoders on the best weights of both kinds."""
    from matplotlib import pyplot

    from nap_decode.viz.plots import COLOURS, MARKERS

    hidden = ("semi_autoregressive_3", "semi_autoregressive_18", "parallel_forced_0.8")
    panels = [("same recipe, any-order", [(kind, "any_order", KIND_NAMES[kind]) for kind in SAME_RECIPE])]
    for kind in ("paths_best", "chain_best"):
        names = {decoder: name for decoder, name in DECODER_NAMES.items() if decoder not in hidden}
        panels.append((KIND_NAMES[kind], [(kind, decoder, name) for decoder, name in names.items()]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 5.2), layout="constrained", sharey=True)
    for ax, (title, curves) in zip(axes, panels, strict=True):
        points = {name: study.curve(kind, decoder) for kind, decoder, name in curves}
        for number, (name, curve) in enumerate((name, curve) for name, curve in points.items() if curve):
            ax.errorbar(
                [math.log2(value) for value in curve],
                [estimate.percent for estimate in curve.values()],
                yerr=[estimate.error for estimate in curve.values()],
                label=name,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if number < len(COLOURS) else "--",
                linewidth=1.5,
                markersize=max(10 - number, 5),  # so that of several at one place all can be seen
                capsize=2.5,
            )
        ax.axhline(12.5, color="grey", linewidth=1, linestyle=":")
        ax.annotate("chance", (0, 12.5), xytext=(0, 3), textcoords="offset points", fontsize="small", color="grey")
        ax.set_xticks([math.log2(value) for value in TOKENS_PER_STEP], list(map(str, TOKENS_PER_STEP)))
        ax.set(title=title, xlabel="tokens per step", ylim=(0, 103))
        ax.grid(alpha=0.25)
        if any(points.values()):
            ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axes[0].set_ylabel("exact answer, %")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


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
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    draw_accuracy(Study(results), args.figures / "accuracy.png")


if __name__ == "__main__":
    main()
