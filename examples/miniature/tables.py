"""The tables of the study, from its results and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from examples.miniature.evaluate import DECODERS, Result
from examples.miniature.study import CHAINS, DECODER_NAMES, FORCED, KIND_NAMES, PATHS, TOKENS_PER_STEP, Estimate, Study


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _signed(gap: Estimate | None) -> str:
    return "-" if gap is None else f"{gap:+}"


def differences(gap: Callable[[int], Estimate | None]) -> list[str]:
    """The cells of a row: a difference for each number of tokens per step."""
    return [_signed(gap(value)) for value in TOKENS_PER_STEP]


def layouts_table(study: Study) -> str:
    """Every kind by its best decoder."""

    def cell(kind: str, value: int) -> str:
        best = study.at_best([kind], value)
        return "-" if best is None else str(best[2])

    kinds = study.kinds(KIND_NAMES)
    head = ["written as", *map(str, TOKENS_PER_STEP)]
    return table(head, ([KIND_NAMES[kind], *(cell(kind, value) for value in TOKENS_PER_STEP)] for kind in kinds))


def trainings_table(study: Study) -> str:
    """Every training on its own, by the decoder that is best for its kind; at 4, 6, 8 and 12 tokens per step."""
    seeds = sorted({result.seed for result in study.results})

    def cell(kind: str, seed: int, value: int) -> str:
        best = study.best([kind], list(DECODERS), value)
        found = [result for result in study.cell(*best, value) if result.seed == seed] if best else []
        return f"{100 * found[0].correct / found[0].problems:.0f}" if found else "-"

    rows = [
        [KIND_NAMES[kind], *(", ".join(cell(kind, seed, value) for value in (4, 6, 8, 12)) for seed in seeds)]
        for kind in study.kinds(KIND_NAMES)
    ]
    return table(["written as", *(f"seed {seed}" for seed in seeds)], rows)


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
                rows.append([name, str(value), paths_cell, chain_cell, f"**{one - other:+}**"])
    return table(["", "tokens per step", "paths", "baseline", "gap"], rows)


def effects_table(study: Study) -> str:
    """What comes from the data, what from the decoder."""
    rows = []
    chain, forced_chain = ("chain", "any_order"), ("chain", "parallel_forced_thirds")
    paths, forced_paths = ("paths", "any_order"), ("paths", "parallel_forced_shared")
    for value in (2, 3, 4, 6, 8, 12):
        cells = [study.estimate(*cell, value) for cell in (chain, forced_chain, paths, forced_paths)]
        if all(cells):
            effects = ((paths, chain), (forced_chain, chain), (forced_paths, paths))
            rows.append([str(value), *map(_text, cells), *(_signed(study.gap(*e, value)) for e in effects)])
    head = ["tokens per step", "chain, any-order", "chain, forced", "paths, any-order", "paths, forced"]
    return table([*head, "data", "decoder on the chain", "decoder on paths"], rows)


def forced_table(study: Study) -> str:
    """Parallel-forced less any-order, on weights that were trained on paths."""
    rows = []
    for kind in study.kinds(PATHS):
        for decoder in FORCED:
            cells = differences(partial(study.gap, (kind, decoder), (kind, "any_order")))
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
                accuracy = study.estimate(kind, decoder.name, value)
                if accuracy is not None:
                    passes, per_forward = (
                        f"{study.mean(name, kind, decoder.name, value):.1f}"
                        for name in ("forward_passes", "tokens_per_forward")
                    )
                    setting = f"{DECODER_NAMES[decoder.name]}, {decoder.setting} {value:g}"
                    rows.append([KIND_NAMES[kind], setting, passes, per_forward, str(accuracy)])
    return table(["written as", "decoder", "forward passes", "tokens per forward pass", "exact answer"], rows)


def arness_table(study: Study, value: int) -> str:
    """How autoregressive each decoder is on each kind."""
    rows = []
    for kind in study.kinds(KIND_NAMES):
        for decoder in DECODERS.values():
            results = study.cell(kind, decoder.name, value) if decoder.setting == "tokens_per_step" else []
            if results:
                means = [
                    f"{study.mean(name, kind, decoder.name, value):.2f}"
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
                (study.mean("forward_passes", kind, decoder.name, value), decoder.name, value)
                for decoder in DECODERS.values()
                for value in decoder.values
                if (tune := study.estimate(kind, decoder.name, value, "tune")) is not None
                and tune.percent >= goal
                and study.cell(kind, decoder.name, value)
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
    """What a gap says: only more than two standard errors are a difference."""
    if abs(gap.percent) <= 2 * gap.error:
        return f"not told apart ({gap:+} points)"
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
        effect = study.gap(("paths_best", "parallel_forced"), ("paths_best", "any_order"), value)
        if effect:
            forced.append(f"{value}: {verdict(effect)}")
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
                if exact := study.estimate(kind, decoder, value):
                    ends = 100 * study.mean("path_ends_correct", kind, decoder, value)
                    cells.append(f"{ends:.1f}, {exact.percent:.1f}")
                else:
                    cells.append("-")
            if set(cells) != {"-"}:
                rows.append([KIND_NAMES[kind], DECODER_NAMES[decoder], *cells])
    return table(["written as", "decoder", *map(str, TOKENS_PER_STEP)], rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "findings": findings,
    "summary": summary_table,
    "coverage": coverage_table,
    "layouts": layouts_table,
    "trainings": trainings_table,
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
