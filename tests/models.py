"""Small models and stand-ins for the tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
needs_transformers_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="encoders of transformers 4 take no mask with a row for every query"
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
    """A Llama with random weights, in float64, that attends both ways, also where a release does not read that.

    So it can be called by a reference; :func:`untold_model` is as the release makes it.
    """
    model = untold_model(**options)
    if not READS_IS_CAUSAL and model.config.is_causal is False:
        model.register_forward_pre_hook(_tell, with_kwargs=True)
    return model


def _tell(module, args, kwargs):
    """Make a flat mask, or none, one that lets every position see both ways."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else kwargs.get("inputs_embeds", args[0] if args else None)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim > 2:
        return None
    there = torch.ones(ids.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    seen = there[:, None, None].expand(-1, -1, ids.shape[1], -1)
    dtype = module.dtype
    told = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return args, {**kwargs, "attention_mask": told}


def untold_model(**options) -> transformers.PreTrainedModel:
    """The same as the installed release makes it, which may look back only unless a mask says otherwise."""
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
        model = LlamaForCausalLM(LlamaConfig(**{"is_causal": False, "bos_token_id": None} | options))
        return model.to(torch.float64).eval()


def _reads_is_causal() -> bool:
    model = untold_model()
    rows = torch.tensor([[MASK, 5], [MASK, 6]])
    one, other = model(input_ids=rows).logits[:, 0]
    return not torch.equal(one, other)


READS_IS_CAUSAL = _reads_is_causal()
needs_is_causal = pytest.mark.skipif(
    not READS_IS_CAUSAL, reason="decoders of this release attend both ways only if a mask says so"
)


class TableModel:
    """Logits that are an arbitrary function of the whole row: a table with an entry for every row of ids."""

    def __init__(self, vocabulary: int, length: int, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary**length, length, vocabulary)
        self.table = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.base = vocabulary ** torch.arange(length)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[(input_ids * self.base).sum(1)]


class StandIn(nn.Module):
    """A small bidirectional transformer in float64; subclasses take their input as remote code does.

    Tokens, positions and who sees whom are given explicitly, so that a subclass is its calling convention.
    """

    def __init__(
        self, model_type: str, vocabulary: int = VOCABULARY, width: int = 16, layers: int = 2, **options
    ) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(vocab_size=vocabulary, **options)
        self.config.model_type = model_type
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(80, width)
        self.layers = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)
        self.double().eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.5, generator=generator)

    def run(self, input_ids: Tensor, position_ids: Tensor | None, seen: Tensor | None) -> SimpleNamespace:
        """Of ``seen`` ``(B, 1, L, L)``, true or 0.0 means visible; None: all see all."""
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x = self.embed(input_ids) + self.place(places)
        for layer in self.layers:
            q, k, v = layer(x)[:, None].chunk(3, dim=-1)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0].tanh()
        return SimpleNamespace(logits=self.head(x))


class Remote(StandIn):
    """What most remote code looks like; a StandIn with embeddings and an output layer to be found."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class DreamLike(Remote):
    def forward(self, input_ids, attention_mask=None, position_ids=None, num_logits_to_keep=0):
        assert num_logits_to_keep == 0
        assert attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.ndim == 4)
        return self.run(input_ids, position_ids, attention_mask)


class LLaDALike(Remote):
    """One of those versions that do not look at their attention mask."""

    def forward(self, input_ids, attention_mask=None, attention_bias=None, use_cache=None):
        assert not use_cache
        return self.run(input_ids, None, attention_bias)


class BlockLike(Remote):
    """LLaDA2: a 4-D additive mask, and causal without one."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        length = input_ids.shape[1]
        if attention_mask is None:
            return self.run(input_ids, position_ids, torch.ones(length, length, dtype=torch.bool).tril())
        assert attention_mask.dtype == torch.float64
        assert attention_mask.shape == (len(input_ids), 1, length, length)
        return self.run(input_ids, position_ids, attention_mask)


class OwnBlocks(Remote):
    """Fast-dLLM v2: makes its block-causal mask itself, and would not look at another."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, block_size=32):
        assert attention_mask is None  # a waste
        return self.run(input_ids, position_ids, blocks(input_ids.shape[1], block_size))


class MDLMLike(StandIn):
    """A bare tensor, times that it wants and does not use, and no way to ask for its parts."""

    def get_input_embeddings(self):
        raise NotImplementedError

    def forward(self, input_ids, timesteps=None, return_dict=None):
        assert timesteps.shape == input_ids.shape[:1]
        return self.run(input_ids, None, None).logits


class Repeater(StandIn):
    """Has learned to repeat what stood three places before; with ``shift``, one place early."""

    def __init__(self, model_type: str, shift: bool, **options) -> None:
        super().__init__(model_type, **options)
        self.shift = shift
        self.calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        back = 2 if self.shift else 3
        before = torch.cat([input_ids[:, :back], input_ids[:, :-back]], dim=1)
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        logits = self.run(input_ids, None, seen).logits
        return SimpleNamespace(logits=logits + 99.0 * nn.functional.one_hot(before, logits.shape[-1]))


def blocks(length: int, size: int) -> Tensor:
    """A block-causal mask, entry by entry."""
    return torch.tensor([[key // size <= query // size for key in range(length)] for query in range(length)])


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "initializer_range": 0.6,
}
MASKED = {
    "Bert": {},
    "Roberta": {},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4,
                   "bos_token_id": 3, "eos_token_id": 4},
    "EuroBert": {"num_key_value_heads": 2, "bos_token_id": 3, "eos_token_id": 4, "mask_token_id": MASK},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": MASK},
    "Electra": {"embedding_size": 16},
}  # fmt: skip
DECODERS = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {"head_dim": 8}}


def build(name, **options):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = "ForMaskedLM" if name in MASKED else "ForCausalLM"
    options = SMALL | (MASKED.get(name) or DECODERS.get(name, {})) | options
    if name in DECODERS:
        options |= {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2, "is_causal": False}
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name + kind)(config).double().eval()
