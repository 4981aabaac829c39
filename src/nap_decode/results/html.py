"""Decodes as HTML for notebooks: tokens coloured by the step that committed them, and a canvas that plays.

Backgrounds are half transparent and texts have the colour of the page, so that both can be read on a light and
on a dark one.  Nothing is loaded from anywhere, and no text of the model reaches the page unescaped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nap_decode.base.errors import NapDecodeError, check_between, check_integer
from nap_decode.canvas import Canvas
from nap_decode.results.texts import TokenTexts
from nap_decode.results.trace import DecodeTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RAMP = ((0, 114, 178), (86, 180, 233), (240, 228, 66), (213, 94, 0))
"""Blue, sky, yellow, vermillion: from the palette of Okabe and Ito, whose colours the colour-blind tell apart."""

_STYLE = """
.nap-decode{font:14px/1.9 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;max-width:72em;margin:.3em 0}
.nap-decode p{margin:.2em 0;line-height:1.5;font-family:system-ui,sans-serif}
.nap-decode .nap-row{margin:.6em 0 1em;white-space:pre-wrap;overflow-wrap:anywhere}
.nap-decode .nap-prompt{opacity:.65}
.nap-decode .nap-given{display:block}
.nap-decode .nap-block{position:relative;border:1px solid rgba(128,128,128,.75);border-radius:5px;
 margin:.9em 0 .3em;padding:.45em .5em .2em;white-space:normal}
.nap-decode .nap-name{position:absolute;top:-.8em;left:.6em;padding:0 .35em;border-radius:4px;
 white-space:nowrap;font:600 12px/1.5 system-ui,sans-serif;color:#fff;background:#5a6270}
.nap-decode .nap-block span[title]{border-radius:3px;padding:.1em .18em;margin:0 1px;white-space:pre-wrap;
 unicode-bidi:isolate;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.nap-decode .nap-block.nap-hole{display:inline-block;margin:1em .2em .3em;vertical-align:middle}
.nap-decode .nap-hole .nap-name{position:static;margin:0 .4em 0 -.2em}
.nap-decode .nap-behind{opacity:.65}
.nap-decode .nap-mask{outline:1px dashed rgba(128,128,128,.8);outline-offset:-1px}
.nap-decode .nap-note{opacity:.75;font:italic 12px/1.5 system-ui,sans-serif}
.nap-decode .nap-legend{display:inline-block}
.nap-decode .nap-key{display:inline-block;min-width:1.2em;text-align:center;border-radius:3px;padding:0 .3em;
 margin:0 1px;font-size:12px}
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


@dataclass(frozen=True)
class Slot:
    """A decoded slot, ready to be drawn.

    Args:
        text: its token, with what is invisible made visible.
        token: its id.
        position: its column, counted from the row's first token.
        step: index of the step that committed it; -1 if it is still masked.
        confidence: its confidence then; nan where there is none.
        is_behind: whether it stands at the end of its block, or behind it.
        is_filled: whether it was filled without being decoded.
    """

    text: str
    token: int
    position: int
    step: int
    confidence: float
    is_behind: bool
    is_filled: bool


@dataclass(frozen=True)
class Run:
    """Neighbouring slots of one block, or a text that was given.

    Args:
        name: of the block; empty if it was given.
        text: if it was given.
        slots: if it was decoded.
        is_prompt: whether it was given as a prompt, not as part of a template.
        left_out: slots that are not in it, because there are too many.
    """

    name: str = ""
    text: str = ""
    slots: tuple[Slot, ...] = ()
    is_prompt: bool = False
    left_out: int = 0


def step_colour(step: int, num_steps: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a step of ``num_steps``.

    Example:
        >>> step_colour(0, 9), step_colour(8, 9)
        ((0, 114, 178), (213, 94, 0))
    """
    place = max(0, min(step, num_steps - 1)) / max(num_steps - 1, 1) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    share = place - left
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True))
    return red, green, blue


def count_steps(trace: DecodeTrace, row: int) -> int:
    """Steps up to the last one that committed something in this row."""
    return int(trace.step[row].max()) + 1


def check_row(trace: DecodeTrace, row: int) -> None:
    """Raise unless the trace has this row."""
    check_integer("row", row, 0)
    if row >= len(trace.tokens):
        raise NapDecodeError(f"row must be below {len(trace.tokens)}, the number of rows, but is {row}")


def lay_out(
    trace: DecodeTrace,
    row: int = 0,
    *,
    canvas: Canvas | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_slots: int = 1100,
    max_prompt: int = 200,
) -> list[Run]:
    """What one row of a decode is made of, in order.

    Args:
        trace: what happened when.
        row: which row.
        canvas: to tell the prompt from the template and from padding; without it what stands before the first
            block is taken for the prompt.
        tokenizer: for the texts; ids without it.
        max_slots: of a longer canvas each block is cut at its share of this.
        max_prompt: of a longer prompt the last so many tokens are shown.

    Raises:
        NapDecodeError: a row that is not there; bounds below 1.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> [run.name or run.text for run in lay_out(out.trace, tokenizer=out.tokenizer)][-2:]
        ['<summary>', 'summary']
    """
    check_row(trace, row)
    check_integer("max_slots", max_slots, 1)
    check_integer("max_prompt", max_prompt, 1)
    texts = TokenTexts(tokenizer)
    tokens, block, step = (values[row].tolist() for values in (trace.tokens, trace.block, trace.step))
    confidence, before_end = trace.confidence[row].tolist(), trace.before_end()[row].tolist()
    filled = [False] * len(tokens) if trace.closed is None else trace.closed[row].tolist()
    first = next((column for column, index in enumerate(block) if index >= 0), len(block))
    if canvas is None:
        start, prompt = 0, [column < first for column in range(len(block))]
    else:
        start, prompt = int(canvas.padding[row, 0]), canvas.prompt[row].tolist()

    groups = groupby(range(start, len(block)), key=lambda c: (block[c], block[c] < 0 and prompt[c]))
    parts = [(index, is_prompt, list(columns)) for (index, is_prompt), columns in groups]
    canvas_parts = [columns for _, is_prompt, columns in parts if not is_prompt]
    is_cut = sum(map(len, canvas_parts)) > max_slots
    share = max(max_slots // max(len(canvas_parts), 1), 1) if is_cut else max_slots

    def slot(column: int) -> Slot:
        is_behind = not before_end[column] and step[column] >= 0
        number = tokens[column], column - start, step[column], confidence[column]
        return Slot(texts(tokens[column]), *number, is_behind=is_behind, is_filled=filled[column])

    runs, room = [], max_slots
    for index, is_prompt, columns in parts:
        kept = columns[-max_prompt:] if is_prompt else columns[: min(share, room)]
        room -= 0 if is_prompt else len(kept)
        left_out = len(columns) - len(kept)
        if index < 0:
            text = texts.join([tokens[c] for c in kept])
            runs.append(Run(text=text, is_prompt=is_prompt, left_out=left_out))
        else:
            runs.append(Run(name=trace.block_names[index], slots=tuple(map(slot, kept)), left_out=left_out))
    return runs


def render(
    trace: DecodeTrace,
    *,
    canvas: Canvas | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: Sequence[int] | None = None,
    heading: str = "",
    max_slots: int = 1100,
    max_prompt: int = 200,
) -> str:
    """A decode as HTML: what ``_repr_html_`` of an output shows.

    Args:
        trace: what happened when.
        canvas: see :func:`lay_out`.
        tokenizer: see :func:`lay_out`.
        rows: which rows; the first four by default.
        heading: a line above.
        max_slots: see :func:`lay_out`.
        max_prompt: see :func:`lay_out`.

    Raises:
        NapDecodeError: rows that are not there.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> page = render(sampler("6 0 6 4 6 2 1 2 4 7 0 6 =").trace)  # with ids, for want of a tokenizer
        >>> page.count('title="step 8, confidence ')
        2
    """
    shown = range(min(len(trace.tokens), 4)) if rows is None else rows
    for row in shown:
        check_row(trace, row)
    options = {"canvas": canvas, "tokenizer": tokenizer, "max_slots": max_slots, "max_prompt": max_prompt}
    parts = [f"<p>{escape(heading)}</p>"] * bool(heading)
    parts += [_row(trace, row, is_single=len(trace.tokens) == 1, options=options) for row in shown]
    if rows is None and len(trace.tokens) > len(shown):
        others = f"{len(trace.tokens) - len(shown)} more rows are left out; html.render(rows=...) shows them"
        parts.append(f'<p class="nap-note">{others}</p>')
    return f"{_open('')}{''.join(parts)}</div>"


def render_player(
    trace: DecodeTrace,
    row: int = 0,
    *,
    canvas: Canvas | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seconds_per_step: float = 0.4,
    max_slots: int = 1100,
    max_prompt: int = 200,
) -> str:
    """A canvas that fills up in a browser, with a button and a slider.

    It stands still where scripts do not run, with everything decoded, and until asked for to whom motion is a nuisance.

    Args:
        trace: what happened when.
        row: which row.
        canvas: see :func:`lay_out`.
        tokenizer: see :func:`lay_out`.
        seconds_per_step: how long each step is shown.
        max_slots: see :func:`lay_out`.
        max_prompt: see :func:`lay_out`.

    Raises:
        NapDecodeError: a row that is not there; a time that is not above 0.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> page = render_player(sampler("6 0 6 4 6 2 1 2 4 7 0 6 =").trace)
        >>> page.count('data-step="8"'), "http" in page
        (2, False)
    """
    check_row(trace, row)
    check_between("seconds_per_step", seconds_per_step, 0.001, 3600.0)
    options = {"canvas": canvas, "tokenizer": tokenizer, "max_slots": max_slots, "max_prompt": max_prompt}
    body = _row(trace, row, is_single=True, options=options, plays=True)
    steps = count_steps(trace, row)
    # A name that is made of the contents, so that a notebook that is run again does not change.
    name = hashlib.sha256(f"{seconds_per_step} {body}".encode("utf-8", "backslashreplace")).hexdigest()[:12]
    controls = (
        '<div class="nap-controls" hidden><button type="button">▶ play</button>'
        f'<input type="range" min="0" max="{steps}" value="{steps}" aria-label="steps done">'
        f"<output>step {steps} of {steps}</output></div>"
    )
    script = _SCRIPT.replace("NAME", name).replace("STEPS", str(steps))
    script = script.replace("MILLISECONDS", json.dumps(round(1000 * seconds_per_step)))
    # The slider begins at the end, where "play" begins from the start.
    return f"{_open('nap-player', name)}{controls}{body}</div><script>{script}</script>"


def to_page(fragment: str, title: str) -> str:
    """A whole page around what :func:`render` or :func:`render_player` made.

    Example:
        >>> to_page("<p>1 &lt; 2</p>", "a < b").count("<title>a &lt; b</title>")
        1
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        "<style>:root{color-scheme:light dark}body{margin:1.5em;background:Canvas;color:CanvasText}</style>\n"
        f"</head><body>{fragment}</body></html>\n"
    )


def _open(kind: str, name: str = "") -> str:
    # These two classes tell MathJax, which notebooks load, that a dollar is a dollar.
    mark = f' data-nap-player="{name}"' if name else ""
    classes = " ".join(filter(None, ("nap-decode", kind, "tex2jax_ignore", "mathjax_ignore")))
    return f'<div class="{classes}"{mark}><style>{_STYLE}</style>'


def _row(trace: DecodeTrace, row: int, *, is_single: bool, options: dict[str, Any], plays: bool = False) -> str:
    steps = count_steps(trace, row)
    passes, decoded = int(trace.forward_passes[row]), trace.block[row] >= 0
    tokens = int(trace.before_end()[row].sum())
    facts = [
        _number(passes, "forward pass", "forward passes"),
        f"{tokens / max(passes, 1):.2f} tokens per forward pass",
        f"{tokens} of {_number(int(decoded.sum()), 'slot', 'slots')} before an end token"
        if trace.end_token_ids
        else _number(int(decoded.sum()), "slot", "slots"),
    ]
    masked = int((decoded & (trace.step[row] < 0)).sum())
    facts += [f"{masked} still masked"] * bool(masked)
    title = "" if is_single else f"<b>row {row}</b>: "
    canvas = options["canvas"]
    kind = "nap-block nap-hole" if canvas is not None and canvas.is_infill else "nap-block"
    body = "".join(_run(run, steps, kind, plays) for run in lay_out(trace, row, **options))
    return f'<p>{title}{", ".join(facts)}. {_key(steps)}</p><div class="nap-row">{body}</div>'


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _key(steps: int) -> str:
    """Colours of some steps."""
    if steps < 1:
        return ""
    some = sorted({round(place * (steps - 1) / 8) for place in range(9)})
    cells = "".join(f'<span class="nap-key" style="{_background(step, steps)}">{step}</span>' for step in some)
    return f'<span class="nap-legend">Committed at step {cells}</span>'


def _background(step: int, steps: int) -> str:
    red, green, blue = step_colour(step, steps)
    return f"background:rgba({red},{green},{blue},.5)"


def _run(run: Run, steps: int, kind: str, plays: bool) -> str:
    left_out = f"{run.left_out:,} {{}} are not shown" if run.left_out else ""
    if not run.name:
        text = _safe(run.text)
        if run.is_prompt:
            before = _note(f"… {left_out.format('tokens before')} … ") if left_out else ""
            return f'{before}<span class="nap-prompt">{text}</span>'
        after = _note(f" … {left_out.format('tokens')}") if left_out else ""
        return f'<span class="nap-given">{text.strip()}{after}</span>'
    cells = "<wbr>".join(_slot(slot, steps, plays) for slot in run.slots)  # lines break between tokens
    after = _note(f" … {left_out.format('more slots')}") if left_out else ""
    return f'<div class="{kind}"><span class="nap-name">{_safe(run.name)}</span>{cells}{after}</div>'


def _note(text: str) -> str:
    return f'<span class="nap-note">{text}</span>'


def _slot(slot: Slot, steps: int, plays: bool) -> str:
    facts = list(_facts(slot))
    kind = "nap-mask" if slot.step < 0 else "nap-behind" if slot.is_behind else ""
    attributes = f' class="{kind}"' if kind else ""
    if slot.step >= 0:
        attributes += f' style="{_background(slot.step, steps)}"' + f' data-step="{slot.step}"' * plays
    text = slot.text.removesuffix("\n")  # the line breaks behind the cell, not in it
    return f'<span title="{", ".join(facts)}"{attributes}>{_safe(text)}</span>' + "<br>" * (text != slot.text)


def _facts(slot: Slot) -> Iterator[str]:
    if slot.step < 0:
        yield "still masked"
    elif slot.is_filled:
        yield f"filled at step {slot.step}, not decoded"
    else:
        yield f"step {slot.step}"
        yield "no confidence" if slot.confidence != slot.confidence else f"confidence {slot.confidence:.3g}"
    yield f"position {slot.position}"
    yield f"id {slot.token}"


def _safe(text: str) -> str:
    # No surrogate comes so far from a tokenizer, but a name may have one, and a page cannot.
    return escape(text.encode("utf-8", "backslashreplace").decode())
