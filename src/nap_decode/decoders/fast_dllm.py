"""Fast-dLLM (arXiv 2505.22618; NVlabs/Fast-dLLM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Proposal, Selection, ThresholdSelection, in_blocks


@dataclass(frozen=True)
class FactorSelection(Selection):
    """The largest n with ``c_(n) >= 1 - factor / (n + 1)`` (section 3.3).

    Args:
        factor: the larger, the more slots are committed.

    Example:
        >>> import torch
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 0]]), quota=torch.tensor([[1]]))
        >>> FactorSelection(1.0)(Proposal.of(slots, torch.tensor([[.9, .5, .7, .7]]))).long().tolist()
        [[1, 0, 1, 0]]
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_between("factor", self.factor, 0.0, math.inf)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        # c_(n) falls and the bound rises with n, so what passes is a prefix.
        n = proposal.rank() + 1
        return proposal.fill_up(proposal.confidence >= 1 - self.factor / (n + 1))


def fast_dllm_threshold(*, threshold: float = 0.9, block_length: int | None = 32) -> Decoder:
    """Fast-dLLM's threshold: whatever is sure enough, and the best."""
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(selection=ThresholdSelection(threshold)))


def fast_dllm_factor(*, factor: float = 1.0, block_length: int | None = 32) -> Decoder:
    """Fast-dLLM's factor: the more tokens, the surer each must be."""
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(selection=FactorSelection(factor)))
