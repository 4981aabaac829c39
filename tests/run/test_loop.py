"""The loop: rows come and go, blocks close, steps are saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK, PAD, Words

from nap_decode import (
    AnyOrderScheduler,
    CanvasTemplate,
    Committer,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    QuotaSelection,
    Reviser,
    Sampler,
    Scheduler,
    Selection,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
)
from nap_decode.decoders.maskgit import CosineSchedule
from nap_decode.parts.slots import Decision

END = 2
LEFTMOST = MicroConfidenceCommitter(confidence="leftmost")


def script(*rows: list[int]):
    """A model that says at every position what is written there, whatever else there is; a row is found by its
    first id."""

    def model(input_ids, attention_mask):
        table = torch.zeros(20, input_ids.shape[1], dtype=torch.int64)
        for row in rows:
            width = min(len(row), table.shape[1])
            table[row[0], :width] = torch.tensor(row[:width])
        return torch.nn.functional.one_hot(table[input_ids[:, 0]], 20) * 9.0

    return model


def sampler_of(scheduler: Scheduler, template: CanvasTemplate, *rows: list[int], close_on=(END,)) -> Sampler:
    denoiser = Denoiser(script(*rows), Words(), end_token_ids=[END])
    return Sampler(denoiser, decoder=Decoder(scheduler, LEFTMOST, close_on=close_on), template=template)


def nap(paths: int, path_length: int, summary_length: int) -> CanvasTemplate:
    return CanvasTemplate.nap(
        paths, path_length=path_length, summary_length=summary_length, path_header=[(6,)] * paths, summary_header=(6,)
    )


def test_the_budget_of_a_closed_block_serves_the_others():
    row = [5, 6, 7, END, 9, 9, 9, 9, 6, 8, 8, 8, 8, 8, 8, 6, 7, 7]
    out = sampler_of(MacroParallelScheduler(tokens_per_step=2), nap(2, 6, 2), row)([[5]])
    # Path 1 comes to its end at once, path 2 is twice as fast then, and the summary follows.
    assert out.trace.step.tolist() == [[-1, -1, 0, 1, 1, 1, 1, 1, -1, 0, 1, 2, 2, 3, 3, -1, 4, 4]]
    assert out.sequences.tolist() == [[5, 6, 7, END, PAD, PAD, PAD, PAD, 6, 8, 8, 8, 8, 8, 8, 6, 7, 7]]
    assert out.steps_saved == [2]
    assert out.forward_passes == 5
    assert out.trace.closed is not None
    assert out.trace.closed.nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert out.trace.canvas_at(1).tolist()[0][4:8] == [MASK] * 4


def test_a_block_closes_only_when_everything_before_its_end_is_there():
    prefer_the_end = MicroConfidenceCommitter(confidence=lambda c: c.positions.double())  # right to left
    sampler = sampler_of(AnyOrderScheduler(tokens_per_step=1), CanvasTemplate.plain(4), [5, 7, END, 8, 9])
    out = sampler.set(committer=prefer_the_end)([[5]])
    assert out.trace.step.tolist() == [[-1, 3, 2, 1, 0]]
    assert out.steps_saved == [0]
    assert not out.trace.closed.any()


def test_blocks_of_the_canvas_close_whatever_the_scheduler_makes_of_them():
    row = [5, 7, 7, END, *[9] * 9]
    scheduler = SemiAutoregressiveScheduler(tokens_per_step=1, block_length=4)
    out = sampler_of(scheduler, CanvasTemplate.plain(12), row)([[5]])
    assert out.forward_passes == 3
    assert out.steps_saved == [9]
    assert out.sequences.tolist() == [[5, 7, 7, END, *[PAD] * 9]]


def test_without_a_padding_id_the_end_fills_the_block():
    denoiser = Denoiser(script([5, 7, END, 9, 9]), mask_token_id=MASK)
    scheduler = AnyOrderScheduler(tokens_per_step=1)
    sampler = Sampler(denoiser, decoder=Decoder(scheduler, LEFTMOST, close_on=[END]))
    assert sampler([[5]], max_new_tokens=4).sequences.tolist() == [[5, 7, END, END, END]]


def test_the_measure_of_ar_ness_leaves_out_what_was_not_decoded():
    from nap_decode import ARnessMeter

    row = [5, 8, END, 9, 9, 9, 9]
    values = []
    for close_on in ((), (END,)):
        meter = ARnessMeter()
        sampler = sampler_of(AnyOrderScheduler(tokens_per_step=1), CanvasTemplate.plain(6), row, close_on=close_on)
        meter.update(sampler([[5]]).trace)
        values.append(meter.compute())
    assert values[0].before_end.tokens_per_forward == 1 / 6
    assert values[1].before_end.tokens_per_forward == 1 / 2
    assert values[1].tokens_per_step == 1


def test_a_trace_with_closed_blocks_can_be_saved(tmp_path):
    from nap_decode import DecodeTrace

    out = sampler_of(AnyOrderScheduler(tokens_per_step=1), CanvasTemplate.plain(6), [5, 8, END, 9, 9, 9, 9])([[5]])
    out.trace.save(tmp_path / "trace")
    assert torch.equal(DecodeTrace.load(tmp_path / "trace").closed, out.trace.closed)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_budgets_are_kept_and_steps_are_saved(data):
    paths, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    summary, per_step = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    scheduler = data.draw(
        st.sampled_from(
            [
                MacroParallelScheduler(tokens_per_step=per_step),
                MacroParallelScheduler(tokens_per_step=per_step, hold_until=0.6),
                MacroParallelScheduler(tokens_per_step=per_step, share_last_step=True),
                SemiAutoregressiveScheduler(tokens_per_step=per_step),
                AnyOrderScheduler(tokens_per_step=per_step),
            ]
        )
    )
    template = nap(paths, length, summary)
    total = paths * length + summary
    if total < paths + 1 or -(-total // per_step) < paths + 1:
        scheduler = AnyOrderScheduler(tokens_per_step=per_step)
    ids, block = template.encode(None, MASK)
    tokens = [data.draw(st.sampled_from([7, 8, END])) if b >= 0 else i for i, b in zip(ids, block, strict=True)]
    out = sampler_of(scheduler, template, [5, *tokens])([[5]])
    plain = sampler_of(scheduler, template, [5, *tokens], close_on=())([[5]])
    assert out.forward_passes + out.steps_saved[0] == plain.forward_passes
    assert out.steps_saved[0] >= 0
    decoded = (out.trace.block >= 0) & ~out.trace.closed
    expected = torch.tensor([[5, *tokens]])
    assert torch.equal(out.sequences[decoded], expected[decoded])
    # Behind an end nothing is decoded, but for what was committed before the end was.
    per_step_committed = torch.bincount(out.trace.step[decoded])
    assert per_step_committed.max() <= torch.bincount(plain.trace.step[plain.trace.block >= 0]).max()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((-1,), "token id of close_on"),
        ((1.5,), "token id of close_on"),
        ((MASK,), "never emits"),
        ((99,), "never emits"),
        ("eos", "no way to close blocks 'eos'"),
    ],
)
def test_bad_ends(tiny, ids, message):
    with pytest.raises(NapDecodeError, match=message):
        Sampler(Denoiser(tiny, Words()), decoder=Decoder(MacroParallelScheduler(steps=2), close_on=ids))


def test_the_ends_of_the_model(tiny):
    scheduler = MacroParallelScheduler(steps=2)
    assert Sampler(Denoiser(tiny, Words()), decoder=Decoder(scheduler, close_on="end"))._ends == (END,)
    with pytest.raises(NapDecodeError, match="it says none"):
        Sampler(Denoiser(script([5]), mask_token_id=MASK), decoder=Decoder(scheduler, close_on="end"))


class TestStream:
    PROMPTS = ([5, 6, 7], [8], [9, 9, 9, 9], [5, 5], [6] * 6, [7], [8, 9])

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls, tiny):
        template = CanvasTemplate.nap(2, path_length=4, summary_length=2, path_header=[(10,)] * 2, summary_header=(10,))
        return Sampler(
            Denoiser(tiny, Words()), decoder=Decoder(MacroParallelScheduler(tokens_per_step=2)), template=template
        )

    @pytest.mark.parametrize("max_batch", [1, 2, 3, 100])
    def test_order(self, sampler, max_batch):
        for in_order in (True, False):
            outs = list(sampler.stream(iter(self.PROMPTS), max_batch=max_batch, in_order=in_order))
            numbers = [out.index for out in outs]
            assert sorted(numbers) == list(range(len(self.PROMPTS)))
            if in_order:
                assert numbers == sorted(numbers)
            for out in outs:
                assert torch.equal(out.sequences, sampler([self.PROMPTS[out.index]]).sequences)
                assert out.canvas.is_single
                assert isinstance(out.text, str)

    def test_as_they_finish(self, sampler):
        outs = sampler.stream(self.PROMPTS, max_batch=1, in_order=False)
        assert [out.index for out in outs] == [4, 2, 0, 3, 6, 1, 5]  # from the longest to the shortest

    def test_prompts_are_read_as_they_are_needed(self, sampler):
        read = []

        def endless():
            number = 0
            while True:
                read.append(number)
                yield [5 + number % 7]
                number += 1

        outs = sampler.stream(endless(), max_batch=2)
        for number in range(40):
            assert next(outs).index == number
        assert len(read) == 64  # two windows of 16 * max_batch

    def test_memory_is_bounded(self, sampler, tiny):
        shapes = []
        sampler(self.PROMPTS)  # the model is probed at the first padded batch
        handle = tiny.get_input_embeddings().register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
        try:
            outs = list(sampler.stream(self.PROMPTS, max_batch=5, max_tokens=40))
        finally:
            handle.remove()
        assert len(outs) == len(self.PROMPTS)
        assert max(rows * width for rows, width in shapes) <= 40
        assert max(rows for rows, width in shapes) >= 2

    def test_too_long(self, sampler):
        with pytest.raises(NapDecodeError, match="prompt 4 and its canvas take 19 tokens, more than max_tokens=18"):
            list(sampler.stream(self.PROMPTS, max_tokens=18))

    def test_rows_share_forward_passes(self, sampler, tiny):
        sampler.denoiser.probe()  # has passes of its own, at the first use
        calls = []
        handle = tiny.get_input_embeddings().register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
        try:
            list(sampler.stream(self.PROMPTS, max_batch=7))
        finally:
            handle.remove()
        assert calls == [7] * 5

    def test_a_single_prompt_is_not_taken_apart(self, sampler):
        for prompts in ([5, 6, 7], [{"role": "user", "content": "5"}]):
            with pytest.raises(NapDecodeError, match="a stream takes many prompts, but number 0 of them is"):
                list(sampler.stream(prompts))

    def test_errors_name_the_prompt(self, sampler):
        with pytest.raises(NapDecodeError, match="mask token in prompt 2"):
            list(sampler.stream([[5], [6, 7], [MASK, 5, 5, 5]], max_batch=1))

    def test_two_streams_of_one_sampler(self, sampler):
        for one, other in zip(sampler.stream(self.PROMPTS), sampler.stream(self.PROMPTS), strict=True):
            assert torch.equal(one.sequences, other.sequences)

    def test_row_seeds(self, tiny):
        """A row's draws are its own, wherever it stands."""
        drawing = MicroConfidenceCommitter(temperature=2.0)
        sampler = Sampler(
            Denoiser(tiny, mask_token_id=MASK), decoder=Decoder(MacroParallelScheduler(tokens_per_step=2), drawing)
        )
        options = {"max_new_tokens": 6}
        seeds = [2**70 + 7 * n for n in range(len(self.PROMPTS))]
        want = sampler(self.PROMPTS, row_seeds=seeds, **options)
        outs = list(sampler.stream(self.PROMPTS, row_seeds=iter(seeds), max_batch=2, **options))
        back = list(sampler.stream(self.PROMPTS[::-1], row_seeds=seeds[::-1], max_batch=3, **options))[::-1]
        for row, (out, other) in enumerate(zip(outs, back, strict=True)):
            length = out.sequences.shape[1]
            assert out.sequences[0].tolist() == want.sequences[row, :length].tolist()
            assert torch.equal(out.sequences, other.sequences)
            assert out.row_seeds == want.row_seeds[row : row + 1]
        assert len({tuple(out.sequences[0].tolist()[-6:]) for out in outs}) > 1

    def test_bad_row_seeds(self, sampler, tiny):
        with pytest.raises(NapDecodeError, match="leave out seed"):
            sampler.stream(self.PROMPTS, seed=1, row_seeds=[1])
        with pytest.raises(NapDecodeError, match="there are 2, and more prompts"):
            list(sampler.stream(self.PROMPTS, row_seeds=[1, 2]))
        with pytest.raises(NapDecodeError, match="there are more than 1 prompts"):
            list(sampler.stream([[5]], row_seeds=[1, 2]))

    @pytest.mark.parametrize("prompts", ["5 6", torch.tensor([[5]]), {"input_ids": [[5]]}, 3])
    def test_not_a_list(self, sampler, prompts):
        with pytest.raises(NapDecodeError, match="stream takes a list or an iterator of prompts"):
            sampler.stream(prompts)

    def test_bad_options_come_before_anything_is_decoded(self, sampler):
        with pytest.raises(NapDecodeError, match="max_batch"):
            sampler.stream(self.PROMPTS, max_batch=0)
        with pytest.raises(NapDecodeError, match="say what to decode"):
            Sampler(sampler.denoiser, decoder=Decoder(sampler.decoder.scheduler)).stream(self.PROMPTS)

    def test_no_prompts(self, sampler):
        assert list(sampler.stream([])) == []

    def test_rows_with_different_numbers_of_steps(self, tiny):
        """Random schedules: rows finish at different steps of a fixed schedule, and nobody asks the device when."""
        scheduler = MacroParallelScheduler(tokens_per_step=2, schedule=CosineSchedule())
        sampler = Sampler(Denoiser(tiny, Words()), decoder=Decoder(scheduler), template=CanvasTemplate.plain(9))
        whole = sampler(self.PROMPTS)
        for out in sampler.stream(self.PROMPTS, max_batch=3):
            assert torch.equal(out.sequences[0], whole.sequences[out.index, : out.sequences.shape[1]])

    def test_gradients_are_the_callers_business_between_rows(self, sampler):
        for _ in sampler.stream(self.PROMPTS[:2]):
            assert torch.is_grad_enabled()


def test_sharing_the_last_step_spends_the_whole_budget():
    row = [5, 6, END, 9, 9, 6, 8, 8, 8, 6, 7]
    scheduler = MacroParallelScheduler(tokens_per_step=4, share_last_step=True)
    out = sampler_of(scheduler, nap(2, 3, 1), row)([[5]])
    assert out.steps_saved[0] >= 0


def test_inference_mode_leaves_nothing_behind(tiny):
    sampler = Sampler(Denoiser(tiny, Words()), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    expected = sampler([[5]], max_new_tokens=4).sequences
    with torch.inference_mode():
        assert torch.equal(sampler([[5]], max_new_tokens=4).sequences, expected)
    assert torch.equal(sampler([[5]], max_new_tokens=4).sequences, expected)


def test_threads_may_share_a_sampler(tiny):
    from concurrent.futures import ThreadPoolExecutor

    sampler = Sampler(Denoiser(tiny, Words()), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
    prompts = [[5 + i] * (1 + i % 3) for i in range(12)]
    expected = [sampler(prompt, max_new_tokens=6).sequences for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda prompt: sampler(prompt, max_new_tokens=6).sequences, prompts))
    assert all(torch.equal(out, tokens) for out, tokens in zip(outs, expected, strict=True))


def test_rows_leave_the_batch_when_they_are_finished(tiny):
    """Holes of different sizes: the model is called with fewer and fewer rows."""
    rows = []
    handle = tiny.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(tuple(args[0].shape)))
    sampler = Sampler(Denoiser(tiny, Words()), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
    texts = [[5, 6, MASK, 7, 8, 9], [MASK, 5, MASK], [MASK, MASK, MASK, MASK]]
    try:
        sampler.infill(texts)  # the model is probed at the first padded batch
        rows.clear()
        out = sampler.infill(texts)
    finally:
        handle.remove()
    assert rows == [(3, 6), (2, 4), (1, 4), (1, 4)]
    assert out.trace.forward_passes.tolist() == [1, 2, 4]
    assert out.forward_passes == 4
    for row, text in enumerate(texts):
        alone = sampler.infill([text])
        assert torch.equal(alone.sequences[0], out.sequences[row, : len(text)])


def stepped(sampler, **options):
    loop = sampler.loop()
    batch = loop.start(sampler.canvas([[5], [6]], max_new_tokens=4), **options)
    while batch.is_busy:
        batch = loop.step(batch)
    return loop, batch


@pytest.mark.parametrize("selection", [QuotaSelection(), ThresholdSelection()])
def test_there_is_no_step_after_the_last(tiny, selection):
    decoder = Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(selection=selection))
    loop, batch = stepped(Sampler(Denoiser(tiny, Words()), decoder=decoder))
    with pytest.raises(NapDecodeError, match="no row has a turn left"):
        loop.step(batch)


@pytest.mark.parametrize("seeds", [None, torch.tensor([1]), torch.tensor([1.0, 2.0])])
def test_rows_that_draw_need_a_seed_each(tiny, seeds):
    decoder = Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(temperature=1.0))
    sampler = Sampler(Denoiser(tiny, Words()), decoder=decoder)
    with pytest.raises(NapDecodeError, match=r"the decoder draws; pass seeds=, int64 \(2,\)"):
        stepped(sampler, seeds=seeds)
    assert not stepped(sampler, seeds=torch.tensor([1, 2]))[1].state.masked.any()


class Odd(Selection):
    """Whatever it is told to return."""

    needs = Needs()

    def __init__(self, function):
        self.function = function

    def __call__(self, proposal):
        return self.function(proposal)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda proposal: torch.zeros_like(proposal.slots.open), "6 slots are masked though all steps are done"),
        (
            lambda proposal: proposal.confidence,
            r"chosen, .* be torch.bool \(1, 6\), but is torch.float32 \(1, 6\)",
        ),
        (
            lambda proposal: proposal.slots.open[:, :1],
            r"chosen, .* be torch.bool \(1, 6\), but is torch.bool \(1, 1\)",
        ),
        (lambda proposal: None, "chosen, decided by MicroConfidenceCommitter or a part of it, must be"),
    ],
)
def test_what_parts_of_others_return_is_looked_at(tiny, function, message):
    decoder = Decoder(AnyOrderScheduler(steps=1), MicroConfidenceCommitter(selection=Odd(function)))
    with pytest.raises(NapDecodeError, match=message):
        Sampler(Denoiser(tiny.float(), Words()), decoder=decoder)([5], max_new_tokens=6)


class Fixed(Committer):
    """Commits the id that it is told to."""

    needs = Needs(adaptive=True)

    def __init__(self, token):
        self.token = token

    def __call__(self, slots, predict):
        tokens = torch.full_like(slots.index, self.token)
        return Decision(tokens, torch.ones(tokens.shape), slots.open) if self.token < 100 else None


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (-1, "committed token ids that the model does not have: \\[-1\\]"),
        (99, "committed token ids that the model does not have: \\[99\\]"),
        (MASK, "committed the mask token"),
        (100, "Fixed, or its reviser, must return a Decision, not None"),
    ],
)
def test_what_committers_of_others_commit_is_looked_at(tiny, token, message):
    decoder = Decoder(AnyOrderScheduler(), Fixed(token))
    with pytest.raises(NapDecodeError, match=message):
        Sampler(Denoiser(tiny, Words()), decoder=decoder)([5], max_new_tokens=6)


def test_a_reviser_sees_committed_slots_whatever_it_needs(tiny):
    class Watching(Reviser):
        needs = Needs(adaptive=True)
        seen = 0

        def __call__(self, proposal, decision):
            Watching.seen += int(proposal.slots.committed.sum())
            return decision

    decoder = Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(reviser=Watching()))
    Sampler(Denoiser(tiny, Words()), decoder=decoder)([5], max_new_tokens=3)
    assert Watching.seen == 1 + 2


def test_a_divergence_has_the_step_before_whatever_asks_for_it(tiny):
    values = []

    class Still(Selection):
        needs = Needs(adaptive=True, statistics=("divergence",))

        def __call__(self, proposal):
            values.extend(proposal["divergence"][proposal.slots.open].tolist())
            return proposal.fill_up(proposal["divergence"] < 0)

    decoder = Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(selection=Still()))
    Sampler(Denoiser(tiny, Words()), decoder=decoder)([5], max_new_tokens=3)
    assert [value < torch.inf for value in values] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("confidence", [lambda c: 1.0, lambda c: c.best[:1], lambda c: c.best[:, None]])
def test_a_confidence_is_a_number_for_each_candidate(tiny, confidence):
    decoder = Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(confidence=confidence))
    with pytest.raises(NapDecodeError, match="must return one number for each of the 4 candidates, but returned"):
        Sampler(Denoiser(tiny, Words()), decoder=decoder)([5], max_new_tokens=4)


def test_needs_are_needs():
    with pytest.raises(NapDecodeError, match="statistics of Needs must be a tuple"):
        Needs(statistics="margin")
    assert Needs(statistics=["margin"]) | Needs() == Needs(statistics=("margin",))

    class Dictionary(Selection):
        @property
        def needs(self):
            return {"adaptive": True}

        def __call__(self, proposal):
            return proposal.slots.open

    with pytest.raises(NapDecodeError, match="the needs of a part must be Needs"):
        MicroConfidenceCommitter(selection=Dictionary())
