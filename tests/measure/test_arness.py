from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK, VOCABULARY, Words
from reference import kendall_tau_b, order_measures
from torch import nn

from nap_decode import (
    AnyOrderScheduler,
    ARnessMeter,
    CanvasTemplate,
    Decoder,
    DecodeTrace,
    Denoiser,
    NapDecodeError,
    Sampler,
)


def trace(*rows, block=None, confidence=None, tokens=None, names=("completion",), passes=None, ends=()):
    step = torch.tensor(rows)
    block = torch.where(step >= 0, 0, -1) if block is None else torch.tensor(block)
    return DecodeTrace(
        tokens=torch.full_like(step, 9) if tokens is None else torch.tensor(tokens),
        block=block,
        step=step,
        confidence=torch.full(step.shape, 0.5) if confidence is None else torch.tensor(confidence),
        forward_passes=step.amax(1) + 1 if passes is None else torch.tensor(passes),
        block_names=names,
        mask_token_id=MASK,
        end_token_ids=ends,
    )


def measure(*traces, **options):
    meter = ARnessMeter(**options)
    for t in traces:
        meter.update(t)
    return meter.compute()


def test_left_to_right_is_one():
    got = measure(trace(list(range(50))), ks=(1, 2, 5))
    assert got.global_at == got.global_lower == got.global_upper == got.local_at == {1: 1.0, 2: 1.0, 5: 1.0}
    assert got.kendall_tau == 1.0
    assert got.tokens_per_step == 1.0


def test_right_to_left():
    got = measure(trace(list(range(49, -1, -1))))
    assert got.global_at[1] == pytest.approx(1 / 50)  # the last one left is the lowest
    assert got.local_at[1] == 0
    assert got.kendall_tau == -1.0


def test_round_robin_over_the_papers_canvas():
    step = [3 * i + path for path in range(3) for i in range(330)] + list(range(990, 1022))
    block = [[j] * 330 for j in range(3)] + [[3] * 32]
    got = measure(trace(step, block=[[b for part in block for b in part]], names=("1", "2", "3", "S")))
    assert got.global_at[1] == pytest.approx((330 + 2 + 32) / 1022)
    assert got.global_at[1] == pytest.approx(0.3562, abs=5e-5)
    assert got.local_at[1] == pytest.approx(32 / 1021)
    assert got.local_at[1] == pytest.approx(0.0313, abs=5e-5)
    assert [got.blocks[name].global_at[1] for name in "123S"] == [1.0] * 4
    assert got.blocks["2"].local_at[1] == 1.0


def test_six_tokens_two_per_step_by_hand():
    # position     0    1    2    3    4    5
    # step         1    0    0    2    2    1
    # confidence  .9   .6   .8   .5   .7   .4
    #
    # commit        2      1      0      5      4      3
    # masked      012345 01345  0345   345    34     3
    # @1            .      .      x      .      .      x     2 of 6
    # @2            .      x      x      .      x      x     4 of 6
    # runs          -      .      .      .      .      .     0 of 5
    #
    # ascending   1 2 | 0 5 | 3 4: hits 0, 3, 4.  descending   2 1 | 5 0 | 4 3: hits 0, 3
    # pairs of positions: 8 in order of step, 4 against, 3 tied
    got = measure(
        trace([1, 0, 0, 2, 2, 1], confidence=[[0.9, 0.6, 0.8, 0.5, 0.7, 0.4]]),
        ks=(1, 2),
    )
    assert got.global_at == {1: pytest.approx(2 / 6), 2: pytest.approx(4 / 6)}
    assert got.global_upper[1] == pytest.approx(3 / 6)
    assert got.global_lower[1] == pytest.approx(2 / 6)
    assert got.step_level[1] == pytest.approx(2 / 6)  # of {0}, {0}, {3}: 0 and 3
    assert got.local_at == {1: 0.0, 2: 0.0}
    assert got.tokens_per_step == 2.0
    assert got.tokens_per_forward == 2.0
    assert got.kendall_tau == pytest.approx((8 - 4) / math.sqrt(12 * 15))


@settings(max_examples=300)
@given(st.permutations(range(9)), st.integers(1, 4))
def test_one_token_per_step_agrees_with_the_definition(order, k):
    step = [order.index(p) for p in range(9)]
    got = measure(trace(step), ks=(k,))
    expected_global, expected_local = order_measures(order, k)
    assert got.global_at[k] == pytest.approx(expected_global)
    assert got.global_lower == got.global_upper == got.global_at
    assert got.local_at[k] == pytest.approx(expected_local)
    assert got.kendall_tau == pytest.approx(kendall_tau_b(list(range(9)), step))


@settings(max_examples=150)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=7), st.integers(1, 3))
def test_bounds_hold_for_every_order_inside_steps(step, k):
    got = measure(trace(step), ks=(k,))
    groups = [[p for p, s in enumerate(step) if s == t] for t in sorted(set(step))]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    values = [order_measures(list(itertools.chain(*order)), k)[0] for order in orders]
    assert got.global_lower[k] == pytest.approx(min(values))
    assert got.global_upper[k] == pytest.approx(max(values))
    start = {t: [p for p, s in enumerate(step) if s >= t] for t in step}
    assert got.step_level[k] == pytest.approx(sum(p in start[s][:k] for p, s in enumerate(step)) / len(step))
    tau = kendall_tau_b(list(range(len(step))), step)
    assert got.kendall_tau == pytest.approx(tau, nan_ok=True)


def test_monotone_in_k():
    step = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    got = measure(trace(step), ks=tuple(range(1, 61)))
    values = list(got.global_at.values())
    assert values == sorted(values)
    assert values[-1] == 1.0
    local = list(got.local_at.values())[:-1]
    assert local == sorted(local, reverse=True)
    assert math.isnan(got.local_at[60])


def test_headers_and_padding_are_skipped():
    bare = measure(trace([0, 2, 1, 3]))
    framed = measure(trace([-1, 0, -1, -1, 2, 1, -1, 3]))
    assert framed == bare


def test_sequences_are_averaged_with_equal_weight():
    got = measure(trace([0, 1, 2], [2, 1, 0]))
    assert got.sequences == 2
    assert got.global_at[1] == pytest.approx((1 + 1 / 3) / 2)
    assert measure(trace([0, 1, 2]), trace([2, 1, 0])) == got


def test_padding_after_the_end_with_and_without():
    tokens = [[9, 9, 2, 2, 2, 2]]
    got = measure(trace([0, 1, 5, 4, 3, 2], tokens=tokens, passes=[6], ends=(2,)))
    assert got.global_at[1] == pytest.approx(3 / 6)
    assert got.before_end.global_at[1] == 1.0
    assert got.before_end.blocks["completion"].global_at[1] == 1.0
    assert got.tokens_per_forward == got.before_end.tokens_per_forward == pytest.approx(2 / 6)
    unknown = measure(trace([0, 1, 5, 4, 3, 2], tokens=tokens, passes=[6]))
    assert unknown.before_end is None
    assert unknown.tokens_per_forward == 1.0


def test_reset_and_errors():
    meter = ARnessMeter()
    meter.update(trace([0, 1]))
    meter.reset()
    with pytest.raises(NapDecodeError, match="nothing was measured; call update"):
        meter.compute()
    with pytest.raises(NapDecodeError, match="k must be a whole number of at least 1, but is 0"):
        ARnessMeter((0,))
    assert ARnessMeter(3).ks == (3,)


def test_as_a_table():
    text = str(measure(trace([0, 1, 2, 3], block=[[0, 0, 1, 1]], names=("a", "summary")), ks=(1, 2)))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["Global@1", "all", "a", "summary"]
    assert len(set(map(len, lines))) == 1


class TestWatch:
    """Foreign loops, written here as people write them."""

    @staticmethod
    def loop(model, prompt, length, per_step, batch=1, append=0):
        ids = torch.tensor([prompt + [MASK] * length] * batch)
        order = []
        while (ids == MASK).any():
            with torch.no_grad():
                logits = model(ids).logits
            p = logits.softmax(-1)
            p[..., MASK] = 0
            confidence, tokens = p.max(-1)
            confidence = confidence.masked_fill(ids != MASK, -1)
            for row in range(batch):
                best = confidence[row].topk(min(per_step, int((ids[row] == MASK).sum()))).indices
                ids[row, best] = tokens[row, best]
            order.append(ids.clone())
            if append and not (ids == MASK).any():
                ids = torch.cat([ids, torch.full((batch, append), MASK)], 1)
                append = 0
        return ids, order

    def test_sees_what_our_own_trace_says(self, tiny):
        prompt = [5, 6, 7]
        sampler = Sampler(
            Denoiser(tiny, mask_token_id=MASK),
            decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)),
            template=CanvasTemplate.plain(8),
        )
        with ARnessMeter.watch(tiny, MASK) as watch:
            ids, _ = self.loop(tiny, prompt, 8, 2)
        got, ours = watch.trace(ids), sampler([prompt]).trace
        assert torch.equal(got.tokens, ours.tokens)
        assert torch.equal(got.step, ours.step)
        assert got.forward_passes.tolist() == [4]
        assert measure(got).global_upper == measure(ours).global_upper
        with ARnessMeter.watch(tiny, MASK) as watch:
            sampler([prompt])
        assert torch.equal(watch.trace().step, ours.step)

    def test_batches_growing_canvases_and_several_decodes(self, tiny):
        with ARnessMeter.watch(tiny, MASK) as watch:
            _, orders = self.loop(tiny, [5, 6], 6, 1, batch=2, append=3)
            self.loop(tiny, [5, 6], 6, 3)
            third, _ = self.loop(tiny, [7, 7], 6, 3)
        traces = watch.traces()
        assert [len(t.tokens) for t in traces] == [2, 1, 1]
        assert [t.tokens.shape[1] for t in traces] == [11, 8, 8]
        for step, ids in enumerate(orders[:-1]):  # what the last one committed is seen by no call
            width = ids.shape[1]
            assert torch.equal(traces[0].canvas_at(step + 1)[:, :width][ids != MASK], ids[ids != MASK])
        assert traces[2].step.max() == 1
        assert torch.equal(watch.trace(third).tokens, third)

    def test_rows_of_an_unconditional_branch_can_be_left_out(self, tiny):
        with ARnessMeter.watch(tiny, MASK, num_rows=1) as watch:
            guided = Denoiser(tiny, mask_token_id=MASK, cfg_scale=1.0)
            out = Sampler(guided, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))([[5, 6]], max_new_tokens=4)
        assert torch.equal(watch.trace(out.sequences).step, out.trace.step)

    def test_an_unconditional_branch_in_calls_of_its_own_is_left_out(self, tiny):
        with ARnessMeter.watch(tiny, MASK) as watch, torch.no_grad():
            for ids in ([5, MASK, MASK], [5, 6, MASK], [5, 6, 7]):
                tiny(torch.tensor([ids]))
                tiny(torch.tensor([[MASK, *ids[1:]]]))
        assert len(watch.traces()) == 1
        assert watch.trace().step.tolist() == [[-1, 0, 1]]

    def test_one_shot_decodes_of_one_prompt_are_told_apart_by_begin(self, tiny):
        ids = torch.tensor([[5, MASK, MASK]])
        with ARnessMeter.watch(tiny, MASK, end_token_ids=[9]) as watch, torch.no_grad():
            tiny(ids)
            watch.begin()
            tiny(ids)
        assert [t.forward_passes.tolist() for t in watch.traces()] == [[1], [1]]
        assert watch.trace(torch.tensor([[5, 6, 9]])).before_end().tolist() == [[False, True, False]]

    def test_sequences_of_another_decode_are_refused(self, tiny):
        with ARnessMeter.watch(tiny, MASK) as watch, torch.no_grad():
            tiny(torch.tensor([[5, 6, MASK]]))
        with pytest.raises(NapDecodeError, match="where those were not masked; are the rows padded on another side"):
            watch.trace(torch.tensor([[0, 5, 6]]))

    def test_leaves_the_model_as_it_was(self, tiny):
        with pytest.raises(ZeroDivisionError), ARnessMeter.watch(tiny, MASK):
            raise ZeroDivisionError
        assert "forward" not in vars(tiny)

    def test_errors(self, tiny):
        with ARnessMeter.watch(tiny, MASK) as watch:
            pass
        with pytest.raises(NapDecodeError, match="was not called inside the with block"):
            watch.trace()
        embeds = tiny.get_input_embeddings()(torch.tensor([[5, MASK]]))
        with ARnessMeter.watch(tiny, MASK), pytest.raises(NapDecodeError, match="called without input_ids"):
            tiny(inputs_embeds=embeds)
        with ARnessMeter.watch(tiny, MASK) as watch, torch.no_grad():
            tiny(torch.tensor([[5, MASK]]))
        with pytest.raises(NapDecodeError, match=r"sequences \(1, 3\) must have the shape"):
            watch.trace(torch.tensor([[5, 6, 7]]))


class Taken(nn.Module):
    """A stand-in for a model: loops here commit by a plan, so that nothing need be computed."""

    def forward(self, *args, **kwargs):
        return None


class Grown:
    """A cache that is filled as a loop goes on, as transformers' are."""

    def __init__(self, length=0):
        self.length = length

    def get_seq_length(self, layer_idx=0):
        return self.length


def keys(length, rows=1):
    """What older code calls past_key_values: keys and values of every layer."""
    return [(torch.zeros(rows, 2, length, 4), torch.zeros(rows, 2, length, 4)) for _ in range(2)]


class Plan:
    """Which slot is decoded when; the loops below carry it out, each with the calls of a public one."""

    def __init__(self, prompt, steps, block):
        self.prompt, self.steps, self.block = torch.tensor(prompt), torch.tensor(steps), block
        self.rows, self.start = self.prompt.shape
        self.length = self.start + self.steps.shape[1]
        self.tokens = torch.cat([self.prompt, 5 + torch.arange(self.steps.numel()).view_as(self.steps) % 15], 1)

    def canvas(self):
        return torch.cat([self.prompt, torch.full_like(self.steps, MASK)], 1)

    def blocks(self):
        return [(s, s + self.block) for s in range(self.start, self.length, self.block)]

    def times(self, start, end):
        return sorted(set(self.steps[:, start - self.start : end - self.start].flatten().tolist()))

    def commit(self, x, time):
        """In place, as far as x reaches."""
        now = torch.nn.functional.pad(self.steps == time, (self.start, 0))[:, : x.shape[1]]
        x[now] = self.tokens[:, : x.shape[1]][now]

    def decode(self, call, x=None):
        """Block by block; call(x, start, end, is_first) calls the model."""
        x = self.canvas() if x is None else x
        for start, end in self.blocks():
            for i, time in enumerate(self.times(start, end)):
                call(x, start, end, i == 0)
                self.commit(x, time)
        return x

    def masked(self, x):
        """The unconditional branch."""
        return torch.cat([torch.full_like(self.prompt, MASK), x[:, self.start :]], 1)


def whole(model, plan):
    return plan.decode(lambda x, *_: model(x))


def up_to_the_block(model, plan):  # LLaDA2
    return plan.decode(lambda x, start, end, _: model(x[:, :end], position_ids=torch.arange(end)[None]))


def prefix_cache(model, plan):  # Fast-dLLM
    def call(x, start, end, is_first):
        if is_first:
            model(x, use_cache=True)
        else:
            model(x[:, start:], past_key_values=keys(start, len(x)), use_cache=True)

    return plan.decode(call)


def dual_cache(model, plan, told="replace_position"):  # Fast-dLLM
    def call(x, start, end, is_first):
        if is_first:
            model(x, None, use_cache=True)
            return
        here = torch.arange(start, end)
        named = {
            "replace_position": torch.zeros_like(x, dtype=torch.bool).index_fill(1, here, True),
            "position_ids": here[None],
            "cache_position": here,
        }
        model(x[:, start:end], None, past_key_values=keys(plan.length, len(x)), **{told: named[told]})

    return plan.decode(call)


def dual_cache_by_position_ids(model, plan):
    return dual_cache(model, plan, "position_ids")


def dual_cache_by_cache_position(model, plan):
    return dual_cache(model, plan, "cache_position")


def stored_blocks(model, plan):  # SDAR, TraDo
    x, cache = plan.canvas(), Grown()
    model(x[:, : plan.start], past_key_values=cache, store_kv=True)
    cache.length = plan.start
    for start, end in plan.blocks():
        here = torch.arange(start, end)[None]
        for time in plan.times(start, end):
            model(x[:, start:end].clone(), position_ids=here, past_key_values=cache, store_kv=False)
            plan.commit(x, time)
        model(x[:, start:end].clone(), position_ids=here, past_key_values=cache, store_kv=True)
        cache.length = end
    return x


def guided_blocks(model, plan, is_guided=True):  # dLLM's BD3LM sampler
    x = plan.prompt.clone()
    for start, end in plan.blocks():
        model(x, use_cache=True)
        if is_guided:
            model(plan.masked(x), use_cache=True)
        past = keys(x.shape[1], len(x))
        x = torch.cat([x, torch.full((len(x), end - start), MASK)], 1)
        for time in plan.times(start, end):
            for _ in range(1 + is_guided):
                model(x[:, start:end], past_key_values=copy.deepcopy(past), position_ids=torch.arange(start, end)[None])
            plan.commit(x, time)
    return x


def small_blocks(model, plan):  # Fast-dLLM v2, which calls forward
    x, cache = plan.canvas(), Grown()
    model.forward(input_ids=x[:, : plan.start], past_key_values=cache)
    for start, end in plan.blocks():
        cache.length = start
        for i, time in enumerate(plan.times(start, end)):
            if i == 0 or end - start < 2:
                model.forward(input_ids=x[:, start:end], past_key_values=cache, use_block_cache=True)
            else:
                middle = (plan.steps[:, start - plan.start : end - plan.start] == time).any(0).nonzero()[:, 0]
                low, high = int(middle[0]), int(middle[-1]) + 1
                options = {"past_key_values": cache, "block_past_key_values": Grown(end), "replace_position": low}
                model.forward(input_ids=x[:, start + low : start + high], **options)
            plan.commit(x, time)
        model.forward(input_ids=x[:, start:end], past_key_values=cache)
    return x


def stacked(model, plan):  # LLaDA
    return plan.decode(lambda x, *_: model(torch.cat([x, plan.masked(x)])))


def stacked_below(model, plan):
    return plan.decode(lambda x, *_: model(torch.cat([plan.masked(x), x])))


def stacked_in_turn(model, plan):
    return plan.decode(lambda x, *_: model(torch.stack([x, plan.masked(x)], 1).flatten(0, 1)))


def stacked_at_times(model, plan):  # guidance for a part of the steps
    def call(x, start, end, is_first):
        model(torch.cat([x, plan.masked(x)]) if is_first else x)

    return plan.decode(call)


def stacked_late(model, plan):
    def call(x, start, end, is_first):
        model(x if is_first else torch.cat([x, plan.masked(x)]))

    return plan.decode(call)


def stacked_with_cache(model, plan):
    def call(x, start, end, is_first):
        both = torch.cat([x, plan.masked(x)])
        model(both) if is_first else model(both[:, start:], past_key_values=keys(start, len(both)))

    return plan.decode(call)


def in_calls_of_their_own(model, plan):
    def call(x, *_):
        model(x)
        model(plan.masked(x))

    return plan.decode(call)


def shadow_columns(model, plan):  # WINO
    def call(x, start, end, _):
        positions = torch.cat([torch.arange(plan.length), torch.arange(start, end)])
        model(torch.cat([x, torch.full((len(x), end - start), MASK)], 1), position_ids=positions)

    return plan.decode(call)


def with_likelihoods(model, plan):
    def call(x, *_):
        model(x)
        model(torch.tensor([[10, MASK, 9, 9, 9]]))
        model(torch.full_like(x, 19))

    return plan.decode(call)


def under_another_name(model, plan):
    return plan.decode(lambda x, *_: model(tokens=x, attention_mask=torch.ones_like(x)))


def in_second_place(model, plan):
    return plan.decode(lambda x, *_: model(torch.zeros(len(x)), x))


def past_the_wrapper(model, plan):
    return plan.decode(lambda x, *_: model.forward(x))


LOOPS = [
    whole,
    up_to_the_block,
    prefix_cache,
    dual_cache,
    dual_cache_by_position_ids,
    dual_cache_by_cache_position,
    stored_blocks,
    guided_blocks,
    small_blocks,
    stacked,
    stacked_below,
    stacked_in_turn,
    stacked_at_times,
    stacked_late,
    stacked_with_cache,
    in_calls_of_their_own,
    shadow_columns,
    with_likelihoods,
    under_another_name,
    in_second_place,
    past_the_wrapper,
]


PLAN = Plan([[9, 3, 4]], [[2, 0, 1, 5, 4, 3]], 3)


def ranks(step):
    """Steps numbered without gaps, by row."""
    return [torch.unique(row, return_inverse=True)[1].tolist() for row in step]


@st.composite
def plans(draw):
    rows, block, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    start = draw(st.integers(2, 5))
    prompt = [
        [10 + row, *draw(st.lists(st.integers(2, 8), min_size=start - 1, max_size=start - 1))] for row in range(rows)
    ]
    # Something is decoded at every step of every row: a row in which nothing is has no call to tell its steps apart.
    at_once = draw(st.integers(1, block))
    steps = []
    for _ in range(rows):
        orders = [draw(st.permutations(range(block))) for _ in range(blocks)]
        steps.append([4 * b + order.index(i) // at_once for b, order in enumerate(orders) for i in range(block)])
    return Plan(prompt, steps, block)


class TestWatchForeignCalls:
    @pytest.mark.parametrize("loop", LOOPS)
    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_sees_the_true_order(self, loop, data):
        many = [data.draw(plans()) for _ in range(data.draw(st.integers(1, 2)))]
        model, meter = Taken(), ARnessMeter()
        for plan in many:
            with ARnessMeter.watch(model, MASK) as watch:
                out = loop(model, plan)
            got = watch.trace(out)
            assert torch.equal(got.tokens, plan.tokens)
            assert (got.block[:, : plan.start] == -1).all()
            assert (got.block[:, plan.start :] == 0).all()
            assert ranks(got.step[:, plan.start :]) == ranks(plan.steps)
            meter.update(got)
        assert meter.compute().sequences == sum(plan.rows for plan in many)

    @pytest.mark.parametrize("loop", [whole, prefix_cache, stored_blocks, guided_blocks, stacked, shadow_columns])
    def test_follows_one_decode_after_another(self, loop):
        many = [Plan([[9, 3, 4]], [[1, 0, 1, 2, 3, 2]], 3), Plan([[9, 5]], [[0, 1, 1, 4, 2, 3]], 3), PLAN]
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            for plan in many:
                loop(model, plan)
        assert [ranks(got.step[:, plan.start :]) for got, plan in zip(watch.traces(), many, strict=True)] == [
            ranks(plan.steps) for plan in many
        ]
        assert torch.equal(watch.trace(PLAN.tokens).tokens, PLAN.tokens)

    def test_decodes_that_take_turns_are_told_apart(self):
        model, plans = Taken(), [Plan([[9, 3]], [[1, 0, 2]], 3), Plan([[9, 4]], [[2, 0, 1]], 3)]
        rows = [plan.canvas() for plan in plans]
        with ARnessMeter.watch(model, MASK) as watch:
            for time in range(3):
                for x, plan in zip(rows, plans, strict=True):
                    model(x)
                    plan.commit(x, time)
        assert [got.step[0, 2:].tolist() for got in watch.traces()] == [plan.steps[0].tolist() for plan in plans]
        assert torch.equal(watch.trace(rows[0]).tokens, rows[0])

    def test_caches_tell_which_decode_is_meant(self):
        model, plans = Taken(), [Plan([[9, 3]], [[1, 0]], 2), Plan([[9, 4]], [[0, 1]], 2)]
        rows, caches = [plan.canvas() for plan in plans], [Grown(), Grown()]
        with ARnessMeter.watch(model, MASK) as watch:
            for x, cache in zip(rows, caches, strict=True):
                model(x[:, :2], past_key_values=cache)
                cache.length = 2
            for time in range(2):
                for x, cache, plan in zip(rows, caches, plans, strict=True):
                    model(x[:, 2:], past_key_values=cache)
                    plan.commit(x, time)
        assert [ranks(got.step[:, 2:]) for got in watch.traces()] == [ranks(plan.steps) for plan in plans]

    def test_finished_rows_may_leave(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            model(torch.tensor([[9, MASK, MASK], [8, MASK, MASK], [9, MASK, MASK]]))
            model(torch.tensor([[9, 5, 6], [8, MASK, 5], [9, MASK, 7]]))
            model(torch.tensor([[8, 4, 5], [9, MASK, 7]]))
            model(torch.tensor([[9, MASK, 7]]))
        got = watch.trace(torch.tensor([[9, 5, 6], [8, 4, 5], [9, 8, 7]]))
        assert got.step.tolist() == [[-1, 0, 0], [-1, 1, 0], [-1, 3, 0]]
        assert got.forward_passes.tolist() == [2, 3, 4]

    def test_left_padding_moves_positions_but_not_columns(self):
        positions = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])
        model, plan = Taken(), Plan([[0, 0, 9]], [[1, 0, 3, 2]], 2)
        x = plan.canvas()
        with ARnessMeter.watch(model, MASK) as watch:
            for time in range(4):
                if time in (0, 2):
                    model(x, position_ids=positions)
                else:
                    start = 3 if time == 1 else 5
                    model(x[:, start:], position_ids=positions[:, start:], past_key_values=keys(start))
                plan.commit(x, time)
        assert ranks(watch.trace(x).step[:, 3:]) == ranks(plan.steps)

    def test_positions_of_padded_rows_place_nothing_by_themselves(self):
        positions = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            model(torch.tensor([[0, 0, 9, MASK, MASK, MASK, MASK]]), position_ids=positions)
            model(torch.tensor([[MASK, 5]]), position_ids=positions[:, 5:])
        with pytest.raises(NapDecodeError, match="does not go on from what was seen"):
            watch.trace()

    def test_what_the_loop_left_masked_was_not_decoded(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            model(torch.tensor([[9, MASK, MASK, MASK]]))
            model(torch.tensor([[9, 5, MASK, MASK]]))
        got = watch.trace(torch.tensor([[9, 5, 6, MASK]]))
        assert got.step.tolist() == [[-1, 0, 1, -1]]
        assert got.masked().tolist() == [[False, False, False, True]]

    def test_without_sequences_masks_that_no_call_shows_again_are_refused(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            x = dual_cache(model, Plan([[9, 3]], [[3, 1, 2, 0]], 4))
            model(x[:, 4:6], None, past_key_values=keys(6), cache_position=torch.tensor([4, 5]))
        with pytest.raises(NapDecodeError, match="1 of 4 slots were masked when"):
            watch.trace()

    @pytest.mark.parametrize("keep", [(), (0,)], ids=["all masked", "one kept"])
    @pytest.mark.parametrize("num_rows", [None, 1])
    def test_stacked_guidance_never_counts_the_prompt(self, keep, num_rows):
        def call(x, *_):
            below = PLAN.masked(x)
            below[:, list(keep)] = x[:, list(keep)]
            model(torch.cat([x, below]))

        model = Taken()
        with ARnessMeter.watch(model, MASK, num_rows=num_rows) as watch:
            x = PLAN.decode(call)
        for got in (watch.trace(), watch.trace(x)):
            assert (got.block >= 0).tolist() == [[False] * 3 + [True] * 6]
            assert ranks(got.step[:, 3:]) == ranks(PLAN.steps)

    def test_texts_with_holes_are_no_guidance(self):
        rows = torch.tensor([[9, 5, MASK, 7], [9, MASK, MASK, 7]])
        done = torch.tensor([[9, 5, 6, 7], [9, 5, 6, 7]])
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            model(rows)
        with pytest.raises(NapDecodeError, match="or texts with other holes"):
            watch.trace()
        assert watch.trace(done).block.tolist() == [[-1, -1, 0, -1], [-1, 0, 0, -1]]
        assert watch.trace(done[:1]).block.tolist() == [[-1, -1, 0, -1]]
        with ARnessMeter.watch(model, MASK, num_rows=2) as watch:
            model(rows)
        assert len(watch.trace().tokens) == 2
        with ARnessMeter.watch(model, MASK) as watch:
            model(rows)
            model(done)
        assert len(watch.trace().tokens) == 2

    @pytest.mark.parametrize(
        ("calls", "match"),
        [
            pytest.param(
                [{"inputs_embeds": torch.zeros(1, 6, 4)}], "call 1 came without ids", id="embeddings in between"
            ),
            pytest.param(
                [{"input_ids": [[MASK, 5, MASK]], "past_query_key_values": [keys(6), (torch.ones(1, 6), None)]}],
                "comes with past_query_key_values, which does not say",
                id="dKV-Cache, LLaDA",
            ),
            pytest.param(
                [
                    {
                        "input_ids": [[MASK, 5, MASK]],
                        "past_key_values": Grown(3),
                        "position_ids": torch.arange(6)[None],
                        "cache_position": torch.ones(1, 6, dtype=torch.bool),
                    }
                ],
                "comes with position_ids and cache_position, which",
                id="dKV-Cache, Dream",
            ),
            pytest.param(
                [{"input_ids": [[9, 3, 4, 5, MASK, MASK], [9, 3, 4, MASK, 5, MASK]]}],
                "2 rows that go on from 1: of alternatives",
                id="LoPA",
            ),
            pytest.param([{"input_ids": [[5, MASK, MASK]]}], "shows 3 of 6 columns", id="a cache inside of the model"),
            pytest.param(
                [{"input_ids": [[8, MASK]], "past_key_values": keys(1)}], "does not go on from", id="another prompt"
            ),
            pytest.param(
                [{"input_ids": [[5, MASK]], "past_key_values": keys(9)}], "does not go on from", id="beyond the row"
            ),
            pytest.param(
                [{"input_ids": [[5, MASK]], "past_key_values": Grown(6), "replace_position": torch.ones(1, 6) > 0}],
                "comes with replace_position",
                id="another number of places",
            ),
        ],
    )
    def test_what_cannot_be_followed_is_refused_but_stops_no_loop(self, calls, match):
        model, passed = Taken(), []
        model.register_forward_hook(lambda *_: passed.append(1))
        with ARnessMeter.watch(model, MASK) as watch:
            model(torch.tensor([[9, 3, 4, MASK, MASK, MASK]]))
            for call in calls:
                model(**{name: torch.tensor(value) if name == "input_ids" else value for name, value in call.items()})
            model(torch.tensor([[9, 3, 4, 5, MASK, MASK]]))
            watch.begin()
            whole(model, PLAN)
        assert len(passed) == 2 + len(calls) + 6
        assert ranks(watch.trace().step[:, 3:]) == ranks(PLAN.steps)
        with pytest.raises(NapDecodeError, match=match):
            watch.traces()

    def test_a_decode_that_began_before_the_watch_is_refused(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            model(torch.tensor([[MASK, MASK]]), past_key_values=keys(4))
            model(torch.tensor([[9, 3, 4, 5, MASK, 6]]))
        with pytest.raises(NapDecodeError, match="call 1 shows a part of a row, by its cache"):
            watch.trace()

    def test_an_unconditional_branch_that_is_called_first_is_refused(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            for ids in ([3, MASK, MASK], [3, 5, MASK]):
                model(torch.tensor([[MASK, *ids[1:]]]))
                model(torch.tensor([ids]))
        with pytest.raises(NapDecodeError, match="an unconditional branch that is called first"):
            watch.trace()

    def test_parts_that_fit_into_several_decodes_are_refused(self):
        model = Taken()
        with ARnessMeter.watch(model, MASK) as watch:
            for prompt in (3, 4):
                model(torch.tensor([[9, prompt, MASK, MASK]]))
            model(torch.tensor([[MASK, 5]]), past_key_values=keys(2))
        with pytest.raises(NapDecodeError, match="fits into several decodes"):
            watch.trace()

    def test_a_wrong_mask_id_is_named(self):
        model = Taken()
        with ARnessMeter.watch(model, 17) as watch:
            whole(model, PLAN)
        with pytest.raises(NapDecodeError, match="never called with the mask id 17; is mask_token_id right"):
            watch.trace()

    @pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.compile(model, backend="eager")])
    def test_compiled_models_are_seen_and_left_as_they_were(self, compiled):
        model = compiled(nn.Embedding(VOCABULARY, 2))
        before = model.forward
        with ARnessMeter.watch(model, MASK) as watch:
            x = whole(model, PLAN)
        assert ranks(watch.trace(x).step[:, 3:]) == ranks(PLAN.steps)
        with ARnessMeter.watch(model, MASK) as watch:
            pass
        assert model.forward == before
        model(x)
        with pytest.raises(NapDecodeError, match="not called inside"):
            watch.trace()


def test_words_stand_for_a_tokenizer():
    assert Words()("5 _")["input_ids"] == [3, 5, MASK]
