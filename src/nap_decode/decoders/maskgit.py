"""MaskGIT (arXiv 2202.04200)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.schedule import Schedule, steps_taken
from nap_decode.parts.scheduler import AnyOrderScheduler
from nap_decode.parts.selection import QuotaSelection


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Few tokens first, many last: after a share r of the steps, cos(pi r / 2) of the tokens are masked.

    MaskGIT (arXiv 2202.04200, section 3.2), rounded so that every step commits at least one token.

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
    """MaskGIT's cosine schedule: few tokens first, many last.

    MaskGIT lets the temperature of the positions fall to 0 over the steps; here it is the same at all.
    """
    selection = QuotaSelection(position_temperature)
    return Decoder(AnyOrderScheduler(schedule=CosineSchedule()), MicroConfidenceCommitter(selection=selection))
