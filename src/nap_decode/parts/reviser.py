"""What becomes of tokens that are committed already: a reviser may replace them or mask them again."""

from __future__ import annotations

from abc import ABC, abstractmethod

from nap_decode.parts.needs import Needs
from nap_decode.parts.slots import Decision, Proposal


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
        """Revise a decision.

        Args:
            proposal: masked and committed slots of the open blocks, and the tokens that are proposed for them; only
                ``proposal.slots.committed`` may be revised.
            decision: so far: ``chosen`` are the masked slots that are committed at this step.

        Returns:
            The decision with edited slots among the ``chosen``, ``remasked`` slots and ``unsettled`` blocks.
        """
