"""PC-Sampler: position-aware calibration (arXiv 2508.13021; NEUIR/PC-Sampler)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nap_decode.base.batching import to_device
from nap_decode.base.errors import NapDecodeError, check_between, check_number
from nap_decode.base.lazy import lazy
from nap_decode.parts import Candidates, Decoder, MicroConfidenceCommitter, Needs, in_blocks, probability


@dataclass(frozen=True)
class CalibratedConfidence:
    """``exp(-position_decay offset) min(cap, -p log f(token))`` (``pc_sampler_function``).

    Tokens that are frequent anyway (f is a background frequency) count little, early slots of a block much.

    Args:
        frequencies: ``V`` background frequencies, by token id; see :func:`background_frequencies`.
        position_decay: lambda, how fast a later slot of a block loses.
        cap: alpha, the most that a rare token can be worth.
    """

    frequencies: Sequence[float] = field(repr=False)
    position_decay: float = 0.25
    cap: float = 10.0

    needs = Needs()

    def __post_init__(self) -> None:
        check_between("position_decay", self.position_decay, 0.0, math.inf)
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
    def _surprise(self) -> dict[torch.device, Tensor]:
        """``-log f`` by device: copied once, because a copy waits for the device."""
        return {}

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        size, best = candidates.distribution.vocab_size, candidates.best
        if size > len(self.frequencies):
            raise NapDecodeError(f"there are {len(self.frequencies)} background frequencies for {size} token ids")
        if best.device not in self._surprise:
            self._surprise[best.device] = to_device(-torch.tensor(self.frequencies, device="cpu").log(), best.device)
        surprise = self._surprise[best.device][candidates.tokens].to(best)
        score = (probability(candidates) * surprise).clamp(max=self.cap)
        return score * (-self.position_decay * candidates.offsets.to(score)).exp()


def background_frequencies(texts: Iterable[Sequence[int]], vocab_size: int) -> tuple[float, ...]:
    """Frequencies of ``vocab_size`` token ids in texts; ids that never occur get those of a single occurrence.

    Example:
        >>> background_frequencies([[0, 0, 2], [0]], vocab_size=3)
        (0.75, 0.25, 0.25)
    """
    counts = Counter(token for text in texts for token in text)
    total = sum(counts.values())
    if not total:
        raise NapDecodeError("there is no token in the texts to count")
    return tuple(max(counts[token], 1) / total for token in range(vocab_size))


def pc_sampler(
    *, frequencies: Sequence[float], decay: float = 0.25, cap: float = 10.0, block_length: int | None = None
) -> Decoder:
    """PC-Sampler: early positions and rare tokens first; options see :class:`CalibratedConfidence`."""
    committer = MicroConfidenceCommitter(confidence=CalibratedConfidence(frequencies, decay, cap))
    return Decoder(in_blocks(block_length), committer)
