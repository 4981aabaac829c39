"""Dream's decoders and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Words
from papers import BANNED, check_fixed
from samplers import make

from nap_decode import AnyOrderScheduler, Denoiser, NapDecodeError, SemiAutoregressiveScheduler, decoders
from nap_decode.base.random import row_seeds
from nap_decode.decoders.dream import AncestralSchedule, DreamSchedule


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def quotas(tokens, steps, eps=1e-3):
    """As in DreamGenerationMixin._sample: float32 tensors, truncated."""
    times = torch.linspace(1, eps, steps + 1)
    left, numbers = tokens, []
    for i in range(steps):
        number = int(torch.tensor(left).float() * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
        numbers.append(number)
        left -= number
    return numbers


@pytest.mark.parametrize(
    ("name", "confidence"),
    [
        ("dream_maskgit_plus", "probability"),
        ("dream_topk_margin", "margin"),
        ("dream_entropy", "negative_entropy"),
    ],
)
def test_agrees_with_the_reference(denoiser, name, confidence):
    cases = [([5, 6, 7], 12, 5), ([8], 7, 7), ([9, 9, 5, 6], 10, 3), ([7], 4, 9)]
    check_fixed(denoiser, name, confidence, quotas, cases)


@settings(max_examples=300)
@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([1e-3, 0.05]))
def test_dream_rounds_as_dream_does(tokens, steps, eps):
    committed = DreamSchedule(eps)(torch.tensor([tokens]), torch.tensor([steps]), torch.empty(1, 0))[0]
    assert committed.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist() == quotas(tokens, steps, eps)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_counts_have_the_law_of_independent_reveals(steps):
    rows, tokens, eps = 20_000, 6, 1e-3
    plan = AnyOrderScheduler(steps=steps, schedule=AncestralSchedule(eps)).plan(
        torch.full((rows, 1), tokens), seeds=row_seeds(0, range(rows))
    )
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64)
    assert (plan.targets[:, -1] == tokens).all()
    for i in range(steps - 1):
        revealed = 1 - times[i + 1]  # of each token, by itself
        expected = torch.tensor([math.comb(tokens, n) * revealed**n * (1 - revealed) ** (tokens - n) for n in range(7)])
        seen = torch.bincount(plan.targets[:, i], minlength=tokens + 1) / rows
        error = (expected * (1 - expected) / rows).sqrt().clamp(min=1e-6)
        assert ((seen - expected).abs() < 4.5 * error + 1e-4).all()


def test_reveals_do_not_depend_on_the_other_rows():
    scheduler = AnyOrderScheduler(steps=7, schedule=AncestralSchedule())
    seeds = row_seeds(1, range(3))
    together = scheduler.plan(torch.tensor([[9], [4], [20]]), seeds=seeds).targets
    alone = scheduler.plan(torch.tensor([[4]]), seeds=seeds[1:2]).targets
    assert torch.equal(together[1:2], alone)


def test_the_blocks_of_a_row_draw_for_themselves():
    scheduler = SemiAutoregressiveScheduler(steps=8, schedule=AncestralSchedule())
    targets = scheduler.plan(torch.full((200, 2), 6), seeds=row_seeds(0, range(200))).targets
    first, second = targets[:, :4], targets[:, 4:] - 6
    assert (first[:, -1] == 6).all()
    assert (first != second).any(1).double().mean() > 0.5


def test_dream_scores_what_it_draws_from(tiny, denoiser):
    """At temperature 0 a cut by top_p changes the confidences, and so the order, but not the proposals."""
    plain = make(denoiser, "dream_maskgit_plus", steps=9, alg_temp=None)
    cut = make(denoiser, "dream_maskgit_plus", steps=9, alg_temp=None, top_p=0.6)
    outs = [s([5, 6, 7], max_new_tokens=12) for s in (plain, cut)]
    assert not torch.equal(outs[0].trace.step, outs[1].trace.step)
    row = tiny(outs[1].canvas.tokens).logits[0].detach().softmax(1)
    first = (outs[1].trace.step[0] == 0).nonzero()[0, 0]
    kept, total = 0.0, 0.0
    for p in sorted(row[first].tolist(), reverse=True):
        if total > 0.6:
            break
        kept, total = kept + p, total + p
    allowed = row[first].clone()
    allowed[sorted(BANNED)] = 0
    assert float(outs[1].trace.confidence[0, first]) == pytest.approx(float(allowed.max()) / kept, rel=1e-5)


def test_alg_temp_draws_the_positions():
    assert not decoders.dream_entropy().needs.random
    assert decoders.dream_entropy(alg_temp=0.5).committer.selection.position_temperature == 0.5
    with pytest.raises(NapDecodeError, match="alg_temp must be a finite number of at least 0, but is -1"):
        decoders.dream_entropy(alg_temp=-1)


@pytest.mark.parametrize("schedule", [DreamSchedule, AncestralSchedule])
@pytest.mark.parametrize("eps", [-0.1, 0.6, "small", None])
def test_bad_times(schedule, eps):
    with pytest.raises(NapDecodeError, match=r"eps must be a number from 0 to 0\.5"):
        schedule(eps)
