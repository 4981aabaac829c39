"""How the tokens of a phase are spread over its steps: evenly, unless a paper says otherwise.

Those of a single paper stand with its decoder: MaskGIT's cosine, Dream's rule, ancestral sampling.  The latter two may
leave steps without tokens, which cost no forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

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
    """Steps that differ by at most one token, the larger ones first (LLaDA's ``get_num_transfer_tokens``)."""

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        taken, per_step = steps_taken(steps), steps.clamp(min=1)
        base, rest = (tokens // per_step)[:, None], (tokens % per_step)[:, None]
        return taken * base + torch.minimum(taken, rest)


def steps_taken(steps: Tensor) -> Tensor:
    """``(R, S)``: steps taken, 1 to S, but no more than a row has."""
    taken = torch.arange(1, int(steps.max()) + 1, device=steps.device)
    return torch.minimum(taken, steps[:, None])
