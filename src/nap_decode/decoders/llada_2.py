"""LLaDA2.0 (arXiv 2512.15745) and LLaDA2.1 (arXiv 2602.08676)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from nap_decode.base.errors import check_integer, check_number
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Needs, Reviser, ThresholdSelection, in_blocks
from nap_decode.parts.slots import Decision, Proposal


@dataclass(frozen=True)
class EditReviser(Reviser):
    """Replaces a committed token where the model is sure of another.

    When nothing in a block is masked any more, it is looked at again until no token changes.

    Args:
        edit_threshold: probability that the other token must exceed.
        max_passes: forward passes over a block without masks, at most.
    """

    edit_threshold: float = 0.9
    max_passes: int = 16

    needs = Needs(adaptive=True, memory=True, committed=True, statistics=("probability",))

    def __post_init__(self) -> None:
        check_number("edit_threshold", self.edit_threshold)
        check_integer("max_passes", self.max_passes, 1)

    @override
    def __call__(self, proposal: Proposal, decision: Decision) -> Decision:
        slots, is_sure = proposal.slots, proposal["probability"] > self.edit_threshold
        edited = slots.committed & (proposal.tokens != slots.tokens) & is_sure
        had_masks, has_edits = slots.count(slots.open) > 0, slots.count(edited) > 0  # (B, M)
        passes = slots.kept("edit_passes", torch.zeros_like(slots.quota)) + (slots.count(slots.committed) > 0)
        passes = torch.where(had_masks, 0, passes)
        slots.memory["edit_passes"] = passes
        unsettled = had_masks | (has_edits & (passes < self.max_passes))
        return replace(decision, chosen=decision.chosen | edited, unsettled=unsettled)


def llada2(*, threshold: float = 0.95, block_length: int = 32) -> Decoder:
    """LLaDA2.0's decoder: a threshold, in blocks on the grid of its attention.

    Confidences are those of the tempered and cut distribution, as there.
    """
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(threshold), scores_proposal=True)
    return Decoder(in_blocks(block_length, on_grid=True), committer)


def llada21_editing(
    *, threshold: float = 0.95, edit_threshold: float = 0.9, max_passes: int = 16, block_length: int = 32
) -> Decoder:
    """LLaDA2.1's decoder: as LLaDA2.0's, and committed tokens are replaced by surer ones, see :class:`EditReviser`."""
    decoder = llada2(threshold=threshold, block_length=block_length)
    return decoder.set(reviser=EditReviser(edit_threshold, max_passes))
