"""How many of the scored slots are committed: the last of a committer's three questions.

All of them choose inside each block.  ``c_(n)`` is the n-th highest confidence of a block's masked slots.

====================== ==========================================================================
QuotaSelection         exactly the quota, highest first (or drawn by confidence)
ThresholdSelection     all with ``c >= threshold``
FactorSelection        the largest n with ``c_(n) >= 1 - factor / (n + 1)``
EntropyBoundSelection  the longest prefix whose entropies without the largest add up to ``<= gamma``
StableSelection        all with ``c > threshold`` whose distribution stood still
HierarchySelection     the best of every run of masks above a low threshold, and all above a high one
LeapSelection          anchors above a high threshold, their neighbours above a low one
CappedSelection        what another selection chooses, but no more than a share of what is masked
====================== ==========================================================================

But for the first, all of them commit at least the quota.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name, check_number
from nap_decode.base.random import SELECTION_STREAM
from nap_decode.parts.confidence import Confidence, divergence, negative_entropy
from nap_decode.parts.slots import Slots


class Selection(ABC):
    """Chooses among scored slots.  A subclass writes ``__call__``.

    Example:
        >>> class BestHalf(Selection):
        ...     def __call__(self, confidence, slots, statistics):
        ...         half = (slots.count(slots.open) + 1) // 2
        ...         return rank_in_block(confidence, slots.open_block) < slots.per_slot(half)
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1]]), quota=torch.tensor([[1, 0]]))
        >>> BestHalf()(torch.tensor([[0.1, 0.9, 0.5, 0.2]]), slots, ()).long().tolist()
        [[0, 1, 1, 1]]
    """

    statistics: ClassVar[tuple[Confidence, ...]] = ()
    """Functions of :class:`~nap_decode.parts.confidence.Candidates` whose values it needs besides the confidence."""
    compares_steps: ClassVar[bool] = False
    """Whether its statistics need the logits of the step before, which keeps them in memory."""

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of slots it chooses depends on the scores; if not, it is exactly the quota."""
        return True

    @property
    def is_random(self) -> bool:
        """Whether it draws."""
        return False

    @abstractmethod
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        """Choose.

        Args:
            confidence: ``(B, K)`` scores.
            slots: the slots they belong to; only those in ``slots.open`` may be chosen.
            statistics: ``(B, K)`` values of each of the class's ``statistics``.

        Returns:
            ``(B, K)`` bool.
        """


@dataclass(frozen=True)
class QuotaSelection(Selection):
    """The most confident slots of each block, exactly as many as its quota.

    Args:
        temperature: 0 takes the highest scores; otherwise slots are drawn one after the other with chances
            proportional to exp(confidence / temperature) (Dream's ``alg_temp``).
        ties: which of equal scores are chosen: those at ``"lower"`` positions, or those that ``torch.topk`` takes of
            the whole row, as LLaDA's and Dream's code does.  Which these are depends on the device and on the width of
            the batch, and the step waits for the device.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1, 1]]), quota=torch.tensor([[2, 1]]))
        >>> QuotaSelection()(torch.tensor([[.1, .9, .5, .2, .3]]), slots, ()).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    temperature: float = 0.0
    ties: str = "lower"

    def __post_init__(self) -> None:
        check_between("temperature", self.temperature, 0.0, math.inf)
        check_name("ties", self.ties, ("lower", "topk"))

    @property
    @override
    def is_adaptive(self) -> bool:
        return False

    @property
    @override
    def is_random(self) -> bool:
        return self.temperature > 0

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        if self.temperature > 0:
            # The highest scores after Gumbel noise are a draw without replacement (Kool et al., arXiv 1903.06059).
            noise = -(-slots.uniform(SELECTION_STREAM).log()).log()
            confidence = confidence / self.temperature + noise
        if self.ties == "topk":
            return _topk(confidence, slots)
        return rank_in_block(confidence, slots.open_block) < slots.per_slot(slots.quota) * slots.open


def _topk(confidence: Tensor, slots: Slots) -> Tensor:
    """``(B, K)`` bool: as many slots of each block as its quota says, one ``torch.topk`` after the other."""
    chosen = torch.zeros_like(slots.open)
    for row, block in (slots.quota > 0).nonzero().tolist():
        candidates = slots.open_block[row] == block
        columns, number = slots.index[row, candidates], int(slots.quota[row, block])
        # Where a score stands among the others of the row has a say in which of equal ones are taken.
        scores = confidence.new_full((slots.row_tokens.shape[1],), -torch.inf)
        scores[columns] = confidence[row, candidates].clamp(min=torch.finfo(scores.dtype).min)  # before all others
        best = scores.topk(min(number, len(columns))).indices
        chosen[row] |= candidates & torch.isin(slots.index[row], best)
    return chosen


@dataclass(frozen=True)
class ThresholdSelection(Selection):
    """Every slot that reaches a confidence (Fast-dLLM, arXiv 2505.22618, algorithm 1).

    Args:
        threshold: slots with at least this confidence are committed.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1, 1]]), quota=torch.tensor([[0, 1]]))
        >>> ThresholdSelection(0.9)(torch.tensor([[.1, .9, .95, .2, .3]]), slots, ()).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        return fill_up((confidence >= self.threshold) & slots.open, confidence, slots)


@dataclass(frozen=True)
class FactorSelection(Selection):
    """The largest n with ``c_(n) >= 1 - factor / (n + 1)`` (Fast-dLLM, arXiv 2505.22618, section 3.3).

    Args:
        factor: the larger, the more slots are committed.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 0]]), quota=torch.tensor([[1]]))
        >>> FactorSelection(1.0)(torch.tensor([[.9, .5, .7, .7]]), slots, ()).long().tolist()
        [[1, 0, 1, 0]]
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_between("factor", self.factor, 0.0, math.inf)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        # c_(n) falls and the bound rises with n, so what passes is a prefix.
        n = rank_in_block(confidence, slots.open_block) + 1
        return fill_up((confidence >= 1 - self.factor / (n + 1)) & slots.open, confidence, slots)


@dataclass(frozen=True)
class EntropyBoundSelection(Selection):
    """The longest prefix, by confidence, with ``sum(H) - max(H) <= gamma`` (EB-Sampler, arXiv 2505.24857, eq. 8).

    H are the entropies of the slots' distributions: the bound is one on how much the tokens that are
    committed together can depend on each other.

    Args:
        gamma: the bound, in nats.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0]]), quota=torch.tensor([[1]]))
        >>> entropy = torch.tensor([[.05, .3, .2]])
        >>> EntropyBoundSelection(0.1)(-entropy, slots, (-entropy,)).long().tolist()
        [[1, 0, 1]]
    """

    gamma: float = 0.1

    statistics = (negative_entropy,)

    def __post_init__(self) -> None:
        check_between("gamma", self.gamma, 0.0, math.inf)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        entropy = -statistics[0].double()
        order, _, first = _sort_in_block(confidence, slots.open_block)
        ordered = entropy.gather(1, order)
        total = ordered.cumsum(1)
        before = total.gather(1, first) - ordered.gather(1, first)  # of the blocks in front
        # The running maximum starts anew in each block: lift every block above all those before it.
        lift = slots.open_block.gather(1, order) * (entropy.amax(1, keepdim=True) + 1)
        largest = (ordered + lift).cummax(1).values - lift
        bound = torch.zeros_like(total).scatter_(1, order, total - before - largest)
        return fill_up((bound <= self.gamma) & slots.open, confidence, slots)


@dataclass(frozen=True)
class StableSelection(Selection):
    """Every slot that is confident and whose distribution stood still (KLASS, arXiv 2511.05664, section 3).

    Where no slot of a block does both, its quota is committed.  It keeps the logits of one step; a block has no
    history when it opens, as the model is not asked about closed ones.

    Args:
        threshold: slots with more than this confidence are committed,
        max_divergence: if KL(p_t || p_(t-1)) was below this
        history: in each of this many last steps.

    Example:
        >>> StableSelection()
        StableSelection(threshold=0.9, max_divergence=0.01, history=2)
    """

    threshold: float = 0.9
    max_divergence: float = 0.01
    history: int = 2

    statistics = (divergence,)
    compares_steps = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_between("max_divergence", self.max_divergence, 0.0, math.inf)
        check_integer("history", self.history, 1)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        before = slots.kept("stable", torch.zeros_like(slots.rank))  # (B, W) steps without a change
        stable = torch.where(statistics[0] < self.max_divergence, before.gather(1, slots.index) + 1, 0)
        slots.memory["stable"] = torch.where(slots.rank >= 0, slots.spread(stable), before)
        ready = (confidence > self.threshold) & (stable >= self.history) & slots.open
        return fill_up(ready, confidence, slots)


@dataclass(frozen=True)
class HierarchySelection(Selection):
    """The best slot of every run of masks, so that each forward pass halves the runs (dInfer's ``HierarchyDecoder``).

    Args:
        threshold: slots above this confidence are committed wherever they are.
        low_threshold: the best of a run is committed if it is above this.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 0]]), quota=torch.tensor([[1]]),
        ...                  index=torch.tensor([[0, 1, 5, 6]]))  # two runs
        >>> HierarchySelection()(torch.tensor([[.5, .6, .7, .3]]), slots, ()).long().tolist()
        [[0, 1, 1, 0]]
    """

    threshold: float = 0.9
    low_threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("low_threshold", self.low_threshold)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        follows = (slots.index.diff(dim=1) == 1) & (slots.open_block.diff(dim=1) == 0)
        runs = (~pad(follows, (1, 0))).cumsum(1)  # a number for every run
        best = rank_in_block(confidence, runs) == 0
        chosen = (best & (confidence > self.low_threshold)) | (confidence > self.threshold)
        return fill_up(chosen & slots.open, confidence, slots)


@dataclass(frozen=True)
class LeapSelection(Selection):
    """Confident slots are anchors, around which less confidence will do (LocalLeap, arXiv 2510.07081).

    Args:
        threshold: slots with at least this confidence are anchors.
        low_threshold: what slots near an anchor need.
        radius: columns to the anchor, at most.

    Example:
        >>> slots = Slots.of(block=torch.zeros(1, 6, dtype=torch.long), quota=torch.tensor([[1]]))
        >>> LeapSelection(radius=2)(torch.tensor([[.8, .5, .95, .8, .1, .8]]), slots, ()).long().tolist()
        [[1, 0, 1, 1, 0, 0]]
    """

    threshold: float = 0.9
    low_threshold: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("low_threshold", self.low_threshold)
        check_integer("radius", self.radius, 0)

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        anchor = (confidence >= self.threshold) & slots.open
        near = anchor
        # Slots stand in the order of their columns, so that none further away in the list is nearer.
        for distance in range(1, min(self.radius, anchor.shape[1] - 1) + 1):
            close = (slots.index[:, distance:] - slots.index[:, :-distance] <= self.radius) & (
                slots.block[:, distance:] == slots.block[:, :-distance]
            )
            pad = torch.nn.functional.pad
            near = (
                near
                | pad(anchor[:, :-distance] & close, (distance, 0))
                | pad(anchor[:, distance:] & close, (0, distance))
            )
        chosen = anchor | (near & (confidence >= self.low_threshold) & slots.open)
        return fill_up(chosen, confidence, slots)


@dataclass(frozen=True)
class CappedSelection(Selection):
    """What another selection chooses, but no more than a share of the masked slots of a block (WINO).

    Args:
        selection: the other one.
        share: of the masked slots, rounded down.
        least: the cap is not below this,
        most: nor above this.

    Example:
        >>> slots = Slots.of(block=torch.zeros(1, 4, dtype=torch.long), quota=torch.tensor([[1]]))
        >>> capped = CappedSelection(ThresholdSelection(0.5), share=0.5, least=1)
        >>> capped(torch.tensor([[.6, .9, .7, .8]]), slots, ()).long().tolist()
        [[0, 1, 0, 1]]
    """

    selection: Selection
    share: float = 0.7
    least: int = 5
    most: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.selection, Selection) or self.selection.statistics:
            raise NapDecodeError(
                f"selection must be a Selection that needs the confidence alone, but is {self.selection!r}"
            )
        check_between("share", self.share, 0.0, 1.0)
        check_integer("least", self.least, 1)
        check_integer("most", self.most, self.least)

    @property
    @override
    def is_random(self) -> bool:
        return self.selection.is_random

    @override
    def __call__(self, confidence: Tensor, slots: Slots, statistics: tuple[Tensor, ...]) -> Tensor:
        chosen = self.selection(confidence, slots, ())
        masked = slots.count(slots.open)
        # In float64, where 0.7 * 10 is 7.
        cap = (masked.double() * self.share).floor().long().clamp(self.least, self.most)
        cap = torch.maximum(cap, slots.quota)
        return chosen & (rank_in_block(confidence, slots.open_block) < slots.per_slot(cap))


def fill_up(chosen: Tensor, confidence: Tensor, slots: Slots) -> Tensor:
    """Choose more, highest confidence first, where a block has fewer chosen slots than its quota.

    Args:
        chosen: ``(B, K)`` bool.
        confidence: ``(B, K)``.
        slots: the slots.

    Returns:
        ``(B, K)`` bool.

    Example:
        >>> slots = Slots.of(block=torch.zeros(1, 3, dtype=torch.long), quota=torch.tensor([[2]]))
        >>> fill_up(torch.tensor([[True, False, False]]), torch.tensor([[.1, .2, .3]]), slots).long().tolist()
        [[1, 0, 1]]
    """
    return chosen | QuotaSelection()(confidence.masked_fill(chosen, torch.inf), slots, ())


def rank_in_block(confidence: Tensor, block: Tensor) -> Tensor:
    """Place of every slot in its block by falling confidence, from 0; ties go to the lower index.

    Args:
        confidence: ``(B, K)``.
        block: ``(B, K)`` int64.

    Returns:
        ``(B, K)`` int64.

    Example:
        >>> rank_in_block(torch.tensor([[.1, .9, .5, .2]]), torch.tensor([[0, 0, 0, 1]])).tolist()
        [[2, 0, 1, 0]]
    """
    order, place, _ = _sort_in_block(confidence, block)
    return torch.zeros_like(order).scatter_(1, order, place)


def _sort_in_block(confidence: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order ``(B, K)`` by block, then by falling confidence; in it, the place in the block and the block's first."""
    # Sort by confidence, then, keeping that order, by block: each block is a run from best to worst.
    order = confidence.argsort(dim=1, descending=True, stable=True)
    by_block = block.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_block)
    runs = block.gather(1, order)
    first = torch.searchsorted(runs, runs)
    return order, torch.arange(runs.shape[1], device=runs.device) - first, first
