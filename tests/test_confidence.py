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
    return Candidates(logits, allowed, allowed.argmax(1), torch.arange(6), row_seeds(0, 6), step=2)


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
    given = Candidates(sharp, sharp, torch.tensor([0, 0]), torch.tensor([0, 1]), row_seeds(0, 2), 0)
    for name in ("probability", "margin", "negative_entropy", "leftmost"):
        sure, unsure = CONFIDENCES[name](given).tolist()
        assert sure > unsure


def test_entropy_survives_impossible_ids():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    given = Candidates(logits, logits, torch.tensor([0]), torch.tensor([0]), row_seeds(0, 1), 0)
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
    assert find_confidence("margin") is CONFIDENCES["margin"]
    with pytest.raises(NapDecodeError, match=r"there is no confidence 'marginn'. Did you mean 'margin'"):
        find_confidence("marginn")
