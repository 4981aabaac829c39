"""Commit order, AR-ness over steps, and accuracy against parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nap_decode.base.errors import NapDecodeError, check_integer, check_name
from nap_decode.measure.arness import ascends, commit_order, decoded_slots, masked_below
from nap_decode.measure.parallelism import accuracy_under_parallelism, check_points
from nap_decode.results.html import check_row
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import DecodeTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, whose colours the colour-blind tell apart; without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#7F7F7F"

_Floats: TypeAlias = "NDArray[np.float64]"


def trace_of(decoded: DecodeTrace | SamplerOutput) -> DecodeTrace:
    """The trace of an output, or the trace itself."""
    trace = getattr(decoded, "trace", decoded)
    if not isinstance(trace, DecodeTrace):
        raise NapDecodeError(f"a picture needs a SamplerOutput or a DecodeTrace, but got {decoded!r:.80}")
    return trace


def plot_order(
    decoded: DecodeTrace | SamplerOutput, row: int = 0, *, ax: Axes | None = None, color_by: str = "block"
) -> Axes:
    """Step of every commit against its position, as in Figure 1 of NAP (arXiv 2602.23225).

    Decoding from left to right is a diagonal (the dotted line), decoding in parallel one diagonal or cloud in each
    block.  Positions are numbered over the decoded slots only, as for AR-ness; blocks are shaded and named.

    Args:
        decoded: an output or a trace.
        row: which row.
        ax: where to draw.
        color_by: ``"block"``, or ``"confidence"`` with a scale beside it.

    Raises:
        NapDecodeError: a row that is not there; matplotlib is not installed.
    """
    trace = trace_of(decoded)
    check_row(trace, row)
    check_name("way to colour", color_by, ("block", "confidence"))
    ax = ax or _new_axes()
    inside = trace.block[row] >= 0
    block, step, confidence = (x[row][inside].numpy() for x in (trace.block, trace.step, trace.confidence))
    filled = np.zeros(len(step), bool) if trace.closed is None else trace.closed[row][inside].numpy()
    position, decoded_here = np.arange(len(step)), (step >= 0) & ~filled
    last = max(int(step.max(initial=0)), 0)
    points: dict[str, Any] = {"s": float(np.clip(4000 / max(len(step), 1), 3, 40)), "linewidths": 0, "zorder": 3}

    runs = [(index, list(run)) for index, run in groupby(position, key=lambda p: block[p])]
    for index, run in runs:
        colour = COLOURS[index % len(COLOURS)]
        ax.axvspan(run[0] - 0.5, run[-1] + 0.5, color=colour, alpha=0.10, linewidth=0)
        if color_by == "block":
            here = decoded_here & np.isin(position, run)
            ax.scatter(position[here], step[here], color=colour, **points)
    if color_by == "confidence":
        scale: dict[str, Any] = {"c": confidence[decoded_here], "cmap": "cividis", "plotnonfinite": True}
        drawn = ax.scatter(position[decoded_here], step[decoded_here], **scale, **points)
        ax.figure.colorbar(drawn, ax=ax, label="confidence")
    if filled.any():
        hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": _GREY, "label": "filled, not decoded"}
        ax.scatter(position[filled], step[filled], s=points["s"], zorder=2, **hollow)
        ax.legend(loc="upper left", fontsize="small")
    if decoded_here.any():
        ax.plot([0, len(step) - 1], [0, last], ":", color=_GREY, linewidth=1, zorder=1)
    ax.set(xlabel="position", ylabel="step", xlim=(-0.5, max(len(step), 1) - 0.5), ylim=(-0.5, last + 0.5))
    ax.locator_params(integer=True)
    _name_blocks(ax, [(trace.block_names[index], (run[0] + run[-1]) / 2) for index, run in runs])
    return ax


def _name_blocks(ax: Axes, names: list[tuple[str, float]]) -> None:
    """Write names above the axes, aslant if they would touch each other; none if even so there is no room."""
    points = ax.get_window_extent().width * 72 / ax.figure.dpi / np.ptp(ax.get_xlim())  # for every slot
    labels, centers = zip(*names, strict=True)
    gaps, widths = np.diff(centers) * points, np.array([len(name) * 5.5 for name in labels])  # of 9-point letters
    if len(gaps) and gaps.min() < 9:
        return
    is_aslant = bool((gaps < (widths[1:] + widths[:-1]) / 2 + 4).any())
    slope: dict[str, Any] = {"rotation": 35, "ha": "left"} if is_aslant else {"rotation": 0, "ha": "center"}
    top = ax.secondary_xaxis("top")  # where a title makes room for it
    top.set_xticks(centers, labels, fontsize=9, rotation_mode="anchor", parse_math=False, **slope)
    top.tick_params(length=0, pad=3)
    top.spines["top"].set_visible(False)


@dataclass(frozen=True, eq=False)
class RunningARness:
    """AR-ness of what was committed so far, averaged over rows."""

    steps: NDArray[np.int64]  # (S,), steps done: 1 to S
    global_at: dict[int, _Floats]  # by k, (S,), after each of them; nan before the first commit
    local_at: dict[int, _Floats]  # by k, (S,); nan before the k-th commit


def running_arness(
    decoded: DecodeTrace | SamplerOutput, *, ks: Sequence[int] = (1,), block: str | None = None
) -> RunningARness:
    """AR-ness as the decode goes on.

    Global@k and Local@k are shares of commits (:class:`~nap_decode.ARnessMeter`); after each step, here is the
    share among the commits so far.  What is still masked counts for Global@k although it is not committed yet, so
    the last value is what :class:`~nap_decode.ARnessMeter` measures.  A row that is done keeps its value.
    Given a ``block``, only its slots are looked at.

    Raises:
        NapDecodeError: a k below 1; a block that is not there; nothing was decoded.
    """
    trace = trace_of(decoded)
    for k in ks:
        check_integer("k", k, 1)
    if block is not None:
        check_name("block", block, trace.block_names)
    counted = decoded_slots(trace)
    if block is not None:
        counted &= trace.block.numpy() == trace.block_names.index(block)
    rows = np.flatnonzero(counted.any(1))
    if not len(rows):
        raise NapDecodeError("nothing was decoded there, so there is no AR-ness")
    num_steps = int(trace.step.numpy()[counted].max()) + 1
    steps = np.arange(num_steps)
    global_at: dict[int, list[_Floats]] = {k: [] for k in ks}
    local_at: dict[int, list[_Floats]] = {k: [] for k in ks}
    for row in rows:
        step, confidence = (x[row].numpy()[counted[row]] for x in (trace.step, trace.confidence))
        order = commit_order(step, confidence)
        skipped = masked_below(order)
        done = np.searchsorted(step[order], steps, side="right")  # (S,) commits so far
        for k in ks:
            global_at[k].append(_share(skipped < k, done))
            local_at[k].append(_share(ascends(order, k), done - k))
    means = [
        {k: np.ma.masked_invalid(shares).mean(0).filled(np.nan) for k, shares in by_k.items()}
        for by_k in (global_at, local_at)
    ]
    return RunningARness(steps + 1, *means)


def _share(hit: NDArray[np.bool_], done: NDArray[np.int64]) -> _Floats:
    """Mean of the first ``done`` entries of ``hit``, for each entry of ``done``; nan of none."""
    sums, done = np.concatenate([[0], np.cumsum(hit)]), done.clip(0, len(hit))
    return np.where(done > 0, sums[done] / done.clip(1), np.nan)


def plot_arness(
    decoded: DecodeTrace | SamplerOutput | Mapping[str, DecodeTrace | SamplerOutput],
    *,
    ks: Sequence[int] = (1,),
    block: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """AR-ness of the commits so far against steps: Global@k as full lines, Local@k as broken ones.

    Args:
        decoded: an output or a trace; or several, by the names of their decoders.
        ks: values of k.
        block: only the slots of this block; on a canvas of parallel blocks the whole is low by construction.
        ax: where to draw.
    """
    several = decoded if isinstance(decoded, Mapping) else {"": decoded}
    if not several:
        raise NapDecodeError("there is nothing to draw; give at least one output")
    measured = {name: running_arness(one, ks=ks, block=block) for name, one in several.items()}
    is_own = ax is None
    ax = ax or _new_axes()
    for number, (name, running) in enumerate(measured.items()):
        for place, k in enumerate(ks):
            # One decoder: a colour for each k.  Several: a colour for each, a marker for each k.
            style: dict[str, Any] = {"color": COLOURS[(number if len(several) > 1 else place) % len(COLOURS)]}
            if len(several) > 1 and len(ks) > 1:
                style |= {"marker": MARKERS[place % len(MARKERS)], "markevery": 0.1, "markersize": 5}
            before = f"{name}, " if name else ""
            ax.plot(running.steps, running.global_at[k], label=f"{before}Global@{k}", linewidth=2, **style)
            ax.plot(running.steps, running.local_at[k], "--", label=f"{before}Local@{k}", linewidth=1.5, **style)
    ax.set(xlabel="steps done", ylabel="AR-ness so far" + (f", {block}" if block else ""), ylim=(-0.03, 1.03))
    ax.locator_params("x", integer=True)
    _add_legend(ax, is_below=is_own)
    return ax


def plot_frontier(
    results: Mapping[str, Sequence[Sequence[float]]], *, best: float | None = None, ax: Axes | None = None
) -> Axes:
    """Accuracy against tokens per forward pass for several decoders, with their AUP.

    Points that do not count for AUP (:func:`~nap_decode.measure.parallelism.accuracy_under_parallelism`) are hollow.

    Args:
        results: for each decoder its points: tokens per forward pass, accuracy in percent, and possibly the
            standard error of that.
        best: the best accuracy on this task in percent, if it is not among these.
        ax: where to draw.
    """
    if not results:
        raise NapDecodeError("there is nothing to draw; give the points of at least one decoder")
    pairs = {name: check_points(points) for name, points in results.items()}
    if best is None:
        best = max(accuracy for points in pairs.values() for _, accuracy in points)
    is_own = ax is None
    ax = ax or _new_axes()
    for number, (name, points) in enumerate(results.items()):
        area = accuracy_under_parallelism(points, best=best)
        ordered = sorted(points, key=lambda point: (point[0], -point[1]))
        x, y, errors = np.array([(*point, 0.0)[:3] for point in ordered], float).T
        lost = y < y[0] - 5
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        size = max(10 - 1.5 * number, 5)  # points, so that of several at one place all can be seen
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size}
        ax.plot(x, y, linewidth=1.5, label=f"{name} (AUP {area:.0f})", **style)
        ax.plot(x[lost], y[lost], ls="none", markerfacecolor="white", **style)
        if errors.any():
            ax.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, capsize=2.5, linewidth=1)
    ax.set(xlabel="tokens per forward pass", ylabel="accuracy, %")
    ax.grid(alpha=0.25)
    _add_legend(ax, is_below=is_own)
    return ax


def _add_legend(ax: Axes, *, is_below: bool) -> None:
    """Below the axes nothing is covered, but only the layout of a figure of our own is sure to make room there."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2} if is_below else {}
    for text in ax.legend(fontsize="small", **place).get_texts():
        text.set_parse_math(False)  # names of decoders are no formulas


def need_matplotlib() -> None:
    """Raise unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        missing = "drawing needs matplotlib, which is not installed; run pip install 'nap_decode[viz]'"
        raise NapDecodeError(missing) from error


def _new_axes() -> Axes:
    need_matplotlib()
    from matplotlib import pyplot

    ax: Axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")[1]
    return ax
