from __future__ import annotations

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
