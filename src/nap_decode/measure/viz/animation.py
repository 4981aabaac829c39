"""A canvas that fills up: as a GIF, or as HTML that plays in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nap_decode.base.errors import NapDecodeError, check_between
from nap_decode.canvas import Canvas
from nap_decode.measure.viz.plots import Decoded, need_matplotlib, trace_of
from nap_decode.results.html import Run, Slot, check_row, count_steps, lay_out, render_player, step_colour, to_page
from nap_decode.results.trace import DecodeTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TEXTS = 240
"""Slots up to which a GIF shows tokens; of a longer canvas it shows cells."""
_MAX_FRAMES = 40
_LINE_WIDTH = 84
"""Letters in a line of a GIF."""
_FONT = "DejaVu Sans Mono"  # comes with matplotlib
_FONT_SIZE = 10  # points
_MASKED = (0.87, 0.87, 0.87)
_Labels: TypeAlias = "list[tuple[float, str]]"


@dataclass(frozen=True, eq=False)
class CanvasAnimation:
    """A decode to be played; notebooks show it as HTML.  Made by :func:`animate`.

    Args:
        trace: what happened when.
        row: which row.
        canvas: what decoding started from; None if it is not known.
        tokenizer: for the texts; None to show ids.
        seconds_per_step: how long each step is shown.
    """

    trace: DecodeTrace
    row: int = 0
    canvas: Canvas | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    seconds_per_step: float = 0.4

    def __post_init__(self) -> None:
        check_row(self.trace, self.row)
        check_between("seconds_per_step", self.seconds_per_step, 0.02, 60.0)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """HTML with a button and a slider, to put into a page; it loads nothing."""
        return render_player(
            self.trace,
            self.row,
            canvas=self.canvas,
            tokenizer=self.tokenizer,
            seconds_per_step=self.seconds_per_step,
        )

    def save(self, path: str | PathLike[str], *, dpi: int = 100) -> None:
        """Write a GIF (which needs matplotlib) or a page of HTML (which does not), by the ending of the name.

        A GIF of a long canvas has cells without tokens, and one of many steps skips some: it has at most 40 frames.

        Args:
            path: ends in ``.gif`` or ``.html``.
            dpi: pixels per inch of a GIF.

        Raises:
            NapDecodeError: another ending; matplotlib is not installed.
        """
        ending = Path(path).suffix.lower()
        if ending == ".html":
            page = to_page(self.to_html(), "nap_decode")
            Path(path).write_text(page, encoding="utf-8")
        elif ending == ".gif":
            self._save_gif(fspath(path), dpi)
        else:
            raise NapDecodeError(f"an animation is saved as .gif or .html, but the path is {fspath(path)!r}")

    def _save_gif(self, path: str, dpi: int) -> None:
        need_matplotlib()
        from matplotlib.animation import PillowWriter

        drawing = _Drawing.of(lay_out(self.trace, self.row, canvas=self.canvas, tokenizer=self.tokenizer))
        steps = count_steps(self.trace, self.row)
        shown = np.unique(np.linspace(0, steps, min(steps + 1, _MAX_FRAMES)).round().astype(int)).tolist()
        last = max(1, round(1.5 / self.seconds_per_step))  # frames, to have time to read
        rate: Any = 1 / self.seconds_per_step  # which is annotated as whole, and need not be
        writer = PillowWriter(fps=rate)
        with writer.saving(drawing.figure, path, dpi):
            for before, done in [*zip([0, *shown[:-1]], shown, strict=True), *[(steps, steps)] * last]:
                drawing.show(before, done, steps)
                writer.grab_frame()


def animate(
    decoded: DecodeTrace | Decoded,
    row: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seconds_per_step: float = 0.4,
) -> CanvasAnimation:
    """A canvas that fills up step by step.

    Args:
        decoded: an output or a trace.
        row: which row.
        tokenizer: for the texts of a trace; an output has its own.
        seconds_per_step: how long each step is shown, 0.02 to 60.

    Returns:
        What a notebook plays when it stands at the end of a cell, and ``.save("canvas.gif")`` or
        ``.save("canvas.html")`` writes.

    Raises:
        NapDecodeError: a row that is not there; a time out of range.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> animation = animate(sampler("6 0 6 4 6 2 1 2 4 7 0 6 ="))
        >>> "step 9 of 9" in animation.to_html()
        True
    """
    return CanvasAnimation(
        trace_of(decoded),
        row,
        canvas=getattr(decoded, "canvas", None),
        tokenizer=tokenizer or getattr(decoded, "tokenizer", None),
        seconds_per_step=seconds_per_step,
    )


@dataclass(frozen=True, eq=False)
class _Drawing:
    """A figure with a cell for every slot, to be coloured frame by frame."""

    figure: Any
    title: Any
    slots: list[Slot]
    cells: Any
    texts: list[Any]

    @classmethod
    def of(cls, runs: list[Run]) -> _Drawing:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        slots = [slot for run in runs for slot in run.slots]
        has_texts = len(slots) <= _MAX_TEXTS
        draw = _drawable()
        corners, labels, height = _arrange(runs, has_texts)
        width = max([right for _, _, right, _ in corners] + [len(text) for _, text in labels] + [24])
        margin, letter, line = 0.15, 0.602 * _FONT_SIZE / 72, 1.9 * _FONT_SIZE / 72  # inches
        across, down = width * letter + 2 * margin, height * line + 2 * margin
        figure = Figure(figsize=(across, down), facecolor="white")
        FigureCanvasAgg(figure)
        ax = figure.add_axes((margin / across, margin / down, 1 - 2 * margin / across, 1 - 2 * margin / down))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.set_axis_off()
        font: dict[str, Any] = {"family": _FONT, "fontsize": _FONT_SIZE, "va": "center_baseline", "parse_math": False}
        title = ax.text(0, 0.5, "", color="black", weight="bold", **font)
        for y, text in labels:
            ax.text(0, y, draw(text), color="#444444", **font)
        cells = PolyCollection([[(a, b), (c, b), (c, d), (a, d)] for a, b, c, d in corners], closed=True)
        ax.add_collection(cells)
        texts = []
        for slot, (left, top, right, bottom) in zip(slots if has_texts else [], corners, strict=False):
            place = (left + right) / 2, (top + bottom) / 2
            alpha = 0.45 if slot.is_behind else 1.0
            texts.append(ax.text(*place, draw(_short(slot.text)), ha="center", color="black", alpha=alpha, **font))
        return cls(figure, title, slots, cells, texts)

    def show(self, before: int, done: int, steps: int) -> None:
        """Colour the cells as they were after ``done`` steps, and frame those that are new after ``before`` steps."""
        is_there = [0 <= slot.step < done for slot in self.slots]
        faces, edges = [], []
        for slot, there in zip(self.slots, is_there, strict=True):
            faces.append(_on_white(step_colour(slot.step, steps)) if there else _MASKED)
            is_fresh = there and slot.step >= before and done < steps
            edges.append((0.0, 0.0, 0.0) if is_fresh else faces[-1])
        self.cells.set(facecolors=faces, edgecolors=edges)
        for text, there in zip(self.texts, is_there, strict=False):
            text.set_visible(there)
        self.title.set_text(f"step {done} of {steps}")


def _arrange(runs: list[Run], has_texts: bool) -> tuple[list[tuple[float, float, float, float]], _Labels, float]:
    """Where everything goes, in letters and lines from the top left.

    Returns:
        Left, top, right and bottom of each slot's cell; lines of text and how far down they are; lines in all.
    """
    prompt = " ".join(run.text for run in runs if run.is_prompt).split()
    corners, labels, y = [], [(1.5, _fit(" ".join(prompt)))], 3.0
    for run in runs:
        if not run.slots:
            continue
        labels.append((y, _fit(run.name + f" ({run.left_out} more slots are not shown)" * bool(run.left_out))))
        x, y = 0.0, y + 1
        for slot in run.slots:
            width = len(_short(slot.text)) + 0.8 if has_texts else 1.0
            if x + width > _LINE_WIDTH:
                x, y = 0.0, y + 1
            corners.append((x, y - 0.43, x + width, y + 0.43))
            x += width + 0.3
        y += 1.3
    return corners, labels, y - 0.6


def _short(text: str, length: int = 10) -> str:
    text = text.replace("\n", "").strip(" ")
    return text if len(text) <= length else text[: length - 1] + "…"


def _fit(text: str) -> str:
    return text if len(text) <= _LINE_WIDTH else "… " + text[2 - _LINE_WIDTH :]


def _on_white(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """As the half transparent backgrounds of the HTML look on a white page."""
    red, green, blue = (1 - 0.5 * (1 - value / 255) for value in colour)
    return red, green, blue


def _drawable() -> Callable[[str], str]:
    """A function that puts boxes for letters that the font lacks; matplotlib would warn about each."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    return lambda text: "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in text)
