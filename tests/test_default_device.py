"""What belongs on the host stays there, whatever torch's default device is.

``torch.set_default_device("cuda")`` is common in notebooks; "meta" stands for it, whose tensors cannot be mixed with
others, nor be looked at.
"""

from __future__ import annotations

import pytest
import torch
from models import MASK
from samplers import HOLES, OPTIONS, PROMPTS, TEMPLATE
from transformers import BertConfig, BertForMaskedLM

from nap_decode import (
    ARnessMeter,
    Denoiser,
    PromptReuse,
    chain_log_likelihood,
    log_likelihood_bound,
    presets,
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


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets(model, name):
    def decode():
        sampler = presets.PRESETS[name](model, mask_token_id=MASK, template=TEMPLATE, **OPTIONS[name])
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
        return presets.llada_random(model, mask_token_id=MASK, template=TEMPLATE, temperature=1.0)(PROMPTS).sequences

    assert torch.equal(*both(decode))


@pytest.mark.parametrize("options", [{"cfg_scale": 0.5}, {"reuse": PromptReuse()}], ids=str)
def test_what_a_denoiser_can_do_besides(model, options):
    def decode():
        denoiser = Denoiser(model, mask_token_id=MASK, **options)
        sampler = presets.parallel_forced(denoiser, template=TEMPLATE).replace(close_on="end")
        return sampler(PROMPTS).sequences

    assert torch.equal(*both(decode))


def test_likelihoods(model):
    def score():
        texts = Denoiser(model, mask_token_id=MASK), PROMPTS, [[9, 8], [4, 5, 6, 7], [9] * 9]
        return chain_log_likelihood(*texts).value, log_likelihood_bound(*texts, samples=16).value

    for plain, other in zip(*both(score), strict=True):
        assert torch.equal(plain, other)
