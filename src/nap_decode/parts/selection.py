"""How many of the scored slots are committed, and what becomes of those that are already.

A selection chooses inside each block; a reviser may replace committed tokens or mask them again.  Those of a single
paper stand with their decoder, in :mod:`nap_decode.decoders`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between, check_name, check_number
from nap_decode.base.random import SELECTION_STREAM
from nap_decode.parts.needs import Needs
from nap_decode.parts.slots import Decision, Proposal


class Selection(ABC):
    """Chooses among scored slots.  A subclass writes ``__call__``.

    Example:
        >>> from nap_decode.parts import Slots
        >>> class AboveTheMean(Selection):
        ...     def __call__(self, proposal):
        ...         return proposal.fill_up(proposal.confidence > proposal.mean(proposal.confidence))
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1]]), quota=torch.tensor([[1, 1]]))
        >>> AboveTheMean()(Proposal.of(slots, torch.tensor([[0.1, 0.9, 0.8, 0.2]]))).long().tolist()
        [[0, 1, 1, 1]]
    """

    @property
    def needs(self) -> Needs:
        """See :class:`Needs`.  Adaptive, if the number of slots depends on the scores; if not, it is the quota."""
        return Needs(adaptive=True)

    @abstractmethod
    def __call__(self, proposal: Proposal) -> Tensor:
        """``(B, K)`` bool: which of the open slots are committed."""


@dataclass(frozen=True)
class QuotaSelection(Selection):
    """The most confident slots of each block, exactly as many as its quota.

    Args:
        position_temperature: 0 takes the highest scores; otherwise slots are drawn one after the other with chances
            proportional to exp(confidence / position_temperature) (Dream's ``alg_temp``).
        ties: which of equal scores are chosen: those at ``"lower"`` positions, or those that ``torch.topk`` takes of
            the whole row, as LLaDA's and Dream's code does.  Which these are depends on the device and on the width of
            the batch, and the step waits for the device.

    Example:
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1, 1]]), quota=torch.tensor([[2, 1]]))
        >>> QuotaSelection()(Proposal.of(slots, torch.tensor([[.1, .9, .5, .2, .3]]))).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    position_temperature: float = 0.0
    ties: str = "lower"

    def __post_init__(self) -> None:
        check_between("position_temperature", self.position_temperature, 0.0, math.inf)
        check_name("ties", self.ties, ("lower", "topk"))

    @property
    @override
    def needs(self) -> Needs:
        return Needs(random=self.position_temperature > 0)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        score = proposal.confidence
        if self.position_temperature > 0:
            # The highest scores after Gumbel noise are a draw without replacement (Kool et al., arXiv 1903.06059).
            noise = -(-proposal.slots.uniform(SELECTION_STREAM).log()).log()
            score = score / self.position_temperature + noise
        return _topk(proposal, score) if self.ties == "topk" else proposal.best(proposal.slots.quota, score)


def _topk(proposal: Proposal, score: Tensor) -> Tensor:
    """``(B, K)`` bool: as many slots of each block as its quota says, one ``torch.topk`` after the other."""
    slots = proposal.slots
    chosen = torch.zeros_like(slots.open)
    for row, block in (slots.quota > 0).nonzero().tolist():
        candidates = slots.open_block[row] == block
        columns, number = slots.index[row, candidates], int(slots.quota[row, block])
        # Where a score stands among the others of the row has a say in which of equal ones are taken.
        scores = score.new_full((slots.row_tokens.shape[1],), -torch.inf)
        scores[columns] = score[row, candidates].clamp(min=torch.finfo(scores.dtype).min)  # before all others
        best = scores.topk(min(number, len(columns))).indices
        chosen[row] |= candidates & torch.isin(slots.index[row], best)
    return chosen


@dataclass(frozen=True)
class ThresholdSelection(Selection):
    """Every slot that reaches a confidence (Fast-dLLM, arXiv 2505.22618, algorithm 1).

    Example:
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0, 1, 1]]), quota=torch.tensor([[0, 1]]))
        >>> ThresholdSelection(0.9)(Proposal.of(slots, torch.tensor([[.1, .9, .95, .2, .3]]))).long().tolist()
        [[0, 1, 1, 0, 1]]
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        return proposal.fill_up(proposal.confidence >= self.threshold)


class Reviser(ABC):
    """Looks at the committed slots of the open blocks.  A subclass writes ``__call__``.

    It must come to an end: mask fewer slots than are committed, and leave blocks settled some time.

    Example:
        >>> from dataclasses import replace
        >>> class SecondThoughts(Reviser):  # edits whatever the model would now say otherwise
        ...     def __call__(self, proposal, decision):
        ...         slots = proposal.slots
        ...         edited = slots.committed & (proposal.tokens != slots.tokens)
        ...         return replace(decision, chosen=decision.chosen | edited)
    """

    @property
    def needs(self) -> Needs:
        """See :class:`Needs`; committed slots in any case."""
        return Needs(adaptive=True, memory=True, committed=True)

    @abstractmethod
    def __call__(self, proposal: Proposal, decision: Decision) -> Decision:
        """Revise a decision, whose ``chosen`` so far are the masked slots that are committed at this step.

        The proposal is for masked and committed slots of the open blocks; only ``proposal.slots.committed`` may be
        revised.  What comes back has edited slots among the ``chosen``, ``remasked`` slots and ``unsettled`` blocks.
        """
