"""WINO: wide in, narrow out (arXiv 2507.18578; Feng-Hong/WINO-DLLM)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between, check_integer, check_number, check_part
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Needs, Reviser, Selection, ThresholdSelection, in_blocks
from nap_decode.parts.slots import Decision, Proposal, rank_in_block


@dataclass(frozen=True)
class CappedSelection(Selection):
    """What another selection chooses, but no more than a share of the masked slots of a block.

    Args:
        capped: the other one.
        share: of the masked slots, rounded down.
        least: the cap is not below this,
        most: nor above this.
    """

    capped: Selection
    share: float = 0.7
    least: int = 5
    most: int = 20

    def __post_init__(self) -> None:
        check_part("capped", self.capped, Selection, "ThresholdSelection()")
        check_between("share", self.share, 0.0, 1.0)
        check_integer("least", self.least, 1)
        check_integer("most", self.most, self.least)

    @property
    @override
    def needs(self) -> Needs:
        return self.capped.needs | Needs(adaptive=True)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        slots = proposal.slots
        masked = slots.count(slots.open)
        # In float64, where 0.7 * 10 is 7.
        cap = (masked.double() * self.share).floor().long().clamp(self.least, self.most)
        return self.capped(proposal) & proposal.best(torch.maximum(cap, slots.quota))


@dataclass(frozen=True)
class RemaskReviser(Reviser):
    """Masks a committed token again that the rest of the canvas does not support.

    That is its probability with its slot hidden from the model, found in the same forward pass by a second mask
    token with the same position (see :meth:`Denoiser.__call__`).  In each block fewer slots are masked again than the
    step before committed there, so that decoding proceeds.

    Args:
        back_threshold: support below which a token is masked again.
    """

    back_threshold: float = 0.9

    needs = Needs(adaptive=True, memory=True, committed=True, left_out=True, statistics=("support",))

    def __post_init__(self) -> None:
        check_number("back_threshold", self.back_threshold)

    @override
    def __call__(self, proposal: Proposal, decision: Decision) -> Decision:
        slots, support = proposal.slots, proposal["support"]
        accepted = slots.count(decision.chosen)  # (B, M)
        before = slots.kept("accepted", torch.zeros_like(accepted))
        before = torch.where(before > 0, before, 30)  # as in WINO's reference; at first nothing can be masked anyway
        limit = torch.where(accepted > 1, before - 1, 0)
        slots.memory["accepted"] = torch.where(accepted > 0, accepted, before)
        doubtful = slots.committed & (support < self.back_threshold)
        worst = torch.where(doubtful, -support, -torch.inf)
        remasked = doubtful & (rank_in_block(worst, slots.block) < slots.per_slot(limit))
        return replace(decision, remasked=remasked)


def wino(*, threshold: float = 0.6, back_threshold: float = 0.9, block_length: int | None = 128) -> Decoder:
    """WINO: commit boldly, and mask again what the rest does not support.

    The model must take position ids and 4-D attention masks, and must not be shifted.

    Args:
        threshold: tokens surer than this are committed: 5 to 20 of a block at once, and no more than 70 %.
        back_threshold: see :class:`RemaskReviser`.
        block_length: see :mod:`nap_decode.decoders`.
    """
    bold = CappedSelection(ThresholdSelection(threshold), share=0.7, least=5, most=20)
    committer = MicroConfidenceCommitter(selection=bold, reviser=RemaskReviser(back_threshold))
    return Decoder(in_blocks(block_length), committer)
