"""A sampler class for dLLM's harnesses and scripts (ZHZisZZ/dllm at ca17675).

It stands in for ``core/samplers/mdlm.py``, and for ``pipelines/dream/sampler.py`` where a config has an ``alg``.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode import decoders
from nap_decode.base.errors import NapDecodeError, check_integer, check_name, refuse
from nap_decode.canvas import Canvas, CanvasTemplate
from nap_decode.decoders.dream import AncestralSchedule
from nap_decode.integrations._shared import Padded, dream_decoder, find, llada_decoder, make
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.schedule import Schedule
from nap_decode.parts.scheduler import AnyOrderScheduler, SemiAutoregressiveScheduler
from nap_decode.run import sampler

# Fields of dLLM's configs and their defaults: how to decode, and what belongs to the canvas, the model and the output.
_BOTH: dict[str, Any] = {"max_length": None, "cfg_scale": 0.0, "return_dict": False}
_MDLM_RULE: dict[str, Any] = {"steps": 128, "block_size": 128, "temperature": 0.0, "remasking": "low_confidence"}
_MDLM_RULE |= {"stochastic_transfer": False, "begin_suppress_tokens": None}
_MDLM = _MDLM_RULE | _BOTH | {"max_new_tokens": 128, "right_shift_logits": False}
_MDLM |= {"cfg_keep_tokens": None, "suppress_tokens": None}
_DREAM_RULE: dict[str, Any] = {"steps": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "alg": "origin"}
_DREAM_RULE |= {"stochastic_transfer": False, "alg_temp": 0.0, "eps": 1e-3}
_DREAM = _DREAM_RULE | _BOTH | {"max_new_tokens": 20, "right_shift_logits": True}


@dataclass(frozen=True)
class AlphaSchedule(Schedule):
    """The expected number of tokens at each step, rounded (dLLM's ``get_num_transfer_tokens``).

    Computed in float32 as there, because rounding decides.

    Args:
        alpha: one of dLLM's alpha schedulers; None for its linear one.

    Example:
        >>> AlphaSchedule()(torch.tensor([8]), torch.tensor([3]), torch.empty(1, 0)).tolist()
        [[3, 5, 8]]
    """

    alpha: Any = None

    may_skip = True

    @override
    def __call__(self, tokens: Tensor, steps: Tensor, draws: Tensor) -> Tensor:
        committed = tokens[:, None].repeat(1, int(steps.max()))
        for number in set(steps.tolist()) - {0}:
            left = tokens[steps == number].double()
            for step in range(number):
                still_masked = self._still_masked((number - step - 1) / number, (number - step) / number)
                left = left - torch.minimum((left * (1 - still_masked)).round(), left)
                committed[steps == number, step] -= left.long()
        return committed

    def _still_masked(self, s: float, t: float) -> float:
        if self.alpha is not None:
            return float(self.alpha.reverse_mask_prob(s=s, t=t))
        later, now = torch.tensor([s, t])
        return float((1 - (1 - later)) / (1 - (1 - now)))


@dataclass(frozen=True, eq=False)
class SampledSequences:
    """What is returned if a dict is asked for.

    Args:
        sequences: ``(B, L)`` int64, padded with the end token.
        histories: ``(B, L)`` before the first step, and after every step that committed something.
    """

    sequences: Tensor
    histories: list[Tensor]


@dataclass
class Sampler:
    """Takes the place of ``MDLMSampler``: ``sampler_cls=Sampler`` or ``sampler_cls=Sampler.using("klass")``.

    Config attributes and keywords are those of ``MDLMSamplerConfig``; what is not known is refused.  With an ``alg``
    they are those of ``DreamSamplerConfig``, and it takes the place of ``DreamSampler``.  At temperature 0 it makes
    dLLM's tokens; what differs is listed in ``docs/integrations.md``.

    Args:
        model: what a :class:`Denoiser` can be made of.
        tokenizer: knows the mask and end ids.
        scheduler: one of dLLM's alpha schedulers; linear by default.
        model_precision: compute and compare confidences in the precision of the model's logits, as dLLM does, instead
            of float32, to reproduce published scores.

    Example:
        >>> from nap_decode import demo
        >>> cls = Sampler.using("klass", threshold=0.8)
        >>> cls(*demo.load()).sample([[8, 9, 10], [8]], max_new_tokens=4).shape
        torch.Size([2, 7])
    """

    model: Any
    tokenizer: Any
    scheduler: Any = None
    model_precision: bool = False

    decoder: ClassVar[Decoder | str | PathLike[str] | None] = None
    decoder_options: ClassVar[Mapping[str, Any]] = {}
    settable: ClassVar[frozenset[str]] = frozenset()  # options that the decoder takes from a config
    template: ClassVar[CanvasTemplate | None] = None

    def __post_init__(self) -> None:
        if self.decoder is not None:
            own = {"scheduler": self.scheduler, "model_precision": self.model_precision or None}
            refuse(own, {}, "the decoder has its own")

    @classmethod
    def using(
        cls, decoder: Decoder | str | PathLike[str], *, template: CanvasTemplate | None = None, **options: Any
    ) -> type[Sampler]:
        """A class that decodes with a decoder of ours, its name and options, or a file written by ``Sampler.save``.

        What belongs to the model, the canvas or the output still comes from dLLM's config.  Its other options have a
        say only if they are not what the config's class has by default: those that a decoder given by its name has too
        (``block_size`` is its ``block_length``) go to it, all others are refused.

        Raises:
            NapDecodeError: no decoder, or an option that it does not have.
        """
        made, settable, name = find(decoder, options)["decoder"], set[str](), type(decoder).__name__
        if isinstance(decoder, str):
            name = decoder
            if name in decoders.DECODERS:
                settable = {*inspect.signature(decoders.DECODERS[name]).parameters, *made.options()} - options.keys()
        members = {"decoder": decoder, "decoder_options": options, "settable": settable, "template": template}
        return type(f"{cls.__name__}[{name}]", (cls,), members)

    def check(self, config: Any = None, **kwargs: Any) -> None:
        """Raise what :meth:`sample`, which harnesses call last, would raise about its options, without a prompt."""
        options, given = self._options(config, kwargs)
        self._to_sample(options, given, longest=0)

    def sample(self, inputs: Sequence[Tensor | Sequence[int]], config: Any = None, **kwargs: Any) -> Any:
        """Decode ``max_new_tokens`` slots behind every prompt.

        Args:
            inputs: token ids of each prompt.
            config: an ``MDLMSamplerConfig`` or ``DreamSamplerConfig``, or anything with attributes of their names.
            kwargs: go before the config.

        Returns:
            ``(B, L)`` int64, rows padded with the end token, on the right or, as ``DreamSampler`` does, on the left; or
            :class:`SampledSequences`.

        Raises:
            NapDecodeError: an option that is not known, or would have no effect.
        """
        options, given = self._options(config, kwargs)
        rows, limit = self._rows(inputs, options), options["max_length"]
        bound, length = self._to_sample(options, given, longest=max(map(len, rows), default=0))
        canvas = bound.canvas(rows, max_new_tokens=None if bound.template is not None else length)
        if limit is not None and canvas.tokens.shape[1] > limit:
            raise NapDecodeError(
                f"the longest prompt and what shall be decoded take {canvas.tokens.shape[1]} tokens, more than "
                f"max_length={limit}"
            )
        return self._decode(bound, canvas, options)

    def infill(self, inputs: Sequence[Tensor | Sequence[int]], config: Any = None, **kwargs: Any) -> Any:
        """Decode the mask tokens in texts, in windows of ``block_size`` counted from the start of each.

        Arguments are those of :meth:`sample` but for lengths.  ``DreamSampler`` has no windows.
        """
        lengths = {name: kwargs.get(name) for name in ("max_new_tokens", "max_length")}
        refuse(lengths, {}, "infill decodes the masks in the text")
        options, given = self._options(config, kwargs)
        if self.decoder is None and "alg" in options:
            refuse({"cfg_scale": options["cfg_scale"] or None}, {}, "DreamSampler's infill has no guidance")
        rows = self._rows(inputs, options)
        bound = self._bind(options, given, max(map(len, rows), default=1), on_grid=True)
        mask, pad, device = bound.denoiser.mask_token_id, bound.denoiser.pad_token_id, bound.denoiser.device
        canvas = Canvas.from_infill(rows, mask_token_id=mask, pad_token_id=pad, device=device)
        return self._decode(bound, canvas, options)

    def _options(self, config: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """All options, and the names of those that are not what the config's class has by default."""
        is_dream = "alg" in kwargs or hasattr(config, "alg")
        defaults, whose = (_DREAM, "DreamSamplerConfig") if is_dream else (_MDLM, "MDLMSamplerConfig")
        for name in kwargs:
            check_name(f"option of {whose}", name, defaults)
        fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        declared = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields}
        own = {name: getattr(config, name) for name in declared if name not in defaults}
        # The config of another sampler means another rule, with its defaults too; a decoder of ours has its own rule.
        usual = {} if self.decoder is None else declared
        refuse(own, usual, f"{type(config).__name__} has it, but {whose} does not")
        found = {name: getattr(config, name, default) for name, default in defaults.items()} | dict(kwargs)
        # dLLM's harness writes an empty list for None.
        given = [n for n in defaults if n in kwargs or (found[n] or None) != (declared.get(n, defaults[n]) or None)]
        return found, given

    def _to_sample(self, options: dict[str, Any], given: Sequence[str], longest: int) -> tuple[sampler.Sampler, int]:
        """What decodes behind prompts of at most so many tokens, and how many slots."""
        length, limit = options["max_new_tokens"], options["max_length"]
        if not length and limit is None:
            raise NapDecodeError("say what to decode: give max_new_tokens or max_length")
        length = length or limit - longest
        check_integer("max_new_tokens", length, 1)
        bound = self._bind(options, given, int(length), on_grid=False)
        if bound.template is not None:
            refuse({"max_new_tokens": length} if "max_new_tokens" in given else {}, {}, "the decoder has a template")
        return bound, int(length)

    def _rows(self, inputs: Sequence[Tensor | Sequence[int]], options: dict[str, Any]) -> list[list[int]]:
        rows: list[list[int]] = [torch.as_tensor(row, dtype=torch.int64).tolist() for row in inputs]
        # As in dLLM: a shifted model predicts the first position from something.
        starts = options["right_shift_logits"] and "alg" not in options
        return [row or [self.tokenizer.bos_token_id] for row in rows] if starts else rows

    def _bind(self, options: dict[str, Any], given: Sequence[str], length: int, *, on_grid: bool) -> sampler.Sampler:
        if self.decoder is None:
            how = {"decoder": self._dream(options) if "alg" in options else self._mdlm(options, length, on_grid)}
        else:
            names = {n: "block_length" if n == "block_size" else n for n in given if n in _MDLM_RULE | _DREAM_RULE}
            decided = {n: options[n] for n, own in names.items() if own not in self.settable}
            refuse(decided, {}, "the decoder, or its options in using(...), decide that")
            how = find(self.decoder, {own: options[n] for n, own in names.items()} | dict(self.decoder_options))
        return make(
            how,
            self.model,
            self.tokenizer,
            is_shifted=options["right_shift_logits"],
            never=options.get("suppress_tokens") or (),
            model_precision=self.model_precision,
            template=self.template,
            mask_token_id=self.tokenizer.mask_token_id,
            cfg_scale=options["cfg_scale"],
        )

    def _dream(self, options: dict[str, Any]) -> Decoder:
        """What ``DreamSampler`` does."""
        refuse({"eps": options["eps"]}, {"eps": _DREAM["eps"]}, "DreamSampler does not use it")
        rule = {name: options[name] for name in ("temperature", "top_p", "top_k", "alg_temp")}
        decoder = dream_decoder(options["alg"], ("maskgit_plus", "topk_margin", "entropy"), rule)  # it has no other
        return decoder.set(scheduler=AnyOrderScheduler(steps=options["steps"], schedule=self._schedule(options)))

    def _mdlm(self, options: dict[str, Any], length: int, on_grid: bool) -> Decoder:
        """What ``MDLMSampler`` does."""
        check_integer("steps", options["steps"], 1)
        last = tuple(options["begin_suppress_tokens"] or ())
        decoder = llada_decoder(options["remasking"], last, begin_suppress_tokens=last)
        block_size = options["block_size"] or length
        check_integer("block_size", block_size, 1)
        num_blocks = math.ceil(length / block_size)
        scheduler = SemiAutoregressiveScheduler(
            steps=math.ceil(options["steps"] / num_blocks) * num_blocks,
            block_length=block_size,
            schedule=self._schedule(options),
            on_grid=on_grid,
        )
        return decoder.set(scheduler=scheduler, temperature=options["temperature"])

    def _schedule(self, options: dict[str, Any]) -> Schedule:
        if not options["stochastic_transfer"]:
            return AlphaSchedule(self.scheduler)
        refuse({"scheduler": self.scheduler}, {}, "stochastic_transfer is done for the linear scheduler only")
        return AncestralSchedule(eps=0.0)

    def _decode(self, bound: sampler.Sampler, canvas: Canvas, options: dict[str, Any]) -> Any:
        if keep := options.get("cfg_keep_tokens"):
            refuse({} if options["cfg_scale"] else {"cfg_keep_tokens": keep}, {}, "cfg_scale is 0")
            kept = torch.isin(canvas.tokens, torch.tensor(keep, device=canvas.tokens.device))
            canvas = replace(canvas, prompt=canvas.prompt & ~kept)
        trace, there = bound.decode(canvas).trace, canvas.attention_mask.bool()
        ends = torch.full_like(canvas.tokens, self.tokenizer.eos_token_id)
        shown = Padded(ends, there.flip(1) if "alg" in options else there)  # as theirs, on the left or on the right
        sequences = shown.padded(trace.tokens.to(ends))
        if not options["return_dict"]:
            return sequences
        done = [0, *(step + 1 for step in sorted(set(trace.step.flatten().tolist())) if step >= 0)]
        return SampledSequences(sequences, [shown.padded(trace.canvas_at(step).to(ends)) for step in done])
