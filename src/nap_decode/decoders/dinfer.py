"""dInfer's ``HierarchyDecoder`` (arXiv 2510.08666; inclusionAI/dInfer)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import check_number
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Proposal, Selection, in_blocks, rank_in_block


@dataclass(frozen=True)
class HierarchySelection(Selection):
    """The best slot of every run of masks, so that each forward pass halves the runs.

    Args:
        threshold: slots above this confidence are committed wherever they are.
        low_threshold: the best of a run is committed if it is above this.

    Example:
        >>> import torch
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 0]]), quota=torch.tensor([[1]]),
        ...                  index=torch.tensor([[0, 1, 5, 6]]))  # two runs
        >>> HierarchySelection()(Proposal.of(slots, torch.tensor([[.5, .6, .7, .3]]))).long().tolist()
        [[0, 1, 1, 0]]
    """

    threshold: float = 0.9
    low_threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("low_threshold", self.low_threshold)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        slots, confidence = proposal.slots, proposal.confidence
        follows = (slots.index.diff(dim=1) == 1) & (slots.open_block.diff(dim=1) == 0)
        runs = (~pad(follows, (1, 0))).cumsum(1)  # a number for every run
        best = rank_in_block(confidence, runs) == 0
        chosen = (best & (confidence > self.low_threshold)) | (confidence > self.threshold)
        return proposal.fill_up(chosen)


def hierarchical(*, threshold: float = 0.9, low_threshold: float = 0.4, block_length: int | None = 32) -> Decoder:
    """Hierarchical decoding: the best of every run of masks; options see :class:`HierarchySelection`."""
    selection = HierarchySelection(threshold, low_threshold)
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(selection=selection))
