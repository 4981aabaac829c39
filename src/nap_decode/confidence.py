"""How sure the model is of a proposed token: the scores by which a committer chooses positions.

A confidence is a function from :class:`Candidates` to one score per candidate; the highest scores are
committed first.  Write your own as a plain function, and pass it as ``confidence=``:

>>> def prefer_digits(candidates):
...     return probability(candidates) + (candidates.tokens < 10)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from nap_decode.errors import NapDecodeError, check_name
from nap_decode.randomness import CONFIDENCE_STREAM, uniform


@dataclass(frozen=True, eq=False)
class Candidates:
    """Proposed tokens, and what the model said about them: R candidates, in any order and any grouping.

    They come in chunks of bounded size, so a confidence must score each candidate on its own.

    Args:
        logits: ``(R, V)`` float32 (float64 if the model computes in it), over the whole vocabulary.
        best: ``(R,)``, the largest logit of an id that may be emitted.
        tokens: ``(R,)`` int64, the proposals.
        positions: ``(R,)`` int64, counted from the row's first token.
        block: ``(R,)`` int64, the scheduler's block of each.
        rows: ``(R,)`` int64, index of the row in the batch.
        seeds: ``(R,)`` int64, seeds of the rows.
        step: index of the decoding step.
    """

    logits: Tensor
    best: Tensor
    tokens: Tensor
    positions: Tensor
    block: Tensor
    rows: Tensor
    seeds: Tensor
    step: int

    @cached_property
    def log_normalizer(self) -> Tensor:
        """``(R,)``: log of the sum of exp(logits) over the whole vocabulary, banned ids included."""
        return self.logits.logsumexp(1)

    @cached_property
    def uniform(self) -> Tensor:
        """``(R,)``: independent uniform draws on [0, 1)."""
        return uniform(self.seeds, self.step, CONFIDENCE_STREAM, self.positions[:, None])[:, 0]


Confidence: TypeAlias = Callable[[Candidates], Tensor]
"""``Candidates -> (R,)`` scores."""


def probability(candidates: Candidates) -> Tensor:
    """Probability of the proposed token at temperature 1 (LLaDA's low-confidence remasking, MaskGIT)."""
    chosen = candidates.logits.gather(1, candidates.tokens[:, None])[:, 0]
    return (chosen - candidates.log_normalizer).exp()


def margin(candidates: Candidates) -> Tensor:
    """Probability of the best allowed token less that of the best other token (Dream's ``topk_margin``).

    Negative where the model prefers a banned id.
    """
    top = candidates.logits.topk(2, dim=1).values
    other = torch.where(candidates.best == top[:, 0], top[:, 1], top[:, 0])
    return (candidates.best - candidates.log_normalizer).exp() - (other - candidates.log_normalizer).exp()


def negative_entropy(candidates: Candidates) -> Tensor:
    """Sum of p log p: 0 for a certain prediction, -log V for a uniform one (Dream's ``entropy``)."""
    log_p = candidates.logits - candidates.log_normalizer[:, None]
    # An id that a logits processor set to -inf adds nothing; without the clamp it adds 0 * -inf = nan.
    return (log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)


def random(candidates: Candidates) -> Tensor:
    """A uniform draw, from the row's own stream (LLaDA's random remasking)."""
    return candidates.uniform


def leftmost(candidates: Candidates) -> Tensor:
    """Lower positions first: left to right."""
    return -candidates.positions.to(candidates.logits.dtype)


CONFIDENCES: dict[str, Confidence] = {f.__name__: f for f in (probability, margin, negative_entropy, random, leftmost)}
"""Confidences that can be asked for by name."""


def find_confidence(confidence: str | Confidence) -> Confidence:
    """A confidence from its name; functions are passed through.

    Raises:
        NapDecodeError: an unknown name, or something that is no function.

    Example:
        >>> find_confidence("entropy")
        Traceback (most recent call last):
        ...
        nap_decode.errors.NapDecodeError: there is no confidence 'entropy'. Did you mean 'negative_entropy'? ...
    """
    if callable(confidence):
        return confidence
    if not isinstance(confidence, str):
        raise NapDecodeError(f"confidence must be a name or a function of Candidates, but is {confidence!r}")
    check_name("confidence", confidence, CONFIDENCES)
    return CONFIDENCES[confidence]
