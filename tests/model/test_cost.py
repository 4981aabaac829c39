"""Floating-point operations, counted by hand."""

from __future__ import annotations

import pytest
import torch
from models import MASK, VOCABULARY, Words, tiny_model
from samplers import PROMPTS, TEMPLATE
from transformers import BertConfig, BertForMaskedLM

from nap_decode import AnyOrderScheduler, CommittedReuse, Decoder, Denoiser, NapDecodeError, Sampler
from nap_decode.model.call import Cost, ModelCall

HIDDEN, INNER, LAYERS, LENGTH = 16, 24, 2, 21  # of the tiny model, and of a row with its first prompt


def decode(model, reuse=None, **options):
    denoiser = Denoiser(model, Words(), reuse=reuse, mask_token_id=MASK, **options)
    return Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=3)), template=TEMPLATE)([PROMPTS[0]])


def test_a_decoder_by_hand(tiny):
    position = 2 * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # projections; gate, up and down
    pair = 4 * LAYERS * HIDDEN  # a score, and a weighted value
    out = decode(tiny, CommittedReuse())
    assert out.flops() == [out.positions_forwarded[0] * (position + pair * LENGTH)]
    assert out.flops(exact=True) == [out.forward_passes * LENGTH * (position + pair * LENGTH)]
    assert out.flops()[0] < 0.8 * out.flops(exact=True)[0]
    assert decode(tiny).flops() == out.flops(exact=True)
    assert decode(tiny, cfg_scale=1.0).flops() == [2 * flops for flops in out.flops(exact=True)]


def test_it_is_what_the_modules_do(tiny):
    """Against torch's own counter, which sees the products of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(attn_implementation="eager")  # the counter does not know every fused attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.full((1, 10), MASK), use_cache=False)
    cost = Denoiser(model, mask_token_id=MASK).cost
    # In some releases the angles of rotary positions are a product, too.
    assert counter.get_total_flops() == pytest.approx(cost.flops(10, 10), rel=1e-3)


def test_an_encoder_by_hand():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=INNER,
    )
    model = BertForMaskedLM(config).eval()
    transform = 2 * HIDDEN * HIDDEN  # stands before the output layer, and is of the body
    expected = 2 * LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER) + transform
    assert Cost.of(ModelCall(model, None)) == Cost(expected, 4 * LAYERS * HIDDEN)


def test_of_experts_those_that_are_asked_count():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))
    attention, router, expert = 4 * HIDDEN * HIDDEN, 4 * HIDDEN, 3 * HIDDEN * INNER
    found = Cost.of(ModelCall(model, None))
    assert found == Cost(2 * LAYERS * (attention + router + 2 * expert), 4 * LAYERS * HIDDEN)


def test_of_a_function_nothing_is_known():
    def uniform(ids, mask):
        return torch.zeros(*ids.shape, VOCABULARY)

    with pytest.raises(NapDecodeError, match="what this model's passes cost is not known"):
        decode(uniform).flops()
