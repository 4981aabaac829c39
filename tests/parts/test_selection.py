"""Every selection against its definition, written out for one block at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK, TableModel

from nap_decode import (
    AnyOrderScheduler,
    Decoder,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    Sampler,
    ThresholdSelection,
)
from nap_decode.base.random import row_seeds
from nap_decode.decoders.credit_decoding import Credit
from nap_decode.decoders.dinfer import HierarchySelection
from nap_decode.decoders.eb_sampler import EntropyBoundSelection
from nap_decode.decoders.fast_dllm import FactorSelection
from nap_decode.decoders.leap import LeapSelection
from nap_decode.decoders.stability import StableSelection
from nap_decode.decoders.wide_in_narrow_out import CappedSelection
from nap_decode.parts.slots import Proposal, Slots, rank_in_block

BLOCKS = 3
"""Block 3 stands for no block."""
scores = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, -math.inf])
shares = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def candidates(draw, score=shares):
    """Slots of one row in the order of their columns: lists of scores, blocks, columns and flags, and a quota."""
    number = draw(st.integers(1, 12))
    confidence = draw(st.lists(score, min_size=number, max_size=number))
    block = sorted(draw(st.lists(st.integers(0, BLOCKS), min_size=number, max_size=number)))
    steps = draw(st.lists(st.integers(1, 3), min_size=number, max_size=number))
    columns = [sum(steps[: i + 1]) for i in range(number)]
    committed = draw(st.lists(st.integers(0, 4).map(lambda n: n == 0), min_size=number, max_size=number))
    quota = draw(st.lists(st.integers(0, 3), min_size=BLOCKS, max_size=BLOCKS))
    return confidence, block, columns, committed, quota


def run(selection, case, **statistics):
    confidence, block, columns, committed, quota = case
    slots = Slots.of(
        torch.tensor([block]),
        torch.tensor([quota]),
        index=torch.tensor([columns]),
        committed=torch.tensor([committed]),
        row_tokens=torch.zeros(1, 40, dtype=torch.int64),
    )
    statistics = {name: torch.tensor([values], dtype=torch.float64) for name, values in statistics.items()}
    proposal = Proposal.of(slots, torch.tensor([confidence], dtype=torch.float64), **statistics)
    chosen = selection(proposal)[0].tolist()
    return {i for i, c in enumerate(chosen) if c}


def members(case, b):
    _, block, _, committed, _ = case
    return [i for i in range(len(block)) if block[i] == b and not committed[i]]


def best(case, group, number):
    return set(sorted(group, key=lambda i: (-case[0][i], i))[:number])


def filled(case, rule):
    """What a rule chooses in each block, and the best others where that is less than the quota."""
    chosen = set()
    for b in range(BLOCKS):
        group = members(case, b)
        own = rule(group)
        rest = [i for i in group if i not in own]
        chosen |= own | best(case, rest, max(0, case[4][b] - len(own)))
    return chosen


@settings(max_examples=400)
@given(st.lists(st.tuples(scores, st.integers(0, 3)), min_size=1, max_size=12))
def test_rank_in_block(pairs):
    confidence = torch.tensor([[c for c, _ in pairs]])
    block = torch.tensor([[b for _, b in pairs]])
    ranks = rank_in_block(confidence, block)[0].tolist()
    for i, (c, b) in enumerate(pairs):
        before = [j for j, (d, a) in enumerate(pairs) if a == b and (d > c or (d == c and j < i))]
        assert ranks[i] == len(before)


@settings(max_examples=300)
@given(candidates(scores))
def test_quota(case):
    assert run(QuotaSelection(), case) == filled(case, lambda group: set())


@settings(max_examples=300)
@given(candidates(scores))
def test_quota_with_the_ties_of_topk(case):
    """The same scores, whichever of the equal slots."""
    chosen, want = run(QuotaSelection(ties="topk"), case), run(QuotaSelection(), case)
    for b in range(BLOCKS):
        ours, theirs = (sorted(case[0][i] for i in some if case[1][i] == b) for some in (chosen, want))
        assert ours == theirs
    assert not any(case[3][i] for i in chosen)
    with pytest.raises(NapDecodeError, match="there is no ties 'higher'"):
        QuotaSelection(ties="higher")


@settings(max_examples=300)
@given(candidates(scores))
def test_threshold(case):
    expected = filled(case, lambda group: {i for i in group if case[0][i] >= 0.5})
    assert run(ThresholdSelection(0.5), case) == expected


@settings(max_examples=300)
@given(candidates(), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_factor(case, factor):
    def rule(group):
        ranked = sorted(group, key=lambda i: (-case[0][i], i))
        numbers = [n for n in range(1, len(ranked) + 1) if case[0][ranked[n - 1]] >= 1 - factor / (n + 1)]
        return set(ranked[: max(numbers, default=0)])

    assert run(FactorSelection(factor), case) == filled(case, rule)


@settings(max_examples=300)
@given(candidates(), st.sampled_from([0.0, 0.26, 1.01]), st.data())
def test_entropy_bound(case, gamma, data):
    number = len(case[0])
    entropy = data.draw(st.lists(shares, min_size=number, max_size=number))

    def rule(group):
        ranked = sorted(group, key=lambda i: (-case[0][i], i))
        fits = 0
        for k in range(1, len(ranked) + 1):
            prefix = [entropy[i] for i in ranked[:k]]
            if sum(prefix) - max(prefix) > gamma + 1e-9:
                break
            fits = k
        return set(ranked[:fits])

    assert run(EntropyBoundSelection(gamma + 1e-9), case, negative_entropy=[-h for h in entropy]) == filled(case, rule)


@settings(max_examples=300)
@given(candidates())
def test_hierarchy(case):
    confidence, _, columns, _, _ = case

    def rule(group):
        chosen, runs = set(), []
        for i in group:
            if runs and columns[i] == columns[runs[-1][-1]] + 1 and i == runs[-1][-1] + 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        for one in runs:
            chosen |= {i for i in best(case, one, 1) if confidence[i] > 0.4}
        return chosen | {i for i in group if confidence[i] > 0.8}

    assert run(HierarchySelection(0.8, 0.4), case) == filled(case, rule)


@settings(max_examples=300)
@given(candidates(), st.integers(0, 4))
def test_leap(case, radius):
    confidence, _, columns, _, _ = case

    def rule(group):
        anchors = [i for i in group if confidence[i] >= 0.8]
        near = {i for i in group if any(abs(columns[i] - columns[a]) <= radius for a in anchors)}
        return set(anchors) | {i for i in near if confidence[i] >= 0.5}

    assert run(LeapSelection(0.8, 0.5, radius), case) == filled(case, rule)


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


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_positions_are_drawn_without_replacement(temperature):
    rows = 40_000
    slots = Slots.of(torch.zeros(rows, 4, dtype=torch.int64), torch.full((rows, 1), 2), seeds=row_seeds(0, range(rows)))
    confidence = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    chosen = QuotaSelection(temperature)(Proposal.of(slots, confidence.expand(rows, -1)))
    assert (chosen.sum(1) == 2).all()
    weight = (confidence / temperature).softmax(0).tolist()
    for i in range(4):
        # i first, or second after any other
        expected = weight[i] + sum(weight[j] * weight[i] / (1 - weight[j]) for j in range(4) if j != i)
        error = (expected * (1 - expected) / rows) ** 0.5
        assert abs(chosen[:, i].double().mean() - expected) < 4.5 * error


def test_a_cap_draws_if_what_it_caps_does():
    assert CappedSelection(QuotaSelection(0.5)).needs.random
    assert not CappedSelection(QuotaSelection()).needs.random
    committer = MicroConfidenceCommitter(selection=CappedSelection(QuotaSelection(5.0)))
    sampler = Sampler(TableModel(3, 4), decoder=Decoder(AnyOrderScheduler(), committer), mask_token_id=MASK)
    outs = [sampler([[]] * 20, max_new_tokens=4, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(outs[0].trace.step, outs[1].trace.step)
    assert not torch.equal(outs[0].trace.step, outs[2].trace.step)
    assert len({tuple(row) for row in outs[0].trace.step.tolist()}) > 1  # every row draws for itself


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


def test_filling_up_prefers_what_is_chosen():
    slots = Slots.of(torch.tensor([[0, 0, 0]]), torch.tensor([[1]]))
    proposal = Proposal.of(slots, torch.tensor([[0.1, 0.9, 0.5]]))
    assert proposal.fill_up(torch.tensor([[True, False, False]])).tolist() == [[True, False, False]]


@pytest.mark.parametrize("threshold", [math.nan, "0.9", None])
@pytest.mark.parametrize("selection", [ThresholdSelection, StableSelection, HierarchySelection, LeapSelection])
def test_bad_thresholds(selection, threshold):
    with pytest.raises(NapDecodeError, match="threshold must be a number"):
        selection(threshold)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactorSelection(-1), "factor must be a finite number of at least 0, but is -1"),
        (lambda: EntropyBoundSelection(-0.1), "gamma must be a finite number of at least 0"),
        (lambda: QuotaSelection(-1.0), "position_temperature must be a finite number of at least 0"),
        (lambda: StableSelection(history=0), "history must be a whole number of at least 1"),
        (lambda: LeapSelection(radius=-1), "radius must be a whole number of at least 0"),
        (lambda: CappedSelection("threshold"), "capped must be a Selection, such as ThresholdSelection"),
        (lambda: CappedSelection(ThresholdSelection(), least=9, most=3), "most must be a whole number of at least 9"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()
