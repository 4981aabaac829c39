"""What the integrations have in common: the ways in which they are told how to decode."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any, TypeAlias

from torch import Tensor

from nap_decode import decoders
from nap_decode.base.errors import NapDecodeError, check_name, refuse
from nap_decode.canvas import CanvasTemplate
from nap_decode.decoders.llada import ProbabilityWithout
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import find_family
from nap_decode.model.foreign import innermost
from nap_decode.parts.decoder import Decoder
from nap_decode.run.sampler import Sampler

AnySampler: TypeAlias = "Sampler | Decoder | str | PathLike[str]"
"""How to decode: a sampler of the model, a :class:`Decoder`, the name of one, or a file written by ``Sampler.save``."""


def find(given: Decoder | str | PathLike[str], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How to decode, checked without a model: a decoder, and what else a file says, see :meth:`Sampler.read`.

    Options are those of a decoder that is given by its name, see :func:`nap_decode.decoders.make`.

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
    how: Mapping[str, Any],
    model: Any,
    tokenizer: Any = None,
    *,
    is_shifted: bool = False,
    never: Sequence[int] = (),
    model_precision: bool = False,
    template: CanvasTemplate | None = None,
    compile: bool | str = False,
    **options: Any,
) -> Sampler:
    """The sampler of what :func:`find` found and a model, which may be a Denoiser already; its options are the others.

    A file's template is the sampler's, its guidance and reuse are the Denoiser's.  ``is_shifted`` is said of the
    family, ``never`` of ids that are not emitted; ``model_precision`` computes as published code does.

    Raises:
        NapDecodeError: two templates, or a Denoiser with other guidance or reuse than the file.
    """
    if not isinstance(model, Denoiser):
        if never:
            from transformers import SuppressTokensLogitsProcessor

            options["logits_processor"] = [SuppressTokensLogitsProcessor(list(never))]
        if is_shifted:
            options["family"] = replace(find_family(getattr(innermost(model), "config", None)), shift=True)
        model = Denoiser(model, tokenizer, **options)
    own = {name: how[name] for name in ("cfg_scale", "reuse") if name in how}
    for name, value in own.items():
        if getattr(model, name) not in (value, 0.0, None):
            raise NapDecodeError(f"the file has {name} {value}, but {getattr(model, name)} is asked for")
    if how.get("template") is not None:
        refuse({"template": template}, {}, "the file has a template")
        template = how["template"]
    decoder: Decoder = how["decoder"]
    if model_precision:
        decoder = decoder.set(model_precision=True, ties="topk")
    return Sampler(model.replace(**own) if own else model, decoder=decoder, template=template, compile=compile)


def llada_decoder(remasking: str, last: Sequence[int], **says_so: Any) -> Decoder:
    """One of LLaDA's rules, with ids that are committed last and the option that asks for it."""
    check_name("remasking", remasking, ("low_confidence", "random"))
    if remasking == "random":
        refuse(says_so if last else {}, {}, "remasking is random")
        return decoders.llada_random()
    return decoders.llada_low_confidence(confidence=ProbabilityWithout(last) if last else "probability")


def dream_decoder(alg: str, known: Iterable[str], rule: Mapping[str, Any]) -> Decoder:
    """One of Dream's algorithms with its options, of which a ``top_p`` of 1 cuts off nothing."""
    check_name("alg", alg, known)
    cuts = rule["top_p"] is not None and rule["top_p"] < 1
    return decoders.make(f"dream_{alg}", **{**rule, "top_p": rule["top_p"] if cuts else None})


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
