"""LocalLeap (arXiv 2510.07081)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import check_integer, check_number
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Proposal, Selection, in_blocks


@dataclass(frozen=True)
class LeapSelection(Selection):
    """Confident slots are anchors, around which less confidence will do.

    Args:
        threshold: slots with at least this confidence are anchors.
        low_threshold: what slots near an anchor need.
        radius: columns to the anchor, at most.

    Example:
        >>> import torch
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.zeros(1, 6, dtype=torch.long), quota=torch.tensor([[1]]))
        >>> LeapSelection(radius=2)(Proposal.of(slots, torch.tensor([[.8, .5, .95, .8, .1, .8]]))).long().tolist()
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
    def __call__(self, proposal: Proposal) -> Tensor:
        slots, confidence = proposal.slots, proposal.confidence
        near = anchor = (confidence >= self.threshold) & slots.open
        # Slots stand in the order of their columns, so that none further away in the list is nearer.
        for distance in range(1, min(self.radius, anchor.shape[1] - 1) + 1):
            same_block = slots.block[:, distance:] == slots.block[:, :-distance]
            close = same_block & (slots.index[:, distance:] - slots.index[:, :-distance] <= self.radius)
            behind = pad(anchor[:, :-distance] & close, (distance, 0))
            in_front = pad(anchor[:, distance:] & close, (0, distance))
            near = near | behind | in_front
        return proposal.fill_up(anchor | (near & (confidence >= self.low_threshold)))


def local_leap(
    *, threshold: float = 0.9, low_threshold: float = 0.75, radius: int = 4, block_length: int | None = 32
) -> Decoder:
    """LocalLeap: less confidence is asked of slots near a sure one; options see :class:`LeapSelection`."""
    selection = LeapSelection(threshold, low_threshold, radius)
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(selection=selection))
