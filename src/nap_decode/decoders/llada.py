"""LLaDA (arXiv 2502.09992; ML-GSAI/LLaDA, ``generate.py`` at b7e6c35)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nap_decode.base.batching import host_tensor
from nap_decode.base.errors import NapDecodeError, check_integer
from nap_decode.base.lazy import lazy
from nap_decode.parts import Candidates, Confidence, Decoder, MicroConfidenceCommitter, Needs, in_blocks


@dataclass(frozen=True)
class ProbabilityWithout:
    """The probability of the proposed token if some ids did not exist; 0 for these themselves.

    They are still proposed, but committed last (LLaDA's ``confidence_eos_eot_inf``), also where a cut-off leaves
    nothing else.
    """

    ids: Sequence[int]

    needs = Needs()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))  # a tuple, to be compared, hashed and saved
        for token in self.ids:
            check_integer("an id of ProbabilityWithout", token, 0)

    @lazy
    def _tables(self) -> dict[torch.device, Tensor]:
        """The ids by device: copied once, because a copy waits for the device."""
        return {}

    def __call__(self, candidates: Candidates) -> Tensor:
        """See :data:`Confidence`."""
        size, device = candidates.logits.shape[1], candidates.logits.device
        if any(token >= size for token in self.ids):
            raise NapDecodeError(f"{self} names ids that the model does not have: there are {size}")
        if device not in self._tables:
            self._tables[device] = host_tensor(self.ids, device)
        others = candidates.distribution.without(self._tables[device])
        return others.probability(candidates.tokens).where(others.best != -torch.inf, 0)


def llada_low_confidence(*, block_length: int | None = None, confidence: str | Confidence = "probability") -> Decoder:
    """LLaDA's low-confidence remasking (algorithm 5): the surest tokens first.

    Steps are divided between blocks as there; confidences are those at temperature 1.

    Args:
        block_length: semi-autoregressive blocks; None decodes anywhere.
        confidence: by which positions are chosen.
    """
    return Decoder(in_blocks(block_length), MicroConfidenceCommitter(confidence=confidence))


def llada_random(*, block_length: int | None = None) -> Decoder:
    """LLaDA's random remasking (algorithm 4): any tokens first."""
    return llada_low_confidence(block_length=block_length, confidence="random")


def left_to_right() -> Decoder:
    """The order of an autoregressive model, whatever the model says."""
    return llada_low_confidence(confidence="leftmost")
