"""What works with the installed transformers, family by family: ``python tests/releases.py`` prints it as JSON.

Small models with random weights, in float64, are made from transformers' own classes and decoded.  Each check gives
``"works"``, or why it is refused; what decodes wrongly, or fails with somebody else's error, raises.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor

from nap_decode import (
    Canvas,
    CanvasTemplate,
    CommittedReuse,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    NapDecodeError,
    Sampler,
    decoders,
)
from nap_decode.speed.reuse import Reuse

MASK, PAD, END = 1, 0, 2
SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,  # far from uniform, so that positions depend on each other
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": END,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 16},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "Albert": {"embedding_size": 16},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": MASK},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4},
    "EuroBert": {"num_key_value_heads": 2, "mask_token_id": MASK},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
}
FAMILIES = [*ENCODERS, *DECODERS]
ATTENTION = ["sdpa", "eager"]
COMPILED = ["Bert", "Llama"]
"""Compiling takes long, and has not much to do with families."""

NEAR = {"rtol": 0.0, "atol": 1e-5}
"""Attention takes its softmax in single precision here and there, and so does confidence."""
PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [5, 6, 7]]
TEMPLATE = CanvasTemplate.plain(6)


class AbsentError(Exception):
    """The installed transformers has no such family, or not with such an attention implementation."""


def build(name: str, attention: str) -> transformers.PreTrainedModel:
    """A small model of a family.

    Raises:
        AbsentError: there is none.
    """
    kind = "ForMaskedLM" if name in ENCODERS else "ForCausalLM"
    if not hasattr(transformers, name + kind):
        raise AbsentError("transformers does not have it")
    options = SMALL | ENCODERS.get(name, {})
    if name in DECODERS:
        options |= {"num_key_value_heads": 2, "is_causal": False} | DECODERS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = getattr(transformers, name + kind)._from_config(config, attn_implementation=attention)
        except (ValueError, ImportError) as error:  # "... does not support an attention implementation through ..."
            if "attention" not in str(error) and "attn" not in str(error):
                raise
            raise AbsentError(f"transformers does not have it with {attention}") from error
        return model.to(torch.float64).eval()


class Everything(Reuse):
    """Computes all positions, but as a choice: exact, if positions, masks and what is kept are right."""

    def select(self, glance: Any) -> Tensor:
        return glance.present


def sampler_of(model: transformers.PreTrainedModel, **options: Any) -> Sampler:
    denoiser = Denoiser(model, mask_token_id=MASK, **options)
    return Sampler(denoiser, decoder=Decoder(MacroParallelScheduler(tokens_per_step=2)), template=TEMPLATE)


def decode(sampler: Sampler, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Tokens and confidences of each row, without its padding."""
    out = sampler(prompts)
    lengths = [len(prompt) + 6 for prompt in prompts]
    return [
        (ids[:length].tolist(), confidence[:length])
        for ids, confidence, length in zip(out.sequences, out.trace.confidence, lengths, strict=True)
    ]


def must_be_equal(found: Iterable[tuple[list[int], Tensor]], expected: Iterable[tuple[list[int], Tensor]]) -> None:
    for (ids, confidence), (other_ids, other) in zip(found, expected, strict=True):
        assert ids == other_ids
        torch.testing.assert_close(confidence, other, **NEAR, equal_nan=True)


def both_ways(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the bare model, every token of which sees all others."""
    other = ids.clone()
    other[:, -1] = 9
    plain = model(input_ids=ids).logits
    if not torch.equal(plain[:, 0], model(input_ids=other).logits[:, 0]):
        return plain
    window = getattr(model.config, "use_sliding_window", True) and getattr(model.config, "sliding_window", None)
    assert not window or window >= ids.shape[1], "what is visible is not known, and it was not refused"
    everything = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
    return model(input_ids=ids, attention_mask=everything).logits


def alone(sampler: Sampler) -> list[tuple[list[int], Tensor]]:
    return [decode(sampler, [prompt])[0] for prompt in PROMPTS]


@torch.no_grad()
def check_decoding(model: transformers.PreTrainedModel) -> None:
    """The model sees the future, and what comes out is what it says of each row alone."""
    sampler = sampler_of(model)
    must_be_equal(decode(sampler, PROMPTS), alone(sampler))
    canvas = Canvas.from_prompts(PROMPTS[:1], TEMPLATE, mask_token_id=MASK)
    ids, wanted = canvas.tokens, torch.tensor([[6, 8, 11]])
    torch.testing.assert_close(sampler.denoiser(ids, wanted, canvas), both_ways(model, ids)[:, wanted[0]], **NEAR)


def check_leaving_one_out(model: transformers.PreTrainedModel) -> None:
    """A decoder that needs it."""
    sampler = Sampler(sampler_of(model).denoiser, decoder=decoders.wino(), template=TEMPLATE)
    must_be_equal(decode(sampler, PROMPTS), alone(sampler))


def check_reuse(model: transformers.PreTrainedModel) -> None:
    """It is exact where it must be; and an approximation does not depend on other rows."""
    must_be_equal(decode(sampler_of(model, reuse=Everything()), PROMPTS), decode(sampler_of(model), PROMPTS))
    sampler = sampler_of(model, reuse=CommittedReuse())
    must_be_equal(decode(sampler, PROMPTS), alone(sampler))


def check_custom_generate(model: transformers.PreTrainedModel) -> None:
    """``model.generate`` is ``sampler.generate``."""
    if not hasattr(model, "generate") or not model.can_generate():
        raise AbsentError("the model has no generate")
    if "custom_generate" not in inspect.signature(model.generate).parameters:
        raise AbsentError("generate takes no custom_generate")
    sampler, ids = sampler_of(model), torch.tensor([PROMPTS[0], [PAD, PAD, PAD, *PROMPTS[2]]])
    present = (ids != PAD).long()
    expected = sampler.generate(ids, attention_mask=present)
    found = model.generate(
        ids,
        attention_mask=present,
        custom_generate=sampler.custom_generate,
        max_new_tokens=6,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    assert torch.equal(found, expected)


def check_compiling(model: transformers.PreTrainedModel) -> None:
    """``compile="kernels"`` decodes the same."""
    sampler = sampler_of(model)
    compiled = Sampler(sampler.denoiser, decoder=sampler.decoder, template=TEMPLATE, compile="kernels")
    must_be_equal(decode(compiled, PROMPTS), decode(sampler, PROMPTS))


CHECKS: dict[str, Callable[[transformers.PreTrainedModel], None]] = {
    "decoding": check_decoding,
    "leave-one-out": check_leaving_one_out,
    "reuse": check_reuse,
    "custom_generate": check_custom_generate,
    'compile="kernels"': check_compiling,
}


def check(name: str, attention: str, what: str) -> str:
    """``"works"``, ``"absent: ..."`` or ``"refused: ..."``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[what](build(name, attention))
    except AbsentError as reason:
        return f"absent: {reason}"
    except NapDecodeError as reason:
        return f"refused: {reason}"
    return "works"


def outcomes() -> dict[str, dict[str, dict[str, str]]]:
    """``[family][attention implementation][check]``."""
    return {
        name: {
            attention: {
                what: check(name, attention, what)
                for what in CHECKS
                if what != 'compile="kernels"' or (name in COMPILED and attention == "sdpa")
            }
            for attention in ATTENTION
        }
        for name in FAMILIES
    }


def tables(record: dict[str, Any]) -> str:
    """In Markdown, what is in ``docs/releases.json``: the tests, and a table for every check."""
    releases = record["releases"]
    tested = {name: each for name, each in releases.items() if "passed" in each}
    lines = ["| transformers | tests passed | skipped |", "|---|---|---|"] if tested else []
    lines += [f"| {name} | {each['passed']} | {each['skipped']} |" for name, each in tested.items()]
    reasons: dict[str, int] = {}  # and the number by which a cell refers to it
    for what in CHECKS:
        columns = {
            release: tuple(
                _cell(each["families"][name][attention].get(what), name, reasons)
                for name in FAMILIES
                for attention in ATTENTION
            )
            for release, each in releases.items()
        }
        spans, cells = [], []  # neighbours that are alike share a column
        for column, same in groupby(columns, columns.__getitem__):
            first, *others = same
            spans.append(f"{first} to {others[-1]}" if others else first)
            cells.append(column)
        rows: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # and families that are alike share a line
        for family, row in zip(itertools.product(FAMILIES, ATTENTION), zip(*cells, strict=True), strict=True):
            rows.setdefault(row, []).append(family)
        lines += ["", f"### {what}", "", f"| | {' | '.join(spans)} |", "|---" * (len(spans) + 1) + "|"]
        lines += [f"| {_names(families)} | {' | '.join(row)} |" for row, families in rows.items() if any(row)]
    lines += ["", "### reasons", ""]
    return "\n".join([*lines, *(f"{number}. {reason}" for reason, number in reasons.items())])


def _cell(outcome: str | None, name: str, reasons: dict[str, int]) -> str:
    """What stands in a table: works, or the number of the reason why not; nothing if it is not there to be tried."""
    kind, _, reason = (outcome or "absent").partition(": ")
    if kind != "refused":
        return "works" if kind == "works" else ""
    reason = re.sub(rf"\b{name}For\w+( \([\w-]+\))?", "the model", reason)
    # Neither somebody else's words, nor remedies, which have their places in the guide.
    reason = re.sub(r"(does not take|it fails)\b.*", r"\1", reason)
    reason = re.sub(r"(; use an algorithm|\. Decode).*", "", reason)
    return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"


def _names(families: list[tuple[str, str]]) -> str:
    """Families, with their attention implementation if it matters."""
    both = [name for name, attention in families if attention == ATTENTION[0] and (name, ATTENTION[1]) in families]
    return ", ".join([*both, *(f"{name} ({attention})" for name, attention in families if name not in both)])


def fill_in(page: str, record: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    before, rest = page.split("<!-- releases -->\n")
    after = rest.split("<!-- end of releases -->", 1)[1]
    return f"{before}<!-- releases -->\n\n{tables(record)}\n\n<!-- end of releases -->{after}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    json.dump(outcomes(), sys.stdout, indent=1)
