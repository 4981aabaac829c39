"""Dream (arXiv 2508.15487; ``generation_utils.py``, ``_sample``).

Its steps may be more than there are tokens; those that commit nothing cost no forward pass.  As there, confidences are
those of the tempered and cut distribution.
"""

from __future__ import annotations

from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.schedule import AncestralSchedule, DreamSchedule, Schedule
from nap_decode.parts.scheduler import AnyOrderScheduler
from nap_decode.parts.selection import QuotaSelection


def dream_origin(*, eps: float = 1e-3) -> Decoder:
    """Dream's ``alg="origin"``: each mask is revealed with probability 1 - s/t.

    Args:
        eps: the time at the last step.
    """
    return _dream("random", AncestralSchedule(eps))


def dream_maskgit_plus(*, alg_temp: float | None = None, eps: float = 1e-3) -> Decoder:
    """Dream's ``alg="maskgit_plus"``: highest probability first.

    Args:
        alg_temp: draws positions from softmax(confidence / alg_temp) instead of taking the best.
        eps: the time at the last step.
    """
    return _dream("probability", DreamSchedule(eps), alg_temp)


def dream_topk_margin(*, alg_temp: float | None = None, eps: float = 1e-3) -> Decoder:
    """Dream's ``alg="topk_margin"``: largest p1 - p2 first; options as :func:`dream_maskgit_plus`."""
    return _dream("margin", DreamSchedule(eps), alg_temp)


def dream_entropy(*, alg_temp: float | None = None, eps: float = 1e-3) -> Decoder:
    """Dream's ``alg="entropy"``: lowest entropy first; options as :func:`dream_maskgit_plus`."""
    return _dream("negative_entropy", DreamSchedule(eps), alg_temp)


def _dream(confidence: str, schedule: Schedule, alg_temp: float | None = None) -> Decoder:
    selection = QuotaSelection(0.0 if alg_temp is None else alg_temp)
    committer = MicroConfidenceCommitter(confidence=confidence, selection=selection, scores_proposal=True)
    return Decoder(AnyOrderScheduler(schedule=schedule), committer)
