"""The EB-Sampler (arXiv 2505.24857)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import Decoder, MicroConfidenceCommitter, Needs, Proposal, Selection, in_blocks
from nap_decode.parts.slots import sort_in_block


@dataclass(frozen=True)
class EntropyBoundSelection(Selection):
    """The longest prefix, by confidence, with ``sum(H) - max(H) <= gamma`` (equation 8).

    H are the entropies of the slots' distributions: the bound is one on how much the tokens that are
    committed together can depend on each other.

    Args:
        gamma: the bound, in nats.

    Example:
        >>> from nap_decode.parts import Slots
        >>> slots = Slots.of(block=torch.tensor([[0, 0, 0]]), quota=torch.tensor([[1]]))
        >>> entropy = torch.tensor([[.05, .3, .2]])
        >>> EntropyBoundSelection(0.1)(Proposal.of(slots, -entropy, negative_entropy=-entropy)).long().tolist()
        [[1, 0, 1]]
    """

    gamma: float = 0.1

    needs = Needs(adaptive=True, statistics=("negative_entropy",))

    def __post_init__(self) -> None:
        check_between("gamma", self.gamma, 0.0, math.inf)

    @override
    def __call__(self, proposal: Proposal) -> Tensor:
        block, entropy = proposal.slots.open_block, -proposal["negative_entropy"].double()
        order, _, first = sort_in_block(proposal.confidence, block)
        ordered = entropy.gather(1, order)
        total = ordered.cumsum(1)
        before = total.gather(1, first) - ordered.gather(1, first)  # of the blocks in front
        # The running maximum starts anew in each block: lift every block above all those before it.
        lift = block.gather(1, order) * (entropy.amax(1, keepdim=True) + 1)
        largest = (ordered + lift).cummax(1).values - lift
        bound = torch.zeros_like(total).scatter_(1, order, total - before - largest)
        return proposal.fill_up(bound <= self.gamma)


def entropy_bounded(*, gamma: float = 0.1, block_length: int | None = None) -> Decoder:
    """The EB-Sampler: as many tokens as a bound on their dependence allows, in the order of their entropies.

    Options see :class:`EntropyBoundSelection`; without blocks, as in the paper.
    """
    selection = EntropyBoundSelection(gamma)
    committer = MicroConfidenceCommitter(confidence="negative_entropy", selection=selection)
    return Decoder(in_blocks(block_length), committer)
