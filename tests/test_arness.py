from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK, Words
from reference import kendall_tau_b, order_measures

from nap_decode import AnyOrderScheduler, ARnessMeter, CanvasTemplate, DecodeTrace, Denoiser, NapDecodeError, Sampler


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
            scheduler=AnyOrderScheduler(tokens_per_step=2),
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
            out = Sampler(guided, scheduler=AnyOrderScheduler(tokens_per_step=2))([[5, 6]], max_new_tokens=4)
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
        assert not tiny._forward_pre_hooks

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


def test_words_stand_for_a_tokenizer():
    assert Words()("5 _")["input_ids"] == [3, 5, MASK]
