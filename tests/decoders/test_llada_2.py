"""LLaDA2's decoders."""

from __future__ import annotations

import pytest
import reference
import torch
from models import MASK, PAD, Words
from papers import BANNED
from samplers import make

from nap_decode import (
    AnyOrderScheduler,
    Block,
    Canvas,
    CanvasTemplate,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    Sampler,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
)
from nap_decode.decoders.llada_2 import EditReviser
from nap_decode.parts.slots import Decision, Proposal, Slots


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def test_editing_agrees_with_the_reference(tiny, denoiser):
    threshold, edit_threshold, max_passes, block_length = 0.3, 0.4, 3, 4
    sampler = make(denoiser, "llada21_editing", max_passes=max_passes)
    edits = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=9)
        tokens, passes = [*prompt, *[MASK] * 9], 0
        slots = range(len(prompt), len(tokens))
        for line in range(0, len(tokens), block_length):
            block = [p for p in slots if line <= p < line + block_length]
            after = 0
            while block:
                masked = [p for p in block if tokens[p] == MASK]
                after += not masked
                if after > max_passes:
                    break
                passes += 1
                with torch.no_grad():
                    logits = tiny(torch.tensor([tokens])).logits[0].tolist()
                proposals = {p: reference.propose(logits[p], BANNED) for p in block}
                changed = [
                    p
                    for p in block
                    if p not in masked
                    and proposals[p][0] != tokens[p]
                    and proposals[p][1][proposals[p][0]] > edit_threshold
                ]
                edits += len(changed)
                if masked:
                    here = {p: proposals[p] for p in masked}
                    changed += reference.threshold_rule(threshold)(here, {})
                for p in changed:
                    tokens[p] = proposals[p][0]
                if not masked and not changed:
                    break
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert edits > 3


def test_blocks_on_the_grid():
    canvas = Canvas.from_prompts(
        [[5] * 6, [5] * 3, [5] * 9], CanvasTemplate.plain(5), mask_token_id=MASK, pad_token_id=PAD
    )
    partition = SemiAutoregressiveScheduler(tokens_per_step=1, block_length=4, on_grid=True).partition(canvas)
    # Slots at 6 to 10, 3 to 7 and 9 to 13; the lines are at 4, 8 and 12.
    assert [row[row >= 0].tolist() for row in partition.block] == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert partition.lengths.tolist() == [[2, 3], [1, 4], [3, 2]]


def sampler_of(model, committer, scheduler=None, **options):
    decoder = Decoder(AnyOrderScheduler() if scheduler is None else scheduler, committer)
    return Sampler(model, decoder=decoder, mask_token_id=MASK, **options)


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


def test_a_block_that_settles_is_owed_nothing():
    """The least number of tokens goes to blocks with masks, also while another is only looked at again."""
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(2.0), reviser=EditReviser(0.3))
    template = CanvasTemplate((Block("a", 1), Block("b", 5)))
    left = []
    sampler = sampler_of(Undecided(), committer, MacroParallelScheduler(), template=template)
    sampler([[0]], callback=lambda state: left.append(int(state.masked.sum())))
    assert left[:6] == [5, 4, 3, 2, 1, 0]


def test_a_row_that_has_joined_has_been_looked_at_never():
    """Zero stands for nothing, and so for a block that is new to the batch."""
    block, quota = torch.tensor([[0] * 6 + [1] * 6] * 2), torch.ones(2, 2, dtype=torch.int64)
    committed = torch.ones_like(block, dtype=torch.bool)
    memory = {"edit_passes": torch.tensor([[3], [0]])}
    slots = Slots.of(block, quota, committed=committed, memory=memory)
    proposal = Proposal.of(slots, torch.zeros(2, 12), probability=torch.zeros(2, 12))
    EditReviser(0.9)(proposal, Decision(proposal.tokens, proposal.confidence, ~committed))
    assert slots.memory["edit_passes"].tolist() == [[4, 1], [1, 1]]


def test_quota_selection_with_a_reviser_is_adaptive():
    assert MicroConfidenceCommitter(selection=QuotaSelection(), reviser=EditReviser()).needs.adaptive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit_threshold": "high"}, "edit_threshold must be a number, but is 'high'"),
        ({"max_passes": 0}, "max_passes must be a whole number of at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NapDecodeError, match=message):
        EditReviser(**options)
