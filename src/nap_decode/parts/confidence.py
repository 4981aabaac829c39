"""How sure the model is of a proposed token: the scores by which a committer chooses positions.

A confidence is a function from :class:`Candidates` to one score per candidate; the highest scores are
committed first.  Write your own as a plain function, and pass it as ``confidence=``:

>>> def prefer_digits(candidates):
...     return probability(candidates) + (candidates.tokens < 10)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, check_name
from nap_decode.base.lazy import lazy
from nap_decode.base.random import CONFIDENCE_STREAM
from nap_decode.model.statistics import Distribution
from nap_decode.parts.needs import Needs
from nap_decode.parts.slots import Slots


@dataclass(frozen=True, eq=False)
class Candidates:
    """Proposed tokens, and what the model said about them: R candidates, in any order and any grouping.

    They come in chunks of bounded size, so a confidence must score each candidate on its own.

    Args:
        distribution: what the model said, in float32 (float64 if it computes in it).
        tokens: ``(R,)`` int64, the proposals.
        slots: the slots of the step,
        places: and ``(R,)`` int64, which of all these the candidates are for.
        previous: ``(R, V)`` logits of the same slots at the step before, if a part asked for them; nan where
            there are none.

    Example:
        >>> slots = Slots.of(block=torch.tensor([[0, 0]]), quota=torch.tensor([[1]]))
        >>> logits = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
        >>> candidates = Candidates(Distribution(logits), torch.tensor([1, 0]), slots, slots.places)
        >>> probability(candidates).tolist(), candidates.positions.tolist()
        ([0.731..., 0.880...], [0, 1])
    """

    distribution: Distribution
    tokens: Tensor
    slots: Slots
    places: Tensor
    previous: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """``(R, V)`` over the whole vocabulary; not to be changed."""
        return self.distribution.logits

    @property
    def best(self) -> Tensor:
        """``(R,)``, the largest logit of an id that may be emitted."""
        return self.distribution.best

    def of(self, values: Tensor) -> Tensor:
        """The candidates' own among values of the step's slots, such as ``slots.tokens``: ``(B, K) -> (R,)``."""
        return values.flatten()[self.places]

    @property
    def positions(self) -> Tensor:
        """``(R,)`` int64, counted from the row's first token."""
        return self.of(self.slots.index)

    @property
    def offsets(self) -> Tensor:
        """``(R,)`` int64, columns from the first slot of the block."""
        return self.of(self.slots.offsets)

    @property
    def block(self) -> Tensor:
        """``(R,)`` int64, the scheduler's block of each."""
        return self.of(self.slots.block)

    @lazy
    def uniform(self) -> Tensor:
        """``(R,)``: independent uniform draws on [0, 1)."""
        return self.of(self.slots.uniform(CONFIDENCE_STREAM))


Confidence: TypeAlias = Callable[[Candidates], Tensor]
"""``Candidates -> (R,)`` scores.  One of yours that draws nothing may say so: ``needs = Needs()``."""


def _asks(reads: tuple[str, ...] | None, **needs: Any) -> Callable[[Confidence], Confidence]:
    """Note the properties of a :class:`Distribution` that a function reads of the logits, if that is all; its needs."""

    def note(function: Confidence) -> Confidence:
        vars(function).update(reads=reads, needs=Needs(**needs))
        return function

    return note


@_asks(("log_normalizer",))
def probability(candidates: Candidates) -> Tensor:
    """Probability of the proposed token at temperature 1 (LLaDA's low-confidence remasking, MaskGIT)."""
    return candidates.distribution.probability(candidates.tokens)


@_asks(("log_normalizer", "second"))
def margin(candidates: Candidates) -> Tensor:
    """Probability of the best allowed token less that of the best other token (Dream's ``topk_margin``).

    Negative where the model prefers a banned id.
    """
    return candidates.distribution.margin


@_asks(("negative_entropy",))
def negative_entropy(candidates: Candidates) -> Tensor:
    """Sum of p log p: 0 for a certain prediction, -log V for a uniform one (Dream's ``entropy``)."""
    return candidates.distribution.negative_entropy


@_asks((), random=True)
def random(candidates: Candidates) -> Tensor:
    """A uniform draw, from the row's own stream (LLaDA's random remasking)."""
    return candidates.uniform


@_asks(())
def leftmost(candidates: Candidates) -> Tensor:
    """Lower positions first: left to right."""
    return -candidates.positions.to(candidates.best.dtype)


@_asks(None)
def support(candidates: Candidates) -> Tensor:
    """Probability of the token that a committed slot holds (WINO, with the slot hidden); 0 for a mask."""
    distribution, tokens = candidates.distribution, candidates.of(candidates.slots.tokens)
    supported, banned = distribution.probability(tokens), distribution.banned
    return supported if banned is None else supported.masked_fill(torch.isin(tokens, banned), 0)


@_asks(None, memory=True, previous=True)
def divergence(candidates: Candidates) -> Tensor:
    """KL(p_t || p_(t-1)) of a slot's distributions at this step and the one before; inf if there was none (KLASS)."""
    if candidates.previous is None:
        return torch.full_like(candidates.best, torch.inf)
    log_p = candidates.logits - candidates.distribution.log_normalizer[:, None]
    # Two ids that are -inf at both steps add nothing; one that was possible and is not, neither.
    change = (log_p - candidates.previous.log_softmax(1)).where(log_p > -torch.inf, 0)
    return (log_p.exp() * change).sum(1).nan_to_num(torch.inf, torch.inf)


CONFIDENCES: dict[str, Confidence] = {f.__name__: f for f in (probability, margin, negative_entropy, random, leftmost)}
"""Confidences that can be asked for by name."""
STATISTICS: dict[str, Confidence] = CONFIDENCES | {f.__name__: f for f in (support, divergence)}
"""The functions of candidates that this module has; those besides the confidences are for selections and revisers."""


def find_confidence(confidence: str | Confidence, known: Mapping[str, Confidence] = CONFIDENCES) -> Confidence:
    """A confidence from its name; functions are passed through.  Raises for unknown names, and what is no function."""
    if callable(confidence):
        return confidence
    if not isinstance(confidence, str):
        raise NapDecodeError(f"confidence must be a name or a function of Candidates, but is {confidence!r}")
    check_name("confidence", confidence, known)
    return known[confidence]
