"""What differs between model families, as small frozen records found from a model's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from nap_decode.base.errors import NapDecodeError, check_integer, check_name


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """How an architecture behaves, as far as decoding is concerned.

    Args:
        name: for messages.
        shift: the logits at position p - 1 predict position p (models adapted from autoregressive
            ones, such as Dream); otherwise those at p do.
        attention: how the model is told who may look at whom, padding included.  ``"2d"``: ``(B, L)`` of 0
            and 1; ``"4d"``: bool ``(B, 1, L, L)``, true where a query may look; ``"additive"``: the same as
            numbers added to attention scores, 0 or the lowest there is; ``"none"``: the model is told
            nothing, and is called with rows of one length at a time.
        block_size: attention is block-causal: both ways inside blocks of so many positions, counted from a
            row's first token, and back to earlier blocks.  The model is told by its attention mask, or, with
            ``attention="none"``, makes the mask itself.  None: all see all.
        mask_token_id: the mask id of released checkpoints, used if neither tokenizer nor config
            names one.
        vocab_sizes: ``config.vocab_size`` of released checkpoints: the mask id of a model with another one is
            not known, see :func:`find_family`.  Empty: whatever it is.
        refusal: why this family cannot be decoded here, or None.

    Raises:
        NapDecodeError: an attention convention that there is not, or one that cannot tell blocks.

    Example:
        >>> ModelFamily(name="my shifted model", shift=True).shift
        True
    """

    name: str
    shift: bool = False
    attention: Literal["2d", "4d", "additive", "none"] = "2d"
    block_size: int | None = None
    mask_token_id: int | None = None
    vocab_sizes: tuple[int, ...] = ()
    refusal: str | None = None

    def __post_init__(self) -> None:
        check_name("attention convention", self.attention, ("2d", "4d", "additive", "none"))
        if self.block_size is not None:
            check_integer("block_size", self.block_size, 1)
            if self.attention == "2d":
                raise NapDecodeError(
                    f"block_size={self.block_size} needs a mask with a row for every query; a 2-D one has none. Pass "
                    'attention="4d" (bool) or "additive", or "none" if the model makes the mask itself'
                )


_UNIFORM = (
    "it is a uniform-diffusion model: its canvas starts from random tokens and has no [MASK], so there "
    "is nothing for an unmasking decoder to commit. Use the generate method that comes with the model"
)
_TIMED = (
    "it is conditioned on time (config.time_conditioning), which an unmasking decoder does not know. Wrap it into a "
    "function (input_ids, attention_mask) -> logits that knows"
)

_EDITED = (
    "it was trained to delete and insert tokens (config.delete_token_id, config.split_token_id), and slots neither "
    "come nor go here. Use the decoder that comes with the model"
)
_MIXED = (
    "its decoder lets text before a block see the past only, and the block itself see both ways, which no attention "
    "mask here says. Use the generate method that comes with the model; family=ModelFamily(name=...) decodes it all "
    "the same, with all positions seeing all"
)
_BLOCKS = (
    "its config has {name}={size}, but models of this type have no blocks as far as is known here. If attention is "
    'block-causal, pass family=ModelFamily(name=..., attention="4d" or "additive", block_size={size}, shift={shift})'
)

# docs/families.md says where each of these facts was read, and what was run.
_LLADA = ModelFamily(name="LLaDA", mask_token_id=126336, vocab_sizes=(126464,))
_LLADA_MOE = ModelFamily(name="LLaDA-MoE", mask_token_id=156895, vocab_sizes=(157184,))
_LLADA2 = ModelFamily(name="LLaDA2", attention="additive", block_size=32, mask_token_id=156895, vocab_sizes=(157184,))
# A 2-D mask of Dream's hides queries too: padding then sees nothing, and becomes nan.
_DREAM = ModelFamily(name="Dream", shift=True, attention="4d", mask_token_id=151666, vocab_sizes=(152064,))
# One revision takes its mask for bool whatever is in it, so an additive one would be turned round.
_SDAR = ModelFamily(name="SDAR", attention="4d", block_size=4, mask_token_id=151669, vocab_sizes=(151936,))
_NEMOTRON = ModelFamily(name="Nemotron-Labs-Diffusion", refusal=_MIXED)
_A2D = ModelFamily(name="A2D")
_DIFFUSION_GEMMA = ModelFamily(name="DiffusionGemma", refusal=_UNIFORM)

# By config.model_type, or by the architecture for what is published under the type that it was made from.
_FAMILIES: dict[str, ModelFamily] = {
    "llada": _LLADA,
    "fastdllm_llada": _LLADA,  # dllm's name for LLaDA with Fast-dLLM's caches
    "llada_moe": _LLADA_MOE,
    "lladamoe": _LLADA_MOE,  # dllm's name; the published checkpoints are called "llada", see find_family
    "llada2_moe": _LLADA2,
    "llada2_moe_veomni": _LLADA2,  # the same with merged experts, in its trainer
    "llada21_moe": replace(_LLADA2, name="LLaDA2.1"),
    "Dream": _DREAM,  # DiffuCoder too
    "fastdllm_dream": _DREAM,
    "sdar": _SDAR,  # TraDo too
    "sdar_moe": _SDAR,
    # Makes its mask itself, and does not look at the one it is given.
    "Fast_dLLM_Qwen": ModelFamily(
        name="Fast-dLLM v2",
        shift=True,
        attention="none",
        block_size=32,
        mask_token_id=151665,
        vocab_sizes=(151936, 152064),
    ),
    "StableDiffcoderForCausalLM": ModelFamily(
        name="Stable-DiffCoder", attention="additive", block_size=4, mask_token_id=5, vocab_sizes=(155136,)
    ),
    "illada": ModelFamily(name="iLLaDA", mask_token_id=5, vocab_sizes=(155136,)),
    "nemotron_labs_diffusion": _NEMOTRON,
    "nemotron_labs_diffusion_vlm": _NEMOTRON,
    "mdlm": ModelFamily(name="MDLM", attention="none", mask_token_id=50257, vocab_sizes=(50258,)),
    "a2d-llama": _A2D,
    "a2d-qwen2": _A2D,
    "a2d-qwen3": _A2D,
    "diffusion_gemma": _DIFFUSION_GEMMA,
    "diffusion_gemma_text": _DIFFUSION_GEMMA,
}

_WITHOUT_BLOCKS = (_LLADA, _LLADA_MOE, _DREAM, _A2D)


def register_family(model_type: str, family: ModelFamily) -> None:
    """Teach the package how models with ``config.model_type == model_type`` behave.

    Raises:
        NapDecodeError: another family is registered for that type.

    Example:
        >>> register_family("my_model", ModelFamily(name="mine", shift=True, mask_token_id=3))
    """
    if _FAMILIES.get(model_type, family) != family:
        raise NapDecodeError(
            f"a family is registered for model type {model_type!r} already: {_FAMILIES[model_type]}. "
            "To override it for one model, pass family= to Denoiser"
        )
    _FAMILIES[model_type] = family


def find_family(config: Any, architecture: str | None = None) -> ModelFamily:
    """The family of a model with this transformers config; in place, 2-D mask if it is not known.

    What the config itself says goes before what is known of its type: ``right_shift_logits``, the
    ``block_size`` (or ``bd_size``) of a family that has blocks, and ``time_conditioning``.  The family's mask id is
    left out if ``vocab_size`` is not that of a released checkpoint, for then it may be any token.

    Args:
        config: the config, or None.
        architecture: name of the model's class, which a config names only once it was saved.
    """
    family = _published(config, architecture)
    said: dict[str, Any] = {}
    shift = getattr(config, "right_shift_logits", None)
    if shift is not None:
        said["shift"] = bool(shift)
    for name in ("block_size", "bd_size"):
        size = getattr(config, name, None)
        if family.block_size is not None and size is not None:
            said["block_size"] = size
        elif size is not None and family in _WITHOUT_BLOCKS:  # elsewhere it may mean the context length
            said["refusal"] = _BLOCKS.format(name=name, size=size, shift=said.get("shift", family.shift))
    if getattr(config, "time_conditioning", False):
        said["refusal"] = _TIMED
    if any(getattr(config, name, None) is not None for name in ("delete_token_id", "split_token_id")):
        said["refusal"] = _EDITED
    if family.vocab_sizes and getattr(config, "vocab_size", None) not in family.vocab_sizes:
        said["mask_token_id"] = None
    return replace(family, **said) if said else family


def find_mask(config: Any) -> int | None:
    """The mask id that a transformers config names, if it names one."""
    mask: int | None = getattr(config, "mask_token_id", None)
    # LLaDA's config class fills in the end of GPT-2's texts where a checkpoint says nothing.
    return None if mask == 50256 and _published(config) == _LLADA else mask


def _published(config: Any, architecture: str | None = None) -> ModelFamily:
    """What is known of models with this architecture, or with the config's architecture or type."""
    model_type = getattr(config, "model_type", None) or "unknown"
    if model_type == "llada" and getattr(config, "num_experts", None) is not None:
        model_type = "llada_moe"  # published under the dense model's type
    names = (architecture, *(getattr(config, "architectures", None) or ()), model_type)
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), ModelFamily(name=model_type))
