from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import score

from nap_decode import (
    AnyOrderScheduler,
    Decoder,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    QuotaSelection,
    Sampler,
)
from nap_decode.base.random import row_seeds
from nap_decode.decoders.calibration import CalibratedConfidence
from nap_decode.decoders.llada import ProbabilityWithout
from nap_decode.model.statistics import Distribution
from nap_decode.parts.confidence import (
    CONFIDENCES,
    STATISTICS,
    Candidates,
    divergence,
    find_confidence,
    support,
)
from nap_decode.parts.slots import Slots


def candidates(banned=()):
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return make(logits, torch.arange(6), banned)


def make(logits, positions, banned=(), first=0):
    """A slot in each of as many rows, all of which hold id 1, and begin their block in column ``first``."""
    banned, number = torch.tensor(banned, dtype=torch.int64), len(logits)
    slots = Slots.of(
        torch.zeros(number, 1, dtype=torch.int64),
        torch.ones(number, 1, dtype=torch.int64),
        index=positions[:, None],
        row_tokens=torch.ones(number, 60, dtype=torch.int64),
        row_offsets=torch.arange(60).expand(number, -1) - first,
        seeds=row_seeds(0, range(number)),
        step=torch.full((number,), 2),
    )
    tokens = logits.index_fill(1, banned, -torch.inf).argmax(1)
    return Candidates(Distribution(logits.clone(), banned), tokens, slots, slots.places)


@pytest.mark.parametrize("name", ["probability", "margin", "negative_entropy", "leftmost"])
@pytest.mark.parametrize("banned", [[], [1], [0, 4]])
def test_agrees_with_the_definition(name, banned):
    given = candidates(banned)
    got = CONFIDENCES[name](given).tolist()
    for i in range(6):
        expected = score(name, given.logits[i].tolist(), int(given.tokens[i]), int(given.positions[i]))
        assert got[i] == pytest.approx(expected)


def reads_of(function, *others):
    """What a committer with these as its confidence and its statistics knows that they read."""

    class Asking(QuotaSelection):
        needs = Needs(statistics=others)

    return MicroConfidenceCommitter(confidence=function, selection=Asking())._reads


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
@pytest.mark.parametrize("banned", [[], [1], [0, 4]])
def test_a_function_asks_for_no_more_than_it_is_said_to(name, banned):
    """So the logits may be given up before, if all functions are known; of one of yours nothing is."""
    function = CONFIDENCES[name]
    names, is_all = reads_of(function)
    assert is_all
    whole, spent = candidates(banned), candidates(banned)
    spent.distribution.spend(names)
    spent = replace(spent, tokens=spent.distribution.mode)
    torch.testing.assert_close(function(spent), function(whole), rtol=0, atol=0)
    for other in (lambda candidates: candidates.best, support, divergence, CalibratedConfidence((1.0,))):
        assert reads_of(function, other) == (names, False)


def test_what_several_functions_ask_for_is_named_once():
    both = CONFIDENCES["margin"], CONFIDENCES["probability"]
    assert reads_of(*both) == (("best", "mode", "log_normalizer", "second"), True)


def test_higher_is_more_certain():
    sharp = torch.tensor([[9.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    given = make(sharp, torch.tensor([0, 1]))
    for name in ("probability", "margin", "negative_entropy", "leftmost"):
        sure, unsure = CONFIDENCES[name](given).tolist()
        assert sure > unsure


def test_entropy_survives_impossible_ids():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    given = make(logits, torch.tensor([0]))
    assert CONFIDENCES["negative_entropy"](given).item() == pytest.approx(-0.6931, abs=1e-4)


def test_the_margin_is_that_to_any_other_id():
    logits = torch.tensor([[4.0, 1.0, 3.0, 3.0, 2.0]] * 4)
    p = logits[0].softmax(0)
    for banned, other in (((), 2), ((0,), 0), ((0, 2), 0), ((2, 3), 2)):
        given = make(logits, torch.arange(4), banned)
        expected = p[given.tokens[0]] - p[other]
        torch.testing.assert_close(CONFIDENCES["margin"](given), expected.expand(4))
    tied = make(torch.tensor([[3.0, 3.0, 1.0]]), torch.tensor([0]))
    assert CONFIDENCES["margin"](tied).tolist() == [0.0]


CUTS = [
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.1},
    {"temperature": 1e-6},
    {"top_k": 1},
    {"top_p": 0.1},
]
EVERY_CONFIDENCE = {
    **STATISTICS,
    "calibrated": CalibratedConfidence((0.2,) * 5),
    "without the best": ProbabilityWithout((2,)),
    "without others": ProbabilityWithout((0, 3)),
    "without any": ProbabilityWithout(range(5)),
}


@pytest.mark.parametrize("model_precision", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", EVERY_CONFIDENCE)
def test_a_cut_that_leaves_one_id(name, cut, model_precision):
    """Whatever is asked about a distribution of a single id has an answer: nothing is undefined."""
    committer = MicroConfidenceCommitter(
        confidence=EVERY_CONFIDENCE[name], scores_proposal=True, model_precision=model_precision, **cut
    )
    logits = torch.tensor([[0.0, 0, 9, 1, 1], [0, 0, 1, 9, 1]])
    sampler = Sampler(
        lambda ids, mask: logits.expand(*ids.shape, 5) if ids.shape[1] == 2 else logits[[0, 0, 1]][None],
        decoder=Decoder(AnyOrderScheduler(steps=2), committer),
        mask_token_id=1,
    )
    out = sampler([[3]], max_new_tokens=2)
    assert out.sequences.tolist() == [[3, 2, 3]]
    assert not out.trace.confidence[0, 1:].isnan().any()
    if name == "without the best":  # so 3 was committed first, and 2 last
        assert out.trace.step[0, 1:].tolist() == [1, 0]
        assert out.trace.confidence[0, 1] == 0


def test_a_logit_that_is_no_number_stays_so():
    logits = torch.tensor([[math.nan, 0.0, 1.0], [-math.inf, -math.inf, 1.0]])
    assert ProbabilityWithout((2,))(make(logits, torch.arange(2))).isnan().tolist() == [True, False]


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


def test_support_has_nothing_for_a_banned_id():
    """Such as the mask, which only slots hold that no support is asked for."""
    assert support(candidates(banned=[1])).tolist() == [0.0] * 6


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
    given = make(logits, torch.tensor([0, 1]))
    before = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf]])
    assert divergence(replace(given, previous=before)).tolist() == [0.0, torch.inf]
