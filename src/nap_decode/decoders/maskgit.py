"""MaskGIT (arXiv 2202.04200)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.parts import AnyOrderScheduler, Decoder, MicroConfidenceCommitter, QuotaSelection
from nap_decode.parts.schedule import Schedule, steps_taken


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Few tokens first, many last: after a share r of the steps, cos(pi r / 2) of the tokens are masked (section 3.2).

    Rounded so that every step commits at least one token.

    Example:
        >>> CosineSchedule()(torch.tensor([12]), torch.tensor([6]), torch.empty(1, 0)).tolist()
        [[1, 2, 3, 6, 8, 12]]
    """

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        taken = steps_taken(steps)
        share = taken.double() / steps.clamp(min=1)[:, None]
        # Without the 1e-9 the cosine of a right angle, 6e-17, would leave a token.
        masked = (tokens[:, None] * (share * (math.pi / 2)).cos() - 1e-9).ceil().clamp(min=0).long()
        to_come = steps[:, None] - taken
        return torch.minimum(torch.maximum(tokens[:, None] - masked, taken), tokens[:, None] - to_come)


def maskgit_cosine(*, position_temperature: float = 0.0) -> Decoder:
    """MaskGIT's cosine schedule; the temperature of the positions, which falls to 0 there, is the same at all steps."""
    selection = QuotaSelection(position_temperature)
    return Decoder(AnyOrderScheduler(schedule=CosineSchedule()), MicroConfidenceCommitter(selection=selection))
