"""The figures of the study: three from its results, one from decodes of the embedded models.

Needs ``pip install 'nap_decode[viz]'``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.miniature.data import LAYOUTS
from examples.miniature.evaluate import DECODERS, Result
from examples.miniature.study import DECODER_NAMES, KIND_NAMES, SAME_RECIPE, TOKENS_PER_STEP, Estimate, Study
from nap_decode import Denoiser, demo
from nap_decode.measure import viz

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT = "6 0 6 4 6 2 1 2 4 7 0 6 ="
CHANCE = 12.5
# The decoders that one would think of first; the others are in the tables.
SHOWN = (
    "any_order",
    "parallel_forced",
    "parallel_forced_shared",
    "parallel_forced_thirds",
    "blocks_in_turn",
    "semi_autoregressive_12",
    "random",
    "left_to_right",
)


def _style(number: int, *, is_other: bool = False) -> dict[str, Any]:
    """One of a row of curves: a colour and a marker of its own, smaller and smaller so that none hides another.

    Args:
        number: of the curve, from 0 to 7.
        is_other: another version of it: broken, with hollow marks.
    """
    from nap_decode.measure.viz.plots import COLOURS, MARKERS

    return {
        "color": (*COLOURS, "#000000")[number],
        "marker": (*MARKERS, "*")[number],
        "markerfacecolor": "white" if is_other else None,
        "linestyle": "--" if is_other else "-",
        "linewidth": 1.5,
        "markersize": max(10 - number, 5),
        "capsize": 2.5,
    }


def _draw_curve(ax: Axes, points: dict[float, Estimate], name: str, style: dict[str, Any]) -> None:
    """Estimates against a quantity that doubles from tick to tick."""
    ax.errorbar(
        [math.log2(x) for x in points],
        [estimate.percent for estimate in points.values()],
        yerr=[estimate.error for estimate in points.values()],
        label=name,
        **style,
    )


def _finish(ax: Axes, title: str, label: str, ticks: Sequence[int], *, chance_at: str = "left") -> None:
    ax.axhline(CHANCE, color="grey", linewidth=1, linestyle=":")
    ax.annotate(
        "chance",
        (0 if chance_at == "left" else 1, CHANCE),
        xycoords=("axes fraction", "data"),
        xytext=(3 if chance_at == "left" else -3, 3),
        textcoords="offset points",
        ha=chance_at,
        fontsize="small",
        color="grey",
    )
    ax.set_xticks([math.log2(value) for value in ticks], list(map(str, ticks)))
    ax.set(title=title, xlabel=label, ylim=(0, 103))
    ax.grid(alpha=0.25)


def _save(figure: Figure, file: Path) -> None:
    """Write a figure, and let go of its memory."""
    from matplotlib import pyplot

    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def draw_layouts(study: Study, file: Path) -> None:
    """Every kind by its best decoder, against tokens per step and against forward passes."""
    from matplotlib import pyplot

    styles = {kind: _style(number) for number, kind in enumerate(SAME_RECIPE)}
    styles |= {f"{kind}_best": _style(SAME_RECIPE.index(kind), is_other=True) for kind in ("paths", "chain")}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for kind in study.kinds(styles):
        by_tokens: dict[float, Estimate] = {}
        by_passes: dict[float, Estimate] = {}
        for value in TOKENS_PER_STEP:
            if best := study.at_best([kind], value):
                by_tokens[value] = best[2]
                by_passes[study.mean("forward_passes", kind, best[1], value)] = best[2]
        _draw_curve(axes[0], by_tokens, KIND_NAMES[kind], styles[kind])
        _draw_curve(axes[1], by_passes, KIND_NAMES[kind], styles[kind])
    _finish(axes[0], "the same number of tokens at each step", "tokens per step", TOKENS_PER_STEP)
    _finish(axes[1], "the same cost", "forward passes", (1, 2, 4, 8, 16, 32), chance_at="right")
    axes[0].set_ylabel("exact answer, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, file)


def draw_decoders(study: Study, file: Path) -> None:
    """Decoders on the best weights of both kinds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("paths_best", "chain_best"), strict=True):
        for number, decoder in enumerate(SHOWN):  # the same colour in both panels
            if curve := study.curve(kind, decoder):
                _draw_curve(ax, {float(value): curve[value] for value in curve}, DECODER_NAMES[decoder], _style(number))
        _finish(ax, KIND_NAMES[kind], "tokens per step", TOKENS_PER_STEP)
    axes[0].set_ylabel("exact answer, %")
    labels = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [name for name in map(DECODER_NAMES.get, SHOWN) if name in labels]
    figure.legend([labels[n] for n in names], names, loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, file)


def draw_arness(study: Study, file: Path) -> None:
    """Global and Local AR-ness@1 of every decoder at one token per step."""
    from matplotlib import pyplot

    kinds = ("paths_best", "chain_best")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
    for ax, kind in zip(axes, kinds, strict=True):
        decoders = [decoder for decoder in SHOWN if study.cell(kind, decoder, 1)]
        rows = range(len(decoders))
        for number, (name, field) in enumerate((("Global@1", "arness_global"), ("Local@1", "arness_local"))):
            values = [study.mean(field, kind, decoder, 1) for decoder in decoders]
            style = _style(number, is_other=number == 0) | {"linestyle": "none", "markersize": 10 - 5 * number}
            ax.errorbar(values, rows, label=name, **style)  # one inside the other, where they are the same
        ax.set_yticks(rows, [DECODER_NAMES[decoder] for decoder in decoders])
        ax.invert_yaxis()
        ax.set(title=KIND_NAMES[kind], xlim=(-0.03, 1.03), xlabel="AR-ness (from left to right is 1)")
        ax.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, file)


def draw_orders(file: Path) -> None:
    """The commit order of every decoder on one problem, one token per step, as in the paper's Figure 1."""
    from matplotlib import pyplot

    names = {
        "paths": ("any_order", "parallel_forced", "blocks_in_turn", "left_to_right", "random"),
        "chain": ("any_order", "parallel_forced_thirds", "semi_autoregressive_6", "left_to_right", "random"),
    }
    figure, axes = pyplot.subplots(2, 5, figsize=(15, 6.4), layout="constrained", sharey=True)
    for line, (trained_on, decoders) in zip(axes, names.items(), strict=True):
        denoiser = Denoiser(*demo.load(trained_on))
        for ax, name in zip(line, decoders, strict=True):
            sampler = DECODERS[name].make(denoiser, LAYOUTS[trained_on].template, 1)
            viz.plot_order(sampler(PROMPT, progress=False), ax=ax)
            ax.set_title(f"{trained_on}: {DECODER_NAMES[name]}", fontsize="medium")
            ax.label_outer()
    _save(figure, file)


def draw_all(results: Sequence[Result], directory: Path) -> None:
    """Write all of them."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    study = Study(results)
    draw_layouts(study, directory / "accuracy.png")
    draw_decoders(study, directory / "decoders.png")
    draw_arness(study, directory / "arness.png")
    draw_orders(directory / "order.png")
