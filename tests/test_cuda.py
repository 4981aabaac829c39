"""What must hold on a GPU: on a real one where there is one, on a device that stands in for it elsewhere."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import standin
import torch
from models import Words, tiny_model
from samplers import NAMES, PROMPTS, TEMPLATE, make
from torch import nn

from nap_decode import (
    BlockReuse,
    CanvasTemplate,
    CommittedReuse,
    Denoiser,
    DriftReuse,
    MicroConfidenceCommitter,
    PromptReuse,
    Sampler,
    chain_log_likelihood,
    log_likelihood_bound,
)
from nap_decode.base.random import row_seeds
from nap_decode.bench.observation import count_syncs

IS_REAL = torch.cuda.is_available()
WHY_NOT = None if IS_REAL else standin.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
needs_gpu = pytest.mark.skipif(not IS_REAL, reason="there is no GPU")
needs_standin = pytest.mark.skipif(IS_REAL, reason="a GPU does not say where the host waits for it")

MOST_WAITS = 2
"""Of one decode, all behind the loop: its results are brought to the host."""
LOOK = ("run/loop.py", "_look")
"""Where an adaptive decode finds out what is left."""
BATCHES = pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[0]] * 3], ids=["ragged", "one", "equal"])


@pytest.fixture(autouse=True)
def device():
    """The stand-in, open; None on a GPU."""
    if IS_REAL:
        yield None
        return
    # A parameter there is of a class of its own, as quantised ones are.
    is_plain = mock.patch("nap_decode.model.head._is_plain", lambda parameter: isinstance(parameter, nn.Parameter))
    with is_plain, standin.Device() as opened:
        yield opened


@pytest.fixture(scope="module")
def known():
    """Denoisers by device, made when they are first asked for."""
    return {}


@pytest.fixture
def denoiser(device, known):
    if "cuda" not in known:
        known["cuda"] = Denoiser(tiny_model().cuda(), Words())
    return known["cuda"]


@pytest.fixture
def on_cpu(device, known):
    if "cpu" not in known:
        known["cpu"] = Denoiser(tiny_model(), Words())
    return known["cpu"]


def must_be_equal(out, expected):
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert torch.equal(out.trace.step, expected.trace.step)
    assert out.forward_passes == expected.forward_passes


# ------------------------------------------------------------------------------------------ as on the CPU


@pytest.mark.parametrize("name", NAMES)
def test_decoders_decode_as_on_the_cpu(denoiser, on_cpu, name):
    there, here = make(denoiser, name), make(on_cpu, name)
    must_be_equal(there(PROMPTS, seed=1), here(PROMPTS, seed=1))
    prompts = [*PROMPTS, [10]]
    for out, expected in zip(
        there.stream(prompts, max_batch=2, seed=1), here.stream(prompts, max_batch=2, seed=1), strict=True
    ):
        must_be_equal(out, expected)


def test_ends_are_found_as_on_the_cpu(denoiser, on_cpu):
    samplers = [make(each, "parallel_forced", close_on=(5, 9)) for each in (denoiser, on_cpu)]
    must_be_equal(*(sampler(PROMPTS) for sampler in samplers))


def test_guidance_and_callbacks_work_as_on_the_cpu(denoiser, on_cpu):
    def watch(state):
        return None

    samplers = [make(each.replace(cfg_scale=1.5), "parallel_forced") for each in (denoiser, on_cpu)]
    must_be_equal(*(sampler(PROMPTS, callback=watch) for sampler in samplers))


@pytest.mark.parametrize("name", ["parallel_forced", "llada_low_confidence", "klass", "llada21_editing"])
@pytest.mark.parametrize("policy", [PromptReuse, CommittedReuse, BlockReuse, DriftReuse])
def test_reuse_decodes_as_on_the_cpu(denoiser, on_cpu, policy, name):
    there, here = (make(each.replace(reuse=policy()), name) for each in (denoiser, on_cpu))
    out, expected = there(PROMPTS, seed=1), here(PROMPTS, seed=1)
    must_be_equal(out, expected)
    assert torch.equal(out.trace.forwarded, expected.trace.forwarded)


def test_the_likelihood_is_that_of_the_cpu(denoiser, on_cpu):
    texts = [[5, 6], [7]], [[8, 9, 10, 4, 5, 6], [11]]
    for measure in (log_likelihood_bound, chain_log_likelihood):
        found, expected = measure(denoiser, *texts), measure(on_cpu, *texts)
        assert torch.allclose(found.value, expected.value)
        assert torch.allclose(found.standard_error, expected.standard_error)


# ------------------------------------------------------------------------------------------ waits


def waits_of_steps(sampler, prompts, device):
    """For each step what the host waits for; on a GPU, how often alone."""
    sampler(prompts)  # the model is probed, and constants are brought to the device
    canvas = sampler.canvas([list(prompt) for prompt in prompts])
    sampler.denoiser.check(canvas)
    loop = sampler.loop()
    batch = loop.start(canvas, seeds=row_seeds(0, range(len(prompts))))
    waits = []
    while batch.is_busy:
        if device is None:
            with count_syncs() as count:
                batch = loop.step(batch)
            waits.append([None] * count())
        else:
            device.waits.clear()
            batch = loop.step(batch)
            waits.append(list(device.waits))
    return waits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@BATCHES
def test_the_fixed_step_loop_never_waits(denoiser, device, prompts, temperature):
    sampler = make(denoiser, "parallel_forced").set(committer=MicroConfidenceCommitter(temperature=temperature))
    waits = waits_of_steps(sampler, prompts, device)
    assert len(waits) == 4
    assert waits == [[]] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_once_if_it_depends_on_what_is_left_and_never_else(denoiser, device, name):
    sampler = make(denoiser, name)
    for waits in waits_of_steps(sampler, PROMPTS, device):
        assert len(waits) == sampler.decoder.needs.adaptive, waits
        assert device is None or all(wait[:2] == LOOK for wait in waits)


@needs_standin
@pytest.mark.parametrize("name", NAMES)
def test_waits_around_the_loop_are_few_however_long_it_is(denoiser, device, name):
    counts, passes, decoder = [], [], make(denoiser, name).decoder
    for times in (1, 2):
        lengths = {"path_length": (5 * times, 4 * times), "summary_length": 3 * times}
        template = CanvasTemplate.nap(2, path_header=[(10,), (11,)], summary_header=(14,), **lengths)
        sampler = Sampler(denoiser, decoder=decoder, template=template)
        if times == 1:
            sampler(PROMPTS, seed=1)  # constants are brought to the device
        device.waits.clear()
        passes.append(sampler(PROMPTS, seed=1).forward_passes)
        counts.append(Counter("in the loop" if wait[:2] == LOOK else "around it" for wait in device.waits))
    assert counts[0]["around it"] == counts[1]["around it"] <= MOST_WAITS, device.waits
    assert passes[0] < passes[1] or sampler.decoder.scheduler.steps  # so many, however long
    if not sampler.decoder.needs.adaptive:
        assert counts[1]["in the loop"] == 0


@needs_standin
@pytest.mark.parametrize("policy", [PromptReuse, CommittedReuse, BlockReuse, DriftReuse])
def test_a_pass_that_reuses_waits_once(denoiser, device, policy):
    waits = waits_of_steps(make(denoiser.replace(reuse=policy()), "parallel_forced"), PROMPTS, device)
    assert [[wait[0] for wait in step] for step in waits] == [["speed/reuse.py"]] * 4


# ------------------------------------------------------------------------------------------ captured and compiled


@needs_gpu
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


@needs_gpu
@pytest.mark.parametrize("mode", ["kernels", True])
def test_compiled_kernels_decode_the_same(denoiser, mode):
    plain = make(denoiser, "parallel_forced", tokens_per_step=2)
    compiled = Sampler(denoiser, decoder=plain.decoder, template=TEMPLATE, compile=mode)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert torch.equal(compiled(prompts).sequences, plain(prompts).sequences)
