"""LoPA: lookahead parallel decoding (arXiv 2512.16229; zhijie-group/LoPA, ``scale_dream_d2f.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError, check_between, check_flag, check_integer, check_part
from nap_decode.parts import Committer, Decoder, MicroConfidenceCommitter, Needs, Predict, ThresholdSelection, in_blocks
from nap_decode.parts.slots import Decision, Proposal, Slots


@dataclass(frozen=True, kw_only=True)
class LookaheadCommitter(Committer):
    """Searches over the order in which slots are filled.

    After each step the slots next in confidence make a branch each: the canvas with that one slot filled
    too.  The next forward pass predicts the canvas (the anchor) and all branches, side by side in the batch;
    in each row the branch wins whose open slots look most certain, and the committer goes on from there.  A
    branch's worth is ``weight * confidence of its extra token + (1 - weight) * mean confidence of the least
    certain share of its open slots``; the anchor has no extra token and counts 1 for it.

    A forward pass has ``1 + branches`` times the rows; it is counted as one.

    Args:
        inner: what is done once the branch is chosen; nothing that revises or remembers, as it would have to for every
            branch.
        branches: branches besides the anchor; what LoPA's code makes of ``branching_factor``.
        weight: of the extra token's confidence.
        weakest: share of the open slots, the least certain ones, whose confidence is averaged.
        opens_blocks: whether the extra token may open blocks, each branch for itself, as in LoPA's code, so that the
            branch is judged by them and goes on in them; otherwise they open between the steps.
    """

    inner: MicroConfidenceCommitter = MicroConfidenceCommitter(selection=ThresholdSelection(0.9))
    branches: int = 2
    weight: float = 0.5
    weakest: float = 0.5
    opens_blocks: bool = False

    def __post_init__(self) -> None:
        check_integer("branches", self.branches, 1)
        check_between("weight", self.weight, 0.0, 1.0)
        check_between("weakest", self.weakest, 0.0, 1.0)
        check_flag("opens_blocks", self.opens_blocks)
        check_part("inner", self.inner, MicroConfidenceCommitter, "MicroConfidenceCommitter()")
        if self.inner.needs.memory:
            raise NapDecodeError(
                "a committer that looks ahead cannot revise, give credit or compare steps, because each branch would "
                "need a memory of its own; leave these out"
            )

    @property
    @override
    def needs(self) -> Needs:
        return self.inner.needs | Needs(adaptive=True, memory=True, ahead=self.opens_blocks)

    @override
    def compiled(self, compile: Callable[[Any], Any]) -> LookaheadCommitter:
        return replace(self, inner=self.inner.compiled(compile))

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Decision:
        branches = _Branches.of(slots)
        number, rows, _ = branches.adds.shape  # J, the anchor included, and B
        prediction = predict(torch.where(branches.adds, branches.tokens, slots.tokens))  # (J * B, K)
        proposal = self.inner.propose(prediction, slots.repeat(number))
        block, quota = _opened(slots, branches.adds)
        is_open = slots.open & (block < quota.shape[2]) & ~branches.adds
        future = self._certainty(proposal.confidence.view_as(branches.adds), is_open)
        worth = self.weight * branches.confidence + (1 - self.weight) * future
        # Of equals the first wins, and the anchor is the first.
        winner = worth.where(branches.exists, -torch.inf).argmax(0)  # (B,)
        won = winner * rows + torch.arange(rows, device=winner.device)  # the same among J * B
        added, token, sure, block, quota = (values.flatten(0, 1)[won] for values in (*branches[:3], block, quota))
        slots = replace(slots, block=block, quota=quota, committed=slots.committed | added)
        statistics = {name: values[won] for name, values in proposal.statistics.items()}
        commit = self.inner.decide(Proposal(slots, proposal.tokens[won], proposal.confidence[won], statistics))
        left = commit.confidence.where(slots.open & ~commit.chosen, -torch.inf)
        best, place = left.topk(min(self.branches, left.shape[1]), dim=1)
        found = {"columns": slots.index.gather(1, place) + 1, "tokens": commit.tokens.gather(1, place), "scores": best}
        slots.memory.update((f"branch_{name}", values.where(best > -torch.inf, 0)) for name, values in found.items())
        return Decision(
            tokens=torch.where(added, token, commit.tokens),
            confidence=torch.where(added, sure[:, None].to(commit.confidence), commit.confidence),
            chosen=commit.chosen | added,
        )

    def _certainty(self, confidence: Tensor, is_open: Tensor) -> Tensor:
        """Mean confidence of the least certain share of the open slots, ``(J, B, K) -> (J, B)``; 1 without any."""
        rising = confidence.where(is_open, torch.inf).sort(dim=2).values
        number = is_open.sum(2)
        counted = (number * self.weakest).long().clamp(min=1)
        among = torch.arange(rising.shape[2], device=rising.device) < counted[:, :, None]
        mean = rising.where(among & rising.isfinite(), 0).sum(2) / counted
        return mean.where(number > 0, 1)


class _Branches(NamedTuple):
    """The anchor, and the branches proposed at the step before."""

    adds: Tensor  # (J, B, K) bool, the extra slot
    tokens: Tensor  # (J, B, K) int64, what it is filled with
    confidence: Tensor  # (J, B)
    exists: Tensor  # (J, B) bool

    @classmethod
    def of(cls, slots: Slots) -> _Branches:
        none = torch.zeros(len(slots.index), 0, device=slots.index.device)
        columns, tokens, confidence = (
            slots.memory.get(f"branch_{name}", none.to(dtype)).T  # (J - 1, B)
            for name, dtype in (("columns", torch.int64), ("tokens", torch.int64), ("scores", torch.float32))
        )
        columns = columns - 1  # 0 stands for none
        place = slots.rank.T.gather(0, columns.clamp(min=0))
        # A column whose block is closed by now has no place.
        adds = torch.arange(slots.index.shape[1], device=place.device) == place[:, :, None]
        adds = adds & (columns >= 0)[:, :, None] & slots.open
        anchor = torch.ones(1, len(slots.index), device=place.device)
        return cls(
            adds=torch.cat([torch.zeros_like(slots.open)[None], adds]),
            tokens=torch.cat([slots.tokens[None], tokens[:, :, None].expand_as(adds)]),
            confidence=torch.cat([anchor.to(confidence), confidence]),
            exists=torch.cat([anchor.bool(), adds.any(2)]),
        )


def _opened(slots: Slots, adds: Tensor) -> tuple[Tensor, Tensor]:
    """Each branch's blocks ``(J, B, K)``, M for a slot that is closed in it, and its quotas ``(J, B, M)``."""
    block, quota = slots.block.expand_as(adds), slots.quota.expand(len(adds), -1, -1)
    if slots.ahead is None:
        return block, quota
    added = torch.where(adds, block + 1, 0).amax(2)  # (J, B)
    ahead = slots.ahead[torch.arange(len(slots.block), device=added.device), added]  # (J, B, M)
    closed = pad(ahead, (0, 1)).gather(2, block) == 0
    return block.masked_fill(closed, quota.shape[2]), (ahead - 1).clamp(min=0)


def lopa(
    *,
    threshold: float = 0.9,
    branches: int = 2,
    weight: float = 0.5,
    weakest: float = 0.5,
    block_length: int | None = 32,
) -> Decoder:
    """LoPA: looks ahead over orders of filling; options see :class:`LookaheadCommitter`."""
    inner = MicroConfidenceCommitter(selection=ThresholdSelection(threshold))
    committer = LookaheadCommitter(inner=inner, branches=branches, weight=weight, weakest=weakest)
    return Decoder(in_blocks(block_length), committer)
