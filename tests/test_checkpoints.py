from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nap_decode import NapDecodeError
from nap_decode.checkpoints import auto_class, load_all, load_checkpoint

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig, {}),
    "roberta": (RobertaForMaskedLM, RobertaConfig, {}),
    "albert": (AlbertForMaskedLM, AlbertConfig, {"embedding_size": 8}),
    "esm": (EsmForMaskedLM, EsmConfig, {"pad_token_id": 0, "mask_token_id": 1}),
    "rotary esm": (EsmForMaskedLM, EsmConfig, {"pad_token_id": 0, "position_embedding_type": "rotary"}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "tied llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A checkpoint, and its tensors."""
    kind, config, options = MODELS[request.param]
    kind(config(**SMALL, **options)).save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)


def write(path, tensors):
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_whole_checkpoint_is_loaded(folder):
    path, tensors = folder
    before = transformers.PreTrainedModel.__dict__["from_pretrained"]
    model, _ = load_checkpoint(path)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in own.keys() & tensors.keys())
    assert not model.training
    assert next(load_checkpoint(path, dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is before


def test_weights_that_nobody_uses_may_be_there(folder):
    path, tensors = folder
    write(path, tensors | {"a_head_of_training.weight": torch.zeros(2)})
    load_checkpoint(path)


def test_each_weight_that_is_missing_is_named(folder):
    path, tensors = folder
    model, _ = load_checkpoint(path)
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & tensors.keys():  # some releases write others under names of long ago
        write(path, {other: tensor for other, tensor in tensors.items() if other != name})
        with pytest.raises(NapDecodeError, match=r"1 weights .* not in the checkpoint .*would be random") as raised:
            load_checkpoint(path)
        assert name in str(raised.value)


def test_what_is_computed_may_be_missing(tmp_path):
    EsmForMaskedLM(EsmConfig(**SMALL, pad_token_id=0, position_embedding_type="rotary")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole, ids = load_checkpoint(tmp_path)[0], torch.tensor([[5, 6, 7]])
    kept = {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}
    assert len(kept) < len(tensors)
    write(tmp_path, kept)
    torch.testing.assert_close(load_checkpoint(tmp_path)[0](ids).logits, whole(ids).logits)


def test_a_renamed_weight_is_named(folder):
    path, tensors = folder
    name = max(tensors)
    write(path, {("another." + n if n == name else n): tensor for n, tensor in tensors.items()})
    with pytest.raises(NapDecodeError, match=f"which has 1 others, such as another.{name}: {name}"):
        load_checkpoint(path)


def test_weights_of_another_shape_are_named(folder):
    path, tensors = folder
    name = next(n for n in tensors if n.endswith("dense.weight") or n.endswith("up_proj.weight"))
    write(path, tensors | {name: torch.zeros(3, 5)})
    with pytest.raises(NapDecodeError, match=rf"1 weights .* other shapes than its config says: {name};"):
        load_checkpoint(path)


def test_other_failures_are_what_they_are(folder):
    path, _ = folder
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_checkpoint(path)


class Own(BertForMaskedLM):
    """As the published code of Dream: it uses what is loaded, which is no pair of a model and a report then."""

    @classmethod
    def from_pretrained(cls, *args, **options):
        model = super().from_pretrained(*args, **options)
        model.is_own = not isinstance(model, tuple)
        return model


def test_a_model_that_loads_itself_cannot_be_asked(tmp_path):
    Own(BertConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Own loads itself, so that it cannot be seen whether"):
        model = load_all(Own, tmp_path)
    assert model.is_own


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
