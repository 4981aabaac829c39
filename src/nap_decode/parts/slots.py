"""The slots that a committer decides about at one step, and its decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.batching import pad_to
from nap_decode.base.errors import NapDecodeError
from nap_decode.base.lazy import lazy
from nap_decode.base.random import uniform


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of the open blocks, packed to the left of each row.

    Args:
        index: ``(B, K)`` int64, their columns, which are positions counted from the row's first token; 0 where a
            row has fewer than K.
        block: ``(B, K)`` int64, their blocks; M where a row has fewer than K.
        committed: ``(B, K)`` bool, slots that hold a token which a reviser may replace or mask again.
        rank: ``(B, W)`` int64, for every column of the rows its place among the K, -1 if it has none.
        places: ``(T,)`` int64, the slots there are, among all ``B * K``, row after row.
        quota: ``(B, M)`` int64, tokens that each block shall commit.
        seeds: ``(B,)`` int64.
        step: ``(B,)`` int64, index of the step in each row's schedule.
        row_tokens: ``(B, W)`` int64, the rows as they stand.
        row_offsets: ``(B, W)`` int64, columns from the first slot of a slot's block.
        memory: what parts keep from step to step, each under a name of its own; see :meth:`kept`.
        ahead: ``(B, 1 + M, M)`` int64, for a part that needs it: what each block commits at least, plus 1, or 0 if it
            is closed; first as things stand, then with one token more in each of the blocks.  The slots are then those
            of all blocks that any of this opens.
    """

    index: Tensor
    block: Tensor
    committed: Tensor
    rank: Tensor
    places: Tensor
    quota: Tensor
    seeds: Tensor
    step: Tensor
    row_tokens: Tensor
    row_offsets: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    ahead: Tensor | None = None

    @classmethod
    def pack(
        cls,
        wanted: Tensor,
        block: Tensor,
        quota: Tensor,
        *,
        width: int,
        total: int,
        committed: Tensor | None = None,
        **fields: Any,
    ) -> Slots:
        """Collect slots; without a question to the device, as their numbers are known.

        Args:
            wanted: ``(B, W)`` bool, the slots.
            block: ``(B, W)`` int64, block of every slot to decode, -1 elsewhere.
            quota: as it is kept, like the other fields.
            width: K, the largest number of slots in a row, or more.
            total: T, the number of all slots, or more.
            committed: ``(B, W)`` bool, slots that are not masked; None if all wanted ones are.
            fields: seeds, step, row_tokens, row_offsets, memory and ahead.
        """
        #   wanted  . x . x x .   ->   rank  -1 0 -1 1 2 -1   ->   index  1 3 4
        rank = torch.where(wanted, wanted.cumsum(1) - 1, -1)
        columns = torch.arange(block.shape[1], device=block.device).expand_as(block)
        index = _pack(columns, wanted, rank, width)
        valid = torch.arange(width, device=block.device) < wanted.sum(1, keepdim=True)
        # All alike, as in a batch of one, nothing is to be packed.
        places = torch.arange(valid.numel(), device=block.device)
        if total < valid.numel():
            flat = valid.reshape(1, -1)
            places = _pack(places[None], flat, flat.cumsum(1) - 1, total)[0]
        return cls(
            index=index,
            block=torch.where(valid, block.gather(1, index), quota.shape[1]),
            committed=torch.zeros_like(valid) if committed is None else valid & committed.gather(1, index),
            rank=rank,
            places=places,
            quota=quota,
            **fields,
        )

    @classmethod
    def of(cls, block: Tensor, quota: Tensor, **fields: Any) -> Slots:
        """Slots ``block (B, K)`` of rows that consist of nothing else, to try a part by hand; other fields as given."""
        columns = torch.arange(block.shape[1], device=block.device).expand_as(block)
        none, places = torch.zeros_like(block), torch.arange(block.numel(), device=block.device)
        others = {"index": columns, "rank": columns, "row_offsets": columns, "places": places}
        others |= {"committed": none.bool(), "seeds": none.sum(1), "step": none.sum(1), "row_tokens": none}
        return cls(block=block, quota=quota, **(others | fields))

    @lazy
    def open(self) -> Tensor:
        """``(B, K)`` bool: the slots that are masked, and so may be chosen."""
        return (self.block < self.quota.shape[1]) & ~self.committed

    @lazy
    def open_block(self) -> Tensor:
        """``(B, K)`` int64: the block of every slot that may be chosen, M for the others."""
        return torch.where(self.open, self.block, self.quota.shape[1])

    @lazy
    def tokens(self) -> Tensor:
        """``(B, K)`` int64: ids that the slots hold; the mask id, unless they are committed."""
        return self.row_tokens.gather(1, self.index)

    @lazy
    def offsets(self) -> Tensor:
        """``(B, K)`` int64: columns from the first slot of the block."""
        return self.row_offsets.gather(1, self.index)

    @lazy
    def _unpacked(self) -> Tensor:
        """``(B, K)``: where each slot stands among the T."""
        among = torch.arange(len(self.places), device=self.places.device)
        # A place that is named twice is the same slot both times; the first is taken, whatever the order of writing.
        where = torch.zeros(self.block.numel(), dtype=torch.int64, device=among.device)
        return where.scatter_reduce_(0, self.places, among, "amin", include_self=False).view_as(self.block)

    def unpack(self, values: Tensor) -> Tensor:
        """Bring values of the T slots back to their rows, ``(T, ...) -> (B, K, ...)``; any where there is no slot."""
        if len(self.places) == self.block.numel():
            return values.view(*self.block.shape, *values.shape[1:])
        return values[self._unpacked]

    def total(self, values: Tensor) -> Tensor:
        """Sums over the slots of each block, ``(B, K) -> (B, M)``."""
        sums = values.new_zeros(len(self.block), self.quota.shape[1] + 1)
        return sums.scatter_add_(1, self.block, values)[:, :-1]

    def count(self, where: Tensor) -> Tensor:
        """How many slots of each block are in ``where``, ``(B, K) bool -> (B, M)`` int64."""
        return self.total(where.long())

    def per_slot(self, values: Tensor) -> Tensor:
        """What each slot's block has, ``(B, M) -> (B, K)``; 0 where a row has fewer than K slots."""
        return torch.nn.functional.pad(values, (0, 1)).gather(1, self.block)

    def spread(self, values: Tensor) -> Tensor:
        """Bring values of the K slots back to the columns of the rows, ``(B, K) -> (B, W)``.

        Columns without a slot get the value of some slot; mask them with ``rank >= 0``.
        """
        return values.gather(1, self.rank.clamp(min=0))

    def kept(self, name: str, like: Tensor) -> Tensor:
        """What a part put in ``memory[name]`` at an earlier step, padded or cut to the shape of ``like``, or that.

        The batch changes while it is decoded: rows leave and others come, and their widths with them.  So what
        is kept is a tensor with the batch as its first dimension, in which zero stands for nothing.
        """
        return pad_to(self.memory[name], like.shape[1:]) if name in self.memory else like

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """``(B, K)`` places at an earlier step, which kept its ``rank + 1`` by this name, and whether there was one."""
        place = self.kept(name, torch.zeros_like(self.rank)).gather(1, self.index) - 1
        return place.clamp(min=0), place >= 0

    def uniform(self, stream: int) -> Tensor:
        """``(B, K)`` float32: a uniform draw on [0, 1) for every slot, from the row's own stream."""
        return uniform(self.seeds, self.step, stream, self.index)

    def repeat(self, times: int) -> Slots:
        """The slots of the batch several times over, one batch after the other."""
        names = [f.name for f in fields(self) if f.name not in ("places", "memory", "ahead")]
        repeated: dict[str, Any] = {name: torch.cat([getattr(self, name)] * times) for name in names}
        first = torch.arange(times, device=self.places.device)[:, None] * self.block.numel()
        return replace(self, places=(self.places + first).flatten(), **repeated)


def _pack(values: Tensor, wanted: Tensor, rank: Tensor, width: int) -> Tensor:
    """Move wanted values to the left, ``(B, L) -> (B, width)``, zeros behind them."""
    packed = torch.zeros(len(values), width + 1, dtype=torch.int64, device=values.device)
    # Values that are not wanted all write to the last column, which is cut off.
    packed.scatter_(1, torch.where(wanted, rank, width), values)
    return packed[:, :width]


@dataclass(frozen=True, eq=False)
class Decision:
    """What a committer decides at one step.

    Args:
        tokens: ``(B, K)`` int64, a token for every slot.
        confidence: ``(B, K)``, how sure the model is of it.
        chosen: ``(B, K)`` bool, slots that get their token now: masked ones are committed, committed ones are edited.
        remasked: ``(B, K)`` bool, committed slots that are masked again.
        unsettled: ``(B, M)`` bool, blocks that stay open even if no slot of theirs is masked.
    """

    tokens: Tensor
    confidence: Tensor
    chosen: Tensor
    remasked: Tensor | None = None
    unsettled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """What is proposed for the slots of a step.

    Args:
        slots: the slots.
        tokens: ``(B, K)`` int64, a token for each.
        confidence: ``(B, K)``, how sure the model is of it.
        statistics: ``(B, K)`` each: what the parts' ``needs`` asked for besides; ``proposal["negative_entropy"]``.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1]]), quota=torch.tensor([[2, 0]]))
        >>> proposal = Proposal.of(slots, torch.tensor([[0.1, 0.9, 0.5, 0.2]]))
        >>> proposal.rank().tolist()
        [[2, 0, 1, 0]]
        >>> proposal.fill_up(proposal.confidence < 0.2).long().tolist()
        [[1, 1, 0, 0]]
    """

    slots: Slots
    tokens: Tensor
    confidence: Tensor
    statistics: Mapping[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Slots, confidence: Tensor, **statistics: Tensor) -> Proposal:
        """One with tokens that do not matter, to try a selection by hand."""
        return cls(slots, torch.zeros_like(slots.block), confidence, statistics)

    def __getitem__(self, statistic: Any) -> Tensor:
        """``(B, K)`` values of a statistic, by its name or function; an error if no part says that it needs it."""
        if statistic not in self.statistics:
            raise NapDecodeError(
                f"nobody asked for {statistic!r}; a part that looks at it says so: needs = Needs(statistics=(...,))"
            )
        return self.statistics[statistic]

    def rank(self, score: Tensor | None = None) -> Tensor:
        """``(B, K)`` int64: place of every open slot in its block by falling score (confidence), from 0."""
        return rank_in_block(self.confidence if score is None else score, self.slots.open_block)

    def best(self, number: Tensor, score: Tensor | None = None) -> Tensor:
        """``(B, K)`` bool: as many open slots of each block as ``number (B, M)`` says, highest score first."""
        return self.rank(score) < self.slots.per_slot(number) * self.slots.open

    def fill_up(self, chosen: Tensor) -> Tensor:
        """Open ones among the chosen ``(B, K)``, and more, highest confidence first, up to the quota of each block."""
        chosen = chosen & self.slots.open
        return chosen | self.best(self.slots.quota, self.confidence.masked_fill(chosen, torch.inf))

    def mean(self, values: Tensor) -> Tensor:
        """``(B, K)``: for every slot the mean of the values ``(B, K)`` over the open slots of its block."""
        slots = self.slots
        number = slots.count(slots.open).clamp(min=1)
        return slots.per_slot(slots.total(values.where(slots.open, 0)) / number)


def rank_in_block(score: Tensor, block: Tensor) -> Tensor:
    """``(B, K)`` int64: place of every slot in its block by falling score, from 0; ties go to the lower index.

    Example:
        >>> rank_in_block(torch.tensor([[.1, .9, .5, .2]]), torch.tensor([[0, 0, 0, 1]])).tolist()
        [[2, 0, 1, 0]]
    """
    order, place, _ = sort_in_block(score, block)
    return torch.zeros_like(order).scatter_(1, order, place)


def sort_in_block(score: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order ``(B, K)`` by block, then by falling score; in it, the place in the block and the block's first."""
    # Sort by score, then, keeping that order, by block: each block is a run from best to worst.
    order = score.argsort(dim=1, descending=True, stable=True)
    by_block = block.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_block)
    runs = block.gather(1, order)
    first = torch.searchsorted(runs, runs)
    return order, torch.arange(runs.shape[1], device=runs.device) - first, first
