from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import score

from nap_decode import CalibratedConfidence, NapDecodeError
from nap_decode.confidence import (
    CONFIDENCES,
    Candidates,
    background_frequencies,
    divergence,
    find_confidence,
    support,
)
from nap_decode.randomness import row_seeds


def candidates(banned=()):
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    allowed = logits.index_fill(1, torch.tensor(banned, dtype=torch.int64), -torch.inf)
    return make(logits, allowed, torch.arange(6))


def make(logits, allowed, positions):
    best, tokens = allowed.max(1)
    rows = torch.arange(len(logits))
    return Candidates(
        logits=logits,
        best=best,
        tokens=tokens,
        current=torch.ones_like(rows),
        positions=positions,
        offsets=positions,
        block=torch.zeros_like(rows),
        rows=rows,
        seeds=row_seeds(0, len(rows)),
        step=2,
    )


@pytest.mark.parametrize("name", ["probability", "margin", "negative_entropy", "leftmost"])
@pytest.mark.parametrize("banned", [[], [1], [0, 4]])
def test_agrees_with_the_definition(name, banned):
    given = candidates(banned)
    got = CONFIDENCES[name](given).tolist()
    for i in range(6):
        expected = score(name, given.logits[i].tolist(), int(given.tokens[i]), int(given.positions[i]))
        assert got[i] == pytest.approx(expected)


def test_higher_is_more_certain():
    sharp = torch.tensor([[9.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    given = make(sharp, sharp, torch.tensor([0, 1]))
    for name in ("probability", "margin", "negative_entropy", "leftmost"):
        sure, unsure = CONFIDENCES[name](given).tolist()
        assert sure > unsure


def test_entropy_survives_impossible_ids():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    given = make(logits, logits, torch.tensor([0]))
    assert CONFIDENCES["negative_entropy"](given).item() == pytest.approx(-0.6931, abs=1e-4)


def test_random_is_uniform_and_its_own_stream():
    given = candidates()
    got = CONFIDENCES["random"](given)
    assert ((got >= 0) & (got < 1)).all()
    assert len(got.unique()) == 6


def test_find_confidence():
    def mine(candidates):
        return candidates.positions

    assert find_confidence(mine) is mine
    with pytest.raises(NapDecodeError, match="must be a name or a function of Candidates, but is None"):
        find_confidence(None)
    assert find_confidence("margin") is CONFIDENCES["margin"]
    with pytest.raises(NapDecodeError, match=r"there is no confidence 'marginn'. Did you mean 'margin'"):
        find_confidence("marginn")


def test_support_is_the_probability_of_what_stands_there():
    given = candidates()
    expected = given.logits.softmax(1)[:, 1]  # every slot holds id 1
    torch.testing.assert_close(support(given), expected)


def test_divergence_agrees_with_the_definition():
    given = candidates()
    before = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before[2] = torch.nan  # this slot was not there
    p, q = given.logits.softmax(1), before.softmax(1)
    expected = (p * (p / q).log()).sum(1)
    expected[2] = torch.inf
    torch.testing.assert_close(divergence(replace(given, previous=before)), expected)
    assert (divergence(given) == torch.inf).all()
    assert divergence(replace(given, previous=given.logits)).abs().max() < 1e-12


def test_divergence_survives_impossible_ids():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    given = make(logits, logits, torch.tensor([0, 1]))
    before = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf]])
    assert divergence(replace(given, previous=before)).tolist() == [0.0, torch.inf]


def test_calibrated_confidence_agrees_with_the_definition():
    given = replace(candidates(), positions=torch.arange(6) + 40)  # offsets are those in the block
    frequencies = (0.5, 0.25, 0.125, 1e-30, 0.1)
    got = CalibratedConfidence(frequencies, decay=0.3, cap=2.0)(given).tolist()
    capped = 0
    for i in range(6):
        token = int(given.tokens[i])
        surprise = -float(given.logits[i].softmax(0)[token]) * math.log(frequencies[token])
        capped += surprise > 2
        assert got[i] == pytest.approx(math.exp(-0.3 * i) * min(2.0, surprise))
    assert capped


def test_background_frequencies():
    assert background_frequencies([[0, 0, 2], [0]], 4) == (0.75, 0.25, 0.25, 0.25)
    with pytest.raises(NapDecodeError, match="there is no token in the texts"):
        background_frequencies([[], []], 4)
