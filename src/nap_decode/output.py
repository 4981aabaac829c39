"""What came out of a decode, at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from nap_decode.canvas import Canvas
from nap_decode.cost import Cost
from nap_decode.errors import NapDecodeError
from nap_decode.html import render
from nap_decode.trace import DecodeTrace, ends_before

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

    from nap_decode.viz import CanvasAnimation


@dataclass(frozen=True, eq=False, repr=False)
class SamplerOutput:
    """The decoded batch.

    Texts are a string for a single prompt and a list of strings for a batch.  They are without special
    tokens, and without a block's end token and what follows it.

    Args:
        sequences: ``(B, L)`` int64, left padding, prompt and canvas.
        canvas: what decoding started from.
        trace: what happened when, on the CPU.
        forward_passes: forward passes of the batch.  Of a model that does not hide padding, each takes one call for
            every length of row; of a committer that looks ahead, each has more rows.
        wall_time: seconds that the decoding loop took; in a stream, from the row's admission to its output.
        row_seeds: seeds of the rows, to decode one again with ``row_seeds=``; None if nothing was drawn.
        tokenizer: for the texts; None if there is none.
        steps_saved: steps of each row's schedule that ``close_on`` made unnecessary; None without it, or if the
            number of steps depends on the model anyway.
        index: of an output of :meth:`Sampler.stream`, the place of its prompt.
        cost: what the model's passes cost; None if that is not known.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> out.summary, out.forward_passes, out.finish_reason
        ('6', 9, ['end'])
    """

    sequences: Tensor
    canvas: Canvas
    trace: DecodeTrace
    forward_passes: int
    wall_time: float
    row_seeds: list[int] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    steps_saved: list[int] | None = None
    index: int | None = None
    cost: Cost | None = None

    def __repr__(self) -> str:
        rows = f"{len(self.sequences)} row{'s' if len(self.sequences) > 1 else ''}"
        return f"SamplerOutput({rows}, {self.forward_passes} forward passes, {self.wall_time:.3g} s)"

    def _repr_html_(self) -> str:
        return render(self.trace, canvas=self.canvas, tokenizer=self.tokenizer, heading=repr(self))

    def plot(self, row: int = 0, *, ax: Axes | None = None, color_by: str = "block") -> Axes:
        """Draw the step of every commit against its position; see :func:`nap_decode.viz.plot_order`."""
        return self.trace.plot(row, ax=ax, color_by=color_by)

    def animate(self, row: int = 0, *, seconds_per_step: float = 0.4) -> CanvasAnimation:
        """The canvas filling up, to play in a notebook or to save; see :func:`nap_decode.viz.animate`."""
        from nap_decode.viz import animate

        return animate(self, row, seconds_per_step=seconds_per_step)

    @cached_property
    def _before_end(self) -> Tensor:
        return self.trace.before_end()

    @cached_property
    def _gaps(self) -> Tensor:
        """``(B, L)`` bool: masks that an interruption left before the end of their block."""
        trace = self.trace
        return trace.masked() & (ends_before(trace.tokens, trace.block, trace.end_token_ids) == 0)

    @property
    def finish_reason(self) -> list[str]:
        """For each row ``"end"`` if its last block holds an end token, else ``"length"``.

        ``"interrupted"`` if slots of the row are still masked.
        """
        block, masked = self.trace.block, self.trace.masked()
        cut = (block == block.amax(1, keepdim=True)) & (block >= 0) & ~self._before_end
        reasons = zip(cut.any(1).tolist(), masked.any(1).tolist(), strict=True)
        return ["interrupted" if broken_off else "end" if ended else "length" for ended, broken_off in reasons]

    @property
    def is_complete(self) -> bool:
        """Whether everything was decoded; if not, there are mask tokens in ``sequences``, and texts have gaps."""
        return not bool(self.trace.masked().any())

    @property
    def tokens_per_forward(self) -> list[float]:
        """For each row the decoded tokens before the end of their block, by the forward passes it took."""
        passes = self.trace.forward_passes.clamp(min=1)
        return (self._before_end.sum(1) / passes).tolist()

    @cached_property
    def positions_exact(self) -> list[int]:
        """For each row the positions that its forward passes would have computed if none were reused.

        A pass counts once, also if it looks at alternatives (LoPA) or has shadows (WINO).
        """
        branches = 1 if self.cost is None else self.cost.branches
        lengths = self.canvas.attention_mask.sum(1).cpu()
        return (branches * lengths * self.trace.forward_passes).tolist()

    @property
    def positions_forwarded(self) -> list[int]:
        """For each row the positions that its forward passes computed, see :mod:`nap_decode.reuse`."""
        forwarded = self.trace.forwarded
        return self.positions_exact if forwarded is None else forwarded.sum(1).tolist()

    def flops(self, *, exact: bool = False) -> list[float]:
        """For each row the floating-point operations of its forward passes, without those of the output layer.

        Args:
            exact: those that there would have been if nothing had been reused.

        Raises:
            NapDecodeError: the model does not tell its parts.
        """
        if self.cost is None:
            raise NapDecodeError("what this model's passes cost is not known: it is a function, or has no config")
        positions = self.positions_exact if exact else self.positions_forwarded
        lengths = self.canvas.attention_mask.sum(1).tolist()
        return [self.cost.flops(some, length) for some, length in zip(positions, lengths, strict=True)]

    @cached_property
    def blocks(self) -> dict[str, str | list[str]]:
        """The text of every block by its name."""
        return {
            name: self._texts([self._block_text(row, j) for row in self._rows])
            for j, name in enumerate(self.trace.block_names)
        }

    @property
    def paths(self) -> list[str] | list[list[str]]:
        """Texts of the blocks that are not a summary, for each row."""
        paths = [j for j, held in enumerate(self.canvas.held) if not held]
        rows = [[self._block_text(row, j) for j in paths] for row in self._rows]
        return rows[0] if self.canvas.is_single else rows

    @property
    def summary(self) -> str | list[str]:
        """The text of the summary.

        Raises:
            NapDecodeError: the canvas has none.
        """
        for name, held in zip(self.trace.block_names, self.canvas.held, strict=True):
            if held:
                return self.blocks[name]
        raise NapDecodeError(f"the canvas has no summary; its blocks are {list(self.trace.block_names)}")

    @cached_property
    def text(self) -> str | list[str]:
        """What was decoded: a plain completion as it is; a layout with a line for each block, behind its header.

        For infill it is the whole text, with the holes filled.
        """
        return self._texts([self._row_text(row) for row in self._rows])

    @property
    def _rows(self) -> range:
        return range(len(self.sequences))

    def _texts(self, rows: list[str]) -> str | list[str]:
        return rows[0] if self.canvas.is_single else rows

    def _block_text(self, row: int, block: int) -> str:
        inside = (self.trace.block[row] == block) & (self._before_end[row] | self._gaps[row])
        slots = zip(self.trace.tokens[row][inside].tolist(), self._gaps[row][inside].tolist(), strict=True)
        runs = [([token for token, _ in run], is_gap) for is_gap, run in groupby(slots, key=lambda slot: slot[1])]
        pieces = ["[...]" if is_gap else self._decode(ids, skip_special_tokens=True) for ids, is_gap in runs]
        return "".join(pieces)

    def _row_text(self, row: int) -> str:
        tokens, block = self.trace.tokens[row].tolist(), self.trace.block[row].tolist()
        present, prompt = self.canvas.attention_mask[row].tolist(), self.canvas.prompt[row].tolist()
        if self.canvas.is_infill:
            return self._decode([t for t, p in zip(tokens, present, strict=True) if p], skip_special_tokens=True)
        columns = [c for c in range(len(block)) if present[c] and not prompt[c]]
        runs = [(index, list(run)) for index, run in groupby(columns, key=lambda c: block[c])]
        if len(runs) == 1:
            return self._block_text(row, runs[0][0])
        lines, header = [], False
        for index, run in runs:
            if index < 0:
                lines.append(self._decode([tokens[c] for c in run], skip_special_tokens=False).strip())
            else:
                before = lines.pop() + " " if header else ""
                lines.append(before + self._block_text(row, index).strip())
            header = index < 0
        return "\n".join(lines)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        if self.tokenizer is None:
            raise NapDecodeError("texts need a tokenizer; pass one to the sampler, or read .sequences")
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
