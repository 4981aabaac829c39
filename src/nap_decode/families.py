"""What differs between model families, as small frozen records found from a model's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from nap_decode.errors import NapDecodeError, check_integer, check_name


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

# docs/families.md says where each of these facts was read, and what was run.
_LLADA = ModelFamily(name="LLaDA", mask_token_id=126336)
_LLADA_MOE = ModelFamily(name="LLaDA-MoE", mask_token_id=156895)
_LLADA2 = ModelFamily(name="LLaDA2", attention="additive", block_size=32, mask_token_id=156895)
# A 2-D mask of Dream's hides queries too: padding then sees nothing, and becomes nan.
_DREAM = ModelFamily(name="Dream", shift=True, attention="4d", mask_token_id=151666)
# One revision takes its mask for bool whatever is in it, so an additive one would be turned round.
_SDAR = ModelFamily(name="SDAR", attention="4d", block_size=4, mask_token_id=151669)
_A2D = ModelFamily(name="A2D")
_DIFFUSION_GEMMA = ModelFamily(name="DiffusionGemma", refusal=_UNIFORM)

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
        name="Fast-dLLM v2", shift=True, attention="none", block_size=32, mask_token_id=151665
    ),
    "mdlm": ModelFamily(name="MDLM", attention="none", mask_token_id=50257),
    "a2d-llama": _A2D,
    "a2d-qwen2": _A2D,
    "a2d-qwen3": _A2D,
    "diffusion_gemma": _DIFFUSION_GEMMA,
    "diffusion_gemma_text": _DIFFUSION_GEMMA,
}


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


def find_family(config: Any) -> ModelFamily:
    """The family of a model with this transformers config; in place, 2-D mask if it is not known.

    What the config itself says goes before what is known of its type: ``right_shift_logits``, the
    ``block_size`` (or ``bd_size``) of a family that has blocks, and ``time_conditioning``.
    """
    model_type = getattr(config, "model_type", None) or "unknown"
    if model_type == "llada" and getattr(config, "num_experts", None) is not None:
        model_type = "llada_moe"  # published under the dense model's type
    family = _FAMILIES.get(model_type, ModelFamily(name=model_type))
    said: dict[str, Any] = {}
    shift = getattr(config, "right_shift_logits", None)
    if shift is not None:
        said["shift"] = bool(shift)
    for name in ("block_size", "bd_size"):  # elsewhere it may mean the context length
        size = getattr(config, name, None)
        if family.block_size is not None and size is not None:
            said["block_size"] = size
    if getattr(config, "time_conditioning", False):
        said["refusal"] = _TIMED
    return replace(family, **said) if said else family
