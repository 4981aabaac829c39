from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode import (
    AnyOrderScheduler,
    Canvas,
    CanvasTemplate,
    MacroParallelScheduler,
    NapDecodeError,
    Scheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.decoders.discrete_forcing import PipelineScheduler
from nap_decode.parts.scheduler import Left, divide_steps, fair_share


def play(scheduler, lengths, held=None, **options):
    """Quotas of all steps of a fixed schedule, ``(S, B, M)``."""
    plan = scheduler.plan(torch.tensor(lengths) if isinstance(lengths, list) else lengths, held, **options)
    left, quotas = Left.all(plan.lengths), []
    for _ in range(int(plan.steps.max())):
        quota, left = scheduler.next(plan, left)
        quotas.append(quota)
        left = replace(left, step=left.step + 1)
    return torch.stack(quotas)


def phases(scheduler, lengths, held):
    """Slots of each block that open when everything before is done, ``[[...], ...]``, by playing ``open``."""
    lengths = torch.tensor([lengths])
    left, found = lengths, []
    while left.any():
        opened = scheduler.open(left, lengths, torch.tensor([held]))
        found += opened.tolist()
        left = left - opened
    return found


def rows_of(length, rows=3, blocks=6):
    """Batches of block lengths with at least one token in every row."""
    return st.integers(1, blocks).flatmap(
        lambda m: st.lists(
            st.lists(st.integers(0, length), min_size=m, max_size=m).filter(any), min_size=1, max_size=rows
        )
    )


@settings(max_examples=400)
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


@settings(max_examples=200)
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
        quotas = play(scheduler, lengths, held)
    except NapDecodeError:
        assert most == 1  # one token, one step, but two phases in another row
        return
    assert quotas.shape[0] == scheduler.steps
    assert (quotas.sum(0) == lengths).all()
    assert (quotas >= 0).all()
    assert (quotas.sum(2) >= 1).all()
    for row in range(len(lengths)):
        sizes = quotas[:, row].sum(1).tolist()
        groups = [sizes]
        if not share_last_step:
            # A step ends each phase exactly, and inside a phase steps differ by one token at most.
            first = sum(phases(scheduler, lengths[row].tolist(), held)[0])
            reached = torch.tensor(sizes).cumsum(0).tolist()
            groups = [sizes[: reached.index(first) + 1], sizes[reached.index(first) + 1 :]]
        for group in filter(None, groups):
            assert max(group) - min(group) <= 1
            assert group == sorted(group, reverse=True)  # the remainder goes to the first steps


@settings(max_examples=200)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.data())
def test_macro_parallel_blocks_stay_within_one_token_of_their_share(lengths, data):
    total = sum(lengths)
    given_out = play(MacroParallelScheduler(steps=data.draw(st.integers(1, total))), [lengths])[:, 0].cumsum(0)
    ideal = given_out.sum(1, keepdim=True) * torch.tensor(lengths) / total
    assert ((given_out - ideal).abs() < 1).all()


@settings(max_examples=300)
@given(st.integers(2, 8), st.integers(1, 20), st.integers(1, 7))
def test_fewer_tokens_per_step_than_blocks_starve_no_block(blocks, length, tokens_per_step):
    visited = play(MacroParallelScheduler(tokens_per_step=tokens_per_step), [[length] * blocks])[:, 0].cumsum(0)
    assert (visited.amax(1) - visited.amin(1) <= 1).all()  # equal blocks take turns


@settings(max_examples=200)
@given(rows_of(12), st.data())
def test_semi_autoregressive_finishes_a_block_before_the_next(lengths, data):
    lengths = torch.tensor(lengths)
    least, most = int((lengths > 0).sum(1).max()), int(lengths.sum(1).min())
    if least > most:
        return
    remaining = lengths
    for quota in play(SemiAutoregressiveScheduler(steps=data.draw(st.integers(least, most))), lengths):
        for row in range(len(lengths)):
            visited = [b for b, q in enumerate(quota[row].tolist()) if q]
            assert visited == [next(b for b, r in enumerate(remaining[row].tolist()) if r)]
        remaining = remaining - quota
    assert not remaining.any()


@settings(max_examples=200)
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
    quotas = play(MacroParallelScheduler(steps=256), lengths, held)[:, 0]
    assert (quotas[:248, 3] == 0).all()
    assert (quotas[248:, :3] == 0).all()
    assert quotas[248:, 3].tolist() == [4] * 8
    assert set(quotas[:248].sum(1).tolist()) == {3, 4}
    assert (quotas[:248, :3] >= 1).all()  # every step advances every path


@pytest.mark.parametrize(
    ("hold_until", "opens_after"), [(1.0, 20), (0.8, 16), (0.75, 15), (0.7, 14), (0.01, 1), (0.0, 0)]
)
def test_the_summary_opens_when_its_share_of_the_paths_is_committed(hold_until, opens_after):
    scheduler, held = MacroParallelScheduler(steps=24, hold_until=hold_until), (False, False, True)
    quotas = play(scheduler, [[10, 10, 4]], held)[:, 0]
    committed_before = quotas[:, :2].sum(1).cumsum(0) - quotas[:, :2].sum(1)
    opened = int((quotas[:, 2] > 0).nonzero()[0])
    assert committed_before[opened] >= opens_after
    played = phases(scheduler, [10, 10, 4], held)
    assert [sum(phase) for phase in played] == [n for n in (opens_after, 24 - opens_after) if n]
    assert (played[0][2] == 0) == (opens_after > 0)


def test_the_last_path_step_can_be_shared_with_the_summary():
    lengths, held = [[3, 3, 2]], (False, False, True)
    shared = play(MacroParallelScheduler(tokens_per_step=4, share_last_step=True), lengths, held)
    assert shared[:, 0].tolist() == [[2, 2, 0], [1, 1, 2]]
    alone = play(MacroParallelScheduler(tokens_per_step=4), lengths, held)
    assert alone[:, 0].tolist() == [[3, 3, 0], [0, 0, 2]]


def test_rows_have_their_own_number_of_steps():
    quotas = play(AnyOrderScheduler(tokens_per_step=3), [[7], [2]])
    assert quotas[:, :, 0].tolist() == [[3, 2], [2, 0], [2, 0]]


def after(plan, masked, step, closed=0):
    """What is left at a step when so much is masked, with nothing remembered."""
    left = Left.all(plan.lengths)
    return replace(left, masked=torch.tensor([masked]), step=torch.tensor([step]), closed=left.closed + closed)


def test_a_budget_returns_to_the_plan_when_the_canvas_was_edited():
    scheduler = AnyOrderScheduler(steps=4)
    plan = scheduler.plan(torch.tensor([[8]]))
    assert scheduler.next(plan, after(plan, [8], 1))[0].tolist() == [[4]]  # two tokens were masked again
    assert scheduler.next(plan, after(plan, [5], 3))[0].tolist() == [[5]]  # the last step takes what remains
    quota, left = scheduler.next(plan, after(plan, [3], 1))  # ahead of the plan: the step after the next is the first
    assert quota.tolist() == [[1]]
    assert left.step.tolist() == [2]


def test_what_is_closed_does_not_count_and_the_row_keeps_its_pace():
    """Three of twelve slots were filled without being decoded: two tokens per step all the same, to the end."""
    scheduler = MacroParallelScheduler(tokens_per_step=2)
    plan = scheduler.plan(torch.tensor([[6, 6]]))
    left = replace(Left.all(plan.lengths), masked=torch.tensor([[2, 5]]), closed=torch.tensor([[3, 0]]))
    left, sizes, last = replace(left, step=torch.tensor([1])), [], None
    while left.masked.any():
        last, left = scheduler.next(plan, left)
        sizes.append(int(last.sum()))
        left = replace(left, step=left.step + 1)
    assert sizes == [2, 2, 2, 1]
    assert int(left.step) < int(plan.steps)  # and comes to its end earlier


def test_shares_start_anew_where_something_closes():
    """The budget goes to what is open, in proportion to what that has left then."""
    scheduler = MacroParallelScheduler(tokens_per_step=4)
    plan = scheduler.plan(torch.tensor([[8, 8, 8]]))
    first, left = scheduler.next(plan, Left.all(plan.lengths))
    assert first.tolist() == [[2, 1, 1]]
    closed = replace(left, masked=left.masked * torch.tensor([[0, 1, 1]]), closed=torch.tensor([[6, 0, 0]]))
    second, left = scheduler.next(plan, replace(closed, step=closed.step + 1))
    assert second.tolist() == [[0, 2, 2]]
    assert left.weights.tolist() == [[0, 7, 7]]


def test_the_least_of_an_adaptive_step_stops_at_the_gate():
    scheduler = MacroParallelScheduler(tokens_per_step=2)
    plan = scheduler.plan(torch.tensor([[3, 3, 4]]), (False, False, True), adaptive=True)

    def ask(what, *left):
        return what(plan, torch.tensor([left])).tolist()

    assert ask(scheduler.may_commit, 3, 3, 4) == [[True, True, False]]
    assert ask(scheduler.least, 3, 3, 4) == [[1, 1, 0]]
    assert ask(scheduler.least, 0, 1, 4) == [[0, 1, 0]]
    assert ask(scheduler.may_commit, 0, 0, 4) == [[False, False, True]]
    assert ask(scheduler.least, 0, 0, 4) == [[0, 0, 2]]
    assert ask(scheduler.may_commit, 2, 3, 3) == [[True, True, True]]  # a block that has begun may go on


@settings(max_examples=200)
@given(rows_of(9), st.integers(1, 12), st.sampled_from([0.0, 0.4, 0.8, 1.0]), st.data())
def test_the_least_never_exceeds_tokens_per_step_however_uneven_the_blocks(lengths, tokens_per_step, hold, data):
    lengths = torch.tensor(lengths)
    held = (False,) * (lengths.shape[1] - 1) + (True,)
    for scheduler in (
        MacroParallelScheduler(tokens_per_step=tokens_per_step, hold_until=hold),
        SemiAutoregressiveScheduler(tokens_per_step=tokens_per_step),
        PipelineScheduler(tokens_per_step=tokens_per_step, done_before_next=hold),
        AnyOrderScheduler(tokens_per_step=tokens_per_step),
    ):
        plan = scheduler.plan(lengths, held, adaptive=True)
        remaining = lengths
        while remaining.any():
            least, is_open = scheduler.least(plan, remaining), scheduler.may_commit(plan, remaining)
            assert (least.sum(1) <= tokens_per_step).all()
            assert ((least > 0).any(1) == (remaining > 0).any(1)).all()
            assert (least <= remaining * is_open).all()
            # The threshold may add any number in the open blocks.
            more = data.draw(st.floats(0, 1)) * (remaining * is_open - least)
            remaining = remaining - least - more.long()


def test_macro_parallel_needs_one_phase_only_where_nothing_is_held_back():
    assert play(MacroParallelScheduler(steps=1, hold_until=0.5), [[2, 2]]).tolist() == [[[2, 2]]]


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
    assert any_order.block[0].tolist() == [-1, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0, 0, -1]
    cut = SemiAutoregressiveScheduler(steps=8, block_length=3).partition(canvas)
    assert cut.lengths.tolist() == [[3, 3, 2]] * 2
    assert cut.block[0].tolist() == [-1, -1, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2, -1]
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


def test_one_token_per_step_is_the_default():
    for scheduler in (MacroParallelScheduler(), SemiAutoregressiveScheduler()):
        assert play(scheduler, [[3, 2]]).sum(2).tolist() == [[1]] * 5


# ---------------------------------------------------------------------------------------- any scheduler


@dataclass(frozen=True, kw_only=True)
class Gated(Scheduler):
    """Opens a block, for good, when a share of the one before is done; the first one is open."""

    gates: tuple[float, ...]

    def open(self, left, lengths, held):
        gates = torch.tensor((0.0, *self.gates))[: left.shape[1]]
        done = torch.nn.functional.pad((lengths - left)[:, :-1], (1, 0))
        is_open = done >= gates * torch.nn.functional.pad(lengths[:, :-1], (1, 0))
        return left * is_open.long().cumprod(1)


@dataclass(frozen=True, kw_only=True)
class Arbitrary(Scheduler):
    """Opens an arbitrary part of what is left, and may change its mind."""

    table: tuple[tuple[int, ...], ...]
    """By the number of slots left (cyclically), the share of each block that is open, in quarters."""

    def open(self, left, lengths, held):
        table = torch.tensor(self.table)
        opened = -(-left * table[left.sum(1) % len(table)][:, : left.shape[1]] // 4)
        first = left * ((left > 0).long().cumsum(1) == 1)
        return torch.where(opened.sum(1, keepdim=True) == 0, first, opened)


gated = st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 1.0])] * 5).map(lambda gates: Gated(gates=gates))
arbitrary = st.lists(st.tuples(*[st.integers(0, 4)] * 6), min_size=1, max_size=7).map(
    lambda rows: Arbitrary(table=tuple(rows))
)


@settings(max_examples=200, deadline=None)
@given(rows_of(8), gated, st.data())
def test_what_opens_for_good_is_decoded_in_exactly_the_steps_asked_for(lengths, scheduler, data):
    lengths = torch.tensor(lengths)
    num_phases = max(len(phases(scheduler, row, [False] * len(row))) for row in lengths.tolist())
    most = int(lengths.sum(1).min())
    if num_phases > most:
        return
    scheduler = replace(scheduler, steps=data.draw(st.integers(num_phases, most)))
    plan = scheduler.plan(lengths)
    left, shown = Left.all(lengths), torch.zeros_like(lengths)
    for step in range(scheduler.steps):
        opened = scheduler.open(left.masked, lengths, plan.held)
        quota, left = scheduler.next(plan, left)
        assert (quota <= opened).all()
        assert (quota.sum(1) >= 1).all()
        shown = shown + quota
        assert torch.equal(shown.sum(1), plan.targets[:, step])
        assert torch.equal(left.masked, lengths - shown)
        # Since the last block opened, each has got its ideal share of what was open then, within a token.
        ideal = left.given.sum(1, keepdim=True) * left.weights / left.weights.sum(1, keepdim=True).clamp(min=1)
        assert ((left.given - ideal).abs() < 1).all()
        left = replace(left, step=left.step + 1)
    assert torch.equal(shown, lengths)


@settings(max_examples=200, deadline=None)
@given(rows_of(8), arbitrary, st.data())
def test_any_scheduler_finishes(lengths, scheduler, data):
    lengths = torch.tensor(lengths)
    scheduler = replace(scheduler, steps=data.draw(st.integers(1, int(lengths.sum(1).min()))))
    needed = max(len(phases(scheduler, row, [False] * len(row))) for row in lengths.tolist())
    if scheduler.steps < needed:
        with pytest.raises(NapDecodeError, match="phases of at least one step each"):
            scheduler.plan(lengths)
        return
    plan = scheduler.plan(lengths)
    left, turns = Left.all(lengths), 0
    while left.masked.any():
        is_busy, before = left.masked.sum(1) > 0, (lengths - left.masked).sum(1)
        quota, left = scheduler.next(plan, left)
        assert torch.equal(quota.sum(1) > 0, is_busy)
        # What the row is behind its plan; if less is open, the rest goes to what opens next.
        assert torch.equal(quota.sum(1)[is_busy], (plan.due(left.step) - before)[is_busy])
        left, turns = replace(left, step=left.step + 1), turns + 1
    assert turns <= scheduler.steps


@settings(max_examples=300, deadline=None)
@given(
    rows_of(9, rows=1),
    st.sampled_from([MacroParallelScheduler(hold_until=0.6), SemiAutoregressiveScheduler(), PipelineScheduler()]),
    st.integers(1, 4),
    st.booleans(),
    st.data(),
)
def test_blocks_that_close_and_edits_leave_a_row_its_pace(lengths, scheduler, tokens_per_step, edits, data):
    """Whatever closes, and whatever a callback masks again: the budget goes to what is open, until all is done."""
    lengths, scheduler = torch.tensor(lengths), replace(scheduler, tokens_per_step=tokens_per_step)
    held = (False,) * (lengths.shape[1] - 1) + (True,)
    if len(phases(scheduler, lengths[0].tolist(), list(held))) > -(-int(lengths.sum()) // tokens_per_step):
        return
    plan = scheduler.plan(lengths, held)
    largest = int(plan.targets.diff(dim=1, prepend=torch.zeros(1, 1, dtype=torch.int64)).max())
    left, unspent = Left.all(lengths), 0
    while left.masked.any():
        is_early = int(left.step) < int(plan.steps) - 1
        opened = scheduler.open(left.masked, lengths, plan.held)
        quota, after = scheduler.next(plan, left)
        assert torch.equal(after.masked, left.masked - quota)
        budget = int(plan.due(after.step) - (lengths - left.masked - left.closed).sum(1))
        if left.closed.any():  # what a block that closed leaves waits for the next step
            assert (quota <= opened).all()
            assert int(quota.sum()) == min(budget, int(opened.sum()))
        else:  # a rest goes on to what opens next
            assert int(quota.sum()) == min(budget, int(left.masked.sum()))
            assert (quota <= opened).all() or (quota >= opened).all()
        if not edits:
            assert budget <= largest + unspent  # what too little was open for is made up for
        unspent = budget - int(quota.sum())
        masked, closed = after.masked.clone(), after.closed.clone()
        for block in range(lengths.shape[1]):
            if data.draw(st.integers(0, 5)) == 0:  # the block comes to its end
                closed[0, block] += masked[0, block]
                masked[0, block] = 0
            elif edits and is_early and data.draw(st.integers(0, 5)) == 0:
                again = min(1, int(lengths[0, block] - masked[0, block] - closed[0, block]))
                masked[0, block] += again
        left = replace(after, masked=masked, closed=closed, step=after.step + 1)
    if not edits:
        assert int(left.step) <= int(plan.steps)


@settings(max_examples=300, deadline=None)
@given(rows_of(8), st.one_of(gated, arbitrary), st.integers(1, 5), st.data())
def test_any_adaptive_scheduler_finishes(lengths, scheduler, tokens_per_step, data):
    lengths, scheduler = torch.tensor(lengths), replace(scheduler, tokens_per_step=tokens_per_step)
    plan = scheduler.plan(lengths, adaptive=True)
    remaining, turns = lengths, 0
    while remaining.any():
        least, is_open = scheduler.least(plan, remaining), scheduler.may_commit(plan, remaining)
        opened = scheduler.open(remaining, lengths, plan.held)
        assert torch.equal(least.sum(1), opened.sum(1).clamp(max=tokens_per_step))
        assert (least <= opened).all()
        assert not ((least > 0) & ~is_open).any()
        assert (is_open <= (remaining > 0)).all()
        more = (data.draw(st.floats(0, 1)) * (remaining * is_open - least)).long()
        remaining, turns = remaining - least - more, turns + 1
    assert turns <= int(lengths.sum(1).max())


class Wrong(AnyOrderScheduler):
    """Opens whatever it is told to."""

    def open(self, left, lengths, held):
        return WRONG[self.tokens_per_step](left)


WRONG = {
    1: lambda left: left * 0,  # nothing
    2: lambda left: left + 1,  # more than there is
    3: lambda left: left * torch.tensor([1, -1]),  # less than nothing
    4: lambda left: left * torch.tensor([[1], [0]]),  # nothing in a row
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_open_is_refused_with_its_name(kind, adaptive):
    with pytest.raises(NapDecodeError, match=r"slots left, Wrong.open must open at least one in each row.* but opens"):
        Wrong(tokens_per_step=kind).plan(torch.tensor([[4, 2], [3, 3]]), adaptive=adaptive)


class Late(AnyOrderScheduler):
    """Opens what it is told to as soon as something is decoded."""

    def open(self, left, lengths, held):
        return left if torch.equal(left, lengths) or not left.any() else WRONG_LATER[self.tokens_per_step](left)


WRONG_LATER = {
    1: lambda left: left * 0,
    2: lambda left: left + 1,
    3: lambda left: left * 0.5,
    4: lambda left: left > 0,
    5: lambda left: left[0],
    6: lambda left: left.tolist(),
}


@pytest.mark.parametrize("kind", WRONG_LATER)
def test_a_wrong_open_is_refused_whenever_it_is_asked(kind):
    scheduler, left = Late(tokens_per_step=kind), torch.tensor([[3, 1]])
    plan = scheduler.plan(torch.tensor([[6, 6]]), adaptive=True)
    for ask in (scheduler.least, scheduler.may_commit):
        with pytest.raises(NapDecodeError, match=r"Late.open must (open at least one|return torch.int64 \(1, 2\))"):
            ask(plan, left)
    plan = scheduler.plan(torch.tensor([[6, 6]]))
    with pytest.raises(NapDecodeError, match=r"Late\.open must"):
        scheduler.next(plan, replace(Left.all(plan.lengths), masked=left))


def test_what_is_left_may_be_overwritten_by_open():
    class InPlace(AnyOrderScheduler):
        def open(self, left, lengths, held):
            left[:, 1:] *= (left[:, :1] == 0).long()
            return left

    scheduler = InPlace(tokens_per_step=2)
    plan = scheduler.plan(torch.tensor([[2, 2]]))
    quota, left = scheduler.next(plan, Left.all(plan.lengths))
    assert quota.tolist() == [[2, 0]]
    assert left.masked.tolist() == [[0, 2]]


def test_a_pipeline_opens_a_block_when_the_one_before_is_half_done():
    scheduler, held = PipelineScheduler(), torch.zeros(1, 3, dtype=torch.bool)
    lengths = torch.tensor([[4, 5, 4]])
    for left, opened in (
        ([4, 5, 4], [4, 0, 0]),
        ([3, 5, 4], [3, 0, 0]),
        ([2, 5, 4], [2, 5, 0]),
        ([2, 3, 4], [2, 3, 0]),  # two of five are less than half
        ([2, 2, 4], [2, 2, 4]),
        ([3, 2, 4], [3, 0, 0]),
        ([0, 0, 1], [0, 0, 1]),
    ):
        assert scheduler.open(torch.tensor([left]), lengths, held).tolist() == [opened]
    alone = PipelineScheduler(done_before_next=1.0)
    after_another = SemiAutoregressiveScheduler()
    for left in ([4, 5, 4], [1, 5, 4], [0, 5, 4], [0, 1, 4], [0, 0, 2]):
        left = torch.tensor([left])
        assert torch.equal(alone.open(left, lengths, held), after_another.open(left, lengths, held))
    at_once = PipelineScheduler(done_before_next=0.0)
    assert torch.equal(at_once.open(lengths, lengths, held), lengths)
