from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import KNOWN, MASK, PAD, VOCABULARY, TableModel, Words, needs_is_causal
from reference import decode_row, law
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EsmConfig, EsmForMaskedLM

from nap_decode import (
    AnyOrderScheduler,
    Block,
    Canvas,
    CanvasTemplate,
    Committer,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    ParallelForcedSampler,
    Sampler,
    Selection,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
    decoders,
)
from nap_decode.base.random import row_seeds
from nap_decode.decoders.dream import AncestralSchedule
from nap_decode.parts.confidence import CONFIDENCES
from nap_decode.parts.scheduler import Left
from nap_decode.parts.slots import Decision
from nap_decode.run.loop import Loop

TEMPLATE = CanvasTemplate.nap(
    3, path_length=(4, 3, 4), summary_length=3, path_header=[(10,), (11, 12), (13,)], summary_header=(14,)
)
TOKENS = 14
SCHEDULERS = {
    "macro": MacroParallelScheduler(tokens_per_step=3),
    "macro, one token": MacroParallelScheduler(tokens_per_step=1),
    "macro, 80 %": MacroParallelScheduler(steps=5, hold_until=0.8),
    "macro, together": MacroParallelScheduler(steps=4, hold_until=0.0),
    "macro, shared": MacroParallelScheduler(tokens_per_step=4, share_last_step=True),
    "blocks of the canvas": SemiAutoregressiveScheduler(steps=6),
    "blocks of 5": SemiAutoregressiveScheduler(tokens_per_step=2, block_length=5),
    "any order": AnyOrderScheduler(tokens_per_step=3),
    "one shot": AnyOrderScheduler(steps=1),
}


def prefer_even(candidates):
    return -(candidates.tokens % 2).double() - candidates.positions / 1000


CONFIDENCE = [*CONFIDENCES, prefer_even]
BATCHES = {
    "single": [[5, 6, 7]],
    "equal": [[5, 6, 7], [8, 9, 5], [7, 7, 7]],
    "ragged": [[5, 6, 7, 8, 9], [7], [5, 6, 7], [6, 5, 9, 9]],
}


def steps_of(scheduler):
    return scheduler.steps or math.ceil(TOKENS / scheduler.tokens_per_step)


def quotas_of(scheduler, partition):
    """``(B, M)`` tokens of every step of a fixed schedule."""
    plan = scheduler.plan(partition.lengths, partition.held)
    left = Left.all(plan.lengths)
    while bool(left.masked.any()):
        quota, left = scheduler.next(plan, left)
        left = replace(left, step=left.step + 1)
        yield quota


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("confidence", CONFIDENCE, ids=lambda c: getattr(c, "__name__", c))
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
class TestContract:
    """What holds for every scheduler, confidence and batch."""

    @pytest.fixture
    def sampler(self, denoiser, scheduler, confidence, temperature):
        committer = MicroConfidenceCommitter(temperature=temperature, confidence=confidence)
        return Sampler(denoiser, decoder=Decoder(scheduler, committer), template=TEMPLATE)

    def test_rules(self, sampler, prompts, scheduler):
        seeds = [100 + row for row in range(len(prompts))]
        out = sampler(prompts, row_seeds=seeds)
        header, block = TEMPLATE.encode(None, MASK)
        for row, prompt in enumerate(prompts):
            got, end = out.sequences[row].tolist(), len(prompt) + len(header)
            assert got[: len(prompt)] == prompt
            assert got[end:] == [PAD] * (max(map(len, prompts)) - len(prompt))
            for g, h, b in zip(got[len(prompt) : end], header, block, strict=True):
                if b < 0:
                    assert g == h
                else:
                    assert g != MASK
                    assert g < KNOWN

        steps = steps_of(scheduler)
        assert out.forward_passes == steps
        assert out.trace.forward_passes.tolist() == [steps] * len(prompts)
        partition = scheduler.partition(out.canvas)
        for step, quota in enumerate(quotas_of(scheduler, partition)):
            for row in range(len(prompts)):
                committed = partition.block[row][out.trace.step[row] == step].tolist()
                assert committed.count(-1) == 0
                assert [committed.count(b) for b in range(quota.shape[1])] == quota[row].tolist()
        assert step == steps - 1

        again = sampler(prompts, row_seeds=seeds)
        assert torch.equal(again.sequences, out.sequences)
        assert torch.equal(again.trace.step, out.trace.step)
        for row, prompt in enumerate(prompts):
            alone = sampler([prompt], row_seeds=[seeds[row]])
            kept = len(prompt) + len(header)
            assert torch.equal(alone.sequences[0], out.sequences[row, :kept])
            assert torch.equal(alone.trace.step[0], out.trace.step[row, :kept])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("confidence", ["probability", "margin", "negative_entropy", "leftmost"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_agrees_with_the_reference(tiny, scheduler, confidence, shift):
    from nap_decode import ModelFamily

    denoiser = Denoiser(tiny, Words(), family=ModelFamily(name="test", shift=shift))
    committer = MicroConfidenceCommitter(confidence=confidence)
    prompts = BATCHES["ragged"]
    out = Sampler(denoiser, decoder=Decoder(scheduler, committer), template=TEMPLATE)(prompts)
    partition = scheduler.partition(out.canvas)
    quotas = list(quotas_of(scheduler, partition))
    banned = {MASK, *range(KNOWN, VOCABULARY)}

    def model(ids, _):
        with torch.no_grad():
            return tiny(ids).logits

    for row, prompt in enumerate(prompts):
        end = len(prompt) + len(TEMPLATE.encode(None, MASK)[0])
        tokens, steps = decode_row(
            model,
            out.canvas.tokens[row, :end].tolist(),
            partition.block[row, :end].tolist(),
            [quota[row].tolist() for quota in quotas],
            confidence=confidence,
            banned=banned,
            shift=shift,
        )
        assert out.sequences[row, :end].tolist() == tokens
        assert out.trace.step[row, :end].tolist() == steps


@pytest.mark.parametrize(
    ("confidence", "tokens_per_step", "temperature"),
    [("probability", 1, 1.0), ("probability", 2, 1.0), ("random", 1, 1.0), ("random", 2, 0.7), ("probability", 4, 1.0)],
)
def test_samples_follow_the_enumerated_law(confidence, tokens_per_step, temperature):
    model = TableModel(vocabulary=4, length=4, seed=3)  # three tokens and the mask, id 3
    sampler = Sampler(
        model,
        decoder=Decoder(
            AnyOrderScheduler(tokens_per_step=tokens_per_step),
            MicroConfidenceCommitter(confidence=confidence, temperature=temperature),
        ),
        mask_token_id=3,
        template=CanvasTemplate.plain(4),
    )
    count = 40_000
    rows = sampler([[]] * count, seed=11).sequences
    seen = Counter(map(tuple, rows.tolist()))
    quotas = [tokens_per_step] * (4 // tokens_per_step)
    expected = law(model, 4, 3, quotas, random_positions=confidence == "random", temperature=temperature)
    assert sum(expected.values()) == pytest.approx(1)
    assert set(seen) <= set(expected)
    # Pool outcomes that are expected less than five times, as the chi-square approximation wants.
    rare = [row for row, p in expected.items() if p * count < 5]
    cells = [(seen[row], p * count) for row, p in expected.items() if p * count >= 5]
    cells.append((sum(seen[row] for row in rare), sum(expected[row] for row in rare) * count))
    statistic = sum((s - e) ** 2 / e for s, e in cells if e)
    freedom = len([e for _, e in cells if e]) - 1
    # Wilson and Hilferty: the cube root is nearly normal.  3.7 standard deviations: one failure in 10,000.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.7
    assert freedom > 20


def test_temperature_zero_draws_nothing(denoiser):
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=3)), template=TEMPLATE)
    state = torch.get_rng_state()
    out = sampler([[5]])
    assert torch.equal(torch.get_rng_state(), state)
    assert out.row_seeds is None
    assert torch.equal(sampler([[5]], seed=3).sequences, out.sequences)


def test_without_a_seed_torchs_global_generator_decides(denoiser):
    sampler = ParallelForcedSampler(denoiser, template=TEMPLATE, temperature=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = sampler([[5]]), sampler([[5]])
        torch.manual_seed(5)
        assert torch.equal(sampler([[5]]).sequences, first.sequences)
    assert not torch.equal(first.sequences, second.sequences)
    assert torch.equal(sampler([[5]], row_seeds=first.row_seeds).sequences, first.sequences)


def test_a_confidence_of_ones_own_may_draw(denoiser):
    decoder = decoders.parallel_forced().set(confidence=lambda candidates: candidates.uniform)
    sampler = ParallelForcedSampler(denoiser, template=TEMPLATE, decoder=decoder)
    first, second = sampler([[5]]), sampler([[5]])
    assert not torch.equal(first.trace.step, second.trace.step)
    assert torch.equal(sampler([[5]], row_seeds=first.row_seeds).trace.step, first.trace.step)


def test_rows_of_a_batch_draw_differently(denoiser):
    sampler = ParallelForcedSampler(denoiser, template=TEMPLATE, temperature=1.0)
    assert len(set(map(tuple, sampler([[5]] * 8, seed=0).sequences.tolist()))) > 1


def test_ragged_infill(denoiser):
    texts = [[5, MASK, 6, MASK, MASK], [MASK, 7], [5, 6, 7, MASK, MASK, MASK, MASK, 8]]
    for scheduler in (AnyOrderScheduler(tokens_per_step=2), MacroParallelScheduler(tokens_per_step=2)):
        out = Sampler(denoiser, decoder=Decoder(scheduler)).infill(texts)
        assert out.trace.forward_passes.tolist() == [2, 1, 2]
        assert out.forward_passes == 2
        assert not (out.sequences == MASK).any()
        for row, text in enumerate(texts):
            got = out.sequences[row, : len(text)].tolist()
            assert all(g == t for g, t in zip(got, text, strict=True) if t != MASK)
            alone = Sampler(denoiser, decoder=Decoder(scheduler)).infill([text])
            assert alone.sequences[0].tolist() == got


def test_infill_of_text(denoiser):
    out = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2))).infill("5 _ 7 _")
    words = out.text.split()
    assert (words[0], words[2]) == ("5", "7")
    assert out.trace.block_names == ("hole 1", "hole 2")


def test_generate_keeps_the_width_of_the_prompt(denoiser):
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    right = sampler.generate(ids, attention_mask=mask, max_new_tokens=6)
    left = sampler.generate(ids.roll(1, 1), attention_mask=mask.roll(1, 1), max_new_tokens=6)
    assert right.shape == (2, 10)
    assert right[:, :4].tolist() == [[0, 0, 5, 6], [0, 5, 6, 7]]
    assert torch.equal(left, right)
    assert right[0, 4:].tolist() == sampler([[5, 6]], max_new_tokens=6).sequences[0, 2:].tolist()
    out = sampler.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(out.sequences, right)


def test_arguments_are_not_changed(denoiser):
    canvas = Canvas.from_prompts([[5], [6, 7]], TEMPLATE, mask_token_id=MASK)
    before = canvas.tokens.clone()
    out = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2))).decode(canvas)
    assert torch.equal(canvas.tokens, before)
    assert out.sequences.data_ptr() != canvas.tokens.data_ptr()
    out.trace.tokens.zero_()
    out.trace.block.zero_()
    assert out.sequences.any()
    assert canvas.block.min() == -1


def rows_of(hidden: torch.Tensor) -> int:
    """Rows that pass the output layer; none while the body runs."""
    return hidden.shape[:-1].numel()


def test_the_head_sees_as_many_rows_as_are_wanted(denoiser, tiny):
    seen = []
    handle = tiny.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(rows_of(args[0])))
    try:
        Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(tokens_per_step=4)), template=TEMPLATE)(
            BATCHES["ragged"]
        )
    finally:
        handle.remove()
    # 11 path tokens in 3 steps (4, 4, 3), every path visited, then the 3 of the summary.
    assert [rows for rows in seen if rows] == [4 * 11, 4 * 7, 4 * 3, 4 * 3]


def test_blocks_that_wait_for_their_turn_are_not_looked_at(denoiser, tiny):
    seen = []
    handle = tiny.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(rows_of(args[0])))
    try:
        Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(tokens_per_step=1)), template=TEMPLATE)([[5]])
    finally:
        handle.remove()
    assert max(seen) == 4
    assert len([rows for rows in seen if rows]) == TOKENS


WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}
"""Operations that wait for the device, or whose result's shape the host must wait for."""


def calls_of_a_step(scheduler, template, prompts, temperature=0.0):
    """Names of the torch operations between the first and the last forward pass, for each step."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            steps[-1].append(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    def model(input_ids, attention_mask):
        steps.append([])
        return table[input_ids]

    steps, table = [[]], torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    committer = MicroConfidenceCommitter(temperature=temperature)
    sampler = Sampler(model, decoder=Decoder(scheduler, committer), mask_token_id=MASK, template=template)
    with Recorder():
        sampler(prompts, seed=0)
    return steps[1:-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_fixed_step_loop_never_waits_for_the_device(scheduler, temperature):
    steps = calls_of_a_step(scheduler, TEMPLATE, BATCHES["ragged"], temperature)
    assert len(steps) == steps_of(scheduler) - 1
    for step in steps:
        assert "aten.gather" in step
        assert not WAITING & set(step)


@needs_is_causal  # else it is told by a mask, which some releases look at on the host
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", [MacroParallelScheduler(tokens_per_step=2), AnyOrderScheduler(tokens_per_step=3)])
@pytest.mark.parametrize("texts", ["prompts", "holes"])
def test_a_model_and_a_ragged_batch_do_not_wait_either(tiny, scheduler, temperature, texts):
    """A transformers model, rows of different lengths, and in holes rows that leave: all that a fixed decode does."""
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # Reading a tensor of the host is no waiting; there is none that is made inside, so all are the device's.
            seen.add(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    committer = MicroConfidenceCommitter(temperature=temperature)
    sampler = Sampler(Denoiser(tiny, Words()), decoder=Decoder(scheduler, committer), template=TEMPLATE)
    canvas = sampler.canvas(BATCHES["ragged"])
    if texts == "holes":
        canvas = Canvas.from_infill([[5, MASK, 6], [MASK, MASK, MASK, MASK, 7]], mask_token_id=MASK, pad_token_id=PAD)
        scheduler = AnyOrderScheduler(tokens_per_step=1)
    sampler.denoiser.check(canvas)
    number = len(canvas.tokens)
    loop = Loop(sampler.denoiser, Decoder(scheduler, committer))
    batch = loop.start(canvas, seeds=row_seeds(0, range(number)))
    assert [batch.given.rows, batch.agenda.turns, batch.agenda.ends]  # made once, on the host
    while batch.is_busy:
        with Recorder():
            batch = loop.step(batch)
    assert "aten.gather" in seen
    assert not WAITING & seen


def test_the_number_of_operations_depends_neither_on_rows_nor_on_blocks():
    counts = set()
    for rows in (2, 16):
        for paths in (1, 8):
            template = CanvasTemplate.nap(paths, path_length=3, summary_length=0, path_header=[(7,)] * paths)
            steps = calls_of_a_step(MacroParallelScheduler(steps=3), template, [[5]] * rows + [[5, 6]])
            counts |= set(map(len, steps[1:]))  # the first also fills the canvas's caches
    assert len(counts) == 1


class TestAdaptive:
    def test_threshold_zero_commits_every_open_block_at_once(self, denoiser):
        committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.0))
        out = Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(), committer), template=TEMPLATE)([[5], [6]])
        assert out.forward_passes == 2
        assert out.trace.step[out.trace.block == 3].unique().tolist() == [1]

    def test_an_unreachable_threshold_commits_the_least(self, denoiser):
        committer = MicroConfidenceCommitter(selection=ThresholdSelection(2.0))
        for scheduler in (AnyOrderScheduler(), SemiAutoregressiveScheduler(), MacroParallelScheduler()):
            out = Sampler(denoiser, decoder=Decoder(scheduler, committer), template=TEMPLATE)([[5], [6, 7]])
            assert out.forward_passes == TOKENS
        out = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=4), committer), template=TEMPLATE)(
            [[5]]
        )
        assert out.forward_passes == 4

    @pytest.mark.parametrize(
        "scheduler", [AnyOrderScheduler(), SemiAutoregressiveScheduler(), MacroParallelScheduler()]
    )
    def test_rows_do_not_depend_on_each_other(self, denoiser, scheduler):
        committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.5))
        sampler = Sampler(denoiser, decoder=Decoder(scheduler, committer), template=TEMPLATE)
        out = sampler(BATCHES["ragged"])
        assert not (out.sequences == MASK).any()
        assert out.trace.forward_passes.min() < TOKENS
        assert len(out.trace.forward_passes.unique()) > 1
        for row, prompt in enumerate(BATCHES["ragged"]):
            alone = sampler([prompt])
            assert alone.forward_passes == out.trace.forward_passes[row]
            assert alone.sequences[0].tolist() == out.sequences[row, : alone.sequences.shape[1]].tolist()

    def test_what_a_step_commits_reaches_the_threshold(self, denoiser):
        committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.6))
        out = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(), committer), template=TEMPLATE)([[5]])
        for step in range(out.forward_passes):
            confidence = out.trace.confidence[out.trace.step == step]
            assert (confidence >= 0.6).all() or len(confidence) == 1


class TestThresholdUnderMacroParallel:
    def test_a_block_that_runs_ahead_does_not_drag_the_others_along(self):
        # Block 0 is certain, block 1 hopeless: it must get one token per pass, not catch up.
        def model(input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, 15)
            logits[:, :31, 7] = 50.0
            return logits

        committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.9))
        template = CanvasTemplate((Block("sure", 30), Block("unsure", 30)))
        sampler = Sampler(
            model, decoder=Decoder(MacroParallelScheduler(), committer), mask_token_id=1, template=template
        )
        out = sampler([[5]])
        sizes = torch.bincount(out.trace.step[0][out.trace.block[0] == 1]).tolist()
        assert set(sizes) <= {0, 1}
        assert out.forward_passes == 31


class TestCallback:
    @pytest.fixture
    def sampler(self, denoiser):
        return Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(tokens_per_step=2)), template=TEMPLATE)

    def test_reads(self, sampler):
        states = []
        out = sampler([[5], [6, 7]], callback=states.append)
        assert [state.step for state in states] == list(range(1, 8))
        assert {state.total_steps for state in states} == {7}
        for state in states:
            assert torch.equal(state.tokens, out.trace.canvas_at(state.step))
            assert torch.equal(state.masked, state.tokens == MASK)
            assert torch.equal(state.commit_step >= 0, state.canvas.decodable & ~state.masked)

    def test_fills_a_slot(self, sampler):
        def fill(state):
            if state.step == 1:
                tokens = state.tokens.clone()
                column = int(state.masked[0].nonzero()[-1])
                tokens[0, column] = 19
                filled.append(column)
                return tokens
            return None

        filled = []
        out = sampler([[5]], callback=fill)
        assert out.sequences[0, filled[0]] == 19
        assert out.trace.step[0, filled[0]] == 0
        assert math.isnan(out.trace.confidence[0, filled[0]])
        assert not (out.sequences == MASK).any()
        assert out.forward_passes <= 7

    def test_masks_again(self, sampler):
        def forget(state):
            if state.step == 3:
                return torch.where(state.canvas.decodable, MASK, state.tokens)
            return None

        out = sampler([[5]], callback=forget)
        assert out.forward_passes == 7
        assert out.trace.step[0].max() == 6
        assert out.trace.step[out.trace.block >= 0].min() == 3
        assert not (out.sequences == MASK).any()

    def test_everything_at_once(self, sampler):
        out = sampler([[5]], callback=lambda state: torch.where(state.masked, 9, state.tokens))
        assert out.forward_passes == 1

    def test_changing_the_tensors_of_the_state_changes_nothing(self, sampler):
        def meddle(state):
            for tensor in (state.tokens, state.masked, state.commit_step, state.confidence):
                tensor.zero_()

        assert torch.equal(sampler([[5]], callback=meddle).sequences, sampler([[5]]).sequences)

    def test_rows_do_not_depend_on_each_other_after_an_edit(self, denoiser):
        sampler = ParallelForcedSampler(denoiser, template=TEMPLATE, tokens_per_step=2, temperature=1.0)

        def fill(state):
            if state.step != 1:
                return None
            tokens = state.tokens.clone()
            columns = state.masked[0].nonzero()[:8, 0]
            tokens[0, columns] = 9
            return tokens

        alone = sampler([[5]], row_seeds=[3], callback=fill)
        batch = sampler([[5], [6]], row_seeds=[3, 4], callback=fill)
        assert torch.equal(alone.sequences[0], batch.sequences[0])
        assert torch.equal(alone.trace.step[0], batch.trace.step[0])
        assert alone.trace.forward_passes[0] == batch.trace.forward_passes[0]
        assert alone.forward_passes < batch.forward_passes

    def test_nan_is_found_in_slots_that_were_not_edited(self):
        def broken(input_ids, attention_mask):
            return torch.full((*input_ids.shape, 5), torch.nan)

        sampler = Sampler(broken, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)), mask_token_id=4)
        with pytest.raises(NapDecodeError, match="were nan in places"):
            sampler([[1]], max_new_tokens=4, callback=lambda state: state.tokens)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda s: s.tokens[:, :3],
                r"whole-number tokens \(1, 20\), not torch.int64 of \(1, 3\)",
            ),
            (lambda s: s.tokens.float(), "must return None or whole-number tokens"),
            (lambda s: True, "must return None or whole-number tokens .* not True"),
            (lambda s: s.tokens.masked_fill(s.masked, -7), "token ids that the tokenizer does not have: .-7"),
            (lambda s: s.tokens.masked_fill(s.masked, 21), "token ids that the tokenizer does not have: .21"),
            (lambda s: s.tokens.masked_fill(s.masked, 999), "token ids that the tokenizer does not have: .999"),
            (lambda s: s.tokens.index_fill_(1, torch.tensor([0]), 9), "changed the prompt, a header or padding"),
            (lambda s: torch.full_like(s.tokens, 9), "changed the prompt, a header or padding"),
        ],
    )
    def test_bad_edits(self, sampler, edit, message):
        with pytest.raises(NapDecodeError, match=message):
            sampler([[5]], callback=edit)

    def test_masking_after_the_last_step(self, sampler):
        def forget(state):
            return torch.where(state.canvas.decodable, MASK, state.tokens)

        with pytest.raises(NapDecodeError, match="masked slots after step 7, the last one"):
            sampler([[5]], callback=forget)


class TestBadInput:
    """Each is refused before the first forward pass of the decode."""

    @pytest.fixture
    def sampler(self, denoiser, monkeypatch):
        def forward(*_):
            raise AssertionError("a forward pass was made")

        monkeypatch.setattr(Denoiser, "predict", forward)
        return Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=15)), template=TEMPLATE)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([[5]], "steps=15 is more than the 14 tokens to decode in row 0"),
            ([[5, 24]], "token id 24 is out of range: the model has ids from 0 to 23"),
            ([[5, -1]], "a token id of a prompt must be a whole number of at least 0, but is -1"),
            ([], "the batch of prompts is empty"),
            ([[5], 3.5], "a prompt must be text, chat messages, or a list or 1-D tensor"),
            ([[5, 1]], "there is a mask token in prompt 0; infill"),
            ([[0.5]], "a prompt must be text"),
        ],
    )
    def test_prompts(self, sampler, prompts, message):
        with pytest.raises(NapDecodeError, match=message):
            sampler(prompts)

    def test_nothing_to_decode(self, sampler):
        with pytest.raises(NapDecodeError, match="no slot of the canvas is to be decoded; is the mask token in"):
            sampler.infill([[5, 6]])

    def test_no_template(self, denoiser):
        with pytest.raises(NapDecodeError, match="give the sampler a template, or pass max_new_tokens="):
            Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=1)))([[5]])

    def test_row_seeds(self, sampler):
        with pytest.raises(NapDecodeError, match="given: 1 for 2 rows"):
            sampler([[5], [6]], row_seeds=[1], max_new_tokens=20)
        with pytest.raises(NapDecodeError, match="row_seeds are seeds of their own for every row; leave out seed"):
            sampler([[5]], row_seeds=[1], seed=2, max_new_tokens=20)

    def test_parts_that_do_not_go_together(self, denoiser):
        adaptive = MicroConfidenceCommitter(selection=ThresholdSelection())
        with pytest.raises(NapDecodeError, match="steps=4 would have no effect: the committer decides"):
            Decoder(AnyOrderScheduler(steps=4), adaptive)
        for make in (Sampler, partial(Sampler, decoder=3), partial(ParallelForcedSampler, decoder=3)):
            with pytest.raises(NapDecodeError, match="a Sampler takes a model, its tokenizer and a Decoder"):
                make(denoiser)
        for options in ({"mask_token_id": 7}, {"tokenizer": Words()}):
            with pytest.raises(NapDecodeError, match="the Denoiser has its own tokenizer and mask_token_id"):
                Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=4)), **options)
        with pytest.raises(NapDecodeError, match="scheduler must be a Scheduler, such as"):
            Sampler(denoiser, decoder=Decoder("macro"))
        with pytest.raises(NapDecodeError, match="committer must be a Committer, such as"):
            Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=4), "x"))
        with pytest.raises(NapDecodeError, match="a template has its own blocks; leave out num_paths"):
            ParallelForcedSampler(denoiser, template=TEMPLATE, num_paths=7)

    def test_arguments_of_another_kind(self, sampler):
        with pytest.raises(NapDecodeError, match=r"input_ids must be a tensor \(B, P\), but are \[\[5, 6\]\]"):
            sampler.generate([[5, 6]])
        with pytest.raises(NapDecodeError, match=r"attention_mask and input_ids must have one shape, .* \[3\] and"):
            sampler.generate(torch.tensor([[5, 6]]), 3)
        with pytest.raises(NapDecodeError, match=r"decode takes a Canvas, .* makes, not 3"):
            sampler.decode(3)

    def test_unknown_options(self, denoiser):
        with pytest.raises(TypeError, match="token_per_step"):
            ParallelForcedSampler(denoiser, token_per_step=3)
        with pytest.raises(NapDecodeError, match="Did you mean 'probability'"):
            decoders.parallel_forced().set(confidence="probabilty")

    def test_logits_that_are_nan(self):
        def broken(input_ids, attention_mask):
            return torch.full((*input_ids.shape, 5), torch.nan)

        sampler = Sampler(broken, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)), mask_token_id=4)
        with pytest.raises(NapDecodeError, match="were nan in places"):
            sampler([[1]], max_new_tokens=4)

    @pytest.mark.filterwarnings("ignore:EsmForMaskedLM .* does not hide")  # of some releases
    def test_nan_of_a_row_of_nothing_but_masks(self):
        """ESM scales its embeddings by the share of masks among all tokens."""
        options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = EsmConfig(vocab_size=20, pad_token_id=PAD, mask_token_id=MASK, token_dropout=True, **options)
        sampler = Sampler(
            EsmForMaskedLM(config).eval(), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)), mask_token_id=MASK
        )
        with pytest.raises(
            NapDecodeError, match=r"nan in places.* Row 1 held nothing but masks .* give it a prompt, or"
        ):
            sampler([[5, 6, 7], []], max_new_tokens=4)
        assert sampler([[5, 6, 7], [8]], max_new_tokens=4).is_complete

    def test_masks_that_nobody_would_decode(self, sampler):
        canvas = Canvas.from_prompts([[5, 6]], TEMPLATE, mask_token_id=MASK)
        prompt = canvas.tokens.clone()
        prompt[0, 1] = MASK
        with pytest.raises(
            NapDecodeError, match=r"a mask token \(1\) in a slot of the canvas that is not to be decoded"
        ):
            sampler.decode(replace(canvas, tokens=prompt))

    def test_tokens_where_masks_should_be(self, sampler):
        canvas = Canvas.from_prompts([[5]], TEMPLATE, mask_token_id=9)
        with pytest.raises(NapDecodeError, match="every slot to decode must hold the mask id 1"):
            sampler.decode(canvas)


def test_every_option_of_parallel_forced_reaches_its_part(denoiser):
    sampler = ParallelForcedSampler(
        denoiser,
        num_paths=2,
        total_length=11,
        summary_length=1,
        steps=9,
        hold_until=0.5,
        temperature=0.5,
        decoder=decoders.parallel_forced().set(
            share_last_step=True, temperature=1.0, top_k=7, top_p=0.8, confidence="margin"
        ),
    )
    assert [b.length for b in sampler.template.blocks] == [5, 5, 1]
    assert sampler.decoder.scheduler == MacroParallelScheduler(steps=9, hold_until=0.5, share_last_step=True)
    committer = sampler.decoder.committer
    assert (committer.temperature, committer.top_k, committer.top_p) == (0.5, 7, 0.8)
    assert committer.confidence == "margin"
    assert ParallelForcedSampler(denoiser).decoder.scheduler.tokens_per_step == 4
    own = CanvasTemplate((Block("a", 2),))
    assert ParallelForcedSampler(denoiser, template=own).template is own


def test_compiled_kernels_decode_the_same_and_are_compiled_a_few_times(denoiser):
    """In every step the number of slots is another one; that must not compile anything."""
    from torch._dynamo.utils import counters

    plain = Sampler(
        denoiser,
        decoder=Decoder(
            MacroParallelScheduler(tokens_per_step=1), MicroConfidenceCommitter(temperature=1.0, confidence="margin")
        ),
        template=TEMPLATE,
    )
    compiled = Sampler(denoiser, decoder=plain.decoder, template=TEMPLATE, compile="kernels")
    counters.clear()
    for name in ("ragged", "equal", "single", "ragged"):
        out, expected = compiled(BATCHES[name], seed=2), plain(BATCHES[name], seed=2)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.trace.step, expected.trace.step)
        torch.testing.assert_close(out.trace.confidence, expected.trace.confidence, equal_nan=True)
    for out, expected in zip(
        compiled.stream(BATCHES["ragged"], seed=4), plain.stream(BATCHES["ragged"], seed=4), strict=True
    ):
        assert torch.equal(out.sequences, expected.sequences)
    # The body: padded, not padded, a single row. What is done to logits: several rows, one row.
    assert 2 <= counters["stats"]["unique_graphs"] <= 8
    before = counters["stats"]["unique_graphs"]
    compiled(BATCHES["ragged"], seed=3)
    assert counters["stats"]["unique_graphs"] == before


def test_progress_bar_can_be_switched_on(denoiser, capsys):
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2)), template=TEMPLATE)([[5]], progress=True)
        assert "2/2" in capsys.readouterr().err
        Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2)), template=TEMPLATE)([[5]])
        assert not capsys.readouterr().err
    finally:
        logging.disable_progress_bar()


def test_a_selection_that_never_chooses_is_stopped(denoiser, monkeypatch):
    class Never(Selection):
        def __call__(self, proposal):
            return torch.zeros_like(proposal.slots.open)

    monkeypatch.setattr(Committer, "patience", 5)
    never = Sampler(
        denoiser, decoder=Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(selection=Never())), template=TEMPLATE
    )
    with pytest.raises(NapDecodeError, match="6 steps in a row came no further"):
        never([5])

    def undo(state):  # every other step
        return torch.where(state.canvas.decodable, MASK, state.tokens) if state.step % 2 == 0 else None

    with pytest.raises(NapDecodeError, match="6 steps in a row came no further"):
        Sampler(denoiser, decoder=decoders.make("fast_dllm_threshold", threshold=2.0))(
            [5], max_new_tokens=4, callback=undo
        )


class Sevens(Committer):
    """Asks nobody."""

    needs = Needs(adaptive=True)

    def __init__(self, token):
        self.token = token

    def __call__(self, slots, predict):
        return Decision(torch.full_like(slots.tokens, self.token), torch.ones(slots.tokens.shape), slots.open)


def test_a_committer_that_does_not_ask(denoiser):
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(), Sevens(7)), template=TEMPLATE)
    out = sampler([5], callback=lambda state: state.tokens.clone())
    assert out.forward_passes == 0
    assert set(out.sequences[out.canvas.decodable].tolist()) == {7}
    with pytest.raises(NapDecodeError, match="token ids that the tokenizer does not have"):
        sampler([5], callback=lambda state: torch.where(state.canvas.decodable, VOCABULARY, state.tokens))


def test_more_than_the_quota_is_said(denoiser):
    class Greedy(Selection):
        needs = Needs()

        def __call__(self, proposal):
            return proposal.slots.open

    decoder = Decoder(MacroParallelScheduler(tokens_per_step=2), MicroConfidenceCommitter(selection=Greedy()))
    with pytest.raises(NapDecodeError, match="committed more than the quota"):
        Sampler(denoiser, decoder=decoder, template=TEMPLATE)([[5], [6, 7]])


def test_a_committer_cannot_leave_masks(denoiser):
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(), Sevens(MASK)), template=TEMPLATE)
    with pytest.raises(NapDecodeError, match="Sevens committed the mask token"):
        sampler([5])


def test_sharing_the_last_step_means_nothing_to_adaptive_committers(denoiser):
    with pytest.raises(NapDecodeError, match="share_last_step=True would have no effect"):
        decoders.parallel_forced().set(selection=ThresholdSelection(), share_last_step=True)


def test_a_schedule_that_draws_needs_seeds_too(denoiser):
    scheduler = AnyOrderScheduler(steps=5, schedule=AncestralSchedule())
    sampler = Sampler(denoiser, decoder=Decoder(scheduler), template=TEMPLATE)  # nothing else is drawn
    outs = [sampler([[5], [6, 7]], seed=seed) for seed in (1, 1, 2, 3)]
    assert torch.equal(outs[0].trace.step, outs[1].trace.step)
    assert any(not torch.equal(outs[0].trace.step, out.trace.step) for out in outs[2:])
    alone = sampler([[6, 7]], row_seeds=[outs[0].row_seeds[1]])
    assert torch.equal(alone.trace.step[0], outs[0].trace.step[1])
