"""MaskGIT (arXiv 2202.04200)."""

from __future__ import annotations

from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.schedule import CosineSchedule
from nap_decode.parts.scheduler import AnyOrderScheduler
from nap_decode.parts.selection import QuotaSelection


def maskgit_cosine(*, position_temperature: float = 0.0) -> Decoder:
    """MaskGIT's cosine schedule: few tokens first, many last.

    MaskGIT lets the temperature of the positions fall to 0 over the steps; here it is the same at all.
    """
    selection = QuotaSelection(position_temperature)
    return Decoder(AnyOrderScheduler(schedule=CosineSchedule()), MicroConfidenceCommitter(selection=selection))
