from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import MASK, TableModel

from nap_decode import (
    AnyOrderScheduler,
    Block,
    CanvasTemplate,
    Decoder,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    Reviser,
    Sampler,
    ThresholdSelection,
)
from nap_decode.decoders.llada_2 import EditReviser
from nap_decode.decoders.wide_in_narrow_out import RemaskReviser
from nap_decode.parts.slots import Decision, Proposal, Slots


def sampler_of(model, committer, scheduler=None, **options):
    decoder = Decoder(AnyOrderScheduler() if scheduler is None else scheduler, committer)
    return Sampler(model, decoder=decoder, mask_token_id=MASK, **options)


def revise(reviser, slots, chosen, **statistics):
    """A reviser's decision about proposals of token 0, of which some were chosen."""
    proposal = Proposal.of(slots, torch.zeros(slots.block.shape), **statistics)
    return reviser(proposal, Decision(proposal.tokens, proposal.confidence, chosen))


class Undecided:
    """Says at every position the id that is not there: 2 for 0, 0 for 2, and for a mask 0."""

    def __call__(self, input_ids, attention_mask):
        return 20.0 * torch.nn.functional.one_hot(torch.where(input_ids == 0, 2, 0), 3).double()


def test_a_model_that_never_settles_is_left_after_max_passes():
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.9), reviser=EditReviser(0.9, max_passes=5))
    sampler = sampler_of(Undecided(), committer)
    out = sampler([[0, 2]], max_new_tokens=3)
    assert out.forward_passes == 1 + 5
    assert out.trace.step[0, 2:].tolist() == [5, 5, 5]
    assert out.sequences[0].tolist() == [0, 2, 2, 2, 2]  # the prompt is not edited


def test_rows_settle_by_themselves():
    """A row that is done is not looked at again while another goes on."""

    def model(ids, mask):
        calm = ids[:, :1] == 2
        wanted = torch.where(calm, 2, torch.where(ids == 0, 2, 0))
        return 20.0 * torch.nn.functional.one_hot(wanted, 3).double()

    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.9), reviser=EditReviser(0.9, max_passes=4))
    sampler = sampler_of(model, committer)
    out = sampler([[2], [0]], max_new_tokens=3)
    assert out.trace.forward_passes.tolist() == [2, 5]  # one to commit, one to see that nothing changes
    assert out.sequences[0].tolist() == [2, 2, 2, 2]


def test_remasking_is_bounded_by_what_was_accepted_before():
    block = torch.zeros(1, 6, dtype=torch.int64)
    committed = torch.tensor([[True, True, True, True, False, False]])
    slots = Slots.of(block, torch.tensor([[1]]), committed=committed, memory={"accepted": torch.tensor([[3]])})
    support = torch.tensor([[0.1, 0.4, 0.2, 0.95, 0.0, 0.0]])
    two = torch.tensor([[False] * 4 + [True, True]])
    one = torch.tensor([[False] * 5 + [True]])
    reviser = RemaskReviser(0.9)
    remasked = revise(reviser, slots, two, support=support).remasked
    assert remasked.tolist() == [[True, False, True, False, False, False]]
    assert slots.memory["accepted"].tolist() == [[2]]
    assert revise(reviser, slots, two, support=support).remasked.tolist() == [[True] + [False] * 5]
    assert not revise(reviser, slots, one, support=support).remasked.any()  # a step that commits one token only adds


def test_a_row_that_has_joined_remembers_nothing():
    """Zero stands for nothing: it is treated as at its first step, and so is a block that is new to the batch."""
    block = torch.tensor([[0] * 6 + [1] * 6] * 2)
    committed = torch.tensor([[True, True, True, True, False, False] * 2] * 2)
    quota, support = torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 12)
    slots = Slots.of(block, quota, committed=committed, memory={"accepted": torch.tensor([[2], [0]])})
    revision = revise(RemaskReviser(0.9), slots, ~committed, support=support)
    assert slots.count(revision.remasked).tolist() == [[1, 4], [4, 4]]

    slots = Slots.of(
        block, quota, committed=torch.ones_like(committed), memory={"edit_passes": torch.tensor([[3], [0]])}
    )
    revise(EditReviser(0.9), slots, ~committed, probability=support)
    assert slots.memory["edit_passes"].tolist() == [[4, 1], [1, 1]]


def test_a_reviser_of_ones_own():
    class Once(Reviser):
        """Masks the first slot again, once."""

        def __call__(self, proposal, decision):
            slots = proposal.slots
            first = slots.committed & (slots.offsets == 0)
            fresh = "done" not in slots.memory
            if bool(first.any()):
                slots.memory["done"] = first.any(1)
            return replace(decision, remasked=first & fresh)

    committer = MicroConfidenceCommitter(confidence="leftmost", reviser=Once())
    sampler = sampler_of(TableModel(3, 4), committer)
    seen = []

    def look(state):
        seen.append((state.masked[0].tolist(), state.commit_step[0].tolist(), state.tokens[0].tolist()))

    out = sampler([[]], max_new_tokens=4, callback=look)
    assert out.forward_passes == 5
    assert [step for _, step, _ in seen[:3]] == [[0, -1, -1, -1], [-1, 1, -1, -1], [2, 1, -1, -1]]
    for masked, step, tokens in seen:
        assert masked == [s < 0 for s in step] == [t == MASK for t in tokens]
    assert out.trace.step.tolist() == [[2, 1, 3, 4]]


def test_a_block_that_settles_is_owed_nothing():
    """The least number of tokens goes to blocks with masks, also while another is only looked at again."""
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(2.0), reviser=EditReviser(0.3))
    template = CanvasTemplate((Block("a", 1), Block("b", 5)))
    left = []
    sampler = sampler_of(Undecided(), committer, MacroParallelScheduler(), template=template)
    sampler([[0]], callback=lambda state: left.append(int(state.masked.sum())))
    assert left[:6] == [5, 4, 3, 2, 1, 0]


def test_a_reviser_that_draws_has_the_seeds_of_the_rows():
    class Chance(Reviser):
        needs = Needs(adaptive=True, memory=True, committed=True, random=True)

        def __call__(self, proposal, decision):
            seen.append(proposal.slots.seeds.tolist())
            return decision

    seen = []
    committer = MicroConfidenceCommitter(reviser=Chance())
    sampler_of(TableModel(3, 2), committer)([[], []], max_new_tokens=2, row_seeds=[4, 9])
    assert seen == [[4, 9], [4, 9]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EditReviser("high"), "edit_threshold must be a number, but is 'high'"),
        (lambda: EditReviser(max_passes=0), "max_passes must be a whole number of at least 1"),
        (lambda: RemaskReviser(None), "back_threshold must be a number, but is None"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()


def test_a_model_that_cannot_leave_one_out_is_refused_before_decoding():
    calls = []

    def model(ids, mask):
        calls.append(1)
        return torch.zeros(*ids.shape, 3)

    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.9), reviser=RemaskReviser())
    sampler = sampler_of(model, committer)
    with pytest.raises(NapDecodeError, match="position"):
        sampler([[0]], max_new_tokens=3)
    assert not calls
