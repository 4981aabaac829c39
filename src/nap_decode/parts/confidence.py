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
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name, check_number
from nap_decode.base.lazy import lazy
from nap_decode.base.random import CONFIDENCE_STREAM
from nap_decode.model.statistics import Distribution
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
"""``Candidates -> (R,)`` scores."""


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
        frequencies = self.frequencies.tolist() if hasattr(self.frequencies, "tolist") else self.frequencies
        if not isinstance(frequencies, Sequence) or isinstance(frequencies, str):
            raise NapDecodeError(f"frequencies must be numbers, but are {self.frequencies!r:.80}")
        for frequency in frequencies:
            check_number("a background frequency", frequency)
        # A tuple, so that the frozen object can be compared, hashed and saved.
        object.__setattr__(self, "frequencies", tuple(map(float, frequencies)))
        if not all(f > 0 for f in self.frequencies):
            raise NapDecodeError("background frequencies must be positive; background_frequencies(...) makes such")

    @lazy
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def _surprise(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # copied once, because a copy waits for the device
            self._tables[device] = -torch.tensor(self.frequencies, device=device).log()
        return self._tables[device]

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        size, best = candidates.distribution.vocab_size, candidates.best
        if size > len(self.frequencies):
            raise NapDecodeError(f"there are {len(self.frequencies)} background frequencies for {size} token ids")
        surprise = self._surprise(best.device)[candidates.tokens].to(best)
        score = (probability(candidates) * surprise).clamp(max=self.cap)
        return score * (-self.decay * candidates.offsets.to(score)).exp()


@dataclass(frozen=True)
class ProbabilityWithout:
    """The probability of the proposed token if some ids did not exist; 0 for these themselves.

    They are still proposed, but committed last (LLaDA's ``confidence_eos_eot_inf``), also where a cut-off leaves
    nothing else.

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

    @lazy
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        size, device = candidates.logits.shape[1], candidates.logits.device
        if any(token >= size for token in self.ids):
            raise NapDecodeError(f"{self} names ids that the model does not have: there are {size}")
        if device not in self._tables:  # copied once, because a copy waits for the device
            self._tables[device] = torch.tensor(self.ids, dtype=torch.int64, device=device)
        others = candidates.distribution.without(self._tables[device])
        return others.probability(candidates.tokens).where(others.best != -torch.inf, 0)


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


def find_confidence(confidence: str | Confidence) -> Confidence:
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
    check_name("confidence", confidence, CONFIDENCES)
    return CONFIDENCES[confidence]
