"""What came out of a decode, at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas
from nap_decode.model.call import Cost
from nap_decode.results.html import render
from nap_decode.results.trace import DecodeTrace, ends_before

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class SamplerOutput:
    """The decoded batch.

    Texts are a string for a single prompt and a list of strings for a batch.  They are read in the place where they
    stand, so that a prompt and the text of its completion together are the text of both.  Left out are a block's end
    token and what follows it, special tokens at a block's end, and those that were given, not decoded.

    Args:
        sequences: ``(B, L)`` int64: prompt, canvas, and padding behind; of :meth:`Sampler.generate` padding in front.
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
        """For each row ``"end"`` (its last block holds one), ``"length"``, or ``"interrupted"`` (masks are left)."""
        block, masked = self.trace.block, self.trace.masked()
        cut = (block == block.amax(1, keepdim=True)) & (block >= 0) & ~self._before_end
        reasons = zip(masked.any(1).tolist(), cut.any(1).tolist(), strict=True)
        return ["interrupted" if broken_off else "end" if ended else "length" for broken_off, ended in reasons]

    @property
    def is_complete(self) -> bool:
        """Whether everything was decoded; if not, there are mask tokens in ``sequences``, and texts have gaps."""
        return not bool(self.trace.masked().any())

    @property
    def tokens_per_forward(self) -> list[float]:
        """For each row the decoded tokens before the end of their block, by the forward passes it took."""
        passes = self.trace.forward_passes.clamp(min=1)
        return (self._before_end.sum(1) / passes).tolist()

    @property
    def positions_exact(self) -> list[int]:
        """For each row the positions that its forward passes would have computed if none were reused.

        A pass counts once, also if it looks at alternatives (LoPA) or has shadows (WINO).
        """
        branches = 1 if self.cost is None else self.cost.branches
        return (branches * self.canvas.row_lengths * self.trace.forward_passes).tolist()

    @property
    def positions_forwarded(self) -> list[int]:
        """For each row the positions that its forward passes computed, see :mod:`nap_decode.speed.reuse`."""
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
        lengths = self.canvas.row_lengths.tolist()
        return [self.cost.flops(some, length) for some, length in zip(positions, lengths, strict=True)]

    @cached_property
    def blocks(self) -> dict[str, str | list[str]]:
        """The text of every block by its name, without spaces around it if there is more than one block."""
        return {
            name: self._texts([texts[j] for texts in self._block_texts])
            for j, name in enumerate(self.trace.block_names)
        }

    @property
    def paths(self) -> list[str] | list[list[str]]:
        """Texts of the blocks that are not a summary, for each row."""
        paths = [j for j, held in enumerate(self.canvas.held) if not held]
        rows = [[texts[j] for j in paths] for texts in self._block_texts]
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

        A completion begins with the space that sets it off from its prompt, if there is one.  For infill it is the
        whole text, with the holes filled.
        """
        return self._texts([self._row_text(row) for row in range(len(self.sequences))])

    def _texts(self, rows: list[str]) -> str | list[str]:
        return rows[0] if self.canvas.is_single else rows

    @cached_property
    def _block_texts(self) -> list[list[str]]:
        """The text of each block of each row."""
        trace, blocks = self.trace, range(len(self.trace.block_names))
        rows = [
            [self._read(row, (trace.block[row] == index) & self._shown[row]) for index in blocks]
            for row in range(len(trace.tokens))
        ]
        return rows if self._is_plain else [[text.strip() for text in texts] for texts in rows]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether a completion is all that stands behind the prompts."""
        given = self.canvas.attention_mask.bool() & ~self.canvas.prompt & ~self.canvas.decodable
        return len(self.trace.block_names) == 1 and not self.canvas.is_infill and not bool(given.any())

    @cached_property
    def _shown(self) -> Tensor:
        """``(B, L)`` bool: the slots that texts are made of, headers aside."""
        block = self.trace.block
        there = self.canvas.attention_mask.bool().cpu()
        # Tokens that the tokenizer leaves out where it is to leave out special ones.
        special = {
            i
            for i in {*self.trace.tokens[there & ~self._gaps].tolist()}
            if not self._decode([i], skip_special_tokens=True) and self._decode([i])
        }
        ends = self._ids("eos", "sep", "pad")
        # Whatever was decoded is shown, but for what stands at the end of a block just to say that it is the end.
        shown = self._before_end | self._gaps
        goes_on = shown & (self._gaps | ~self._is_in(special - (self._ids("unk", "bos", "cls") - ends)))
        for index in range(len(self.trace.block_names)):
            until = (goes_on & (block == index)).flip(1).cumsum(1).flip(1) > 0
            shown &= (block != index) | until
        return shown | (there & (block < 0) & ~self._is_in(special - (self._ids("unk") - ends)))

    def _ids(self, *names: str) -> set[int | None]:
        return {getattr(self.tokenizer, f"{name}_token_id", None) for name in names}

    def _is_in(self, ids: set[int]) -> Tensor:
        return torch.isin(self.trace.tokens, torch.tensor(sorted(ids), dtype=torch.int64, device="cpu"))

    def _row_text(self, row: int) -> str:
        if self.canvas.is_infill:
            return self._read(row, self._shown[row])
        texts = self._block_texts[row]
        if self._is_plain:
            return texts[0]
        tokens, block = self.trace.tokens[row].tolist(), self.trace.block[row].tolist()
        behind = (self.canvas.attention_mask.bool() & ~self.canvas.prompt)[row].tolist()
        lines, header = [], False
        for index, run in groupby((c for c in range(len(block)) if behind[c]), key=lambda c: block[c]):
            if index < 0:
                lines.append(self._decode([tokens[c] for c in run]).strip())
            else:
                before = lines.pop() + " " if header else ""
                lines.append(before + texts[index])
            header = index < 0
        return "\n".join(lines)

    def _read(self, row: int, where: Tensor) -> str:
        """The text of some of the shown slots, as it is behind all that are shown before them.

        Decoded alone it might lack the space before it, be a part of a word for the tokenizer, or of a character.
        """
        tokens, gaps = self.trace.tokens[row], self._gaps[row]
        pieces = []
        for is_gap, run in groupby(where.nonzero()[:, 0].tolist(), key=lambda column: bool(gaps[column])):
            columns = list(run)
            known = tokens[: columns[0]][(self._shown[row] & ~gaps)[: columns[0]]].tolist()
            before, whole = self._decode(known), self._decode(known + tokens[columns].tolist())
            pieces.append("[...]" if is_gap else _behind(before, whole))
        return "".join(pieces)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        if self.tokenizer is None:
            raise NapDecodeError("texts need a tokenizer; pass one to the sampler, or read .sequences")
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)) if ids else ""


def _behind(before: str, whole: str) -> str:
    """What the whole has behind a text that it mostly begins with.

    Not quite if that ends within a character, or if a tokenizer joins what it has separated (``don '``, but ``don't``).
    """
    if whole.startswith(before):
        return whole[len(before) :]
    differ = (place for place, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other)
    return whole[next(differ, len(whole)) :]
