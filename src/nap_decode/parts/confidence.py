"""How sure the model is of a proposed token: the scores by which a committer chooses positions.

A confidence is a function from :class:`Candidates` to one score per candidate; the highest scores are
committed first.  Write your own as a plain function, and pass it as ``confidence=``:

>>> def prefer_digits(candidates):
...     return probability(candidates) + (candidates.tokens < 10)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

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

    @property
    def log_normalizer(self) -> Tensor:
        """``(R,)``: log of the sum of exp(logits) over the whole vocabulary, banned ids included."""
        return self.distribution.log_normalizer

    @property
    def current(self) -> Tensor:
        """``(R,)`` int64, what the slots hold: the mask id, unless they are committed."""
        return self.slots.tokens.flatten()[self.places]

    @property
    def positions(self) -> Tensor:
        """``(R,)`` int64, counted from the row's first token."""
        return self.slots.index.flatten()[self.places]

    @property
    def offsets(self) -> Tensor:
        """``(R,)`` int64, columns from the first slot of the block."""
        return self.slots.offsets.flatten()[self.places]

    @property
    def block(self) -> Tensor:
        """``(R,)`` int64, the scheduler's block of each."""
        return self.slots.block.flatten()[self.places]

    @property
    def rows(self) -> Tensor:
        """``(R,)`` int64, index of the row in the batch."""
        return self.places // self.slots.index.shape[1]

    @property
    def seeds(self) -> Tensor:
        """``(R,)`` int64, seeds of the rows."""
        return self.slots.seeds[self.rows]

    @property
    def step(self) -> Tensor:
        """``(R,)`` int64, index of the decoding step in the schedule of the row."""
        return self.slots.step[self.rows]

    @lazy
    def uniform(self) -> Tensor:
        """``(R,)``: independent uniform draws on [0, 1)."""
        return self.slots.uniform(CONFIDENCE_STREAM).flatten()[self.places]


Confidence: TypeAlias = Callable[[Candidates], Tensor]
"""``Candidates -> (R,)`` scores.  One of yours that draws nothing may say so: ``needs = Needs()``."""


def probability(candidates: Candidates) -> Tensor:
    """Probability of the proposed token at temperature 1 (LLaDA's low-confidence remasking, MaskGIT)."""
    return candidates.distribution.probability(candidates.tokens)


def support(candidates: Candidates) -> Tensor:
    """Probability of the token that a committed slot holds (WINO, with the slot hidden); 0 for a mask."""
    distribution, tokens = candidates.distribution, candidates.current
    supported, banned = distribution.probability(tokens), distribution.banned
    return supported if banned is None else supported.masked_fill(torch.isin(tokens, banned), 0)


def margin(candidates: Candidates) -> Tensor:
    """Probability of the best allowed token less that of the best other token (Dream's ``topk_margin``).

    Negative where the model prefers a banned id.
    """
    return candidates.distribution.margin


def negative_entropy(candidates: Candidates) -> Tensor:
    """Sum of p log p: 0 for a certain prediction, -log V for a uniform one (Dream's ``entropy``)."""
    return candidates.distribution.negative_entropy


def random(candidates: Candidates) -> Tensor:
    """A uniform draw, from the row's own stream (LLaDA's random remasking)."""
    return candidates.uniform


def leftmost(candidates: Candidates) -> Tensor:
    """Lower positions first: left to right."""
    return -candidates.positions.to(candidates.best.dtype)


def divergence(candidates: Candidates) -> Tensor:
    """KL(p_t || p_(t-1)) of a slot's distributions at this step and the one before; inf if there was none (KLASS)."""
    if candidates.previous is None:
        return torch.full_like(candidates.best, torch.inf)
    log_p = candidates.logits - candidates.log_normalizer[:, None]
    # Two ids that are -inf at both steps add nothing; one that was possible and is not, neither.
    change = (log_p - candidates.previous.log_softmax(1)).where(log_p > -torch.inf, 0)
    return (log_p.exp() * change).sum(1).nan_to_num(torch.inf, torch.inf)


CONFIDENCES: dict[str, Confidence] = {f.__name__: f for f in (probability, margin, negative_entropy, random, leftmost)}
"""Confidences that can be asked for by name."""
STATISTICS: dict[str, Confidence] = CONFIDENCES | {f.__name__: f for f in (support, divergence)}
"""The functions of candidates that this module has; those besides the confidences are for selections and revisers."""
_LOOKS_AT: tuple[tuple[Confidence, tuple[str, ...]], ...] = (
    (probability, ("log_normalizer",)),
    (margin, ("log_normalizer", "second")),
    (negative_entropy, ("negative_entropy",)),
    (random, ()),
    (leftmost, ()),
)


def looked_at(functions: Iterable[Confidence]) -> tuple[tuple[str, ...], bool]:
    """What functions of candidates ask a :class:`~nap_decode.model.statistics.Distribution` for.

    Returns:
        Names of properties, and whether that is all: of a function of yours it is not known.
    """
    known = [[names for known, names in _LOOKS_AT if known is function] for function in functions]
    asked = chain.from_iterable(chain.from_iterable(known))
    return tuple(dict.fromkeys(asked)), all(known)


def needs_of(function: Confidence) -> Needs:
    """The needs of a function of candidates; one of yours may draw, unless it says that it does not."""
    if function is divergence:
        return Needs(memory=True, previous=True)
    is_random = function is random or function not in STATISTICS.values()
    return getattr(function, "needs", Needs(random=is_random))


def find_confidence(confidence: str | Confidence, known: Mapping[str, Confidence] = CONFIDENCES) -> Confidence:
    """A confidence from its name; functions are passed through.

    Raises:
        NapDecodeError: an unknown name, or something that is no function.

    Example:
        >>> find_confidence("entropy")
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no confidence 'entropy'. Did you mean 'negative_entropy'? ...
    """
    if callable(confidence):
        return confidence
    if not isinstance(confidence, str):
        raise NapDecodeError(f"confidence must be a name or a function of Candidates, but is {confidence!r}")
    check_name("confidence", confidence, known)
    return known[confidence]
