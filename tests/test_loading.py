from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from nap_decode.loading import auto_class


@pytest.mark.parametrize(
    ("architecture", "remote", "expected"),
    [
        ("BertForMaskedLM", (), "AutoModelForMaskedLM"),
        ("LlamaForCausalLM", (), "AutoModelForCausalLM"),
        ("LLaDAModelLM", ("AutoModel", "AutoModelForCausalLM"), "AutoModelForCausalLM"),
        ("DreamModel", ("AutoModel",), "AutoModel"),
        ("MDLM", ("AutoModelForMaskedLM",), "AutoModelForMaskedLM"),
        ("A2DQwen3LMHeadModel", ("AutoModelForMaskedLM",), "AutoModelForMaskedLM"),
        ("Lfm2BidirectionalForMaskedLM", ("AutoModel", "AutoModelForMaskedLM"), "AutoModelForMaskedLM"),
    ],
)
def test_a_checkpoint_says_with_what_to_load_it(architecture, remote, expected):
    config = SimpleNamespace(
        architectures=[architecture], auto_map={"AutoConfig": "x.X"} | dict.fromkeys(remote, "x.X")
    )
    assert auto_class(config) is getattr(transformers, expected)
