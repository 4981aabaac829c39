from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nap_decode import MicroConfidenceCommitter, NapDecodeError
from nap_decode.base.random import row_seeds
from nap_decode.decoders.credit_decoding import Credit
from nap_decode.decoders.eb_sampler import EntropyBoundSelection
from nap_decode.decoders.llada_2 import EditReviser
from nap_decode.decoders.stability import StableSelection
from nap_decode.model import prediction
from nap_decode.model.prediction import Prediction
from nap_decode.model.statistics import Distribution
from nap_decode.parts.slots import Slots

NONE = torch.tensor([], dtype=torch.int64)


def slots(rows=2, width=5, quota=2, step=0):
    block = torch.zeros(rows, width, dtype=torch.int64)
    quota, step = torch.full((rows, 1), quota), torch.full((rows,), step)
    return Slots.of(block, quota, seeds=row_seeds(3, range(rows)), step=step)


def propose(committer, scores, slots, banned):
    proposal = committer.propose(Prediction.of(scores, banned=banned), slots)
    return proposal.tokens, proposal.confidence


def logits(rows=2, width=5, vocabulary=7, seed=0):
    return 2 * torch.randn(rows, width, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_greedy_proposals_avoid_banned_ids_and_keep_the_full_normaliser():
    scores = logits()
    top = scores.argmax(2)
    for banned in ([int(top[0, 0])], [int(top[0, 0]), 2, 6]):
        tokens, confidence = propose(MicroConfidenceCommitter(), scores, slots(), torch.tensor(banned))
        allowed = scores.clone()
        allowed[:, :, banned] = -torch.inf
        assert torch.equal(tokens, allowed.argmax(2))
        expected = scores.softmax(2).gather(2, tokens[:, :, None])[:, :, 0]
        torch.testing.assert_close(confidence, expected)


def test_logits_are_not_changed():
    scores = logits()
    before = scores.clone()
    for temperature in (0.0, 1.0):
        said = Prediction.of(scores, banned=torch.tensor([1]))
        MicroConfidenceCommitter(temperature=temperature)(slots(), lambda said=said, **_: said)
        assert torch.equal(scores, before)
        assert torch.equal(said.logits, before)


def test_chunks_make_no_difference(monkeypatch):
    for confidence in ("probability", "margin", "negative_entropy", "random"):
        committer = MicroConfidenceCommitter(temperature=0.8, confidence=confidence)
        whole = propose(committer, logits(), slots(), torch.tensor([1]))
        monkeypatch.setattr(prediction, "_CACHED_NUMBERS", 21)  # three rows of seven
        assert len(list(Prediction.of(logits(), banned=NONE).chunks())) == 4
        parts = propose(committer, logits(), slots(), torch.tensor([1]))
        monkeypatch.undo()
        assert torch.equal(whole[0], parts[0])
        torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype):
    scores = logits().to(dtype)
    _, confidence = propose(MicroConfidenceCommitter(), scores, slots(), NONE)
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, scores.float().softmax(2).amax(2))


@pytest.mark.parametrize(
    ("options", "support"),
    [({}, 7), ({"top_k": 3}, 3), ({"top_k": 1}, 1), ({"top_p": 0.6}, None), ({"top_k": 4, "top_p": 0.7}, None)],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_cut_off_distribution(options, support, temperature):
    count = 30_000
    row = logits(1, 1)[0, 0]
    draws = slots(count, 1)
    committer = MicroConfidenceCommitter(temperature=temperature, **options)
    tokens, _ = propose(committer, row.expand(count, 1, -1), draws, torch.tensor([0]))
    row = row.clone()
    row[0] = -torch.inf
    p = (row / temperature).softmax(0).tolist()
    order = sorted(range(7), key=lambda i: -p[i])[: options.get("top_k", 7)]
    kept, total = [], 0.0
    renormaliser = sum(p[i] for i in order)
    for i in order:
        if total < options.get("top_p", 1.0) * renormaliser:
            kept.append(i)
        total += p[i]
    kept = [i for i in kept if p[i] > 0]
    expected = torch.tensor([p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(7)])
    seen = torch.bincount(tokens[:, 0], minlength=7) / count
    deviation = (seen - expected).abs() / (expected * (1 - expected) / count).sqrt().clamp(min=1e-9)
    assert (deviation[expected > 0] < 4.5).all()
    assert (seen[expected == 0] == 0).all()
    if support is not None:
        assert len(kept) == min(support, 6)


def test_ids_without_probability_are_never_drawn():
    scores = torch.full((1, 1, 5), -torch.inf)
    scores[0, 0, 3] = 0.0
    tokens, _ = propose(MicroConfidenceCommitter(temperature=1.0), scores.expand(5000, 1, -1), slots(5000, 1), NONE)
    assert (tokens == 3).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_where_no_id_is_left_the_confidence_is_nan(temperature):
    scores = torch.full((1, 2, 5), -torch.inf)
    scores[0, :, 3] = 0.0
    scores[0, 1, 2] = 1e4
    tokens, confidence = propose(
        MicroConfidenceCommitter(temperature=temperature), scores, slots(1, 2), torch.tensor([3])
    )
    assert confidence.isnan().tolist() == [[True, False]]
    assert tokens[0, 1] == 2


def test_candidates_say_whose_they_are(monkeypatch):
    seen = []

    def look(candidates):
        named = [getattr(candidates, name).tolist() for name in ("block", "positions", "offsets")]
        seen.append([*named, candidates.of(candidates.slots.tokens).tolist()])
        return candidates.best

    monkeypatch.setattr(prediction, "_CACHED_NUMBERS", 14)  # two rows of seven
    own = replace(
        slots(2, 3),
        block=torch.tensor([[0, 0, 0], [0, 0, 1]]),
        row_tokens=torch.tensor([[5, 5, 5], [6, 5, 6]]),
        row_offsets=torch.tensor([[2, 3, 4], [1, 2, 0]]),
    )
    propose(MicroConfidenceCommitter(confidence=look), logits(2, 3), own, NONE)
    assert seen == [
        [[0, 0], [0, 1], [2, 3], [5, 5]],
        [[0, 0], [2, 0], [4, 1], [5, 6]],
        [[0, 1], [1, 2], [2, 0], [5, 6]],
    ]


def ragged(total, step=0, memory=None):
    """Four, none and two slots in three rows of six; the third of the first row holds a token."""
    wanted = torch.tensor([[0, 1, 1, 1, 0, 1], [0] * 6, [1, 0, 0, 0, 1, 0]]).bool()
    return Slots.pack(
        wanted,
        torch.where(wanted, 0, -1),
        torch.full((3, 1), 2),
        width=4,
        total=total,
        committed=torch.arange(6).expand(3, -1) == 3,
        seeds=row_seeds(3, range(3)),
        step=torch.full((3,), step),
        row_tokens=torch.full((3, 6), 4),
        row_offsets=torch.arange(6).expand(3, -1),
        memory={} if memory is None else memory,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"confidence": "random", "reviser": EditReviser(0.3)},
        {"selection": EntropyBoundSelection(), "adjustment": Credit()},
        {"selection": StableSelection(), "temperature": 0.8, "top_k": 5, "scores_proposal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("total", [6, 9])
def test_only_slots_that_there_are_count(options, total):
    """Whether what fills rows up is predicted too makes no difference, at any step."""
    committer, memories = MicroConfidenceCommitter(**options), ({}, {})
    for step in range(3):
        whole, few = ragged(12, step, memories[0]), ragged(total, step, memories[1])
        said = logits(3, 4, seed=step)
        there = whole.block < 1
        nothing = said.masked_fill(~there[:, :, None], torch.nan)
        proposals = [
            committer.propose(Prediction.of(scores, banned=torch.tensor([0]), places=slots.places), slots)
            for scores, slots in ((said, whole), (nothing, few))
        ]
        for a, b in zip(*((p.tokens, p.confidence, *p.statistics.values()) for p in proposals), strict=True):
            assert a.shape == b.shape == (3, 4)
            torch.testing.assert_close(a[there], b[there], rtol=1e-5, atol=1e-6)
        commits = [committer.decide(p) for p in proposals]
        assert torch.equal(commits[0].chosen & there, commits[1].chosen & there)


def test_a_draw_at_a_boundary_goes_to_the_next_possible_id():
    distribution = Distribution(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log())
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    tokens = [int(distribution.draw(draw[None])) for draw in draws]
    assert tokens == [1, 1, 3, 3, 3]


def test_draws_differ_between_steps_and_positions():
    committer = MicroConfidenceCommitter(temperature=3.0)
    flat = torch.zeros(1, 40, 50)
    first, _ = propose(committer, flat, slots(1, 40, step=0), NONE)
    second, _ = propose(committer, flat, slots(1, 40, step=1), NONE)
    assert len(first.unique()) > 15
    assert (first != second).sum() > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, but is -0.1"),
        ({"temperature": "hot"}, "temperature must be a finite number of at least 0, but is 'hot'"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, but is nan"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0, but is inf"),
        ({"temperature": 1e-320}, "temperature must be 0 or at least 1e-6"),
        ({"confidence": 3}, "confidence must be a name or a function of Candidates, but is 3"),
        ({"selection": "threshold"}, "selection must be a Selection, such as"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be a whole number of at least 1, but is 0"),
        ({"temperature": 1.0, "top_p": 1.2}, "top_p must be a number from 0 to 1, but is 1.2"),
        ({"top_k": 3}, "top_k=3 would have no effect: nothing is drawn"),
        ({"top_p": 0.9}, "top_p=0.9 would have no effect: nothing is drawn"),
        ({"confidence": "entropi"}, "there is no confidence 'entropi'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NapDecodeError, match=message):
        MicroConfidenceCommitter(**options)


def test_scoring_the_proposal_cuts_by_top_p_before_top_k():
    """As in Dream.  The other way round top_p would be a share of what top_k left."""
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().view(1, 1, 4)
    committer = MicroConfidenceCommitter(top_p=0.75, top_k=2, scores_proposal=True)
    _, confidence = propose(committer, row, slots(1, 1), NONE)
    assert confidence.item() == pytest.approx(0.4 / 0.7)
    narrow = MicroConfidenceCommitter(top_p=0.55, top_k=2, scores_proposal=True)
    _, confidence = propose(narrow, row, slots(1, 1), NONE)
    # 0.4 alone does not reach 0.55, but 0.4 / 0.7 would.
    assert confidence.item() == pytest.approx(0.4 / 0.7)
