"""WINO."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from models import MASK, PAD, TableModel, Words
from papers import BANNED, BLOCKS, best, candidates, members, run
from samplers import make

from nap_decode import (
    AnyOrderScheduler,
    Canvas,
    CanvasTemplate,
    Decoder,
    Denoiser,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    Sampler,
    ThresholdSelection,
)
from nap_decode.decoders.wide_in_narrow_out import CappedSelection, RemaskReviser
from nap_decode.parts.slots import Decision, Proposal, Slots


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def test_wino_agrees_with_the_reference(denoiser):
    threshold, back_threshold, length, block_length = 0.2, 0.3, 16, 8
    sampler = make(denoiser, "wino", block_length=block_length)
    again = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=length)
        canvas = Canvas.from_prompts([prompt], CanvasTemplate.plain(length), mask_token_id=MASK, pad_token_id=PAD)
        tokens, passes = canvas.tokens.clone(), 0
        for start in range(len(prompt), len(prompt) + length, block_length):
            block = torch.arange(start, start + block_length)
            last = 30
            while (tokens[0, block] == MASK).any():
                masked = tokens[0, block] == MASK
                with torch.no_grad():
                    logits = denoiser(tokens, block[None], canvas, hidden=~masked[None])[0].tolist()
                passes += 1
                proposals = {i: reference.propose(logits[i], BANNED) for i in range(block_length)}
                c = reference.confidences({i: proposals[i] for i in range(block_length) if masked[i]})
                accepted = sorted((i for i in c if c[i] >= threshold), key=lambda i: (-c[i], i))
                accepted = accepted[: min(max(int(len(c) * 0.7), 5), 20)] or [min(c, key=lambda i: (-c[i], i))]
                support = {i: proposals[i][1][int(tokens[0, block[i]])] for i in range(block_length) if not masked[i]}
                doubtful = sorted((i for i in support if support[i] < back_threshold), key=lambda i: (support[i], i))
                doubtful = doubtful[: last - 1] if len(accepted) > 1 else []
                for i in accepted:
                    tokens[0, block[i]] = proposals[i][0]
                for i in doubtful:
                    tokens[0, block[i]] = MASK
                again += len(doubtful)
                last = len(accepted)
        assert out.sequences.tolist() == tokens.tolist()
        assert out.forward_passes == passes
    assert again > 3


def test_hiding_slots_does_not_depend_on_rows_with_more_of_them(denoiser):
    """Rows of one length without padding, but with different numbers of slots to hide."""
    texts = [[5, MASK, 7, MASK, 8, 6, 9, MASK], [MASK] * 8, [5, 6, 7, 8, 9, MASK, MASK, 5]]
    sampler = make(denoiser, "wino")
    out = sampler.infill(texts)
    for row, text in enumerate(texts):
        assert torch.equal(sampler.infill([text]).sequences[0], out.sequences[row])
        alone = sampler.infill([text]).trace.confidence[0]
        torch.testing.assert_close(alone, out.trace.confidence[row], equal_nan=True)


@settings(max_examples=300)
@given(candidates())
def test_capped(case):
    expected = set()
    for b in range(BLOCKS):
        group, quota = members(case, b), case[4][b]
        own = {i for i in group if case[0][i] >= 0.3}
        own |= best(case, [i for i in group if i not in own], max(0, quota - len(own)))
        cap = max(min(max(int(len(group) * 0.5), 2), 4), quota)
        expected |= best(case, own, cap)
    assert run(CappedSelection(ThresholdSelection(0.3), share=0.5, least=2, most=4), case) == expected


def test_a_cap_draws_if_what_it_caps_does():
    assert CappedSelection(QuotaSelection(0.5)).needs.random
    assert not CappedSelection(QuotaSelection()).needs.random
    committer = MicroConfidenceCommitter(selection=CappedSelection(QuotaSelection(5.0)))
    sampler = Sampler(TableModel(3, 4), decoder=Decoder(AnyOrderScheduler(), committer), mask_token_id=MASK)
    outs = [sampler([[]] * 20, max_new_tokens=4, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(outs[0].trace.step, outs[1].trace.step)
    assert not torch.equal(outs[0].trace.step, outs[2].trace.step)
    assert len({tuple(row) for row in outs[0].trace.step.tolist()}) > 1  # every row draws for itself


def revise(reviser, slots, chosen, support):
    """A reviser's decision where some proposals were chosen."""
    proposal = Proposal.of(slots, torch.zeros(slots.block.shape), support=support)
    return reviser(proposal, Decision(proposal.tokens, proposal.confidence, chosen))


def test_remasking_is_bounded_by_what_was_accepted_before():
    block = torch.zeros(1, 6, dtype=torch.int64)
    committed = torch.tensor([[True, True, True, True, False, False]])
    slots = Slots.of(block, torch.tensor([[1]]), committed=committed, memory={"accepted": torch.tensor([[3]])})
    support = torch.tensor([[0.1, 0.4, 0.2, 0.95, 0.0, 0.0]])
    two = torch.tensor([[False] * 4 + [True, True]])
    one = torch.tensor([[False] * 5 + [True]])
    reviser = RemaskReviser(0.9)
    remasked = revise(reviser, slots, two, support).remasked
    assert remasked.tolist() == [[True, False, True, False, False, False]]
    assert slots.memory["accepted"].tolist() == [[2]]
    assert revise(reviser, slots, two, support).remasked.tolist() == [[True] + [False] * 5]
    assert not revise(reviser, slots, one, support).remasked.any()  # a step that commits one token only adds


def test_a_row_that_has_joined_remembers_nothing():
    """Zero stands for nothing: it is treated as at its first step, and so is a block that is new to the batch."""
    block = torch.tensor([[0] * 6 + [1] * 6] * 2)
    committed = torch.tensor([[True, True, True, True, False, False] * 2] * 2)
    quota, memory = torch.ones(2, 2, dtype=torch.int64), {"accepted": torch.tensor([[2], [0]])}
    slots = Slots.of(block, quota, committed=committed, memory=memory)
    remasked = revise(RemaskReviser(0.9), slots, ~committed, torch.zeros(2, 12)).remasked
    assert slots.count(remasked).tolist() == [[1, 4], [4, 4]]


def test_a_model_that_cannot_leave_one_out_is_refused_before_decoding():
    calls = []

    def model(ids, mask):
        calls.append(1)
        return torch.zeros(*ids.shape, 3)

    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.9), reviser=RemaskReviser())
    sampler = Sampler(model, decoder=Decoder(AnyOrderScheduler(), committer), mask_token_id=MASK)
    with pytest.raises(NapDecodeError, match="position"):
        sampler([[0]], max_new_tokens=3)
    assert not calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CappedSelection("threshold"), "capped must be a Selection, such as ThresholdSelection"),
        (lambda: CappedSelection(ThresholdSelection(), least=9, most=3), "most must be a whole number of at least 9"),
        (lambda: RemaskReviser(None), "back_threshold must be a number, but is None"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()
