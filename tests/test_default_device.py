"""What belongs on the host stays there, whatever torch's default device is.

``torch.set_default_device("cuda")`` is common in notebooks; "meta" stands for it, whose tensors cannot be mixed with
others, nor be looked at.
"""

from __future__ import annotations

import pytest
import torch
from models import MASK
from samplers import HOLES, NAMES, PROMPTS, TEMPLATE, make
from transformers import BertConfig, BertForMaskedLM

from nap_decode import (
    ARnessMeter,
    Denoiser,
    ParallelForcedSampler,
    PromptReuse,
    Sampler,
    chain_log_likelihood,
    decoders,
    demo,
    log_likelihood_bound,
)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=24, max_position_embeddings=64, initializer_range=0.6, eos_token_id=2, **sizes)
        return BertForMaskedLM(config).double().eval()


def both(function):
    """What it returns, with the host as default device and with another."""
    plain = function()
    with torch.device("meta"):
        return plain, function()


@pytest.mark.parametrize("name", NAMES)
def test_decoders(model, name):
    def decode():
        sampler = make(Denoiser(model, mask_token_id=MASK), name)
        outs = [
            sampler(PROMPTS, seed=1),
            *sampler.stream(PROMPTS[:2], max_batch=1, seed=2),
            sampler.infill(HOLES, seed=3),
        ]
        meter = ARnessMeter()
        meter.update(outs[0].trace)
        ids = sampler.generate(torch.tensor([[5, 6]], device="cpu"), max_new_tokens=6, row_seeds=[7])
        return [ids, *(out.sequences for out in outs)], outs[0].tokens_per_forward, meter.compute()

    (plain, cost, order), (other, other_cost, other_order) = both(decode)
    assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))
    assert (cost, repr(order)) == (other_cost, repr(other_order))


def test_seeds_come_from_the_global_generator_of_the_host(model):
    def decode():
        torch.manual_seed(5)
        decoder = decoders.llada_random().set(temperature=1.0)
        return Sampler(model, mask_token_id=MASK, decoder=decoder, template=TEMPLATE)(PROMPTS).sequences

    assert torch.equal(*both(decode))


@pytest.mark.parametrize("options", [{"cfg_scale": 0.5}, {"reuse": PromptReuse()}], ids=str)
def test_what_a_denoiser_can_do_besides(model, options):
    def decode():
        denoiser = Denoiser(model, mask_token_id=MASK, **options)
        decoder = decoders.parallel_forced().set(close_on="end")
        sampler = Sampler(denoiser, decoder=decoder, template=TEMPLATE)
        return sampler(PROMPTS).sequences

    assert torch.equal(*both(decode))


def test_texts_of_outputs():
    sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)

    def texts():
        outs = [sampler("1 2 3 4 5 6 7 0 1 2 3 4 ="), sampler.infill("6 0 6 <mask> =")]
        return [out.text for out in outs], outs[0].summary, outs[0].paths

    plain, other = both(texts)
    assert plain == other
    assert plain[1]


def test_likelihoods(model):
    def score():
        texts = Denoiser(model, mask_token_id=MASK), PROMPTS, [[9, 8], [4, 5, 6, 7], [9] * 9]
        return chain_log_likelihood(*texts).value, log_likelihood_bound(*texts, samples=16).value

    for plain, other in zip(*both(score), strict=True):
        assert torch.equal(plain, other)
