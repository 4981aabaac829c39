"""Looking ahead: several ways to go on are tried in one forward pass, and the most promising is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError, check_between, check_integer
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter, Predict, Proposal
from nap_decode.parts.selection import ThresholdSelection
from nap_decode.parts.slots import Commit, Slots


@dataclass(frozen=True, kw_only=True)
class LookaheadCommitter(Committer):
    """Searches over the order in which slots are filled (LoPA, arXiv 2512.16229).

    After each step the slots next in confidence make a branch each: the canvas with that one slot filled
    too.  The next forward pass predicts the canvas (the anchor) and all branches, side by side in the batch;
    in each row the branch wins whose open slots look most certain, and the committer goes on from there.  A
    branch's worth is ``weight * confidence of its extra token + (1 - weight) * mean confidence of the least
    certain share of its open slots``; the anchor has no extra token and counts 1 for it (reference:
    zhijie-group/LoPA, ``scale_dream_d2f.py``).

    A forward pass has ``1 + branches`` times the rows; it is counted as one.

    Args:
        committer: what is done once the branch is chosen.
        branches: branches besides the anchor; what LoPA's code makes of ``branching_factor``.
        weight: of the extra token's confidence.
        weakest: share of the open slots, the least certain ones, whose confidence is averaged.

    Raises:
        NapDecodeError: a committer that revises or remembers: it would have to for every branch.

    Example:
        >>> from nap_decode import SemiAutoregressiveScheduler, Sampler, demo
        >>> scheduler = SemiAutoregressiveScheduler(block_length=8)
        >>> sampler = Sampler(*demo.load(), scheduler=scheduler, committer=LookaheadCommitter(branches=3))
        >>> out = sampler("1 2 3 4 5 6 7 0 1 2 3 4 = <think 1>", max_new_tokens=8)
    """

    committer: MicroConfidenceCommitter = MicroConfidenceCommitter(selection=ThresholdSelection(0.9))
    branches: int = 2
    weight: float = 0.5
    weakest: float = 0.5

    def __post_init__(self) -> None:
        check_integer("branches", self.branches, 1)
        check_between("weight", self.weight, 0.0, 1.0)
        check_between("weakest", self.weakest, 0.0, 1.0)
        if not isinstance(self.committer, MicroConfidenceCommitter):
            raise NapDecodeError(f"committer must be a MicroConfidenceCommitter, but is {self.committer!r}")
        if self.committer.revises or self.committer.credit is not None or self.committer.selection.compares_steps:
            raise NapDecodeError(
                "a committer that looks ahead cannot revise, give credit or compare steps, because each branch would "
                "need a memory of its own; leave these out"
            )

    @property
    @override
    def is_adaptive(self) -> bool:
        return True

    @property
    @override
    def is_random(self) -> bool:
        return self.committer.is_random

    @property
    @override
    def remembers(self) -> bool:
        return True

    @override
    def compiled(self) -> LookaheadCommitter:
        return replace(self, committer=self.committer.compiled())

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Commit:
        branches = _Branches.of(slots)
        number = len(branches.adds)  # J, the anchor included
        prediction = predict(torch.where(branches.adds, branches.tokens, slots.tokens))  # (J, B, K)
        proposal = self.committer.propose(prediction, slots.repeat(number))
        confidence = rearrange(proposal.confidence, "(j b) k -> j b k", j=number)
        future = self._certainty(confidence, slots.open & ~branches.adds)
        worth = self.weight * branches.confidence + (1 - self.weight) * future
        # Of equals the first wins, and the anchor is the first.
        winner = worth.where(branches.exists, -torch.inf).argmax(0)  # (B,)

        def won(values: Tensor) -> Tensor:  # (J, B, ...) -> (B, ...)
            return values[winner, torch.arange(len(winner), device=winner.device)]

        def won_by_row(values: Tensor) -> Tensor:  # (J * B, K) -> (B, K)
            return won(rearrange(values, "(j b) k -> j b k", j=number))

        added = won(branches.adds)
        slots = replace(slots, committed=slots.committed | added)
        proposal = Proposal(
            won_by_row(proposal.tokens),
            won_by_row(proposal.confidence),
            tuple(map(won_by_row, proposal.statistics)),
        )
        commit = self.committer.commit(proposal, slots)
        left = commit.confidence.where(slots.open & ~commit.chosen, -torch.inf)
        best, place = left.topk(min(self.branches, left.shape[1]), dim=1)
        found = {"columns": slots.index.gather(1, place) + 1, "tokens": commit.tokens.gather(1, place), "scores": best}
        slots.memory.update((f"branch_{name}", values.where(best > -torch.inf, 0)) for name, values in found.items())
        return Commit(
            tokens=torch.where(added, won(branches.tokens), commit.tokens),
            confidence=torch.where(added, won(branches.confidence)[:, None].to(commit.confidence), commit.confidence),
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


@dataclass(frozen=True, eq=False)
class _Branches:
    """The anchor, and the branches proposed at the step before: ``(J, B, K)`` and ``(J, B)``."""

    adds: Tensor
    tokens: Tensor
    confidence: Tensor
    exists: Tensor

    @classmethod
    def of(cls, slots: Slots) -> _Branches:
        num_rows, device = len(slots.index), slots.index.device
        none = torch.zeros(num_rows, 0, device=device)
        columns, tokens, confidence = (
            slots.memory.get(f"branch_{name}", none.to(dtype))  # (B, J - 1)
            for name, dtype in (("columns", torch.int64), ("tokens", torch.int64), ("scores", torch.float32))
        )
        columns = columns - 1  # 0 stands for none
        place = slots.rank.gather(1, columns.clamp(min=0))
        # A column whose block is closed by now has no place.
        adds = torch.arange(slots.index.shape[1], device=device) == place.T[:, :, None]
        adds = adds & (columns >= 0).T[:, :, None] & slots.open
        anchor = torch.ones(1, num_rows, device=device)
        return cls(
            adds=torch.cat([torch.zeros_like(slots.open)[None], adds]),
            tokens=torch.cat([slots.tokens[None], repeat(tokens, "b j -> j b k", k=slots.index.shape[1])]),
            confidence=torch.cat([anchor.to(confidence), confidence.T]),
            exists=torch.cat([anchor.bool(), adds.any(2)]),
        )
