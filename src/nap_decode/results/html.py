"""Decodes as HTML for notebooks: tokens coloured by the step that committed them.

Backgrounds are half transparent and texts have the colour of the page, so that both can be read on a light and
on a dark one.  Nothing is loaded from anywhere, and no text of the model reaches the page unescaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from nap_decode.base.errors import NapDecodeError, check_integer
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
""".strip()


class Slot(NamedTuple):
    """A decoded slot, ready to be drawn."""

    text: str  # its token, with what is invisible made visible
    title: str  # its step, confidence, position and id in words
    step: int  # that committed it, -1 if it is still masked
    is_behind: bool  # whether it stands at the end of its block, or behind it


class Run(NamedTuple):
    """Neighbouring slots of one block, or a text that was given and has no name."""

    name: str
    text: str
    slots: tuple[Slot, ...]
    is_prompt: bool  # whether it was given as a prompt, not as part of a template
    left_out: int  # slots that are not in it, because there are too many


def step_colour(step: int, num_steps: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a step of ``num_steps``."""
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
    """What one row of a decode is made of, in order; see :func:`render`."""
    check_row(trace, row)
    check_integer("max_slots", max_slots, 1)
    check_integer("max_prompt", max_prompt, 1)
    texts = TokenTexts(tokenizer)
    tokens, block, before_end = (x[row].tolist() for x in (trace.tokens, trace.block, trace.before_end()))
    first = next((column for column, index in enumerate(block) if index >= 0), len(block))
    columns, prompt = list(range(len(block))), [column < first for column in range(len(block))]
    if canvas is not None:
        columns, prompt = canvas.attention_mask[row].nonzero()[:, 0].tolist(), canvas.prompt[row].tolist()
    groups = groupby(columns, key=lambda column: (block[column], block[column] < 0 and prompt[column]))
    parts = [(index, is_prompt, list(some)) for (index, is_prompt), some in groups]
    lengths = [len(some) for _, is_prompt, some in parts if not is_prompt]
    share = max(max_slots // len(lengths), 1) if sum(lengths) > max_slots else max_slots
    runs, room = [], max_slots
    for index, is_prompt, some in parts:
        kept = some[-max_prompt:] if is_prompt else some[: min(share, room)]
        room -= 0 if is_prompt else len(kept)
        if index < 0:
            text = texts.join([tokens[column] for column in kept])
            runs.append(Run("", text, (), is_prompt, len(some) - len(kept)))
            continue
        slots = []
        for column in kept:
            step = int(trace.step[row, column])
            title = f"{_history(trace, row, column)}, position {column - columns[0]}, id {tokens[column]}"
            slots.append(Slot(texts(tokens[column]), title, step, not before_end[column] and step >= 0))
        runs.append(Run(trace.block_names[index], "", tuple(slots), False, len(some) - len(kept)))
    return runs


def _history(trace: DecodeTrace, row: int, column: int) -> str:
    step, confidence = int(trace.step[row, column]), float(trace.confidence[row, column])
    if step < 0:
        return "still masked"
    if trace.closed is not None and bool(trace.closed[row, column]):
        return f"filled at step {step}, not decoded"
    return f"step {step}, " + ("no confidence" if confidence != confidence else f"confidence {confidence:.3g}")


def render(
    trace: DecodeTrace,
    *,
    canvas: Canvas | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: Sequence[int] | None = None,
    heading: str = "",
    **limits: int,
) -> str:
    """A decode as HTML: what ``_repr_html_`` of an output shows.

    Args:
        trace: what happened when.
        canvas: to tell the prompt from the template and from padding; without it what stands before the first
            block is taken for the prompt.
        tokenizer: for the texts; ids without it.
        rows: which rows; the first four by default.
        heading: a line above.
        limits: ``max_slots=1100``, of a longer canvas each block is cut at its share of this; ``max_prompt=200``, of a
            longer prompt the last so many tokens are shown.

    Raises:
        NapDecodeError: rows that are not there; limits below 1.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> page = render(sampler("6 0 6 4 6 2 1 2 4 7 0 6 =").trace)  # with ids, for want of a tokenizer
        >>> page.count('title="step 8, confidence ')
        2
    """
    total = len(trace.tokens)
    shown = range(min(total, 4)) if rows is None else rows
    kind = "nap-block nap-hole" if canvas is not None and canvas.is_infill else "nap-block"
    parts = [f"<p>{escape(heading)}</p>"] * bool(heading)
    for row in shown:
        runs = lay_out(trace, row, canvas=canvas, tokenizer=tokenizer, **limits)
        title, steps = f"<b>row {row}</b>: " if total > 1 else "", count_steps(trace, row)
        parts.append(f"<p>{title}{_facts(trace, row)}. {_legend(steps)}</p>")
        parts.append(f'<div class="nap-row">{"".join(_run(run, steps, kind) for run in runs)}</div>')
    if rows is None and total > len(shown):
        others = f"{total - len(shown)} more rows are left out; nap_decode.results.html.render(rows=...) shows them"
        parts.append(_note(others, "p"))
    # The last two classes tell MathJax, which notebooks load, that a dollar is a dollar.
    start = f'<div class="nap-decode tex2jax_ignore mathjax_ignore"><style>{_STYLE}</style>'
    return f"{start}{''.join(parts)}</div>"


def to_page(fragment: str, title: str) -> str:
    """A whole page around a fragment, such as :func:`render` makes."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        "<style>:root{color-scheme:light dark}body{margin:1.5em;background:Canvas;color:CanvasText}</style>\n"
        f"</head><body>{fragment}</body></html>\n"
    )


def _facts(trace: DecodeTrace, row: int) -> str:
    passes, tokens = int(trace.forward_passes[row]), int(trace.before_end()[row].sum())
    slots, masked = int((trace.block[row] >= 0).sum()), int(trace.masked()[row].sum())
    cost = f"{passes:,} forward pass{'es' * (passes != 1)}, {tokens / max(passes, 1):.2f} tokens per forward pass"
    what = f"{slots:,} slot{'s' * (slots != 1)}"
    what = f"{tokens} of {what} before an end token" if trace.end_token_ids else what
    return f"{cost}, {what}" + f", {masked} still masked" * bool(masked)


def _legend(steps: int) -> str:
    if not steps:
        return ""
    some = sorted({round(place * (steps - 1) / 8) for place in range(9)})
    cells = "".join(f'<span class="nap-key" style="{_background(step, steps)}">{step}</span>' for step in some)
    return f'<span class="nap-legend">Committed at step {cells}</span>'


def _background(step: int, steps: int) -> str:
    red, green, blue = step_colour(step, steps)
    return f"background:rgba({red},{green},{blue},.5)"


def _run(run: Run, steps: int, kind: str) -> str:
    what = "more slots" if run.name else "tokens before" if run.is_prompt else "tokens"
    note = _note(f"… {run.left_out:,} {what} are not shown") if run.left_out else ""
    if run.is_prompt:
        return f'{note}<span class="nap-prompt">{_safe(run.text)}</span>'
    if not run.name:
        return f'<span class="nap-given">{_safe(run.text).strip()}{note}</span>'
    cells = "<wbr>".join(_slot(slot, steps) for slot in run.slots)  # lines break between tokens
    return f'<div class="{kind}"><span class="nap-name">{_safe(run.name)}</span>{cells}{note}</div>'


def _slot(slot: Slot, steps: int) -> str:
    kind = "nap-mask" if slot.step < 0 else "nap-behind" if slot.is_behind else ""
    attributes = f' class="{kind}"' if kind else ""
    if slot.step >= 0:
        attributes += f' style="{_background(slot.step, steps)}" data-step="{slot.step}"'
    text = slot.text.removesuffix("\n")  # the line breaks behind the cell, not in it
    return f'<span title="{slot.title}"{attributes}>{_safe(text)}</span>' + "<br>" * (text != slot.text)


def _note(text: str, tag: str = "span") -> str:
    return f'<{tag} class="nap-note"> {text} </{tag}>'


def _safe(text: str) -> str:
    # No surrogate comes so far from a tokenizer, but a name may have one, and a page cannot.
    return escape(text.encode("utf-8", "backslashreplace").decode())
