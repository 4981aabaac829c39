"""CreditDecoding (arXiv 2510.06133; dInfer's ``Credit...Decoder``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts.committer import Adjustment, MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.scheduler import in_blocks
from nap_decode.parts.selection import ThresholdSelection
from nap_decode.parts.slots import Slots


@dataclass(frozen=True, kw_only=True)
class Credit(Adjustment):
    """Tokens that a slot kept preferring gain credit, which is added to their logits (dInfer's ``Credit...Decoder``).

    At each step a slot's credits decay, its most likely token gains ``probability ** boost``, and
    ``strength * log(1 + credit)`` is added to the logits, for proposal and confidence alike.

    Args:
        strength: alpha.
        decay: beta, what is left of a credit after a step.
        boost: gamma.

    Example:
        >>> Credit(strength=0.5)
        Credit(strength=0.5, decay=0.8, boost=0.2)
    """

    strength: float = 0.7
    decay: float = 0.8
    boost: float = 0.2

    def __post_init__(self) -> None:
        check_between("strength", self.strength, 0.0, math.inf)
        check_between("decay", self.decay, 0.0, 1.0)
        check_between("boost", self.boost, 0.0, math.inf)

    @override
    def begin(self, slots: Slots) -> Ledger:
        return Ledger(self, slots)

    def __call__(self, logits: Tensor, tokens: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


class Ledger:
    """What tokens each slot preferred so far, and what credit they have.

    Args:
        credit: the rule.
        slots: the slots of this step, whose memory has what was noted at the steps before.
    """

    def __init__(self, credit: Credit, slots: Slots) -> None:
        self.credit, self.slots = credit, slots
        shape = (*slots.index.shape, 0)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=slots.index.device)
        self.amounts = torch.zeros(shape, device=slots.index.device)
        if "credit_tokens" in slots.memory:
            tokens, amounts = slots.memory["credit_tokens"], slots.memory["credit_amounts"]
            place, known = slots.recall(slots.kept("credit_rank", torch.zeros_like(slots.rank)))
            self.tokens = tokens.take_along_dim(place[:, :, None], dim=1)
            self.amounts = amounts.take_along_dim(place[:, :, None], dim=1) * known[:, :, None]
        self.added: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, places: Tensor) -> Tensor:
        """Logits ``(R, V)`` of some of the slots, with their credits added and the new ones noted."""
        tokens, amounts = (rearrange(t, "b k t -> (b k) t")[places] for t in (self.tokens, self.amounts))
        logits, tokens, amounts = self.credit(logits, tokens, amounts.to(logits))
        self.added.append((tokens, amounts))
        return logits

    def remember(self) -> None:
        """Keep for the next step what was noted."""
        tokens, amounts = (torch.cat(parts) for parts in zip(*self.added, strict=True))
        memory = self.slots.memory
        memory["credit_rank"] = self.slots.rank + 1
        memory["credit_tokens"], memory["credit_amounts"] = self.slots.unpack(tokens), self.slots.unpack(amounts)


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
