"""LoPA."""

from __future__ import annotations

from functools import partial

import pytest
import reference
import torch
from models import MASK, TableModel, Words
from papers import BANNED
from samplers import make

from nap_decode import (
    AnyOrderScheduler,
    Committer,
    Decoder,
    Denoiser,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    Sampler,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
    decoders,
)
from nap_decode.decoders.discrete_forcing import PipelineScheduler
from nap_decode.decoders.llada_2 import EditReviser
from nap_decode.decoders.lookahead import LookaheadCommitter, _Branches
from nap_decode.parts.slots import Slots


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def best_branch(model, tokens, offers, slots_of, weight, weakest):
    """The anchor, or the offer that is worth most: its tokens, its proposals, and whether it is an offer."""
    best = None
    for position, token, creation in [(None, None, 1.0), *offers]:
        branch = list(tokens)
        if position is not None:
            branch[position] = token
        with torch.no_grad():
            logits = model(torch.tensor([branch])).logits[0].tolist()
        proposals = {p: reference.propose(logits[p], BANNED) for p in slots_of(branch)}
        c = sorted(reference.confidences(proposals).values())
        counted = c[: max(1, int(len(c) * weakest))]
        future = sum(counted) / len(counted) if counted else 1.0
        worth = weight * creation + (1 - weight) * future
        if best is None or worth > best[0] + 1e-12:
            best = worth, branch, proposals, position is not None
    return best[1:]


def next_offers(proposals, chosen, branches):
    """The surest of what was not committed, each with its creation."""
    c = reference.confidences({p: proposals[p] for p in proposals if p not in chosen})
    return [(p, proposals[p][0], c[p]) for p in sorted(c, key=lambda p: (-c[p], p))[:branches]]


def test_lookahead_agrees_with_the_reference(tiny, denoiser):
    threshold, branches, weight, weakest, length = 0.5, 2, 0.1, 0.5, 10
    sampler = make(denoiser, "lopa", block_length=None, weight=weight)
    won = 0

    def masked(tokens):
        return [p for p, token in enumerate(tokens) if token == MASK]

    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=length)
        tokens, passes, offers = [*prompt, *[MASK] * length], 0, []
        while MASK in tokens:
            passes += 1
            tokens, proposals, is_offer = best_branch(tiny, tokens, offers, masked, weight, weakest)
            won += is_offer
            chosen = reference.threshold_rule(threshold)(proposals, {}) if proposals else set()
            for p in chosen:
                tokens[p] = proposals[p][0]
            offers = next_offers(proposals, chosen, branches)
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert won > 3


def open_now(tokens, start, size, share):
    """Slots of the blocks that are open, in a pipeline."""
    blocks = [range(first, first + size) for first in range(start, len(tokens), size)]
    count = 1
    while count < len(blocks) and sum(tokens[p] != MASK for p in blocks[count - 1]) >= size * share:
        count += 1
    return [[p for p in block if tokens[p] == MASK] for block in blocks[:count]]


def open_slots(tokens, **pipeline):
    return [p for block in open_now(tokens, **pipeline) for p in block]


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_branches_open_blocks_for_themselves(tiny, denoiser, share):
    threshold, branches, weight, length, size = 0.5, 2, 0.1, 12, 3
    decoder = decoders.lopa(threshold=threshold, branches=branches, weight=weight).set(opens_blocks=True)
    scheduler = PipelineScheduler(block_length=size, done_before_next=share, done_before_owed=0.6)
    sampler = Sampler(denoiser, decoder=decoder.set(scheduler=scheduler))
    opened = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9], [6, 6], [9]):
        out = sampler(prompt, max_new_tokens=length)
        tokens, passes, offers = [*prompt, *[MASK] * length], 0, []
        slots_of = partial(open_slots, start=len(prompt), size=size, share=share)
        while MASK in tokens:
            passes += 1
            branch, proposals, _ = best_branch(tiny, tokens, offers, slots_of, weight, weakest=0.5)
            blocks = open_now(branch, len(prompt), size, share)
            opened += len(blocks) > len(open_now(tokens, len(prompt), size, share))
            chosen = set()
            for i, block in enumerate(blocks):
                here = {p: proposals[p] for p in block}
                rule = reference.threshold_rule(threshold)(here, {}) if here else set()
                before = len(prompt) + (i - 1) * size
                owed = not i or sum(t != MASK for t in branch[before : before + size]) >= size * 0.6
                chosen |= rule if owed else {p for p in rule if reference.confidences(here)[p] >= threshold}
            tokens = branch
            for p in chosen:
                tokens[p] = proposals[p][0]
            offers = next_offers(proposals, chosen, branches)
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert opened > 1


class Recorder(Committer):
    """Asks as another committer does, and keeps what it asked."""

    needs = Needs(adaptive=True, memory=True)

    def __init__(self, committer):
        self.committer, self.asked = committer, []

    def __call__(self, slots, predict):
        def record(tokens=None, **options):
            self.asked.append(tokens.tolist())
            return predict(tokens, **options)

        return self.committer(slots, record)


def sampler_of(scheduler, committer, length=4, seed=0):
    return Sampler(TableModel(3, length, seed=seed), decoder=Decoder(scheduler, committer), mask_token_id=MASK)


def lookahead(threshold=2.0, **options):
    return LookaheadCommitter(inner=MicroConfidenceCommitter(selection=ThresholdSelection(threshold)), **options)


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


@pytest.mark.parametrize("scheduler", [AnyOrderScheduler(), PipelineScheduler(block_length=2)])
def test_rows_look_ahead_for_themselves(scheduler):
    """Each with as many open slots as it has, and branches of its own, whatever stands beside it."""
    committer = lookahead(threshold=0.6, branches=2, weight=0.3, opens_blocks=True)
    for seed in range(6):
        sampler = sampler_of(scheduler, committer, length=5, seed=seed)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LookaheadCommitter(inner=decoders.credit().committer),
            "a committer that looks ahead cannot revise, give credit or compare steps",
        ),
        (lambda: LookaheadCommitter(inner=decoders.klass().committer), "cannot revise, give credit or compare"),
        (lambda: decoders.lopa().set(reviser=EditReviser()), "cannot revise, give credit or compare"),
        (
            lambda: LookaheadCommitter(inner="best"),
            "inner must be a MicroConfidenceCommitter, such as .* but is 'best'",
        ),
        (lambda: LookaheadCommitter(branches=0), "branches must be a whole number of at least 1"),
        (lambda: LookaheadCommitter(weight=2), "weight must be a number from 0 to 1, but is 2"),
        (lambda: LookaheadCommitter(weakest=-1), "weakest must be a number from 0 to 1, but is -1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()
