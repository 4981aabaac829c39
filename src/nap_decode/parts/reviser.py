"""What becomes of tokens that are committed already: a reviser may replace them or mask them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_integer, check_number
from nap_decode.parts.confidence import Confidence, probability, support
from nap_decode.parts.selection import rank_in_block
from nap_decode.parts.slots import Slots


@dataclass(frozen=True, eq=False)
class Revision:
    """What a reviser decided.

    Args:
        edited: ``(B, K)`` bool, committed slots that get the proposed token instead of theirs.
        remasked: ``(B, K)`` bool, committed slots that are masked again.
        unsettled: ``(B, M)`` bool, blocks to look at once more even if nothing in them is masked.

    Example:
        >>> Revision(remasked=torch.tensor([[True, False]])).edited is None
        True
    """

    edited: Tensor | None = None
    remasked: Tensor | None = None
    unsettled: Tensor | None = None


class Reviser(ABC):
    """Looks at the committed slots of the open blocks.  A subclass writes ``__call__``.

    It must come to an end: mask fewer slots than are committed, and leave blocks settled some time.

    Example:
        >>> class SecondThoughts(Reviser):  # edits whatever the model would now say otherwise
        ...     def __call__(self, slots, tokens, chosen, statistics):
        ...         return Revision(edited=slots.committed & (tokens != slots.tokens))
    """

    statistics: ClassVar[tuple[Confidence, ...]] = ()
    """Functions of :class:`~nap_decode.parts.confidence.Candidates` whose values it needs."""
    leaves_one_out: ClassVar[bool] = False
    """Whether the model's predictions at committed slots are those it makes with the slot hidden."""
    is_random: ClassVar[bool] = False
    """Whether it draws."""

    @abstractmethod
    def __call__(self, slots: Slots, tokens: Tensor, chosen: Tensor, statistics: tuple[Tensor, ...]) -> Revision:
        """Decide.

        Args:
            slots: masked and committed slots of the open blocks; only ``slots.committed`` may be revised.
            tokens: ``(B, K)`` int64, what is proposed for each.
            chosen: ``(B, K)`` bool, the masked slots that are committed at this step.
            statistics: ``(B, K)`` values of each of the class's ``statistics``.
        """


@dataclass(frozen=True)
class EditReviser(Reviser):
    """Replaces a committed token where the model is sure of another (LLaDA2.1, arXiv 2602.08676).

    When nothing in a block is masked any more, it is looked at again until no token changes.

    Args:
        threshold: probability that the other token must exceed.
        max_passes: forward passes over a block without masks, at most.

    Example:
        >>> EditReviser(0.95)
        EditReviser(threshold=0.95, max_passes=16)
    """

    threshold: float = 0.9
    max_passes: int = 16

    statistics = (probability,)

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_integer("max_passes", self.max_passes, 1)

    @override
    def __call__(self, slots: Slots, tokens: Tensor, chosen: Tensor, statistics: tuple[Tensor, ...]) -> Revision:
        edited = slots.committed & (tokens != slots.tokens) & (statistics[0] > self.threshold)
        had_masks, has_edits = slots.count(slots.open) > 0, slots.count(edited) > 0  # (B, M)
        passes = slots.kept("edit_passes", torch.zeros_like(slots.quota)) + (slots.count(slots.committed) > 0)
        passes = torch.where(had_masks, 0, passes)
        slots.memory["edit_passes"] = passes
        return Revision(edited=edited, unsettled=had_masks | (has_edits & (passes < self.max_passes)))


@dataclass(frozen=True)
class RemaskReviser(Reviser):
    """Masks a committed token again that the rest of the canvas does not support (WINO, arXiv 2507.18578).

    The support of a token is its probability with its slot hidden from the model, found in the same
    forward pass by a second mask token with the same position (see :meth:`Denoiser.__call__`).  In each
    block fewer slots are masked again than the step before committed there, so that decoding proceeds.

    Args:
        threshold: support below which a token is masked again.

    Example:
        >>> RemaskReviser(0.8)
        RemaskReviser(threshold=0.8)
    """

    threshold: float = 0.9

    statistics = (support,)
    leaves_one_out = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    @override
    def __call__(self, slots: Slots, tokens: Tensor, chosen: Tensor, statistics: tuple[Tensor, ...]) -> Revision:
        accepted = slots.count(chosen)  # (B, M)
        before = slots.kept("accepted", torch.zeros_like(accepted))
        before = torch.where(before > 0, before, 30)  # as in WINO's reference; at first nothing can be masked anyway
        limit = torch.where(accepted > 1, before - 1, 0)
        slots.memory["accepted"] = torch.where(accepted > 0, accepted, before)
        doubtful = slots.committed & (statistics[0] < self.threshold)
        worst = torch.where(doubtful, -statistics[0], -torch.inf)
        return Revision(remasked=doubtful & (rank_in_block(worst, slots.block) < slots.per_slot(limit)))
