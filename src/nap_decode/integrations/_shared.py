"""What the integrations have in common: the ways in which they are told how to decode."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from os import PathLike
from typing import Any, TypeAlias

from torch import Tensor

from nap_decode import decoders
from nap_decode.base.errors import NapDecodeError, check_name, refuse
from nap_decode.canvas import CanvasTemplate
from nap_decode.model.denoiser import Denoiser, LogitsProcessor
from nap_decode.model.families import find_family
from nap_decode.model.foreign import innermost
from nap_decode.parts.decoder import Decoder
from nap_decode.run.generate import check_same_model
from nap_decode.run.sampler import Sampler

AnySampler: TypeAlias = "Sampler | Decoder | str | PathLike[str]"
"""How to decode: a sampler of the model, a :class:`Decoder`, the name of one, or a file written by ``Sampler.save``."""
PUBLISHED_PRECISION = {"model_precision": True, "ties": "topk"}
"""Options of a decoder that computes as published code does, in the precision of the model's logits."""


def find(given: Decoder | str | PathLike[str], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How to decode, checked without a model: a decoder, and what else a file says, see :meth:`Sampler.read`.

    Args:
        given: see :data:`AnySampler`.
        options: of a decoder that is given by its name, see :func:`nap_decode.decoders.make`.

    Raises:
        NapDecodeError: none of these, or options that are not known or do not go together.
    """
    if isinstance(given, Decoder):
        refuse(options or {}, {}, "the decoder is made already")
        return {"decoder": given}
    if not isinstance(given, str | PathLike):
        raise NapDecodeError(
            "sampler must be a Sampler, a Decoder, such as decoders.klass(threshold=0.8), the name of one, or a file "
            f"written by Sampler.save, but is {given!r:.80}"
        )
    name = os.fspath(given)
    if name not in decoders.DECODERS and (name.endswith(".json") or os.path.exists(name)):
        refuse(options or {}, {}, f"{name} says how to decode")
        return Sampler.read(name)
    return {"decoder": decoders.make(name, **options or {})}


def make(
    how: Mapping[str, Any], denoiser: Denoiser, *, template: CanvasTemplate | None = None, **options: Any
) -> Sampler:
    """The sampler of what :func:`find` found and a model; a file's guidance and reuse go into the Denoiser.

    Raises:
        NapDecodeError: two templates, or a Denoiser with other guidance or reuse than the file.
    """
    own = {name: how[name] for name in ("cfg_scale", "reuse") if name in how}
    for name, value in own.items():
        if getattr(denoiser, name) not in (value, 0.0, None):
            raise NapDecodeError(f"the file has {name} {value}, but {getattr(denoiser, name)} is asked for")
    if how.get("template") is not None:
        refuse({"template": template}, {}, "the file has a template")
        template = how["template"]
    return Sampler(denoiser.replace(**own) if own else denoiser, decoder=how["decoder"], template=template, **options)


def bind(given: AnySampler, denoiser: Callable[[], Denoiser], model: Any) -> Sampler:
    """The sampler to run for a model, whose Denoiser is made for what is no sampler.

    Raises:
        NapDecodeError: see :func:`find`; a sampler of another model.
    """
    if not isinstance(given, Sampler):
        return make(find(given), denoiser())
    check_same_model(given, model)
    return given


def make_denoiser(
    model: Any, tokenizer: Any = None, *, is_shifted: bool = False, never: Sequence[int] = (), **options: Any
) -> Denoiser:
    """A Denoiser of a model that is said to be shifted, or that shall never emit some ids."""
    processors: list[LogitsProcessor] = []
    if never:
        from transformers import SuppressTokensLogitsProcessor

        processors.append(SuppressTokensLogitsProcessor(list(never)))
    if is_shifted:
        options["family"] = replace(find_family(getattr(innermost(model), "config", None)), shift=True)
    return Denoiser(model, tokenizer, logits_processor=processors, **options)


def dream_decoder(alg: str, known: Iterable[str], rule: Mapping[str, Any]) -> Decoder:
    """One of Dream's algorithms with its options, of which a ``top_p`` of 1 cuts off nothing."""
    check_name("alg", alg, known)
    cuts = rule["top_p"] is not None and rule["top_p"] < 1
    return decoders.make(f"dream_{alg}", **{**rule, "top_p": rule["top_p"] if cuts else None})


def option(decoder: Decoder, name: str) -> Any:
    """What a decoder has under the name of an option; None if no part has it, or several."""
    paths = decoder.options().get(name, [])
    return getattr(reduce(getattr, paths[0], decoder), name) if len(paths) == 1 else None


@dataclass(frozen=True, eq=False)
class Padded:
    """Rows with padding wherever it was given, ``(B, L)``; those of a canvas begin in column 0, ``(B, W)``."""

    tokens: Tensor  # (B, L) int64, at the start
    there: Tensor  # (B, L) bool, false for padding

    @cached_property
    def order(self) -> Tensor:
        """``(B, W)`` int64: where each column of the canvas comes from."""
        order = self.there.long().argsort(dim=1, descending=True, stable=True)
        return order[:, : int(self.there.sum(1).max())]

    def to_canvas(self, values: Tensor) -> Tensor:
        """``(B, L) -> (B, W)``."""
        return values.gather(1, self.order.to(values.device))

    def padded(self, values: Tensor) -> Tensor:
        """Tokens ``(B, W) -> (B, L)`` with padding as it was given, or logits ``(B, W, V) -> (B, L, V)``."""
        there = self.there.to(values.device)
        column = (there.cumsum(1) - 1).clamp(min=0)
        if values.ndim == 3:
            return values.take_along_dim(column[:, :, None], dim=1)
        return values.gather(1, column).where(there, self.tokens.to(values.device))


def given(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of a command's options that were given, by name: None stands for nothing, and nothing else does."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
