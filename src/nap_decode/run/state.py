"""The canvas while it is decoded, and the callbacks that may look at it and edit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from nap_decode.base.batching import in_runs
from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas
from nap_decode.parts.slots import Decision, Slots


@dataclass(frozen=True, eq=False)
class State:
    """What decoding changes, ``(B, W)`` each; see :class:`DecodeState`."""

    tokens: Tensor
    masked: Tensor
    commit_step: Tensor
    confidence: Tensor
    edited: Tensor
    closed: Tensor

    @classmethod
    def start(cls, tokens: Tensor, decodable: Tensor) -> State:
        """Nothing is committed yet."""
        none = torch.zeros_like(decodable)
        nan = torch.full_like(tokens, torch.nan, dtype=torch.float32)
        return cls(tokens, decodable, torch.full_like(tokens, -1), nan, none, none)

    def after(self, decision: Decision, slots: Slots, mask_token_id: int) -> State:
        """The state one step later."""
        inside = slots.rank >= 0
        chosen = slots.spread(decision.chosen) & inside
        state = replace(
            self,
            tokens=torch.where(chosen, slots.spread(decision.tokens), self.tokens),
            masked=self.masked & ~chosen,
            commit_step=torch.where(chosen, slots.step[:, None], self.commit_step),
            confidence=torch.where(chosen, slots.spread(decision.confidence).float(), self.confidence),
            edited=self.edited & ~chosen,
        )
        if decision.remasked is None:
            return state
        remasked = slots.spread(decision.remasked) & inside
        return replace(
            state,
            tokens=torch.where(remasked, mask_token_id, state.tokens),
            masked=state.masked | remasked,
            commit_step=torch.where(remasked, -1, state.commit_step),
            confidence=torch.where(remasked, torch.nan, state.confidence),
            edited=state.edited & ~remasked,
        )

    def close(self, ends: Tensor, fill: int, order: Tensor, block: Tensor, step: Tensor) -> State:
        """The state after blocks are filled up in which an end token and everything before it is committed.

        ``order`` are the columns sorted by block, stably, and ``block`` their blocks, ``(B, W)``; ``step`` is ``(B,)``.
        """
        masked = self.masked.gather(1, order)
        ended = torch.isin(self.tokens, ends).gather(1, order) & (block >= 0) & ~masked
        ended &= in_runs(masked, block) == 0
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
class DecodeState(State):
    """The canvas between two steps, as a callback sees it.

    Args:
        tokens: ``(B, L)`` int64.
        masked: ``(B, L)`` bool, slots still to decode.
        commit_step: ``(B, L)`` int64, index of the step that committed a slot, -1 for none.
        confidence: ``(B, L)`` float32, confidence when it was committed, nan for none.
        edited: ``(B, L)`` bool, slots whose token a callback put in.
        closed: ``(B, L)`` bool, slots behind the end of their block, which were filled without being decoded.
        canvas: what decoding started from.
        step: index of the next step of the schedule.
        total_steps: steps of the longest row; None if the number depends on the model.

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

    def edit(self, tokens: Tensor, mask_token_id: int, banned: Tensor, vocab_size: int) -> State:
        """The state after a callback replaced tokens.  Edited slots count as committed by the last step.

        Raises:
            NapDecodeError: not tokens of this shape; an id that must not be emitted; a clamped token was changed.
        """
        if not isinstance(tokens, Tensor) or tokens.shape != self.tokens.shape or tokens.is_floating_point():
            got = f"{tokens.dtype} of {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            expected = f"None or whole-number tokens {tuple(self.tokens.shape)}"
            raise NapDecodeError(f"a callback must return {expected}, not {got}")
        tokens = tokens.to(self.tokens)
        changed = tokens != self.tokens
        if bool((changed & ~self.canvas.decodable).any()):
            raise NapDecodeError("a callback changed the prompt, a header or padding; it may edit decoded slots only")
        masked = self.canvas.decodable & (tokens == mask_token_id)
        wrong = changed & ~masked & ((tokens < 0) | (tokens >= vocab_size) | torch.isin(tokens, banned))
        if bool(wrong.any()):
            ids = tokens[wrong].tolist()
            raise NapDecodeError(f"a callback put in token ids that the tokenizer does not have: {ids}")
        edited = (self.edited | changed) & ~masked
        return State(
            tokens=tokens,
            masked=masked,
            commit_step=torch.where(masked, -1, torch.where(changed, self.step - 1, self.commit_step)),
            confidence=torch.where(changed, torch.nan, self.confidence),
            edited=edited,
            closed=self.closed & ~masked & ~edited,
        )


Callback: TypeAlias = Callable[[DecodeState], "Tensor | None"]
"""Called after every step; returns new tokens ``(B, L)`` to edit the canvas, or None to leave it.  A mask id in a
decodable slot puts the slot up for decoding again."""
