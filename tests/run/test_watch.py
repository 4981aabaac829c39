from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from models import MASK

from nap_decode import (
    ARnessMeter,
    Canvas,
    CanvasTemplate,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    ParallelForcedSampler,
    Sampler,
    SemiAutoregressiveScheduler,
    decoders,
)
from nap_decode.run.watch import interrupts

PROMPTS = [[5, 6, 7], [8, 9], [7]]
TEMPLATE = CanvasTemplate.nap(
    2, path_length=(4, 3), summary_length=3, path_header=[(10,), (11, 12)], summary_header=(14,)
)


class Recorder:
    """Keeps what a streamer is told, with the step at which it is told."""

    def __init__(self, clock=None, drafts=False):
        self.calls, self.clock = [], clock or (lambda: 0)
        if drafts:
            self.put_draft = lambda tokens: self.calls.append(("draft", tokens.tolist(), self.clock()))

    def put(self, tokens):
        self.calls.append(("put", tokens.flatten().tolist(), self.clock()))

    def end(self):
        self.calls.append(("end", None, self.clock()))

    @property
    def told(self):
        return [token for kind, tokens, _ in self.calls if kind == "put" for token in tokens]


def one_by_one(tiny, **options):
    return Sampler(
        Denoiser(tiny, mask_token_id=MASK),
        decoder=Decoder(SemiAutoregressiveScheduler(block_length=1, steps=6)),
        **options,
    )


def present(out, row):
    return out.sequences[row][out.canvas.attention_mask[row].bool()].tolist()


# -------------------------------------------------------------------------------------------- streamers


class TestStreams:
    def test_every_row_of_a_batch(self, tiny):
        sampler = Sampler(
            Denoiser(tiny, mask_token_id=MASK), decoder=Decoder(MacroParallelScheduler(steps=4)), template=TEMPLATE
        )
        streamers = [Recorder(), Recorder(drafts=True), Recorder()]
        out = sampler(PROMPTS, streamer=streamers)
        plain = sampler(PROMPTS)
        assert torch.equal(out.sequences, plain.sequences)
        for row, streamer in enumerate(streamers):
            assert streamer.calls[0][:2] == ("put", PROMPTS[row])
            assert streamer.told == present(plain, row)
            assert [kind for kind, *_ in streamer.calls].count("end") == 1
            assert streamer.calls[-1][0] == "end"
        drafts = [tokens for kind, tokens, _ in streamers[1].calls if kind == "draft"]
        assert drafts
        for draft in drafts:
            final = present(plain, 1)[-len(draft) :]
            assert all(token in (MASK, end) for token, end in zip(draft, final, strict=True))

    def test_tokens_as_soon_as_nothing_is_missing_before_them(self, tiny):
        steps = []
        streamer = Recorder(clock=lambda: len(steps))
        out = one_by_one(tiny)([[5, 6]], max_new_tokens=6, streamer=[streamer], callback=None)
        assert [len(tokens) for kind, tokens, _ in streamer.calls if kind == "put"] == [2, 1, 1, 1, 1, 1, 1]
        assert streamer.told == present(out, 0)

    def test_a_row_ends_when_it_is_finished(self, tiny):
        """Not when the batch is."""
        sampler = Sampler(
            Denoiser(tiny, mask_token_id=MASK), decoder=Decoder(MacroParallelScheduler(tokens_per_step=1))
        )
        canvas = Canvas.from_infill([[5, MASK, 6], [5, MASK, MASK, MASK, MASK]], mask_token_id=MASK)
        order = []
        streamers = [Recorder(), Recorder()]
        for name, streamer in zip("ab", streamers, strict=True):
            streamer.end = lambda name=name: order.append((name, len(streamers[1].told)))
        out = sampler.decode(canvas, streamer=streamers)
        assert [name for name, _ in order] == ["a", "b"]
        assert order[0][1] < len(present(out, 1))
        assert streamers[0].told == present(out, 0)

    def test_text_with_holes(self, tiny):
        sampler = Sampler(
            Denoiser(tiny, mask_token_id=MASK), decoder=Decoder(MacroParallelScheduler(tokens_per_step=1))
        )
        streamers = [Recorder() for _ in range(3)]
        out = sampler.infill([[5, 7, MASK, 6], [MASK, 9], [8, 8, 8]], streamer=streamers)
        assert [streamer.calls[0][1] for streamer in streamers] == [[5, 7], [], [8, 8, 8]]
        for row, streamer in enumerate(streamers):
            assert streamer.told == present(out, row)
            assert streamer.calls[-1][0] == "end"

    def test_rows_that_nobody_looks_at(self, tiny):
        streamer = Recorder()
        out = one_by_one(tiny)(PROMPTS, max_new_tokens=6, streamer=[None, streamer, None])
        assert streamer.told == present(out, 1)

    def test_what_a_callback_may_change_is_shown_at_the_end(self, tiny):
        def restart(state):
            if state.step == 3:
                return state.tokens.masked_fill(state.canvas.decodable, MASK)
            return None

        denoiser = Denoiser(tiny, mask_token_id=MASK)
        sampler = Sampler(denoiser, decoder=decoders.make("fast_dllm_threshold", threshold=0.99, block_length=6))
        streamer = Recorder(drafts=True)
        out = sampler([[5, 6]], max_new_tokens=6, streamer=[streamer], callback=restart)
        assert [tokens for kind, tokens, _ in streamer.calls if kind == "put"] == [[5, 6], present(out, 0)[2:]]

    def test_nothing_behind_the_end(self, tiny):
        plain = present(one_by_one(tiny)([[5, 6]], max_new_tokens=6), 0)
        denoiser = Denoiser(tiny, mask_token_id=MASK, end_token_ids=[plain[4]])
        sampler = Sampler(denoiser, decoder=Decoder(SemiAutoregressiveScheduler(block_length=1, steps=6)))
        streamer = Recorder()
        sampler([[5, 6]], max_new_tokens=6, streamer=[streamer])
        assert streamer.told == plain[: plain.index(plain[4], 2) + 1]

    @pytest.mark.parametrize(
        ("streamer", "message"),
        [
            (Recorder(), "there are 1 for 3 rows"),
            ([Recorder()] * 2, "there are 2 for 3 rows"),
            ([print] * 3, r"put\(ids\) and end\(\)"),
        ],
    )
    def test_refusals(self, tiny, streamer, message):
        with pytest.raises(NapDecodeError, match=message):
            one_by_one(tiny)(PROMPTS, max_new_tokens=6, streamer=streamer)


# -------------------------------------------------------------------------------------------- Ctrl-C


def press_at(step):
    """A callback that presses Ctrl-C after a step."""

    def callback(state):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


class TestInterrupts:
    def test_what_was_decoded_so_far(self, embedded):
        sampler = ParallelForcedSampler(*embedded, path_length=11, summary_length=2, tokens_per_step=6)
        prompt = "6 0 6 4 6 2 1 2 4 7 0 6 ="
        whole = sampler(prompt)
        out = sampler(prompt, interruptible=True, callback=press_at(2))
        assert not out.is_complete
        assert whole.is_complete
        assert out.finish_reason == ["interrupted"]
        assert out.forward_passes == 2
        assert torch.equal(out.sequences, whole.trace.canvas_at(2))
        assert torch.equal(out.trace.masked(), whole.trace.step >= 2)
        assert out.tokens_per_forward == [7.0]  # 33 in five steps, then two
        assert "[...]" in out.text
        assert out.summary == "[...]"
        assert out.steps_saved is None

    def test_the_meter_leaves_masks_out(self, embedded):
        sampler = ParallelForcedSampler(*embedded, path_length=11, summary_length=2, tokens_per_step=6)
        out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =", interruptible=True, callback=press_at(2))
        meter = ARnessMeter()
        meter.update(out.trace)
        measured = meter.compute()
        assert measured.tokens_per_step == 7.0
        assert "summary" not in measured.blocks

    def test_a_ragged_batch_and_its_streamers(self, tiny):
        streamers = [Recorder(), Recorder(), Recorder()]
        out = one_by_one(tiny)(PROMPTS, max_new_tokens=6, interruptible=True, callback=press_at(4), streamer=streamers)
        whole = one_by_one(tiny)(PROMPTS, max_new_tokens=6)
        for row, streamer in enumerate(streamers):
            assert present(out, row)[:-2] == present(whole, row)[:-2]
            assert present(out, row)[-2:] == [MASK, MASK]
            assert streamer.told == present(whole, row)[:-2]
            assert streamer.calls[-1][0] == "end"

    def test_between_steps_of_a_fixed_schedule(self, tiny):
        """Without a callback all steps are planned beforehand."""
        taken = []

        class Pressing(MicroConfidenceCommitter):
            def __call__(self, slots, predict):
                taken.append(1)
                if len(taken) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().__call__(slots, predict)

        sampler = one_by_one(tiny).set(committer=Pressing())
        out = sampler(PROMPTS, max_new_tokens=6, interruptible=True)
        assert out.forward_passes == 2  # the step at which it was pressed is completed
        assert (out.sequences == MASK).sum(1).tolist() == [4, 4, 4]

    def test_it_raises_unless_asked(self, tiny):
        with pytest.raises(KeyboardInterrupt):
            one_by_one(tiny)(PROMPTS, max_new_tokens=6, callback=press_at(1))

    def test_twice_raises(self, tiny):
        def twice(state):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            one_by_one(tiny)(PROMPTS, max_new_tokens=6, interruptible=True, callback=twice)

    def test_the_handler_is_put_back(self, tiny):
        before = signal.getsignal(signal.SIGINT)
        with interrupts(caught=True) as pressed:
            assert signal.getsignal(signal.SIGINT) is not before
            assert not pressed()
        assert signal.getsignal(signal.SIGINT) is before

    def test_other_threads(self, tiny):
        outs = []
        thread = threading.Thread(
            target=lambda: outs.append(one_by_one(tiny)(PROMPTS, max_new_tokens=6, interruptible=True))
        )
        thread.start()
        thread.join()
        assert outs[0].is_complete
