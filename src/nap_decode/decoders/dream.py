"""Dream (arXiv 2508.15487; ``generation_utils.py``, ``_sample``).

Its steps may be more than there are tokens; those that commit nothing cost no forward pass.  As there, confidences are
those of the tempered and cut distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import AnyOrderScheduler, Decoder, MicroConfidenceCommitter, Needs, QuotaSelection
from nap_decode.parts.schedule import Schedule, steps_taken


@dataclass(frozen=True)
class _TimeSchedule(Schedule):
    """One that goes by the time, on ``linspace(1, eps, steps + 1)``, whether or not there is something to commit."""

    eps: float = 1e-3

    may_skip = True

    def __post_init__(self) -> None:
        check_between("eps", self.eps, 0.0, 0.5)

    def _times(self, steps: Tensor) -> Tensor:
        """``(R, S + 1)`` float32: for every row ``torch.linspace(1, eps, its steps + 1)``, then ``eps``."""
        times = torch.full((len(steps), int(steps.max()) + 1), self.eps, device=steps.device)
        for number in set(steps.tolist()):
            times[steps == number, : number + 1] = torch.linspace(1, self.eps, number + 1, device=steps.device)
        return times


@dataclass(frozen=True)
class DreamSchedule(_TimeSchedule):
    """Dream's: of m masked tokens int(m (1 - s/t)) at each step from time t to s, and all that is left at the last.

    Computed in float32 as there, because rounding decides.

    Args:
        eps: the time at the end.

    Example:
        >>> DreamSchedule()(torch.tensor([12]), torch.tensor([8]), torch.empty(1, 0)).tolist()
        [[1, 2, 3, 4, 5, 7, 9, 12]]
    """

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        times = self._times(steps)
        committed = [torch.zeros_like(tokens)]
        for i, (t, s) in enumerate(zip(times.T[:-1], times.T[1:], strict=True)):
            masked = tokens - committed[-1]
            share = torch.where(i + 1 < steps, 1 - s / t, 1.0)
            committed.append(committed[-1] + (masked.float() * share).long())
        return torch.stack(committed[1:], dim=1)


@dataclass(frozen=True)
class AncestralSchedule(_TimeSchedule):
    """Every masked token is committed with probability 1 - s/t at each step from time t to s, surely at the last.

    It is ancestral sampling of masked diffusion (MDLM, arXiv 2406.07524, equation 6) and Dream's ``origin``.  A token
    is still masked after a step with probability s, so that one uniform draw per token says when it is committed.
    Which tokens they are is the committer's business: with the confidence ``"random"`` the law is that of the published
    samplers.

    Args:
        eps: the time at the end; 1e-3 in Dream, 1e-5 in MDLM.

    Example:
        >>> draws = torch.tensor([[0.9, 0.1, 0.6, 0.3]])
        >>> AncestralSchedule()(torch.tensor([4]), torch.tensor([2]), draws).tolist()
        [[2, 4]]
    """

    needs = Needs(random=True)

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        after = self._times(steps)[:, 1:]  # (R, S)
        counted = torch.arange(draws.shape[1], device=tokens.device) < tokens[:, None]
        revealed = (draws[:, None] >= after[:, :, None]) & counted[:, None]
        is_last = steps_taken(steps) >= steps[:, None]
        return torch.where(is_last, tokens[:, None], revealed.sum(2))


def dream_origin(*, eps: float = 1e-3) -> Decoder:
    """Dream's ``alg="origin"``: each mask is revealed with probability 1 - s/t, see :class:`AncestralSchedule`."""
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
    if alg_temp is not None:
        check_between("alg_temp", alg_temp, 0.0, math.inf)
    selection = QuotaSelection(alg_temp or 0.0)
    committer = MicroConfidenceCommitter(confidence=confidence, selection=selection, scores_proposal=True)
    return Decoder(AnyOrderScheduler(schedule=schedule), committer)
