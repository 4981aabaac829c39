"""What the integrations have in common."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from nap_decode.base.errors import NapDecodeError
from nap_decode.model import foreign
from nap_decode.model.denoiser import Denoiser
from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.selection import QuotaSelection
from nap_decode.run.sampler import Sampler

AnySampler: TypeAlias = "Sampler | Callable[[Denoiser], Sampler]"
"""A sampler of the model, or what makes one of a Denoiser: a preset, or a function of yours."""


def bind(sampler: AnySampler, model: Any, denoiser: Callable[[], Denoiser]) -> Sampler:
    """The sampler to run for a model.

    Args:
        sampler: see :data:`AnySampler`.
        model: the model that shall be decoded.
        denoiser: makes the Denoiser for a preset.

    Raises:
        NapDecodeError: neither of the two, or a sampler of another model.
    """
    bound = sampler if isinstance(sampler, Sampler) or not callable(sampler) else sampler(denoiser())
    if not isinstance(bound, Sampler):
        raise NapDecodeError(
            "sampler must be a Sampler, or a function from a Denoiser to one, such as presets.klass or "
            f"functools.partial(presets.klass, threshold=0.8), but gives {bound!r:.80}"
        )
    own, given = bound.denoiser.model, model
    if (
        foreign.innermost(own) is not foreign.innermost(given)
        or foreign.virtual_tokens(foreign.unwrapped(own)) != foreign.virtual_tokens(foreign.unwrapped(given))
        or list(map(id, foreign.wrappers_of_others(own))) != list(map(id, foreign.wrappers_of_others(given)))
    ):
        raise NapDecodeError(
            f"the sampler is for another model ({type(bound.denoiser.model).__name__}) than it is run with "
            f"({type(model).__name__}); make it with this model, or pass a preset instead, such as presets.klass"
        )
    return bound


def given(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of a command's options that were given, by name: None stands for nothing, and nothing else does."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def refuse(options: Mapping[str, Any], defaults: Mapping[str, Any], why: str) -> None:
    """Raise if any of the options was given, which would have no effect.

    Args:
        options: names and values.
        defaults: values that count as not given.
        why: they have no effect.
    """
    given = [f"{name}={value!r:.80}" for name, value in options.items() if value != defaults.get(name)]
    if given:
        raise NapDecodeError(f"{', '.join(given)} would have no effect: {why}. Leave it out")


def in_model_precision(sampler: Sampler) -> Sampler:
    """The sampler with the arithmetic of published code, in the precision of the model's logits."""
    committer = sampler.committer
    assert isinstance(committer, MicroConfidenceCommitter)
    assert isinstance(committer.selection, QuotaSelection)
    selection = replace(committer.selection, ties="topk")
    return sampler.replace(committer=replace(committer, model_precision=True, selection=selection))
