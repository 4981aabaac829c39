"""Which positions are committed, and with which tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from nap_decode.canvas import Canvas
from nap_decode.confidence import CONFIDENCES, Candidates, Confidence, find_confidence, random
from nap_decode.errors import NapDecodeError, check_between, check_integer
from nap_decode.randomness import TOKEN_STREAM, uniform

CHUNK_ELEMENTS = 2**24
"""Logits that a committer converts to float32 at a time (64 MiB)."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots that may be committed at this step, packed to the left of each row.

    Args:
        index: ``(B, K)`` int64, their columns in the canvas; 0 where a row has fewer than K.
        block: ``(B, K)`` int64, their blocks; M where a row has fewer than K.
        positions: ``(B, K)`` int64, counted from the row's first token.
        rank: ``(B, L)`` int64, for every column of the canvas its place among the K, -1 if it has none.
        quota: ``(B, M)`` int64, tokens that each block shall commit.
        seeds: ``(B,)`` int64.
        step: index of the step in the schedule.
    """

    index: Tensor
    block: Tensor
    positions: Tensor
    rank: Tensor
    quota: Tensor
    seeds: Tensor
    step: int

    @classmethod
    def pack(
        cls,
        canvas: Canvas,
        block: Tensor,
        masked: Tensor,
        open_blocks: Tensor,
        quota: Tensor,
        width: int,
        seeds: Tensor,
        step: int,
    ) -> Slots:
        """Collect the masked slots of the open blocks.

        Args:
            canvas: the canvas.
            block: ``(B, L)`` the scheduler's block of every slot.
            masked: ``(B, L)`` bool, slots still to decode.
            open_blocks: ``(B, M)`` bool.
            quota: ``(B, M)`` int64.
            width: K, the largest number of such slots in a row; known on the host, so that shapes are.
            seeds: ``(B,)`` int64.
            step: index of the step.
        """
        #   wanted  . x . x x .   ->   rank  -1 0 -1 1 2 -1   ->   index  1 3 4
        wanted = masked & open_blocks.gather(1, block.clamp(min=0))
        rank = torch.where(wanted, wanted.cumsum(1) - 1, -1)
        columns = torch.arange(block.shape[1], device=block.device).expand_as(block)
        # Slots that are not wanted all write to column K, which is cut off.
        index = torch.zeros(len(block), width + 1, dtype=torch.int64, device=block.device)
        index = index.scatter_(1, torch.where(wanted, rank, width), columns)[:, :width]
        valid = torch.arange(width, device=block.device) < wanted.sum(1, keepdim=True)
        index = torch.where(valid, index, 0)
        return cls(
            index=index,
            block=torch.where(valid, block.gather(1, index), quota.shape[1]),
            positions=canvas.position_ids.gather(1, index),
            rank=rank,
            quota=quota,
            seeds=seeds,
            step=step,
        )

    def spread(self, values: Tensor) -> Tensor:
        """Bring values of the K slots back to the columns of the canvas, ``(B, K) -> (B, L)``.

        Columns without a slot get the value of some slot; mask them with ``rank >= 0``.
        """
        return values.gather(1, self.rank.clamp(min=0))


@dataclass(frozen=True, eq=False)
class Commit:
    """What a committer decided: ``(B, K)`` tokens, their confidence, and which of them are committed."""

    tokens: Tensor
    confidence: Tensor
    chosen: Tensor


class Committer(Protocol):
    """Decides which of the open slots are committed, and with which tokens.

    Example:
        >>> class Eager:  # everything that is open, whatever the quota
        ...     is_adaptive, is_random = True, False
        ...     def __call__(self, logits, slots, banned):
        ...         confidence, tokens = logits.index_fill(2, banned, -torch.inf).softmax(2).max(2)
        ...         return Commit(tokens, confidence, slots.block < slots.quota.shape[1])
        >>> from nap_decode import MacroParallelScheduler, Sampler, demo
        >>> sampler = Sampler(*demo.load(), scheduler=MacroParallelScheduler(), committer=Eager())
        >>> sampler("1 2 3 4 5 6 7 0 1 2 3 4 =", max_new_tokens=5).forward_passes
        1
    """

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of tokens it commits depends on the model; if not, it is exactly the quota."""

    @property
    def is_random(self) -> bool:
        """Whether results depend on the seed."""

    def __call__(self, logits: Tensor, slots: Slots, banned: Tensor) -> Commit:
        """Decide one step.

        Args:
            logits: ``(B, K, V)``; not to be changed.
            slots: the slots they belong to.
            banned: ``(N,)`` int64, ids that must not be proposed.
        """


class Selection(Protocol):
    """Chooses among scored candidates."""

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of tokens it chooses depends on the scores."""

    def __call__(self, confidence: Tensor, block: Tensor, quota: Tensor) -> Tensor:
        """Choose.

        Args:
            confidence: ``(B, K)`` scores.
            block: ``(B, K)`` int64, blocks of the candidates; M for none.
            quota: ``(B, M)`` int64.

        Returns:
            ``(B, K)`` bool.
        """


@dataclass(frozen=True)
class QuotaSelection:
    """The most confident candidates of each block, exactly as many as its quota.

    Of equal scores the lower position is chosen.

    Example:
        >>> scores = torch.tensor([[.1, .9, .5, .2, .3]])
        >>> block = torch.tensor([[0, 0, 0, 1, 1]])
        >>> QuotaSelection()(scores, block, torch.tensor([[2, 1]])).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    is_adaptive = False

    def __call__(self, confidence: Tensor, block: Tensor, quota: Tensor) -> Tensor:
        """See :class:`Selection`."""
        # A column of zeros is the quota of block M, the one of slots that only fill a row up.
        quota = torch.nn.functional.pad(quota, (0, 1))
        return rank_in_block(confidence, block) < quota.gather(1, block)


@dataclass(frozen=True)
class ThresholdSelection:
    """Every candidate that reaches a confidence, and at least the quota (Fast-dLLM, arXiv 2505.22618).

    Args:
        threshold: candidates with at least this confidence are committed.

    Example:
        >>> scores = torch.tensor([[.1, .9, .95, .2, .3]])
        >>> block = torch.tensor([[0, 0, 0, 1, 1]])
        >>> ThresholdSelection(0.9)(scores, block, torch.tensor([[0, 1]])).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    threshold: float = 0.9

    is_adaptive = True

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real) or math.isnan(self.threshold):
            raise NapDecodeError(f"threshold must be a number, but is {self.threshold!r}")

    def __call__(self, confidence: Tensor, block: Tensor, quota: Tensor) -> Tensor:
        """See :class:`Selection`."""
        reaches = (confidence >= self.threshold) & (block < quota.shape[1])
        return reaches | QuotaSelection()(confidence, block, quota)


def rank_in_block(confidence: Tensor, block: Tensor) -> Tensor:
    """Place of every candidate in its block by falling confidence, from 0; ties go to the lower index.

    Args:
        confidence: ``(B, K)``.
        block: ``(B, K)`` int64.

    Returns:
        ``(B, K)`` int64.

    Example:
        >>> rank_in_block(torch.tensor([[.1, .9, .5, .2]]), torch.tensor([[0, 0, 0, 1]])).tolist()
        [[2, 0, 1, 0]]
    """
    # Sort by confidence, then, keeping that order, by block: each block is a run from best to worst.
    order = confidence.argsort(dim=1, descending=True, stable=True)
    by_block = block.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_block)
    runs = block.gather(1, order)
    place = torch.arange(runs.shape[1], device=runs.device) - torch.searchsorted(runs, runs)
    return torch.zeros_like(order).scatter_(1, order, place)


@dataclass(frozen=True, kw_only=True)
class MicroConfidenceCommitter:
    """Proposes a token for every open slot, scores it, and commits the best of each block.

    Args:
        temperature: 0 proposes the most likely token and draws nothing; otherwise (at least 1e-6) a token is
            drawn from softmax(logits / temperature), from the row's own stream.
        top_k: draw among this many most likely tokens only.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum.
        confidence: a function of :class:`~nap_decode.confidence.Candidates`, or the name of one:
            ``"probability"``, ``"margin"``, ``"negative_entropy"``, ``"random"``, ``"leftmost"``.
        selection: how many are committed; exactly the quota by default.

    Confidences are those of the model's own distribution (temperature 1, nothing cut off), whatever the
    proposal is drawn from.  Softmax and draws are computed in float32 (float64 if the logits are).  A
    draw inverts the distribution function at one 24-bit uniform number.

    Raises:
        NapDecodeError: a value out of range, an unknown name, or a cut-off without a temperature.

    Example:
        >>> committer = MicroConfidenceCommitter(temperature=0.7, top_p=0.95, confidence="margin")
        >>> MicroConfidenceCommitter(top_k=5)
        Traceback (most recent call last):
        ...
        nap_decode.errors.NapDecodeError: top_k=5 has no effect at temperature 0; set a temperature or leave it out
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    confidence: str | Confidence = "probability"
    selection: Selection = QuotaSelection()

    def __post_init__(self) -> None:
        check_between("temperature", self.temperature, 0.0, math.inf)
        if 0 < self.temperature < 1e-6:
            raise NapDecodeError(f"temperature must be 0 or at least 1e-6, but is {self.temperature!r}")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_between("top_p", self.top_p, 0.0, 1.0)
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise NapDecodeError(
                    f"{name}={getattr(self, name)} has no effect at temperature 0; set a temperature or leave it out"
                )
        find_confidence(self.confidence)
        if not callable(self.selection):
            raise NapDecodeError(f"selection must be a Selection, such as QuotaSelection(), but is {self.selection!r}")

    @property
    def is_adaptive(self) -> bool:
        """Whether the selection decides by confidence how many tokens are committed."""
        return self.selection.is_adaptive

    @property
    def is_random(self) -> bool:
        """Whether results may depend on the seed: a function of yours might draw."""
        confidence = find_confidence(self.confidence)
        return self.temperature > 0 or confidence is random or confidence not in CONFIDENCES.values()

    def __call__(self, logits: Tensor, slots: Slots, banned: Tensor) -> Commit:
        """See :class:`Committer`."""
        tokens, confidence = self.propose(logits, slots, banned)
        return Commit(tokens, confidence, self.selection(confidence, slots.block, slots.quota))

    def propose(self, logits: Tensor, slots: Slots, banned: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, K)`` and their confidences ``(B, K)``; nan where no id is both possible and allowed."""
        num_rows, width, vocab_size = logits.shape
        flat = rearrange(logits, "b k v -> (b k) v")
        positions, block = rearrange(slots.positions, "b k -> (b k)"), rearrange(slots.block, "b k -> (b k)")
        rows = torch.arange(num_rows, device=logits.device).repeat_interleave(width)
        score = find_confidence(self.confidence)
        tokens, confidence = [], []
        # In chunks, so that the float32 copies do not grow with the canvas.
        size = max(1, CHUNK_ELEMENTS // vocab_size)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            scores = flat[part].to(torch.promote_types(logits.dtype, torch.float32))  # (R, V)
            allowed = scores.index_fill(1, banned, -torch.inf) if len(banned) else scores
            best, chosen = allowed.max(1)
            seeds = slots.seeds[rows[part]]
            if self.temperature > 0:
                draws = uniform(seeds, slots.step, TOKEN_STREAM, positions[part, None])  # (R, 1)
                chosen = _draw(self._probabilities(allowed - best[:, None]), draws)
            candidates = Candidates(scores, best, chosen, positions[part], block[part], rows[part], seeds, slots.step)
            tokens.append(chosen)
            confidence.append(score(candidates).where(best > -torch.inf, torch.nan))
        return torch.cat(tokens).view(num_rows, width), torch.cat(confidence).view(num_rows, width)

    def _probabilities(self, logits: Tensor) -> Tensor:
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        scores = logits / self.temperature
        unused = torch.empty(0, dtype=torch.long)  # the warpers look at the scores alone
        if self.top_k is not None:
            scores = TopKLogitsWarper(int(self.top_k))(unused, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(float(self.top_p))(unused, scores)
        return scores.softmax(1)


def _draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """One token per row, ``(R, V), (R, 1) -> (R,)``: the first whose cumulative probability exceeds the draw."""
    cumulative = probabilities.cumsum(1)
    # Scaled by the sum, which rounding leaves near but not at 1, a draw below 1 stays below the end.
    tokens = torch.searchsorted(cumulative, draws.to(cumulative.dtype) * cumulative[:, -1:], right=True)
    return tokens[:, 0].clamp(max=probabilities.shape[1] - 1)
