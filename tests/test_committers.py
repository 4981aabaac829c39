from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode import (
    Canvas,
    CanvasTemplate,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    ThresholdSelection,
    committers,
)
from nap_decode.committers import Slots, rank_in_block
from nap_decode.randomness import row_seeds

NONE = torch.tensor([], dtype=torch.int64)


def slots(rows=2, width=5, quota=2, step=0):
    index = torch.arange(width).expand(rows, -1)
    return Slots(
        index=index,
        block=torch.zeros(rows, width, dtype=torch.int64),
        positions=index,
        rank=index,
        quota=torch.full((rows, 1), quota),
        seeds=row_seeds(3, rows),
        step=step,
    )


def logits(rows=2, width=5, vocabulary=7, seed=0):
    return 2 * torch.randn(rows, width, vocabulary, generator=torch.Generator().manual_seed(seed))


scores = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, -math.inf])


@settings(max_examples=400)
@given(st.lists(st.tuples(scores, st.integers(0, 3)), min_size=1, max_size=12))
def test_rank_in_block(candidates):
    confidence = torch.tensor([[c for c, _ in candidates]])
    block = torch.tensor([[b for _, b in candidates]])
    ranks = rank_in_block(confidence, block)[0].tolist()
    for i, (c, b) in enumerate(candidates):
        before = [j for j, (d, a) in enumerate(candidates) if a == b and (d > c or (d == c and j < i))]
        assert ranks[i] == len(before)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(scores, st.integers(0, 3)), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_selections(candidates, quota):
    confidence = torch.tensor([[c for c, _ in candidates]])
    block = torch.tensor([[b for _, b in candidates]])  # block 3 stands for no block
    chosen = QuotaSelection()(confidence, block, torch.tensor([quota]))[0].tolist()
    for b in range(3):
        members = [i for i, (_, a) in enumerate(candidates) if a == b]
        best = sorted(members, key=lambda i: (-candidates[i][0], i))[: quota[b]]
        assert [i for i in members if chosen[i]] == sorted(best)
    reached = ThresholdSelection(0.5)(confidence, block, torch.tensor([quota]))[0].tolist()
    for i, (c, b) in enumerate(candidates):
        assert reached[i] == (b < 3 and (c >= 0.5 or chosen[i]))


def test_slots_are_packed_to_the_left():
    template = CanvasTemplate.nap(2, path_length=2, summary_length=1, path_header=[(7,), (7,)], summary_header=(7,))
    canvas = Canvas.from_prompts([[5, 5], [5]], template, mask_token_id=1)
    masked = canvas.decodable.clone()
    masked[0, 3] = False  # the first slot of path 1 is committed
    is_open = torch.tensor([[True, False, True], [False, True, False]])
    quota = torch.tensor([[1, 0, 1], [0, 2, 0]])
    packed = Slots.pack(canvas, canvas.block, masked, is_open, quota, 3, row_seeds(0, 2), 4)
    assert packed.index.tolist() == [[4, 9, 0], [6, 7, 0]]
    assert packed.block.tolist() == [[0, 2, 3], [1, 1, 3]]
    assert packed.positions[:, :2].tolist() == [[4, 9], [5, 6]]
    spread = packed.spread(torch.tensor([[10, 20, 30], [40, 50, 60]])).masked_fill(packed.rank < 0, -1)
    assert spread.tolist() == [[-1] * 4 + [10] + [-1] * 4 + [20], [-1] * 6 + [40, 50, -1, -1]]


def test_greedy_proposals_avoid_banned_ids_and_keep_the_full_normaliser():
    scores = logits()
    top = scores.argmax(2)
    for banned in ([int(top[0, 0])], [int(top[0, 0]), 2, 6]):
        tokens, confidence = MicroConfidenceCommitter().propose(scores, slots(), torch.tensor(banned))
        allowed = scores.clone()
        allowed[:, :, banned] = -torch.inf
        assert torch.equal(tokens, allowed.argmax(2))
        expected = scores.softmax(2).gather(2, tokens[:, :, None])[:, :, 0]
        torch.testing.assert_close(confidence, expected)


def test_logits_are_not_changed():
    scores = logits()
    before = scores.clone()
    for temperature in (0.0, 1.0):
        MicroConfidenceCommitter(temperature=temperature)(scores, slots(), torch.tensor([1]))
        assert torch.equal(scores, before)


def test_chunks_make_no_difference(monkeypatch):
    for confidence in ("probability", "margin", "negative_entropy", "random"):
        committer = MicroConfidenceCommitter(temperature=0.8, confidence=confidence)
        whole = committer.propose(logits(), slots(), torch.tensor([1]))
        monkeypatch.setattr(committers, "CHUNK_ELEMENTS", 21)  # three rows of seven
        parts = committer.propose(logits(), slots(), torch.tensor([1]))
        monkeypatch.undo()
        assert torch.equal(whole[0], parts[0])
        torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype):
    scores = logits().to(dtype)
    _, confidence = MicroConfidenceCommitter().propose(scores, slots(), NONE)
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
    tokens, _ = committer.propose(row.expand(count, 1, -1), draws, torch.tensor([0]))
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
    tokens, _ = MicroConfidenceCommitter(temperature=1.0).propose(scores.expand(5000, 1, -1), slots(5000, 1), NONE)
    assert (tokens == 3).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_where_no_id_is_left_the_confidence_is_nan(temperature):
    scores = torch.full((1, 2, 5), -torch.inf)
    scores[0, :, 3] = 0.0
    scores[0, 1, 2] = 1e4
    tokens, confidence = MicroConfidenceCommitter(temperature=temperature).propose(
        scores, slots(1, 2), torch.tensor([3])
    )
    assert confidence.isnan().tolist() == [[True, False]]
    assert tokens[0, 1] == 2


def test_candidates_say_whose_they_are(monkeypatch):
    seen = []

    def look(candidates):
        seen.append((candidates.rows.tolist(), candidates.block.tolist(), candidates.positions.tolist()))
        return candidates.best

    monkeypatch.setattr(committers, "CHUNK_ELEMENTS", 28)  # four rows of seven
    MicroConfidenceCommitter(confidence=look).propose(logits(2, 3), slots(2, 3), NONE)
    assert seen == [([0, 0, 0, 1], [0] * 4, [0, 1, 2, 0]), ([1, 1], [0] * 2, [1, 2])]


@pytest.mark.parametrize("threshold", [math.nan, "0.9", None])
def test_bad_thresholds(threshold):
    with pytest.raises(NapDecodeError, match="threshold must be a number"):
        ThresholdSelection(threshold)


def test_a_draw_at_a_boundary_goes_to_the_next_possible_id():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    tokens = [int(committers._draw(p, draw.view(1, 1))) for draw in draws]
    assert tokens == [1, 1, 3, 3, 3]


def test_draws_differ_between_steps_and_positions():
    committer = MicroConfidenceCommitter(temperature=3.0)
    flat = torch.zeros(1, 40, 50)
    first, _ = committer.propose(flat, slots(1, 40, step=0), NONE)
    second, _ = committer.propose(flat, slots(1, 40, step=1), NONE)
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
        ({"top_k": 3}, "top_k=3 has no effect at temperature 0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect at temperature 0"),
        ({"confidence": "entropi"}, "there is no confidence 'entropi'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NapDecodeError, match=message):
        MicroConfidenceCommitter(**options)
