"""The slots that a committer decides about at one step, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nap_decode.canvas import Canvas
from nap_decode.randomness import uniform
from nap_decode.schedulers import Partition


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of the open blocks, packed to the left of each row.

    Args:
        index: ``(B, K)`` int64, their columns in the canvas; 0 where a row has fewer than K.
        block: ``(B, K)`` int64, their blocks; M where a row has fewer than K.
        positions: ``(B, K)`` int64, counted from the row's first token.
        offsets: ``(B, K)`` int64, columns from the first slot of the block.
        tokens: ``(B, K)`` int64, ids that they hold; the mask id, unless they are committed.
        committed: ``(B, K)`` bool, slots that hold a token which a reviser may replace or mask again.
        rank: ``(B, L)`` int64, for every column of the canvas its place among the K, -1 if it has none.
        quota: ``(B, M)`` int64, tokens that each block shall commit.
        seeds: ``(B,)`` int64.
        step: index of the step in the schedule.
        memory: what parts keep from step to step of one decode, each under a name of its own; tensors have
            the batch as their first dimension.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1, 1]]), quota=torch.tensor([[2, 1]]))
        >>> slots.positions.tolist()
        [[0, 1, 2, 3, 4]]
    """

    index: Tensor
    block: Tensor
    positions: Tensor
    offsets: Tensor
    tokens: Tensor
    committed: Tensor
    rank: Tensor
    quota: Tensor
    seeds: Tensor
    step: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        canvas: Canvas,
        partition: Partition,
        tokens: Tensor,
        masked: Tensor,
        open_blocks: Tensor,
        quota: Tensor,
        width: int,
        seeds: Tensor,
        *,
        step: int = 0,
        memory: dict[str, Any] | None = None,
        revises: bool = False,
    ) -> Slots:
        """Collect the slots of the open blocks.

        Args:
            canvas: the canvas.
            partition: the scheduler's blocks.
            tokens: ``(B, L)`` int64, the canvas as it stands.
            masked: ``(B, L)`` bool, slots still to decode.
            open_blocks: ``(B, M)`` bool.
            quota: ``(B, M)`` int64.
            width: K, the largest number of such slots in a row; known on the host, so that shapes are.
            seeds: ``(B,)`` int64.
            step: index of the step.
            memory: see :class:`Slots`.
            revises: whether committed slots are collected too.
        """
        block = partition.block
        #   wanted  . x . x x .   ->   rank  -1 0 -1 1 2 -1   ->   index  1 3 4
        wanted = (canvas.decodable if revises else masked) & open_blocks.gather(1, block.clamp(min=0))
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
            offsets=partition.offsets.gather(1, index),
            tokens=tokens.gather(1, index),
            committed=valid & ~masked.gather(1, index) if revises else torch.zeros_like(valid),
            rank=rank,
            quota=quota,
            seeds=seeds,
            step=step,
            memory={} if memory is None else memory,
        )

    @classmethod
    def of(cls, block: Tensor, quota: Tensor, **fields: Any) -> Slots:
        """Slots of canvases that consist of nothing else, to try a part by hand.

        Args:
            block: ``(B, K)`` int64.
            quota: ``(B, M)`` int64.
            fields: any other field of :class:`Slots`.
        """
        index = torch.arange(block.shape[1], device=block.device).expand_as(block)
        names = ("index", "positions", "offsets", "rank")
        tokens = torch.zeros_like(block)
        seeds = torch.zeros(len(block), dtype=torch.int64, device=block.device)
        others = {"tokens": tokens, "committed": tokens.bool(), "seeds": seeds}
        return cls(block=block, quota=quota, **(dict.fromkeys(names, index) | others | fields))

    @cached_property
    def open(self) -> Tensor:
        """``(B, K)`` bool: the slots that are masked, and so may be chosen."""
        return (self.block < self.quota.shape[1]) & ~self.committed

    @cached_property
    def open_block(self) -> Tensor:
        """``(B, K)`` int64: the block of every slot that may be chosen, M for the others."""
        return torch.where(self.open, self.block, self.quota.shape[1])

    def count(self, where: Tensor) -> Tensor:
        """How many slots of each block are in ``where``, ``(B, K) bool -> (B, M)`` int64."""
        counts = torch.zeros(len(self.block), self.quota.shape[1] + 1, dtype=torch.int64, device=self.block.device)
        return counts.scatter_add_(1, self.block, where.long())[:, :-1]

    def per_slot(self, values: Tensor) -> Tensor:
        """What each slot's block has, ``(B, M) -> (B, K)``; 0 where a row has fewer than K slots."""
        return torch.nn.functional.pad(values, (0, 1)).gather(1, self.block)

    def spread(self, values: Tensor) -> Tensor:
        """Bring values of the K slots back to the columns of the canvas, ``(B, K) -> (B, L)``.

        Columns without a slot get the value of some slot; mask them with ``rank >= 0``.
        """
        return values.gather(1, self.rank.clamp(min=0))

    def recall(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Where these slots stood among those of an earlier step, whose ``rank`` is given.

        Returns:
            ``(B, K)`` int64 places, and ``(B, K)`` bool: whether they were there at all.
        """
        place = rank.gather(1, self.index)
        return place.clamp(min=0), place >= 0

    def uniform(self, stream: int) -> Tensor:
        """``(B, K)`` float32: a uniform draw on [0, 1) for every slot, from the row's own stream."""
        return uniform(self.seeds, self.step, stream, self.positions)


@dataclass(frozen=True, eq=False)
class Commit:
    """What a committer decided.

    Args:
        tokens: ``(B, K)`` int64, a token for every slot.
        confidence: ``(B, K)``, how sure the model is of it.
        chosen: ``(B, K)`` bool, slots that get their token now: masked ones are committed, committed ones
            are edited.
        remasked: ``(B, K)`` bool, committed slots that are masked again.
        unsettled: ``(B, M)`` bool, blocks that shall stay open even if no slot of theirs is masked.

    Example:
        >>> scores = torch.tensor([[0.2, 0.9]])
        >>> Commit(tokens=torch.tensor([[5, 7]]), confidence=scores, chosen=scores > 0.5).chosen.tolist()
        [[False, True]]
    """

    tokens: Tensor
    confidence: Tensor
    chosen: Tensor
    remasked: Tensor | None = None
    unsettled: Tensor | None = None
