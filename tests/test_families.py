from __future__ import annotations

from types import SimpleNamespace

import pytest

from nap_decode import ModelFamily, NapDecodeError, register_family
from nap_decode.families import find_family


def test_known_families():
    class Config:
        model_type = "Dream"

    assert find_family(Config()).shift
    assert find_family(Config()).mask_token_id == 151666
    Config.model_type = "diffusion_gemma"
    assert "uniform-diffusion" in find_family(Config()).refusal
    Config.model_type = "bert"
    assert find_family(Config()) == ModelFamily(name="bert")


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llada", {}, {"name": "LLaDA", "mask_token_id": 126336, "attention": "2d", "shift": False}),
        ("llada", {"num_experts": 64}, {"name": "LLaDA-MoE", "mask_token_id": 156895}),
        ("lladamoe", {"num_experts": 64}, {"name": "LLaDA-MoE", "mask_token_id": 156895}),
        ("llada2_moe", {}, {"name": "LLaDA2", "mask_token_id": 156895, "attention": "additive", "block_size": 32}),
        ("llada21_moe", {}, {"name": "LLaDA2.1", "attention": "additive", "block_size": 32}),
        ("sdar", {}, {"name": "SDAR", "mask_token_id": 151669, "attention": "4d", "block_size": 4, "shift": False}),
        ("sdar_moe", {"block_size": 32}, {"name": "SDAR", "block_size": 32}),
        ("Fast_dLLM_Qwen", {"bd_size": 16}, {"name": "Fast-dLLM v2", "mask_token_id": 151665, "block_size": 16,
                                             "shift": True, "attention": "none"}),
        ("mdlm", {"time_conditioning": False}, {"name": "MDLM", "mask_token_id": 50257, "attention": "none",
                                                "refusal": None}),
        ("a2d-qwen3", {}, {"name": "A2D", "shift": False, "mask_token_id": None}),
        ("a2d-llama", {"right_shift_logits": True}, {"name": "A2D", "shift": True}),
        ("Dream", {"right_shift_logits": False}, {"name": "Dream", "shift": False}),
        ("gpt", {"block_size": 1024}, {"name": "gpt", "block_size": None}),  # a context length
    ],
)  # fmt: skip
def test_what_is_known(model_type, options, expected):
    family = find_family(SimpleNamespace(model_type=model_type, **options))
    assert {name: getattr(family, name) for name in expected} == expected


def test_time_conditioning_is_refused():
    config = SimpleNamespace(model_type="mdlm", time_conditioning=True)
    assert "conditioned on time" in find_family(config).refusal


def test_blocks_need_a_mask_with_a_row_for_every_query():
    with pytest.raises(NapDecodeError, match=r"block_size=4 needs a mask with a row for every query; a 2-D one"):
        ModelFamily(name="x", block_size=4)
    with pytest.raises(NapDecodeError, match="block_size must be a whole number of at least 1, but is 0"):
        ModelFamily(name="x", attention="4d", block_size=0)


def test_families_can_be_registered_once():
    assert not find_family(None).shift
    mine = ModelFamily(name="mine", shift=True)
    register_family("a_test_model", mine)
    register_family("a_test_model", mine)
    with pytest.raises(NapDecodeError, match="a family is registered for model type 'a_test_model' already"):
        register_family("a_test_model", ModelFamily(name="other"))

    class Config:
        model_type = "a_test_model"

    assert find_family(Config()) is mine
