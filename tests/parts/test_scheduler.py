from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode import (
    AnyOrderScheduler,
    BlockScheduler,
    Canvas,
    CanvasTemplate,
    MacroParallelScheduler,
    NapDecodeError,
    SemiAutoregressiveScheduler,
)
from nap_decode.parts.scheduler import divide_steps, fair_share


def roll_out(plan):
    """Quotas of all steps, ``(S, B, M)``."""
    remaining, quotas = plan.lengths, []
    for step in range(int(plan.steps.max())):
        quotas.append(plan.quota(remaining, step))
        remaining = remaining - quotas[-1]
    return torch.stack(quotas)


def rows_of(length, rows=3, blocks=6):
    """Batches of block lengths with at least one token in every row."""
    return st.integers(1, blocks).flatmap(
        lambda m: st.lists(
            st.lists(st.integers(0, length), min_size=m, max_size=m).filter(any), min_size=1, max_size=rows
        )
    )


@settings(max_examples=1500)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(any), st.data())
def test_fair_share_is_the_ideal_rounded_down_or_up_and_exact(weights, data):
    total = sum(weights)
    targets = sorted(data.draw(st.sets(st.integers(0, total), max_size=12)) | {total})
    weights = torch.tensor([weights])
    committed = torch.zeros_like(weights)
    for target in targets:
        shares = fair_share(weights, committed, torch.tensor([target]))
        assert (shares >= committed).all()
        assert shares.sum() == target
        # floor(t w / W) <= share <= ceil(t w / W), without dividing
        assert ((shares - 1) * total < target * weights).all()
        assert ((shares + 1) * total > target * weights).all()
        committed = shares


@settings(max_examples=600)
@given(rows_of(12), st.sampled_from([0.0, 0.3, 0.8, 1.0]), st.booleans(), st.data())
def test_macro_parallel_totals_are_exact(lengths, hold_until, share_last_step, data):
    lengths = torch.tensor(lengths)
    held = (False,) * (lengths.shape[1] - 1) + (True,)
    most = int(lengths.sum(1).min())
    least = min(2, most)
    scheduler = MacroParallelScheduler(
        steps=data.draw(st.integers(least, most)), hold_until=hold_until, share_last_step=share_last_step
    )
    try:
        plan = scheduler.plan(lengths, held)
    except NapDecodeError:
        assert most == 1  # one token, one step, but two phases in another row
        return
    quotas = roll_out(plan)
    assert quotas.shape[0] == scheduler.steps
    assert (quotas.sum(0) == lengths).all()
    assert (quotas >= 0).all()
    assert (quotas.sum(2) >= 1).all()
    phases = plan.phase_tokens.sum(2)
    for row in range(len(lengths)):
        sizes = quotas[:, row].sum(1).tolist()
        if share_last_step:
            groups = [sizes]
        else:
            first = int(plan.step_ends[row, 0])
            groups = [sizes[:first], sizes[first:]]
            assert [sum(g) for g in groups] == phases[row].tolist()
        for group in filter(None, groups):
            assert max(group) - min(group) <= 1
            assert group == sorted(group, reverse=True)  # the remainder goes to the first steps


@settings(max_examples=600)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.data())
def test_macro_parallel_blocks_stay_within_one_token_of_their_share(lengths, data):
    total = sum(lengths)
    plan = MacroParallelScheduler(steps=data.draw(st.integers(1, total))).plan(torch.tensor([lengths]))
    given_out = roll_out(plan)[:, 0].cumsum(0)
    ideal = given_out.sum(1, keepdim=True) * torch.tensor(lengths) / total
    assert ((given_out - ideal).abs() < 1).all()


@settings(max_examples=300)
@given(st.integers(2, 8), st.integers(1, 20), st.integers(1, 7))
def test_fewer_tokens_per_step_than_blocks_starve_no_block(blocks, length, tokens_per_step):
    plan = MacroParallelScheduler(tokens_per_step=tokens_per_step).plan(torch.full((1, blocks), length))
    visited = roll_out(plan)[:, 0].cumsum(0)
    assert (visited.amax(1) - visited.amin(1) <= 1).all()  # equal blocks take turns


@settings(max_examples=600)
@given(rows_of(12), st.data())
def test_semi_autoregressive_finishes_a_block_before_the_next(lengths, data):
    lengths = torch.tensor(lengths)
    least, most = int((lengths > 0).sum(1).max()), int(lengths.sum(1).min())
    if least > most:
        return
    plan = SemiAutoregressiveScheduler(steps=data.draw(st.integers(least, most))).plan(lengths)
    remaining = lengths
    for quota in roll_out(plan):
        for row in range(len(lengths)):
            visited = [b for b, q in enumerate(quota[row].tolist()) if q]
            assert visited == [next(b for b, r in enumerate(remaining[row].tolist()) if r)]
        remaining = remaining - quota
    assert not remaining.any()


@settings(max_examples=600)
@given(rows_of(20), st.data())
def test_steps_are_divided_in_proportion_and_every_phase_gets_one(tokens, data):
    tokens = torch.tensor(tokens)
    least, most = int((tokens > 0).sum(1).max()), int(tokens.sum(1).min())
    if least > most:
        return
    steps = data.draw(st.integers(least, most))
    ends = divide_steps(tokens, torch.full((len(tokens),), steps))
    shares = torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))
    assert (ends[:, -1] == steps).all()
    assert ((shares >= 1) == (tokens > 0)).all()
    assert (shares <= tokens).all()


def test_the_papers_canvas_at_256_steps():
    lengths = torch.tensor([[330, 330, 330, 32]])
    held = (False, False, False, True)
    quotas = roll_out(MacroParallelScheduler(steps=256).plan(lengths, held))[:, 0]
    assert (quotas[:248, 3] == 0).all()
    assert (quotas[248:, :3] == 0).all()
    assert quotas[248:, 3].tolist() == [4] * 8
    assert set(quotas[:248].sum(1).tolist()) == {3, 4}
    assert (quotas[:248, :3] >= 1).all()  # every step advances every path


@pytest.mark.parametrize(
    ("hold_until", "opens_after"), [(1.0, 20), (0.8, 16), (0.75, 15), (0.7, 14), (0.01, 1), (0.0, 0)]
)
def test_the_summary_opens_when_its_share_of_the_paths_is_committed(hold_until, opens_after):
    plan = MacroParallelScheduler(steps=24, hold_until=hold_until).plan(
        torch.tensor([[10, 10, 4]]), (False, False, True)
    )
    quotas = roll_out(plan)[:, 0]
    committed_before = quotas[:, :2].sum(1).cumsum(0) - quotas[:, :2].sum(1)
    opened = int((quotas[:, 2] > 0).nonzero()[0])
    assert committed_before[opened] >= opens_after
    phase_tokens = plan.phase_tokens[0].sum(1).tolist()
    assert phase_tokens == [opens_after, 24 - opens_after]
    assert plan.phase_tokens[0, 0, 2] == 0


def test_the_last_path_step_can_be_shared_with_the_summary():
    lengths, held = torch.tensor([[3, 3, 2]]), (False, False, True)
    shared = roll_out(MacroParallelScheduler(tokens_per_step=4, share_last_step=True).plan(lengths, held))
    assert shared[:, 0].tolist() == [[2, 2, 0], [1, 1, 2]]
    alone = roll_out(MacroParallelScheduler(tokens_per_step=4).plan(lengths, held))
    assert alone[:, 0].tolist() == [[3, 3, 0], [0, 0, 2]]


def test_rows_have_their_own_number_of_steps():
    plan = AnyOrderScheduler(tokens_per_step=3).plan(torch.tensor([[7], [2]]))
    assert plan.steps.tolist() == [3, 1]
    assert roll_out(plan)[:, :, 0].tolist() == [[3, 2], [2, 0], [2, 0]]


def test_a_quota_returns_to_the_plan_when_the_canvas_was_edited():
    plan = AnyOrderScheduler(steps=4).plan(torch.tensor([[8]]))
    assert plan.quota(torch.tensor([[8]]), 1).tolist() == [[4]]  # two tokens were masked again
    assert plan.quota(torch.tensor([[3]]), 1).tolist() == [[0]]  # ahead of the plan
    assert plan.quota(torch.tensor([[5]]), 3).tolist() == [[5]]  # the last step takes what remains


def test_the_least_of_an_adaptive_step_stops_at_the_gate():
    scheduler = MacroParallelScheduler(tokens_per_step=2)
    plan = scheduler.plan(torch.tensor([[3, 3, 4]]), (False, False, True), adaptive=True)
    assert plan.open(torch.tensor([[3, 3, 4]])).tolist() == [[True, True, False]]
    assert plan.least(torch.tensor([[3, 3, 4]])).tolist() == [[1, 1, 0]]
    assert plan.least(torch.tensor([[0, 1, 4]])).tolist() == [[0, 1, 0]]
    assert plan.open(torch.tensor([[0, 0, 4]])).tolist() == [[False, False, True]]
    assert plan.least(torch.tensor([[0, 0, 4]])).tolist() == [[0, 0, 2]]


@settings(max_examples=600)
@given(rows_of(9), st.integers(1, 12), st.sampled_from([0.0, 0.4, 0.8, 1.0]), st.data())
def test_the_least_never_exceeds_tokens_per_step_however_uneven_the_blocks(lengths, tokens_per_step, hold, data):
    lengths = torch.tensor(lengths)
    held = (False,) * (lengths.shape[1] - 1) + (True,)
    for scheduler in (
        MacroParallelScheduler(tokens_per_step=tokens_per_step, hold_until=hold),
        SemiAutoregressiveScheduler(tokens_per_step=tokens_per_step),
        AnyOrderScheduler(tokens_per_step=tokens_per_step),
    ):
        plan = scheduler.plan(lengths, held, adaptive=True)
        remaining = lengths
        while remaining.any():
            least, is_open = plan.least(remaining), plan.open(remaining)
            assert (least.sum(1) <= tokens_per_step).all()
            assert ((least > 0).any(1) == (remaining > 0).any(1)).all()
            assert (least <= remaining * is_open).all()
            # The threshold may add any number in the open blocks.
            more = data.draw(st.floats(0, 1)) * (remaining * is_open - least)
            remaining = remaining - least - more.long()


def test_macro_parallel_needs_one_phase_only_where_nothing_is_held_back():
    assert roll_out(MacroParallelScheduler(steps=1, hold_until=0.5).plan(torch.tensor([[2, 2]]))).tolist() == [[[2, 2]]]


def test_adaptive_plans_have_no_steps_to_be_too_few():
    SemiAutoregressiveScheduler(tokens_per_step=4).plan(torch.tensor([[1, 1, 1]]), adaptive=True)
    with pytest.raises(NapDecodeError, match="3 phases of at least one step each; cut longer blocks"):
        SemiAutoregressiveScheduler(tokens_per_step=4).plan(torch.tensor([[1, 1, 1]]))


def test_partitions_of_a_canvas():
    template = CanvasTemplate.nap(2, path_length=3, summary_length=2, path_header=[(7,), (8,)], summary_header=(9,))
    canvas = Canvas.from_prompts([[5], [5, 5]], template, mask_token_id=1)
    assert MacroParallelScheduler(steps=8).partition(canvas).held == (False, False, True)
    any_order = AnyOrderScheduler(steps=8).partition(canvas)
    assert any_order.lengths.tolist() == [[8], [8]]
    assert any_order.block[0].tolist() == [-1, -1, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0, 0]
    cut = SemiAutoregressiveScheduler(steps=8, block_length=3).partition(canvas)
    assert cut.lengths.tolist() == [[3, 3, 2]] * 2
    assert cut.block[0].tolist() == [-1, -1, -1, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2]
    whole = SemiAutoregressiveScheduler(steps=8).partition(canvas)
    assert whole.lengths.tolist() == [[3, 3, 2]] * 2


@pytest.mark.parametrize("scheduler", [MacroParallelScheduler, SemiAutoregressiveScheduler, AnyOrderScheduler])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, but is 0"),
        ({"steps": -3}, "steps must be a whole number of at least 1, but is -3"),
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"tokens_per_step": 0}, "tokens_per_step must be a whole number of at least 1, but is 0"),
        ({"steps": 3, "tokens_per_step": 2}, r"give steps \(3\) or tokens_per_step \(2\), not both"),
    ],
)
def test_bad_options(scheduler, options, message):
    with pytest.raises(NapDecodeError, match=message):
        scheduler(**options)


def test_other_bad_options():
    with pytest.raises(NapDecodeError, match=r"hold_until must be a number from 0 to 1, but is 1.5"):
        MacroParallelScheduler(steps=1, hold_until=1.5)
    with pytest.raises(NapDecodeError, match="block_length must be a whole number of at least 1, but is 0"):
        SemiAutoregressiveScheduler(steps=1, block_length=0)
    with pytest.raises(TypeError, match="token_per_step"):
        AnyOrderScheduler(token_per_step=1)


def test_more_steps_than_tokens():
    with pytest.raises(NapDecodeError, match="steps=5 is more than the 4 tokens to decode in row 1"):
        AnyOrderScheduler(steps=5).plan(torch.tensor([[6], [4]]))


def test_fewer_steps_than_phases():
    lengths, held = torch.tensor([[3, 3, 2]]), (False, False, True)
    with pytest.raises(NapDecodeError, match="2 phases of at least one step each; set share_last_step=True"):
        MacroParallelScheduler(tokens_per_step=8).plan(lengths, held)
    MacroParallelScheduler(tokens_per_step=8, share_last_step=True).plan(lengths, held)
    MacroParallelScheduler(tokens_per_step=8, hold_until=0.0).plan(lengths, held)
    with pytest.raises(NapDecodeError, match="3 phases of at least one step each"):
        SemiAutoregressiveScheduler(steps=2).plan(lengths)


def test_phases_that_do_not_add_up():
    class Forgetful(BlockScheduler):
        def phases(self, lengths, held):
            return lengths[:, None] - 1

    with pytest.raises(NapDecodeError, match="phases of Forgetful must add up"):
        Forgetful(steps=1).plan(torch.tensor([[4]]))
