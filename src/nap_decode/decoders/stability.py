"""KLASS: KL-adaptive stability sampling (arXiv 2511.05664; shkim0116/KLASS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between, check_integer, check_number
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Needs, Proposal, Selection, in_blocks


@dataclass(frozen=True)
class StableSelection(Selection):
    """Every slot that is confident and whose distribution stood still (section 3).

    Where no slot of a block does both, its quota is committed.  It keeps the logits of one step; a block has no
    history when it opens, as the model is not asked about closed ones.

    Args:
        threshold: slots with more than this confidence are committed,
        max_divergence: if KL(p_t || p_(t-1)) was below this
        history: in each of this many last steps.
    """

    threshold: float = 0.9
    max_divergence: float = 0.01
    history: int = 2

    needs = Needs(adaptive=True, memory=True, previous=True, statistics=("divergence",))

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_between("max_divergence", self.max_divergence, 0.0, math.inf)
        check_integer("history", self.history, 1)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        slots = proposal.slots
        before = slots.kept("stable", torch.zeros_like(slots.rank))  # (B, W) steps without a change
        stable = torch.where(proposal["divergence"] < self.max_divergence, before.gather(1, slots.index) + 1, 0)
        slots.memory["stable"] = torch.where(slots.rank >= 0, slots.spread(stable), before)
        return proposal.fill_up((proposal.confidence > self.threshold) & (stable >= self.history))


def klass(
    *, threshold: float = 0.9, max_divergence: float = 0.01, history: int = 2, block_length: int | None = 64
) -> Decoder:
    """KLASS: what is sure and did not change for some steps; options see :class:`StableSelection`."""
    selection = StableSelection(threshold, max_divergence, history)
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(selection=selection))
