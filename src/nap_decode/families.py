"""What differs between model families, as small frozen records found from a model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nap_decode.errors import NapDecodeError, check_name


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """How an architecture behaves, as far as decoding is concerned.

    Args:
        name: for messages.
        shift: the logits at position p - 1 predict position p (models adapted from autoregressive
            ones, such as Dream); otherwise those at p do.
        attention: how padding is told to the model. ``"2d"``: ``(B, L)`` of 0 and 1; ``"4d"``:
            bool ``(B, 1, L, L)``, true where a query may look; ``"none"``: the model takes no mask,
            and batches must have rows of one length.
        mask_token_id: the mask id of released checkpoints, used if neither tokenizer nor config
            names one.
        refusal: why this family cannot be decoded here, or None.

    Example:
        >>> ModelFamily(name="my shifted model", shift=True).shift
        True
    """

    name: str
    shift: bool = False
    attention: Literal["2d", "4d", "none"] = "2d"
    mask_token_id: int | None = None
    refusal: str | None = None

    def __post_init__(self) -> None:
        check_name("attention convention", self.attention, ("2d", "4d", "none"))


_UNIFORM = (
    "it is a uniform-diffusion model: its canvas starts from random tokens and has no [MASK], so there "
    "is nothing for an unmasking decoder to commit. Use the generate method that comes with the model"
)

_FAMILIES: dict[str, ModelFamily] = {
    "llada": ModelFamily(name="LLaDA", mask_token_id=126336),
    "llada_moe": ModelFamily(name="LLaDA-MoE", mask_token_id=156895),
    "Dream": ModelFamily(name="Dream", shift=True, attention="4d", mask_token_id=151666),
    "diffusion_gemma": ModelFamily(name="DiffusionGemma", refusal=_UNIFORM),
    "diffusion_gemma_text": ModelFamily(name="DiffusionGemma", refusal=_UNIFORM),
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
    """The family of a model with this transformers config; in place, 2-D mask if it is not known."""
    model_type = getattr(config, "model_type", None) or "unknown"
    return _FAMILIES.get(model_type, ModelFamily(name=model_type))
