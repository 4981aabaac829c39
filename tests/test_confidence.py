from __future__ import annotations

import pytest
import torch
from reference import score

from nap_decode import NapDecodeError
from nap_decode.confidence import CONFIDENCES, Candidates, find_confidence
from nap_decode.randomness import row_seeds


def candidates(banned=()):
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    allowed = logits.index_fill(1, torch.tensor(banned, dtype=torch.int64), -torch.inf)
    return make(logits, allowed, torch.arange(6))


def make(logits, allowed, positions):
    best, tokens = allowed.max(1)
    rows = torch.arange(len(logits))
    return Candidates(logits, best, tokens, positions, torch.zeros_like(rows), rows, row_seeds(0, len(rows)), step=2)


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
