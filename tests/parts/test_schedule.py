from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode import AnyOrderScheduler, MacroParallelScheduler, NapDecodeError, SemiAutoregressiveScheduler
from nap_decode.base.random import row_seeds
from nap_decode.decoders.dream import AncestralSchedule, DreamSchedule
from nap_decode.decoders.maskgit import CosineSchedule
from nap_decode.parts.schedule import EvenSchedule
from nap_decode.parts.scheduler import Left

NO_DRAWS = torch.empty(1, 0)


def spread(schedule, tokens, steps):
    committed = schedule(torch.tensor([tokens]), torch.tensor([steps]), NO_DRAWS)[0]
    return committed.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()


@settings(max_examples=300)
@given(st.integers(1, 60), st.data())
def test_even(tokens, data):
    steps = data.draw(st.integers(1, tokens))
    base, rest = divmod(tokens, steps)
    assert spread(EvenSchedule(), tokens, steps) == [base + (i < rest) for i in range(steps)]


@settings(max_examples=300)
@given(st.integers(1, 60), st.data())
def test_cosine_commits_at_every_step_and_follows_the_curve(tokens, data):
    steps = data.draw(st.integers(1, tokens))
    got = spread(CosineSchedule(), tokens, steps)
    assert sum(got) == tokens
    assert min(got) >= 1
    for i in range(steps):
        masked = math.ceil(tokens * math.cos(math.pi / 2 * (i + 1) / steps) - 1e-9)
        expected = min(max(tokens - masked, i + 1), tokens - (steps - i - 1))
        assert sum(got[: i + 1]) == expected


@settings(max_examples=300)
@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([1e-3, 0.05]))
def test_dream_rounds_as_dream_does(tokens, steps, eps):
    times = torch.linspace(1, eps, steps + 1)
    left, expected = tokens, []
    for i in range(steps):
        # As in DreamGenerationMixin._sample: float32 tensors, truncated.
        number = int(torch.tensor(left).float() * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
        expected.append(number)
        left -= number
    assert spread(DreamSchedule(eps), tokens, steps) == expected


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


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=4), min_size=1, max_size=3),
    st.sampled_from([EvenSchedule(), CosineSchedule(), DreamSchedule(), AncestralSchedule()]),
    st.sampled_from(["macro", "blocks", "any"]),
    st.data(),
)
def test_plans_are_exact_with_every_schedule(lengths, schedule, kind, data):
    width = min(map(len, lengths))
    lengths = torch.tensor([row[:width] for row in lengths])
    if int(lengths.sum(1).min()) == 0:
        lengths[:, 0] += 1
    least = int((lengths > 0).sum(1).max())
    most = int(lengths.sum(1).min()) if not schedule.may_skip else 40
    if least > most:
        return
    steps = data.draw(st.integers(least, most))
    held = (False,) * (width - 1) + (True,)
    scheduler = {
        "macro": MacroParallelScheduler(steps=max(steps, 2) if most > 1 else steps, schedule=schedule, hold_until=0.7),
        "blocks": SemiAutoregressiveScheduler(steps=steps, schedule=schedule),
        "any": AnyOrderScheduler(steps=steps, schedule=schedule),
    }[kind]
    try:
        plan = scheduler.plan(lengths, held, seeds=row_seeds(0, range(len(lengths))))
    except NapDecodeError:
        return  # fewer steps than phases
    left, before = Left.all(lengths), torch.zeros_like(plan.steps)
    for _ in range(int(plan.busy_steps.max())):
        quota, after = scheduler.next(plan, left)
        assert (quota >= 0).all()
        assert torch.equal(after.masked, left.masked - quota)
        assert (after.masked >= 0).all()
        done, is_busy = (lengths - after.masked).sum(1), quota.sum(1) > 0
        assert torch.equal(done, torch.where(is_busy, plan.due(after.step), before))
        assert (is_busy | (left.masked.sum(1) == 0)).all()
        left, before = replace(after, step=after.step + 1), done
    assert not left.masked.any()


def test_more_steps_than_tokens_need_a_schedule_that_may_skip():
    with pytest.raises(NapDecodeError, match="steps=9 is more than the 4 tokens"):
        AnyOrderScheduler(steps=9).plan(torch.tensor([[4]]))
    assert AnyOrderScheduler(steps=9, schedule=DreamSchedule()).plan(torch.tensor([[4]])).targets[0, -1] == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DreamSchedule(0.9), "eps must be a number from 0 to 0.5, but is 0.9"),
        (lambda: AncestralSchedule(-1), "eps must be a number from 0 to 0.5, but is -1"),
        (lambda: AnyOrderScheduler(steps=3, schedule="cosine"), "schedule must be a Schedule, such as"),
        (
            lambda: AnyOrderScheduler(steps=3, schedule=AncestralSchedule()).plan(torch.tensor([[4]])),
            "AncestralSchedule draws; pass the seeds of the rows",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()
