from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from models import LLaDALike

from nap_decode import (
    AnyOrderScheduler,
    Decoder,
    Denoiser,
    ModelFamily,
    NapDecodeError,
    Sampler,
    register_family,
)
from nap_decode.model.families import _FAMILIES, find_family, find_mask
from nap_decode.model.probe import Probe


def config(model_type, **options):
    return SimpleNamespace(model_type=model_type, **options)


RELEASED = {
    "llada": {"vocab_size": 126464},
    "llada_moe": {"vocab_size": 157184},
    "lladamoe": {"vocab_size": 157184},
    "illada": {"vocab_size": 155136},
    "llama": {"vocab_size": 155136, "architectures": ["StableDiffcoderForCausalLM"]},
    "llada2_moe": {"vocab_size": 157184},
    "Dream": {"vocab_size": 152064},
    "sdar": {"vocab_size": 151936},
    "Fast_dLLM_Qwen": {"vocab_size": 152064},
    "mdlm": {"vocab_size": 50258},
}
"""What the configs of released checkpoints say."""


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llada", {}, {"name": "LLaDA", "mask_token_id": 126336, "attention": "2d", "shift": False}),
        ("llada", {"num_experts": 64, "vocab_size": 157184}, {"name": "LLaDA-MoE", "mask_token_id": 156895}),
        ("lladamoe", {"num_experts": 64}, {"name": "LLaDA-MoE", "mask_token_id": 156895}),
        ("illada", {}, {"name": "iLLaDA", "mask_token_id": 5, "attention": "2d", "block_size": None}),
        ("llama", {}, {"name": "Stable-DiffCoder", "mask_token_id": 5, "attention": "additive", "block_size": 4,
                       "shift": False}),
        ("llama", {"architectures": ["LlamaForCausalLM"]}, {"name": "llama", "mask_token_id": None}),
        ("llada2_moe", {}, {"name": "LLaDA2", "mask_token_id": 156895, "attention": "additive", "block_size": 32,
                            "refusal": None}),
        ("llada21_moe", {}, {"name": "LLaDA2.1", "attention": "additive", "block_size": 32}),
        ("sdar", {}, {"name": "SDAR", "mask_token_id": 151669, "attention": "4d", "block_size": 4, "shift": False}),
        ("sdar_moe", {"block_size": 32}, {"name": "SDAR", "block_size": 32}),
        ("Dream", {}, {"name": "Dream", "mask_token_id": 151666, "attention": "4d", "shift": True}),
        ("Fast_dLLM_Qwen", {"bd_size": 16}, {"name": "Fast-dLLM v2", "mask_token_id": 151665, "block_size": 16,
                                             "shift": True, "attention": "none"}),
        ("mdlm", {"time_conditioning": False}, {"name": "MDLM", "mask_token_id": 50257, "attention": "none",
                                                "refusal": None}),
        ("a2d-qwen3", {}, {"name": "A2D", "shift": False, "mask_token_id": None}),
        ("a2d-llama", {"right_shift_logits": True}, {"name": "A2D", "shift": True}),
        ("Dream", {"right_shift_logits": False}, {"name": "Dream", "shift": False}),
        ("bert", {}, {"name": "bert", "attention": "2d", "shift": False, "mask_token_id": None}),
        ("gpt", {"block_size": 1024}, {"name": "gpt", "block_size": None, "refusal": None}),  # a context length
    ],
)  # fmt: skip
def test_what_is_known(model_type, options, expected):
    family = find_family(config(model_type, **RELEASED.get(model_type, {}) | options))
    assert {name: getattr(family, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("diffusion_gemma", {}, "uniform-diffusion"),
        ("mdlm", {"time_conditioning": True}, "conditioned on time"),
        ("nemotron_labs_diffusion", {"block_size": 32}, "text before a block see the past only"),
        ("llada2_moe", {"delete_token_id": 1, "split_token_id": 2}, "delete and insert tokens"),
        ("Dream", {"block_size": 32}, r"its config has block_size=32, but .* block_size=32, shift=True\)"),
        ("llada", {"bd_size": 8}, r"its config has bd_size=8, but .* block_size=8, shift=False\)"),
    ],
)
def test_what_is_refused(model_type, options, reason):
    model = LLaDALike(model_type, **options)
    with pytest.raises(NapDecodeError, match=f"cannot be decoded here: .*{reason}"):
        Denoiser(model, mask_token_id=1)
    mine = ModelFamily(name="mine", attention="none")
    assert Denoiser(model, mask_token_id=1, family=mine).family is mine  # who knows better says so


ARCHITECTURE = "StableDiffcoderForCausalLM"  # the only one that is known by its class, not by its type
KNOWN = [
    ("llama", family, [name]) if name == ARCHITECTURE else (name, family, None) for name, family in _FAMILIES.items()
]


@pytest.mark.parametrize("said", [{}, {"mask_token_id": None}, {"vocab_size": None}])
@pytest.mark.parametrize(("model_type", "family", "architectures"), KNOWN, ids=[f"{k[0]}-{k[1].name}" for k in KNOWN])
def test_the_mask_of_another_vocabulary_is_not_known(model_type, family, architectures, said):
    some = {"architectures": architectures}
    assert (family.mask_token_id is None) == (not family.vocab_sizes)
    for size in family.vocab_sizes:
        assert find_family(config(model_type, vocab_size=size, **some)).mask_token_id == family.mask_token_id
        # There is such an id, and it may be any token.
        other = config(model_type, **{"vocab_size": size + 64} | some | said)
        assert find_family(other) == _without_mask(family)
        assert find_mask(other) is None


def _without_mask(family):
    return ModelFamily(**{**vars(family), "mask_token_id": None})


@pytest.mark.parametrize("model_type", ["llada", "Dream", "illada", "mdlm"])
def test_a_mask_that_is_not_known_is_asked_for(model_type):
    with pytest.raises(NapDecodeError, match=r"no mask token is known: .*pass mask_token_id="):
        Denoiser(LLaDALike(model_type))
    assert Denoiser(LLaDALike(model_type, mask_token_id=3)).mask_token_id == 3
    assert Denoiser(LLaDALike(model_type), mask_token_id=3).mask_token_id == 3


def test_a_mask_that_a_class_fills_in_is_none():
    assert find_mask(config("llada", mask_token_id=50256)) is None
    assert find_mask(config("llada", mask_token_id=126336)) == 126336
    assert find_mask(config("other", mask_token_id=50256)) == 50256
    assert find_mask(config("other")) is None
    with pytest.raises(NapDecodeError, match="no mask token is known"):
        Denoiser(LLaDALike("llada", mask_token_id=50256))


def test_blocks_need_a_mask_with_a_row_for_every_query():
    with pytest.raises(NapDecodeError, match=r"block_size=4 needs a mask with a row for every query; a 2-D one"):
        ModelFamily(name="x", block_size=4)
    with pytest.raises(NapDecodeError, match="block_size must be a whole number of at least 1, but is 0"):
        ModelFamily(name="x", attention="4d", block_size=0)


def test_families_can_be_registered_once():
    assert not find_family(None).shift
    mine = ModelFamily(name="mine", shift=True, mask_token_id=3)
    register_family("a_test_model", mine)
    register_family("a_test_model", mine)
    with pytest.raises(NapDecodeError, match="a family is registered for model type 'a_test_model' already"):
        register_family("a_test_model", ModelFamily(name="other"))
    # What its owner says holds for any vocabulary, and a block size may mean the context length.
    assert find_family(config("a_test_model", vocab_size=24, block_size=64)) is mine


ESMC = getattr(transformers, "EsmcForMaskedLM", None)


@pytest.mark.skipif(ESMC is None, reason="transformers has ESM-C since 5.24")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_esm_c_needs_nothing_said(attention):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ESMC(transformers.EsmcConfig(**sizes, attn_implementation=attention)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    sampler = Sampler(model, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
    assert sampler.denoiser.mask_token_id == 32
    assert sampler.denoiser.probe() == Probe(sees_future=True, hides_padding=True, shift=None)
    prompts, new = [[0, 5, 6, 7, 8], [0, 9]], 4
    found = sampler(prompts, max_new_tokens=new).sequences.tolist()
    for prompt, row in zip(prompts, found, strict=True):
        expected = prompt + [32] * new
        while 32 in expected:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([expected])).logits[0]
            logits[:, 32] = -torch.inf
            sure, token = logits.softmax(1).max(1)
            best = int(sure.where(torch.tensor(expected) == 32, -1).argmax())
            expected[best] = int(token[best])
        assert row[: len(expected)] == expected
