from __future__ import annotations

import torch
from models import MASK, TableModel

from nap_decode import (
    AnyOrderScheduler,
    LookaheadCommitter,
    MicroConfidenceCommitter,
    Sampler,
    SemiAutoregressiveScheduler,
    Slots,
    ThresholdSelection,
)
from nap_decode.decoders.lookahead import _Branches
from nap_decode.parts.committer import Committer


class Recorder(Committer):
    """Asks as another committer does, and keeps what it asked."""

    is_adaptive = True

    def __init__(self, committer):
        self.committer, self.asked = committer, []

    def __call__(self, slots, predict):
        def record(tokens=None, **options):
            self.asked.append(tokens.tolist())
            return predict(tokens, **options)

        return self.committer(slots, record)


def sampler_of(scheduler, committer, length=4, seed=0):
    return Sampler(TableModel(3, length, seed=seed), scheduler=scheduler, committer=committer, mask_token_id=MASK)


def lookahead(threshold=2.0, **options):
    return LookaheadCommitter(committer=MicroConfidenceCommitter(selection=ThresholdSelection(threshold)), **options)


def test_the_anchor_comes_first_and_branches_fill_one_slot_more():
    recorder = Recorder(lookahead(branches=2, weight=1.0))  # so that the anchor always wins
    sampler_of(AnyOrderScheduler(), recorder)([[]], max_new_tokens=4)
    differences = []
    for tokens in recorder.asked:
        anchor, *branches = (row[0] for row in tokens)
        differences.append([sum(a != b for a, b in zip(anchor, branch, strict=True)) for branch in branches])
    # Four, three, two and one slot are open; at the last there is one branch, and what repeats the anchor.
    assert differences == [[], [1, 1], [1, 1], [1, 0]]


def test_a_branch_costs_no_forward_pass_of_its_own():
    out = sampler_of(AnyOrderScheduler(), lookahead(branches=3, weight=0.0))([[]], max_new_tokens=4)
    assert out.forward_passes < 4  # branches that won brought their tokens along


def test_the_trace_has_the_confidence_with_which_a_branch_was_made():
    out = sampler_of(AnyOrderScheduler(), lookahead(branches=3, weight=0.0))([[]], max_new_tokens=4)
    steps = out.trace.step[0]
    model = TableModel(3, 4)
    checked = 0
    for step in range(1, out.forward_passes):
        together = (steps == step).nonzero()[:, 0].tolist()
        # At threshold 2 a step commits one token; the other one is the branch's, predicted at the step before.
        before = model(out.trace.canvas_at(step - 1), None)[0].softmax(1)
        extra = [p for p in together if abs(float(before[p].amax()) - float(out.trace.confidence[0, p])) < 1e-6]
        if len(together) == 2:
            assert extra
            checked += 1
    assert checked


def test_branches_of_a_closed_block_are_forgotten():
    scheduler = SemiAutoregressiveScheduler(block_length=2)
    for seed in range(5):
        recorder = Recorder(lookahead(branches=2, weight=0.0))
        out = sampler_of(scheduler, recorder, seed=seed)([[]], max_new_tokens=4)
        assert MASK not in out.sequences
        # The first pass over each block has nothing to compare: what was offered belonged to the block before.
        second = out.trace.step[0, 2:].min()
        assert sum(row[0] != recorder.asked[second][0][0] for row in recorder.asked[second]) == 0


def test_rows_look_ahead_for_themselves():
    """Each with as many open slots as it has, and branches of its own, whatever stands beside it."""
    committer = lookahead(threshold=0.6, branches=2, weight=0.3)
    for seed in range(6):
        sampler = sampler_of(AnyOrderScheduler(), committer, length=5, seed=seed)
        together = sampler([[0], [2], [0]], max_new_tokens=4)
        assert len({tuple(row) for row in together.trace.step.tolist()}) > 1
        for row, prompt in enumerate(([0], [2], [0])):
            alone = sampler([prompt], max_new_tokens=4)
            assert torch.equal(together.sequences[row], alone.sequences[0])
            assert torch.equal(together.trace.step[row], alone.trace.step[0])


def test_a_row_that_has_joined_has_no_branches():
    """Zero stands for nothing, and column 0 for itself."""
    slots = Slots.of(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64))
    slots.memory.update(
        branch_columns=torch.tensor([[1, 3], [0, 0]]),
        branch_tokens=torch.tensor([[7, 8], [0, 0]]),
        branch_scores=torch.tensor([[0.5, 0.25], [0.0, 0.0]]),
    )
    branches = _Branches.of(slots)
    assert branches.exists.tolist() == [[True, True], [True, False], [True, False]]
    assert branches.adds[1:].long().tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]]
    assert branches.confidence[:, 0].tolist() == [1.0, 0.5, 0.25]


def test_weakest_counts_the_least_certain_slots():
    confidence = torch.tensor([[[0.9, 0.1, 0.5, 0.7]]])
    is_open = torch.tensor([[[True, True, True, False]]])
    assert lookahead(weakest=0.7)._certainty(confidence, is_open).item() == torch.tensor([0.1, 0.5]).mean().item()
    assert lookahead(weakest=0.0)._certainty(confidence, is_open).item() == torch.tensor(0.1).item()
    assert lookahead()._certainty(confidence, ~is_open & False).item() == 1.0
