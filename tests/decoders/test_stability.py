"""KLASS."""

from __future__ import annotations

import math

import pytest
import torch
from models import MASK, Words
from papers import check_blocks
from reference import stable_rule
from samplers import OPTIONS

from nap_decode import AnyOrderScheduler, Decoder, Denoiser, MicroConfidenceCommitter, NapDecodeError, Sampler
from nap_decode.decoders.credit_decoding import Credit
from nap_decode.decoders.stability import StableSelection
from nap_decode.parts.slots import Proposal, Slots


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_klass_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "klass", stable_rule(**OPTIONS["klass"]), block_length)


def test_stable_waits_for_a_history():
    slots = Slots.of(torch.tensor([[0, 0, 0]]), torch.tensor([[0]]))
    confidence = torch.tensor([[0.95, 0.95, 0.5]])
    selection = StableSelection(0.9, 0.01, 2)

    def step(*divergence):
        return selection(Proposal.of(slots, confidence, divergence=torch.tensor([divergence]))).long().tolist()[0]

    assert step(math.inf, math.inf, math.inf) == [0, 0, 0]
    assert step(0.001, 0.001, 0.001) == [0, 0, 0]
    assert step(0.001, 0.1, 0.001) == [1, 0, 0]
    assert step(0.001, 0.001, 0.001) == [1, 0, 0]
    assert step(0.001, 0.001, 0.001) == [1, 1, 0]


def test_stable_follows_slots_that_move():
    # The slot of column 5 is the second, then the first.
    before = Slots.of(
        torch.tensor([[0, 0]]),
        torch.tensor([[0]]),
        index=torch.tensor([[3, 5]]),
        rank=torch.tensor([[-1, -1, -1, 0, -1, 1]]),
    )
    after = Slots.of(
        torch.tensor([[0]]),
        torch.tensor([[0]]),
        index=torch.tensor([[5]]),
        rank=torch.tensor([[-1, -1, -1, -1, -1, 0]]),
        memory=before.memory,
    )
    selection = StableSelection(0.9, 0.01, 2)
    selection(Proposal.of(before, torch.tensor([[0.5, 0.95]]), divergence=torch.tensor([[1.0, 0.001]])))
    proposal = Proposal.of(after, torch.tensor([[0.95]]), divergence=torch.tensor([[0.001]]))
    assert selection(proposal).tolist() == [[True]]


def test_stability_is_that_of_the_scored_distribution():
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def constant(ids, mask):
        return logits.expand(*ids.shape, 24)

    for options in ({}, {"scores_proposal": True, "temperature": 0.5, "top_k": 20}):
        committer = MicroConfidenceCommitter(selection=StableSelection(0.0, 1e-3, 1), **options)
        sampler = Sampler(constant, decoder=Decoder(AnyOrderScheduler(), committer), mask_token_id=MASK)
        assert sampler([5, 6], max_new_tokens=12, seed=0).forward_passes == 2
    with pytest.raises(NapDecodeError, match="compares the model's predictions from step to step, which Credit"):
        MicroConfidenceCommitter(selection=StableSelection(), adjustment=Credit())


def test_bad_options():
    with pytest.raises(NapDecodeError, match="history must be a whole number of at least 1"):
        StableSelection(history=0)
