"""The canvas while it is decoded, and the callbacks that may look at it and edit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas
from nap_decode.model.rows import in_runs, to_canvas, to_rows
from nap_decode.parts.slots import Commit, Slots

_NOTHING = {"tokens": 0, "masked": False, "commit_step": -1, "confidence": torch.nan, "edited": False}
"""What a canvas shows to callbacks, and what stands there where nothing was decoded."""


@dataclass(frozen=True, eq=False)
class RowState:
    """What decoding changes.

    Args:
        tokens: ``(B, W)`` int64.
        decodable: ``(B, W)`` bool, slots to decode.
        masked: ``(B, W)`` bool, slots still to decode.
        commit_step: ``(B, W)`` int64, index of the step that committed a slot, -1 for none.
        confidence: ``(B, W)`` float32, confidence when it was committed, nan for none.
        edited: ``(B, W)`` bool, slots whose token a callback put in.
        closed: ``(B, W)`` bool, slots behind the end of their block, which were filled without being decoded.
    """

    tokens: Tensor
    decodable: Tensor
    masked: Tensor
    commit_step: Tensor
    confidence: Tensor
    edited: Tensor
    closed: Tensor

    @classmethod
    def start(cls, tokens: Tensor, decodable: Tensor) -> RowState:
        """Nothing is committed yet."""
        return cls(
            tokens=tokens,
            decodable=decodable,
            masked=decodable,
            commit_step=torch.full_like(tokens, -1),
            confidence=torch.full_like(tokens, torch.nan, dtype=torch.float32),
            edited=torch.zeros_like(decodable),
            closed=torch.zeros_like(decodable),
        )

    def after(self, commit: Commit, slots: Slots, mask_token_id: int) -> RowState:
        """The state one step later."""
        inside = slots.rank >= 0
        chosen = slots.spread(commit.chosen) & inside
        state = replace(
            self,
            tokens=torch.where(chosen, slots.spread(commit.tokens), self.tokens),
            masked=self.masked & ~chosen,
            commit_step=torch.where(chosen, slots.step[:, None], self.commit_step),
            confidence=torch.where(chosen, slots.spread(commit.confidence).float(), self.confidence),
            edited=self.edited & ~chosen,
        )
        if commit.remasked is None:
            return state
        remasked = slots.spread(commit.remasked) & inside
        return replace(
            state,
            tokens=torch.where(remasked, mask_token_id, state.tokens),
            masked=state.masked | remasked,
            commit_step=torch.where(remasked, -1, state.commit_step),
            confidence=torch.where(remasked, torch.nan, state.confidence),
            edited=state.edited & ~remasked,
        )

    def close(self, ends: Tensor, fill: int, order: Tensor, block: Tensor, step: Tensor) -> RowState:
        """The state after blocks that have come to their end are filled up.

        A block has come to its end when an end token and everything before it is committed.

        Args:
            ends: ``(N,)`` int64, ids that end a block.
            fill: id that fills the rest of the block.
            order: ``(B, W)`` int64, columns sorted by block, stably.
            block: ``(B, W)`` int64, the sorted blocks.
            step: ``(B,)`` int64, index of the step.
        """
        masked = self.masked.gather(1, order)
        is_end = torch.isin(self.tokens, ends).gather(1, order) & self.decodable.gather(1, order) & ~masked
        ended = is_end & (in_runs(masked, block) == 0)
        rest = masked & (in_runs(ended, block) > 0)
        closed = torch.zeros_like(rest).scatter_(1, order, rest)
        return replace(
            self,
            tokens=torch.where(closed, fill, self.tokens),
            masked=self.masked & ~closed,
            commit_step=torch.where(closed, step[:, None], self.commit_step),
            closed=self.closed | closed,
        )


@dataclass(frozen=True, eq=False)
class DecodeState:
    """The canvas between two steps, as a callback sees it.

    Args:
        canvas: what decoding started from.
        step: index of the next step of the schedule.
        total_steps: steps of the longest row; None if the number depends on the model.
        tokens: ``(B, L)`` int64.
        masked: ``(B, L)`` bool, slots still to decode.
        commit_step: ``(B, L)`` int64, index of the step that committed a slot, -1 for none.
        confidence: ``(B, L)`` float32, confidence when it was committed, nan for none.
        edited: ``(B, L)`` bool, slots whose token a callback put in.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=12)
        >>> def report(state: DecodeState) -> None:
        ...     print(f"step {state.step}: {int(state.masked.sum())} masked")
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =", callback=report)
        step 1: 18 masked
        step 2: 2 masked
        step 3: 0 masked
    """

    canvas: Canvas
    step: int
    total_steps: int | None
    tokens: Tensor
    masked: Tensor
    commit_step: Tensor
    confidence: Tensor
    edited: Tensor

    @classmethod
    def of(cls, rows: RowState, canvas: Canvas, step: int, total_steps: int | None) -> DecodeState:
        """The same in the columns of the canvas."""
        columns = {name: to_canvas(canvas, getattr(rows, name), fill) for name, fill in _NOTHING.items()}
        columns["tokens"] = torch.where(canvas.attention_mask > 0, columns["tokens"], canvas.tokens)
        return cls(canvas=canvas, step=step, total_steps=total_steps, **columns)

    def to_rows(self, rows: RowState) -> RowState:
        """The state of the rows, with what was edited here."""
        columns = {name: to_rows(self.canvas, getattr(self, name), fill) for name, fill in _NOTHING.items()}
        tokens = torch.where(rows.decodable, columns.pop("tokens"), rows.tokens)
        return replace(rows, tokens=tokens, closed=rows.closed & ~columns["masked"] & ~columns["edited"], **columns)

    def edit(self, tokens: Tensor, mask_token_id: int, banned: Tensor, vocab_size: int) -> DecodeState:
        """The state after a callback replaced tokens.  Edited slots count as committed by the last step.

        Raises:
            NapDecodeError: not tokens of this shape; an id that must not be emitted; a clamped token was
                changed.
        """
        if not isinstance(tokens, Tensor) or tokens.shape != self.tokens.shape or tokens.is_floating_point():
            got = f"{tokens.dtype} of {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            raise NapDecodeError(
                f"a callback must return None or whole-number tokens {tuple(self.tokens.shape)}, not {got}"
            )
        tokens = tokens.to(self.tokens)
        changed = tokens != self.tokens
        if bool((changed & ~self.canvas.decodable).any()):
            raise NapDecodeError("a callback changed the prompt, a header or padding; it may edit decoded slots only")
        masked = self.canvas.decodable & (tokens == mask_token_id)
        wrong = changed & ~masked & ((tokens < 0) | (tokens >= vocab_size) | torch.isin(tokens, banned))
        if bool(wrong.any()):
            raise NapDecodeError(
                f"a callback put in token ids that the tokenizer does not have: {tokens[wrong].tolist()}"
            )
        return replace(
            self,
            tokens=tokens,
            masked=masked,
            commit_step=torch.where(masked, -1, torch.where(changed, self.step - 1, self.commit_step)),
            confidence=torch.where(changed, torch.nan, self.confidence),
            edited=(self.edited | changed) & ~masked,
        )


Callback: TypeAlias = Callable[[DecodeState], "Tensor | None"]
"""Called after every step; returns new tokens ``(B, L)`` to edit the canvas, or None to leave it.  A mask
id in a decodable slot puts the slot up for decoding again."""
