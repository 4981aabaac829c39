"""How the tokens of a phase are spread over its steps.

A scheduler says which blocks are decoded together and how many steps they have; its schedule says how
many tokens each of these steps commits.  For 12 tokens in 8 steps::

    EvenSchedule      2 2 2 2 1 1 1 1
    CosineSchedule    1 1 1 1 1 2 2 3
    DreamSchedule     1 1 1 1 1 2 2 3

Dream's rule and ancestral sampling may leave steps without tokens; these cost no forward pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts.needs import Needs


class Schedule(ABC):
    """Spreads tokens over steps.  A subclass writes ``__call__``.

    Example:
        >>> class Late(Schedule):  # one token per step, the rest at the end
        ...     def __call__(self, tokens, steps, draws):
        ...         taken = torch.arange(1, int(steps.max()) + 1)
        ...         return torch.where(taken < steps[:, None], taken, tokens[:, None])
        >>> Late()(torch.tensor([9]), torch.tensor([3]), torch.empty(1, 0)).tolist()
        [[1, 2, 9]]
    """

    may_skip: ClassVar[bool] = False
    """Whether steps may have no tokens; if not, there cannot be more steps than tokens."""

    @property
    def needs(self) -> Needs:
        """See :class:`Needs`; random if it uses ``draws``."""
        return Needs()

    @abstractmethod
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        """Tokens committed after each step.

        Args:
            tokens: ``(R,)`` int64, tokens to spread.
            steps: ``(R,)`` int64, steps to spread them over; 0 only where there are no tokens.
            draws: ``(R, N)`` float32, a uniform draw on [0, 1) for each of at least ``tokens`` tokens;
                ``(R, 0)`` unless it needs them.

        Returns:
            ``(R, S)`` int64, S the largest of ``steps``: never falling, and ``tokens`` from the last step on.
        """


@dataclass(frozen=True)
class EvenSchedule(Schedule):
    """Steps that differ by at most one token, the larger ones first (LLaDA's ``get_num_transfer_tokens``).

    Example:
        >>> EvenSchedule()(torch.tensor([8]), torch.tensor([3]), torch.empty(1, 0)).tolist()
        [[3, 6, 8]]
    """

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        taken, per_step = _taken(steps), steps.clamp(min=1)
        base, rest = (tokens // per_step)[:, None], (tokens % per_step)[:, None]
        return taken * base + torch.minimum(taken, rest)


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
        taken = _taken(steps)
        share = taken.double() / steps.clamp(min=1)[:, None]
        # Without the 1e-9 the cosine of a right angle, 6e-17, would leave a token.
        masked = (tokens[:, None] * (share * (math.pi / 2)).cos() - 1e-9).ceil().clamp(min=0).long()
        to_come = steps[:, None] - taken
        return torch.minimum(torch.maximum(tokens[:, None] - masked, taken), tokens[:, None] - to_come)


@dataclass(frozen=True)
class _TimeSchedule(Schedule):
    """One that goes by the time, which falls from 1 to ``eps`` whether or not there is something to commit."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_between("eps", self.eps, 0.0, 0.5)

    may_skip = True


@dataclass(frozen=True)
class DreamSchedule(_TimeSchedule):
    """Dream's: of m masked tokens int(m (1 - s/t)) at each step, and all that is left at the last.

    t and s are the time before and after the step, on ``linspace(1, eps, steps + 1)``
    (``DreamGenerationMixin._sample``).  Computed in float32 as there, because rounding decides.

    Args:
        eps: the time at the end.

    Example:
        >>> DreamSchedule()(torch.tensor([12]), torch.tensor([8]), torch.empty(1, 0)).tolist()
        [[1, 2, 3, 4, 5, 7, 9, 12]]
    """

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        times = _times(steps, self.eps)  # (R, S + 1)
        committed = [torch.zeros_like(tokens)]
        for i, (t, s) in enumerate(zip(times.T[:-1], times.T[1:], strict=True)):
            masked = tokens - committed[-1]
            share = torch.where(i + 1 < steps, 1 - s / t, 1.0)
            committed.append(committed[-1] + (masked.float() * share).long())
        return torch.stack(committed[1:], dim=1)


@dataclass(frozen=True)
class AncestralSchedule(_TimeSchedule):
    """Every masked token is committed with probability 1 - s/t at each step, and surely at the last.

    t and s are the time before and after the step, on ``linspace(1, eps, steps + 1)``: ancestral sampling
    of masked diffusion (MDLM, arXiv 2406.07524, equation 6) and Dream's ``origin``.  A token is still
    masked after a step with probability s, so that one uniform draw per token says when it is committed;
    the model is not called at steps that commit nothing.  Which tokens they are is the committer's
    business: with the confidence ``"random"`` the law is that of the published samplers.

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
        after = _times(steps, self.eps)[:, 1:]  # (R, S)
        counted = torch.arange(draws.shape[1], device=tokens.device) < tokens[:, None]
        revealed = (draws[:, None] >= after[:, :, None]) & counted[:, None]
        is_last = _taken(steps) >= steps[:, None]
        return torch.where(is_last, tokens[:, None], revealed.sum(2))


def _taken(steps: Tensor) -> Tensor:
    """``(R, S)``: steps taken, 1 to S, but no more than a row has."""
    taken = torch.arange(1, int(steps.max()) + 1, device=steps.device)
    return torch.minimum(taken, steps[:, None])


def _times(steps: Tensor, eps: float) -> Tensor:
    """``(R, S + 1)`` float32: for every row ``torch.linspace(1, eps, its steps + 1)``, then ``eps``."""
    times = torch.full((len(steps), int(steps.max()) + 1), eps, device=steps.device)
    for number in set(steps.tolist()):
        times[steps == number, : number + 1] = torch.linspace(1, eps, number + 1, device=steps.device)
    return times
