"""How sure the model is of a proposed token: the scores by which a committer chooses positions.

A confidence is a function from :class:`Candidates` to one score per candidate; the highest scores are
committed first.  Write your own as a plain function, and pass it as ``confidence=``:

>>> def prefer_digits(candidates):
...     return probability(candidates) + (candidates.tokens < 10)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from nap_decode.errors import NapDecodeError, check_between, check_integer, check_name
from nap_decode.randomness import CONFIDENCE_STREAM, uniform


@dataclass(frozen=True, eq=False)
class Candidates:
    """Proposed tokens, and what the model said about them: R candidates, in any order and any grouping.

    They come in chunks of bounded size, so a confidence must score each candidate on its own.

    Args:
        logits: ``(R, V)`` float32 (float64 if the model computes in it), over the whole vocabulary.
        best: ``(R,)``, the largest logit of an id that may be emitted.
        tokens: ``(R,)`` int64, the proposals.
        current: ``(R,)`` int64, what the slots hold: the mask id, unless they are committed.
        positions: ``(R,)`` int64, counted from the row's first token.
        offsets: ``(R,)`` int64, columns from the first slot of the block.
        block: ``(R,)`` int64, the scheduler's block of each.
        rows: ``(R,)`` int64, index of the row in the batch.
        seeds: ``(R,)`` int64, seeds of the rows.
        step: index of the decoding step.
        previous: ``(R, V)`` logits of the same slots at the step before, if a part asked for them; nan where
            there are none.
    """

    logits: Tensor
    best: Tensor
    tokens: Tensor
    current: Tensor
    positions: Tensor
    offsets: Tensor
    block: Tensor
    rows: Tensor
    seeds: Tensor
    step: int
    previous: Tensor | None = None

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
    return _probability_of(candidates.tokens, candidates)


def support(candidates: Candidates) -> Tensor:
    """Probability of the token that a committed slot holds (WINO, with the slot hidden from the model)."""
    return _probability_of(candidates.current, candidates)


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


def divergence(candidates: Candidates) -> Tensor:
    """KL(p_t || p_(t-1)) of a slot's distributions at this step and the one before; inf if there was none (KLASS)."""
    if candidates.previous is None:
        return torch.full_like(candidates.best, torch.inf)
    log_p = candidates.logits - candidates.log_normalizer[:, None]
    # Two ids that are -inf at both steps add nothing; one that was possible and is not, neither.
    change = (log_p - candidates.previous.log_softmax(1)).where(log_p > -torch.inf, 0)
    return (log_p.exp() * change).sum(1).nan_to_num(torch.inf, torch.inf)


@dataclass(frozen=True)
class CalibratedConfidence:
    """PC-Sampler's: ``exp(-decay offset) min(cap, -p log f(token))`` (NEUIR/PC-Sampler, ``pc_sampler_function``).

    Tokens that are frequent anyway (f is a background frequency) count little, early slots of a block much.

    Args:
        frequencies: ``V`` background frequencies, by token id; see :func:`background_frequencies`.
        decay: lambda, how fast a later slot of a block loses.
        cap: alpha, the most that a rare token can be worth.

    Example:
        >>> confidence = CalibratedConfidence((0.5, 0.25, 0.25), decay=0.1)
        >>> confidence
        CalibratedConfidence(decay=0.1, cap=10.0)
    """

    frequencies: Sequence[float] = field(repr=False)
    decay: float = 0.25
    cap: float = 10.0

    is_random = False

    def __post_init__(self) -> None:
        check_between("decay", self.decay, 0.0, math.inf)
        check_between("cap", self.cap, 0.0, math.inf)
        try:
            frequencies = tuple(float(f) for f in self.frequencies)
        except (TypeError, ValueError):
            raise NapDecodeError(f"frequencies must be numbers, but are {self.frequencies!r:.80}") from None
        # A tuple, so that the frozen object can be compared, hashed and saved.
        object.__setattr__(self, "frequencies", frequencies)
        if not all(f > 0 for f in self.frequencies):
            raise NapDecodeError("background frequencies must be positive; background_frequencies(...) makes such")

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def _surprise(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # copied once, because a copy waits for the device
            self._tables[device] = -torch.tensor(self.frequencies, device=device).log()
        return self._tables[device]

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        if candidates.logits.shape[1] > len(self.frequencies):
            raise NapDecodeError(
                f"there are {len(self.frequencies)} background frequencies for {candidates.logits.shape[1]} token ids"
            )
        surprise = self._surprise(candidates.logits.device)[candidates.tokens].to(candidates.logits)
        score = (probability(candidates) * surprise).clamp(max=self.cap)
        return score * (-self.decay * candidates.offsets.to(score)).exp()


@dataclass(frozen=True)
class ProbabilityWithout:
    """The probability of the proposed token if some ids did not exist; 0 for these themselves.

    They are still proposed, but committed last (LLaDA's ``confidence_eos_eot_inf``).

    Args:
        ids: the ids.

    Example:
        >>> ProbabilityWithout([2])
        ProbabilityWithout(ids=(2,))
    """

    ids: Sequence[int]

    is_random = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))  # a tuple, to be compared, hashed and saved
        for token in self.ids:
            check_integer("an id of ProbabilityWithout", token, 0)

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        size, device = candidates.logits.shape[1], candidates.logits.device
        if any(token >= size for token in self.ids):
            raise NapDecodeError(f"{self} names ids that the model does not have: there are {size}")
        if device not in self._tables:  # copied once, because a copy waits for the device
            self._tables[device] = torch.tensor(self.ids, dtype=torch.int64, device=device)
        without = candidates.logits.index_fill(1, self._tables[device], -torch.inf)
        return probability(replace(candidates, logits=without))


def background_frequencies(texts: Iterable[Sequence[int]], vocab_size: int) -> tuple[float, ...]:
    """Frequencies of token ids in a corpus; ids that never occur get those of a single occurrence.

    Args:
        texts: token ids of each text.
        vocab_size: V, the ids that the model has.

    Raises:
        NapDecodeError: no token at all.

    Example:
        >>> background_frequencies([[0, 0, 2], [0]], vocab_size=3)
        (0.75, 0.25, 0.25)
    """
    counts = Counter(token for text in texts for token in text)
    total = sum(counts.values())
    if not total:
        raise NapDecodeError("there is no token in the texts to count")
    return tuple(max(counts[token], 1) / total for token in range(vocab_size))


def _probability_of(tokens: Tensor, candidates: Candidates) -> Tensor:
    chosen = candidates.logits.gather(1, tokens[:, None])[:, 0]
    return (chosen - candidates.log_normalizer).exp()


CONFIDENCES: dict[str, Confidence] = {f.__name__: f for f in (probability, margin, negative_entropy, random, leftmost)}
"""Confidences that can be asked for by name."""
STATISTICS: dict[str, Confidence] = CONFIDENCES | {f.__name__: f for f in (support, divergence)}
"""The functions of candidates that this module has; those besides the confidences are for selections and revisers."""


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
