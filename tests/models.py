"""Small models and stand-ins for the tests."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
needs_transformers_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="native decoders attend both ways since transformers 5, the embedded model among them"
)

MASK, PAD = 1, 0
VOCABULARY = 24
"""Ids that the model has."""
KNOWN = 20
"""Ids that the tokenizer has: 0 to 19."""


class Words:
    """A tokenizer of numbers, with just what the package uses: "5 6" is the ids 5 and 6."""

    mask_token_id, pad_token_id, eos_token_id, sep_token_id = MASK, PAD, 2, None
    chat_template = "the messages, each behind a 4, and a 5"

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(KNOWN)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [MASK if word == "_" else int(word) for word in text.split()]
        return {"input_ids": [3, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if not skip_special_tokens or i > 3)

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return " ".join(f"4 {message['content']}" for message in messages) + " 5"


def tiny_model(**options) -> transformers.PreTrainedModel:
    """A bidirectional model with random weights, in float64: a Llama, or a BERT before transformers 5."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.6,  # far from uniform, so that positions depend on each other
        "pad_token_id": PAD,
        "eos_token_id": 2,
    } | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if TRANSFORMERS_5:
            model = LlamaForCausalLM(LlamaConfig(**{"is_causal": False, "bos_token_id": None} | options))
        else:
            model = transformers.BertForMaskedLM(transformers.BertConfig(**options))
        return model.to(torch.float64).eval()


class TableModel:
    """Logits that are an arbitrary function of the whole row: a table with an entry for every row of ids."""

    def __init__(self, vocabulary: int, length: int, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary**length, length, vocabulary)
        self.table = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.base = vocabulary ** torch.arange(length)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[(input_ids * self.base).sum(1)]
