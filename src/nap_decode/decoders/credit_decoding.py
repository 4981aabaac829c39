"""CreditDecoding (arXiv 2510.06133; dInfer's ``Credit...Decoder``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import Adjustment, Decoder, MicroConfidenceCommitter, Slots, ThresholdSelection, in_blocks
from nap_decode.parts.committer import Chunk


@dataclass(frozen=True, kw_only=True)
class Credit(Adjustment):
    """Tokens that a slot kept preferring gain credit, which is added to their logits.

    At each step a slot's credits decay, its most likely token gains ``probability ** boost``, and
    ``strength * log(1 + credit)`` is added to the logits, for proposal and confidence alike.

    Args:
        strength: alpha.
        decay: beta, what is left of a credit after a step.
        boost: gamma.
    """

    strength: float = 0.7
    decay: float = 0.8
    boost: float = 0.2

    def __post_init__(self) -> None:
        check_between("strength", self.strength, 0.0, math.inf)
        check_between("decay", self.decay, 0.0, 1.0)
        check_between("boost", self.boost, 0.0, math.inf)

    @override
    def __call__(self, slots: Slots, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        # What tokens each slot preferred at the T steps so far, and what credit they have: (B, K, T) each.
        tokens = torch.zeros((*slots.index.shape, 0), dtype=torch.int64, device=slots.index.device)
        amounts = tokens.float()
        if "credit_tokens" in slots.memory:
            place, known = slots.recall("credit_rank")
            tokens = slots.memory["credit_tokens"].take_along_dim(place[:, :, None], dim=1)
            amounts = slots.memory["credit_amounts"].take_along_dim(place[:, :, None], dim=1) * known[:, :, None]
        tokens, amounts, noted = tokens.flatten(0, 1), amounts.flatten(0, 1), list[list[Tensor]]()
        for places, logits in chunks:
            logits, *ledger = self.add(logits, tokens[places], amounts[places].to(logits))
            noted.append(ledger)
            yield places, logits
        tokens, amounts = (slots.unpack(torch.cat(parts)) for parts in zip(*noted, strict=True))
        slots.memory.update(credit_rank=slots.rank + 1, credit_tokens=tokens, credit_amounts=amounts)

    def add(self, logits: Tensor, tokens: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of R slots.

        Args:
            logits: ``(R, V)``.
            tokens: ``(R, T)`` int64, the most likely token at each step so far.
            amounts: ``(R, T)``, what each has; where a token occurs again its whole credit is at the last.

        Returns:
            Logits with the credits added, and the ledger with a column more.
        """
        top, best = logits.log_softmax(1).max(1)
        same = tokens == best[:, None]
        now = self.decay * (amounts * same).sum(1) + (self.boost * top).exp()
        amounts = torch.cat([self.decay * amounts * ~same, now[:, None]], dim=1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
        return logits.scatter_add(1, tokens, self.strength * amounts.log1p()), tokens, amounts


def credit(
    *,
    threshold: float = 0.9,
    strength: float = 0.7,
    decay: float = 0.8,
    boost: float = 0.2,
    block_length: int | None = 32,
) -> Decoder:
    """Credit decoding: a threshold that tokens reach sooner if they lead for long; options see :class:`Credit`."""
    adjustment = Credit(strength=strength, decay=decay, boost=boost)
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(threshold), adjustment=adjustment)
    return Decoder(in_blocks(block_length), committer)
