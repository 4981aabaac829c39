"""Threads that share a model, as web handlers and ``asyncio.to_thread`` do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import MASK, Words, build, needs_transformers_5, tiny_model
from samplers import NAMES, make

from nap_decode import (
    AnyOrderScheduler,
    BlockReuse,
    Canvas,
    CommittedReuse,
    Decoder,
    Denoiser,
    DriftReuse,
    Sampler,
)
from nap_decode.measure import likelihood

PROMPTS = [[5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]  # shapes that coincide, and one that does not


@torch.no_grad()
@pytest.mark.parametrize("is_inside", [True, False], ids=["while another thread calls the model", "alone"])
def test_the_output_layer_is_applied_later_whatever_others_do_meanwhile(is_inside):
    """One thread stands still inside its call, with its hooks on the model, and another one looks at its logits."""
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    one = Canvas.from_infill([[5, MASK, 6, MASK]], mask_token_id=MASK)
    other = Canvas.from_infill([[MASK, 7, MASK, MASK, MASK]], mask_token_id=MASK)  # as many masks as one has columns
    wanted = torch.tensor([[0, 2, 3, 4]])

    def of_other():
        return denoiser.predict(other.rows, other.tokens, wanted, torch.arange(4))

    expected = denoiser(one.tokens, torch.tensor([[1, 3]]), one), of_other().logits.clone()
    later = of_other()  # whose output layer is still to be applied
    inside, go, got = threading.Event(), threading.Event(), []
    if not is_inside:
        go.set()

    def stand_still(*_):
        inside.set()
        assert go.wait(20)

    model.model.register_forward_pre_hook(stand_still)
    thread = threading.Thread(target=lambda: got.append(denoiser(one.tokens, torch.tensor([[1, 3]]), one)))
    thread.start()
    assert inside.wait(20)
    chunks = [(part, logits.clone()) for part, logits in later.chunks()]
    go.set()
    thread.join()
    assert torch.equal(torch.cat([logits for _, logits in chunks]), expected[1][0])
    assert torch.equal(got[0], expected[0])


def same_in_threads(call, *, threads=4, times=3):
    """Calls with several inputs give in threads what they give one after the other."""
    expected = [call(n) for n in range(threads)]
    start = threading.Barrier(threads)

    def repeatedly(n):
        torch.set_num_threads(1)
        start.wait()
        with torch.no_grad():
            return [call(n) for _ in range(times)]

    with ThreadPoolExecutor(threads) as pool:
        for n, found in enumerate(pool.map(repeatedly, range(threads))):
            assert found == [expected[n]] * times


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder(tiny, name):
    denoiser = Denoiser(tiny, Words())
    samplers = [make(denoiser, name) for _ in range(2)]  # some threads share a sampler, all share the model

    def call(n):
        out = samplers[n % 2](PROMPTS[n % 3 :][:2], seed=n)
        return out.sequences.tolist(), out.trace.step.tolist(), out.forward_passes

    same_in_threads(call, times=2)


@pytest.mark.parametrize("reuse", [CommittedReuse(), DriftReuse(), BlockReuse()])
@pytest.mark.parametrize("name", ["Llama", pytest.param("Bert", marks=needs_transformers_5)])
def test_reuse(name, reuse):
    model = build(name)
    plain = Sampler(Denoiser(model, Words()), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    reusing = Sampler(Denoiser(model, Words(), reuse=reuse), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))

    def call(n):
        sampler = plain if n == 3 else reusing
        return sampler(PROMPTS[n % 3 :][:2], max_new_tokens=6).sequences.tolist()

    same_in_threads(call)


def test_likelihoods_and_the_model_itself(tiny):
    denoiser = Denoiser(tiny, Words())
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))

    def call(n):
        if n == 0:
            return sampler(PROMPTS, max_new_tokens=4).sequences.tolist()
        if n == 1:
            return tiny(input_ids=torch.tensor([[5, MASK, 6, MASK]])).logits.tolist()
        score = likelihood.chain_log_likelihood if n == 2 else likelihood.log_likelihood_bound
        return score(denoiser, PROMPTS, [[7, 8, 9]] * 3).value.tolist()

    same_in_threads(call)


def test_a_model_is_not_asked_again_because_another_thread_is_in_it():
    """Ours are on it meanwhile."""
    model = tiny_model()
    sampler, calls = Sampler(model, Words(), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1))), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    sampler([PROMPTS[0]], max_new_tokens=3)
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: sampler([PROMPTS[0]], max_new_tokens=3), range(24)))
    assert len(calls) == 24 * 3


def test_samplers_made_in_threads():
    """Whoever asks first what the model does."""
    model = tiny_model()

    def call(n):
        sampler = Sampler(model, Words(), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
        return sampler([PROMPTS[n % 3]], max_new_tokens=3).sequences.tolist()

    same_in_threads(call)
