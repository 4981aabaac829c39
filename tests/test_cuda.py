"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from models import Words, tiny_model
from samplers import NAMES, PROMPTS, TEMPLATE, make

from nap_decode import Denoiser, MicroConfidenceCommitter, Sampler
from nap_decode.base.random import row_seeds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(tiny_model().cuda(), Words())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[0]] * 3], ids=["ragged", "one", "equal"])
def test_the_fixed_step_loop_never_waits(denoiser, prompts, temperature):
    sampler = make(denoiser, "parallel_forced").set(committer=MicroConfidenceCommitter(temperature=temperature))
    sampler(prompts)  # the model is probed, and constants are brought to the device
    canvas = sampler.canvas([list(prompt) for prompt in prompts])
    denoiser.check(canvas)
    loop = sampler.loop()
    batch = loop.start(canvas, seeds=row_seeds(0, range(len(prompts))))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        while batch.is_busy:
            batch = loop.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_decoders_decode_as_on_the_cpu(denoiser, name):
    on_cpu = make(Denoiser(tiny_model(), Words()), name)
    out, expected = make(denoiser, name)(PROMPTS, seed=1), on_cpu(PROMPTS, seed=1)
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert torch.equal(out.trace.step, expected.trace.step)


@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_decode_the_same(denoiser, name):
    plain = make(denoiser, name)
    if plain.decoder.needs.memory:
        pytest.skip("keeps things from step to step")
    graphs = Sampler(denoiser, decoder=plain.decoder, template=TEMPLATE, compile="graphs")
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
        out, expected = graphs(prompts, seed=1), plain(prompts, seed=1)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.trace.step, expected.trace.step)
    prompts = [*PROMPTS, [9, 5, 9, 5, 9, 5, 9], [10], PROMPTS[0]]
    for out, expected in zip(graphs.stream(prompts, max_batch=2), plain.stream(prompts, max_batch=2), strict=True):
        assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("mode", ["kernels", True])
def test_compiled_kernels_decode_the_same(denoiser, mode):
    plain = make(denoiser, "parallel_forced", tokens_per_step=2)
    compiled = Sampler(denoiser, decoder=plain.decoder, template=TEMPLATE, compile=mode)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert torch.equal(compiled(prompts).sequences, plain(prompts).sequences)
