"""Selections against their definitions, written out for one block at a time; those of a paper are with its decoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papers import BLOCKS, candidates, filled, run, scores

from nap_decode import NapDecodeError, QuotaSelection, ThresholdSelection
from nap_decode.base.random import row_seeds
from nap_decode.decoders.dinfer import HierarchySelection
from nap_decode.decoders.leap import LeapSelection
from nap_decode.decoders.stability import StableSelection
from nap_decode.parts.slots import Proposal, Slots, rank_in_block


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


def test_filling_up_prefers_what_is_chosen():
    slots = Slots.of(torch.tensor([[0, 0, 0]]), torch.tensor([[1]]))
    proposal = Proposal.of(slots, torch.tensor([[0.1, 0.9, 0.5]]))
    assert proposal.fill_up(torch.tensor([[True, False, False]])).tolist() == [[True, False, False]]


@pytest.mark.parametrize("threshold", [math.nan, "0.9", None])
@pytest.mark.parametrize("selection", [ThresholdSelection, StableSelection, HierarchySelection, LeapSelection])
def test_bad_thresholds(selection, threshold):
    with pytest.raises(NapDecodeError, match="threshold must be a number"):
        selection(threshold)


def test_bad_options():
    with pytest.raises(NapDecodeError, match="position_temperature must be a finite number of at least 0"):
        QuotaSelection(-1.0)


def test_means_are_those_of_the_open_slots_of_a_block():
    slots = Slots.of(
        torch.tensor([[0, 0, 0, 1, 2]]),
        torch.ones(1, 2, dtype=torch.int64),
        committed=torch.tensor([[False, True] * 2 + [False]]),
    )
    proposal = Proposal.of(slots, torch.tensor([[0.2, 9.0, 0.4, 0.5, 7.0]]))
    assert proposal.mean(proposal.confidence).tolist() == [[pytest.approx(0.3)] * 3 + [0.0, 0.0]]


def test_a_statistic_that_nobody_asked_for():
    proposal = Proposal.of(Slots.of(torch.tensor([[0]]), torch.tensor([[1]])), torch.tensor([[0.5]]))
    with pytest.raises(NapDecodeError, match=r"nobody asked for 'margin'; .* needs = Needs\(statistics="):
        proposal["margin"]
