"""A canvas that fills up: as a GIF, or as HTML that plays in a notebook."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nap_decode.base.errors import NapDecodeError, check_between
from nap_decode.canvas import Canvas
from nap_decode.measure.viz.plots import need_matplotlib, trace_of
from nap_decode.results.html import Run, check_row, count_steps, lay_out, render, step_colour, to_page
from nap_decode.results.output import SamplerOutput
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

_STYLE = """
.nap-player [data-step].nap-hidden{background:rgba(128,128,128,.25)!important;color:transparent!important;opacity:1}
.nap-player [data-step].nap-fresh{box-shadow:0 0 0 2px currentColor;font-weight:700}
.nap-player .nap-controls[hidden]{display:none}
.nap-player .nap-controls{display:flex;gap:.8em;align-items:center;font:14px/1.5 system-ui,sans-serif}
.nap-player button{font:inherit;color:inherit;background:rgba(128,128,128,.2);border:1px solid rgba(128,128,128,.75);
 border-radius:5px;padding:.1em .8em;min-width:5.5em;cursor:pointer}
.nap-player input{flex:1;max-width:24em;accent-color:#0072b2}
""".strip()

# Every player of this name that was not started yet: the same one may stand on a page twice.
_SCRIPT = """
(()=>{for(const player of document.querySelectorAll('[data-nap-player="NAME"]:not([data-nap-ready])')){
player.dataset.napReady='';
const slots=[...player.querySelectorAll('[data-step]')],steps=STEPS,button=player.querySelector('button'),
 bar=player.querySelector('input'),label=player.querySelector('output');
let timer=null;
const show=(done)=>{bar.value=done;label.textContent=`step ${done} of ${steps}`;
 for(const slot of slots){const step=+slot.dataset.step;
  slot.classList.toggle('nap-hidden',step>=done);slot.classList.toggle('nap-fresh',step===done-1&&done<steps)}};
const stop=()=>{clearInterval(timer);timer=null;button.textContent='▶ play'};
const play=()=>{let done=+bar.value<steps?+bar.value:0;show(done);button.textContent='❚❚ pause';
 timer=setInterval(()=>{if(!player.isConnected||done>=steps){stop();return}show(++done)},MILLISECONDS)};
button.onclick=()=>timer===null?play():stop();bar.oninput=()=>{stop();show(+bar.value)};
player.querySelector('.nap-controls').hidden=false;
if(!matchMedia('(prefers-reduced-motion: reduce)').matches)play();
}})()
""".strip()


@dataclass(frozen=True, eq=False)
class CanvasAnimation:
    """A decode to be played; notebooks show it as HTML.  Made by :func:`animate`."""

    trace: DecodeTrace
    row: int
    canvas: Canvas | None
    tokenizer: PreTrainedTokenizerBase | None
    seconds_per_step: float

    def __post_init__(self) -> None:
        check_row(self.trace, self.row)
        check_between("seconds_per_step", self.seconds_per_step, 0.02, 60.0)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """HTML with a button and a slider, to put into a page; it loads nothing.

        It stands still where scripts do not run, with everything decoded, and until asked for to whom motion is a
        nuisance.
        """
        body = render(self.trace, canvas=self.canvas, tokenizer=self.tokenizer, rows=[self.row])
        steps = count_steps(self.trace, self.row)
        # A name that is made of the contents, so that a notebook that is run again does not change.
        contents = f"{self.seconds_per_step} {body}".encode("utf-8", "backslashreplace")
        name = hashlib.sha256(contents).hexdigest()[:12]
        script = _SCRIPT.replace("NAME", name).replace("STEPS", str(steps))
        script = script.replace("MILLISECONDS", str(round(1000 * self.seconds_per_step)))
        return (
            f'<div class="nap-player" data-nap-player="{name}"><style>{_STYLE}</style>'
            '<div class="nap-controls" hidden><button type="button">▶ play</button>'
            f'<input type="range" min="0" max="{steps}" value="{steps}" aria-label="steps done">'
            f"<output>step {steps} of {steps}</output></div>{body}</div><script>{script}</script>"
        )

    def save(self, path: str | PathLike[str], *, dpi: int = 100) -> None:
        """Write a GIF (which needs matplotlib) or a page of HTML (which does not), by the ending of the name.

        A GIF of a long canvas has cells without tokens, and one of many steps skips some: it has at most 40 frames.

        Args:
            path: ends in ``.gif`` or ``.html``.
            dpi: pixels per inch of a GIF.
        """
        ending = Path(path).suffix.lower()
        if ending == ".html":
            Path(path).write_text(to_page(self.to_html(), "nap_decode"), encoding="utf-8")
            return
        if ending != ".gif":
            raise NapDecodeError(f"an animation is saved as .gif or .html, but the path is {fspath(path)!r}")
        need_matplotlib()
        from matplotlib.animation import PillowWriter

        drawing = _Drawing(lay_out(self.trace, self.row, canvas=self.canvas, tokenizer=self.tokenizer))
        steps = count_steps(self.trace, self.row)
        shown = np.unique(np.linspace(0, steps, min(steps + 1, _MAX_FRAMES)).round().astype(int)).tolist()
        last = max(1, round(1.5 / self.seconds_per_step))  # frames, to have time to read
        rate: Any = 1 / self.seconds_per_step  # which is annotated as whole, and need not be
        writer = PillowWriter(fps=rate)
        with warnings.catch_warnings(), writer.saving(drawing.figure, fspath(path), dpi):
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
            for before, done in [*zip([0, *shown[:-1]], shown, strict=True), *[(steps, steps)] * last]:
                drawing.show(before, done, steps)
                writer.grab_frame()


def animate(
    decoded: DecodeTrace | SamplerOutput,
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
    """
    canvas = decoded.canvas if isinstance(decoded, SamplerOutput) else None
    tokenizer = tokenizer or getattr(decoded, "tokenizer", None)
    return CanvasAnimation(trace_of(decoded), row, canvas, tokenizer, seconds_per_step)


class _Drawing:
    """A figure with a cell for every slot, to be coloured frame by frame; places are in letters and lines."""

    def __init__(self, runs: list[Run]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        self.figure = Figure(facecolor="white")
        FigureCanvasAgg(self.figure)
        ax = self.figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        font: dict[str, Any] = {"family": _FONT, "fontsize": _FONT_SIZE, "va": "center_baseline", "parse_math": False}
        prompt = " ".join(" ".join(run.text for run in runs if run.is_prompt).split())
        prompt = prompt if len(prompt) <= _LINE_WIDTH else "… " + prompt[2 - _LINE_WIDTH :]
        self.title = ax.text(0, 0.5, "", weight="bold", **font)
        ax.text(0, 1.5, prompt, color="#444444", **font)

        self.slots = [slot for run in runs for slot in run.slots]
        has_texts = len(self.slots) <= _MAX_TEXTS
        self.texts, corners, width, y = [], [], float(max(24, len(prompt))), 3.0
        for run in runs:
            if not run.slots:
                continue
            name = run.name + f" ({run.left_out} more slots are not shown)" * bool(run.left_out)
            ax.text(0, y, name, color="#444444", **font)
            x, y = 0.0, y + 1
            for slot in run.slots:
                text = _short(slot.text)
                wide = len(text) + 0.8 if has_texts else 1.0
                if x + wide > _LINE_WIDTH:
                    x, y = 0.0, y + 1
                corners.append([(x, y - 0.43), (x + wide, y - 0.43), (x + wide, y + 0.43), (x, y + 0.43)])
                if has_texts:
                    alpha = 0.45 if slot.is_behind else 1
                    self.texts.append(ax.text(x + wide / 2, y, text, ha="center", alpha=alpha, **font))
                width = max(width, x + wide, len(name))
                x += wide + 0.3
            y += 1.3
        self.cells = PolyCollection(corners, closed=True)
        ax.add_collection(self.cells)

        height, margin, letter, line = y - 0.6, 0.15, 0.602 * _FONT_SIZE / 72, 1.9 * _FONT_SIZE / 72  # inches
        self.figure.set_size_inches(width * letter + 2 * margin, height * line + 2 * margin)
        ax.set_xlim(-margin / letter, width + margin / letter)
        ax.set_ylim(height + margin / line, -margin / line)

    def show(self, before: int, done: int, steps: int) -> None:
        """Colour the cells as they were after ``done`` steps, and frame those that are new after ``before`` steps."""
        faces, edges = [], []
        for slot in self.slots:
            # As the half transparent backgrounds of the HTML look on a white page.
            colour = tuple(0.5 + value / 510 for value in step_colour(slot.step, steps))
            faces.append(colour if 0 <= slot.step < done else _MASKED)
            edges.append((0.0, 0.0, 0.0) if before <= slot.step < done < steps else faces[-1])
        self.cells.set(facecolors=faces, edgecolors=edges)
        for slot, text in zip(self.slots, self.texts, strict=False):
            text.set_visible(0 <= slot.step < done)
        self.title.set_text(f"step {done} of {steps}")


def _short(text: str) -> str:
    text = text.replace("\n", "").strip(" ")
    return text if len(text) <= 10 else text[:9] + "…"
