from __future__ import annotations

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
