"""Captured steps.  Here a function that is run again stands in for a graph: it too works on tensors of its own."""

from __future__ import annotations

import pytest
import torch
from models import MASK, Words
from samplers import NAMES, PROMPTS, make

from nap_decode import (
    CanvasTemplate,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    Sampler,
    ThresholdSelection,
)
from nap_decode.speed.graphs import Graphs


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


class Recorder:
    """Runs a function a few times, as warming up does, and gives it back."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, function):
        for _ in range(3):
            function()

        def replay():
            self.replays += 1
            function()

        return replay


def captured(sampler: Sampler) -> Sampler:
    sampler = sampler.set()
    sampler._prepared = (*sampler._prepared[:2], Graphs(Recorder()))
    return sampler


def assert_same(out, expected):
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.trace.step, expected.trace.step)
    assert torch.equal(out.trace.forward_passes, expected.trace.forward_passes)
    torch.testing.assert_close(out.trace.confidence, expected.trace.confidence, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_presets_decode_the_same(denoiser, name):
    plain = make(denoiser, name)
    if plain.decoder.needs.memory:
        pytest.skip("keeps things from step to step")
    sampler = captured(plain)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS, [[9, 9, 9, 9, 9], [8], [7, 7, 7]]):
        assert_same(sampler(prompts, seed=3), plain(prompts, seed=3))
    assert len(sampler._prepared[2]._graphs) <= 16  # at most eight for each of two shapes
    prompts = [*PROMPTS, [9, 5, 9, 5, 9, 5, 9], [10], PROMPTS[0], [6] * 4]
    for out, expected in zip(
        sampler.stream(prompts, max_batch=2, seed=5), plain.stream(prompts, max_batch=2, seed=5), strict=True
    ):
        assert_same(out, expected)


def test_a_second_call_captures_nothing(denoiser):
    sampler = captured(make(denoiser, "parallel_forced", tokens_per_step=1))
    sampler(PROMPTS)
    count, replays = len(sampler._prepared[2]._graphs), sampler._prepared[2].record.replays
    assert 1 < count <= 8
    sampler([prompt[::-1] for prompt in PROMPTS])
    assert len(sampler._prepared[2]._graphs) == count
    assert sampler._prepared[2].record.replays == 2 * replays == 24


def test_rows_stay_until_half_of_them_are_finished(denoiser):
    template = CanvasTemplate.plain(12)
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.45))
    plain = Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(), committer), template=template)
    prompts = [[5 + i, 6 + i % 3, 7] for i in range(8)]
    expected = plain(prompts)
    assert len(set(expected.trace.forward_passes.tolist())) > 2  # rows finish at different steps
    sampler = captured(plain)
    assert_same(sampler(prompts), expected)
    assert {shape[0] for shape in sampler._prepared[2]._turns} <= {8, 4, 2, 1}


def test_rows_that_come_take_the_places_of_those_that_went(denoiser):
    committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.45))
    scheduler, template = MacroParallelScheduler(), CanvasTemplate.plain(12)
    sampler = captured(Sampler(denoiser, decoder=Decoder(scheduler, committer), template=template))
    list(sampler.stream([[5 + i % 9, 6 + i % 3, 7] for i in range(24)], max_batch=4))
    assert {shape[0] for shape in sampler._prepared[2]._turns} <= {4, 2, 1}


def test_closed_blocks(denoiser):
    plain = make(denoiser, "parallel_forced", tokens_per_step=2).set(close_on=range(10, 16))
    sampler = captured(plain)
    out, expected = sampler(PROMPTS), plain(PROMPTS)
    assert_same(out, expected)
    assert torch.equal(out.trace.closed, expected.trace.closed)


def test_parts_that_remember_are_refused(tiny):
    for name in ("klass", "wino", "lopa", "credit", "llada21_editing"):
        sampler = make(Denoiser(tiny, Words()), name)
        with pytest.raises(NapDecodeError, match='use compile="kernels"'):
            Sampler(sampler.denoiser, decoder=sampler.decoder, compile="graphs")


def test_two_decodes_at_a_time(denoiser):
    """What one leaves in the tensors of a graph is not what the other goes on from."""
    plain = make(denoiser, "parallel_forced", tokens_per_step=1)
    sampler, prompts = captured(plain), [[5 + i % 9, 6 + i % 3, 7] for i in range(6)]
    expected = [out.sequences for out in plain.stream(prompts, max_batch=2)]
    for out, other, tokens in zip(
        sampler.stream(prompts, max_batch=2), sampler.stream(prompts, max_batch=2), expected, strict=True
    ):
        assert torch.equal(out.sequences, tokens)
        assert torch.equal(other.sequences, tokens)


def test_parts_of_ones_own_that_remember_are_found_out(denoiser):
    class Forgetful(QuotaSelection):
        def __call__(self, proposal):
            slots = proposal.slots
            slots.memory["times"] = slots.kept("times", torch.zeros_like(slots.quota)) + 1
            return super().__call__(proposal)

    sampler = make(denoiser, "parallel_forced").set(committer=MicroConfidenceCommitter(selection=Forgetful()))
    with pytest.raises(NapDecodeError, match="keeps things from step to step"):
        captured(sampler)(PROMPTS)


def test_on_the_cpu(denoiser):
    with pytest.raises(NapDecodeError, match="needs a model on a CUDA device, but it is on cpu"):
        Sampler(denoiser, decoder=make(denoiser, "parallel_forced").decoder, compile="graphs")


@pytest.mark.parametrize("compile", ["all", 1.5, None, "Kernels"])
def test_unknown_modes(denoiser, compile):
    with pytest.raises(NapDecodeError, match="compile must be"):
        Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(steps=2)), compile=compile)


def test_the_mask_is_never_left(denoiser):
    sampler = captured(make(denoiser, "llada_low_confidence"))
    assert not (sampler(PROMPTS, seed=1).sequences == MASK).any()
