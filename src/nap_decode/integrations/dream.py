"""Dream's ``diffusion_generate`` (``generation_utils.py`` of HKUNLP/Dream), for any of our samplers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nap_decode import decoders
from nap_decode.base.errors import NapDecodeError, check_integer, check_name, refuse
from nap_decode.canvas import Canvas, CanvasTemplate
from nap_decode.integrations._hooks import Hook, HookedDenoiser, Recounting, edited
from nap_decode.integrations._shared import PUBLISHED_PRECISION, AnySampler, Padded, bind, find
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import find_family
from nap_decode.model.foreign import innermost
from nap_decode.run.generate import check_same_model
from nap_decode.run.sampler import Sampler

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
_RULE = {"alg": "origin", "steps": 512, "eps": 1e-3, "temperature": 0.0, "top_p": None, "top_k": None, "alg_temp": None}
_LENGTH = {"max_length": 20, "max_new_tokens": None}
_TOKENS = {"mask_token_id": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_OUTPUT = {"num_return_sequences": 1, "output_history": False, "return_dict_in_generate": False, "return_dict": False}
_CONFIG: dict[str, Any] = _RULE | _LENGTH | _TOKENS | _OUTPUT  # DreamGenerationConfig's fields and their defaults
_HOOKS = ("generation_tokens_hook_func", "generation_logits_hook_func")


@dataclass(frozen=True, eq=False)
class DiffusionOutput:
    """What ``diffusion_generate`` returns if a dict is asked for.

    Args:
        sequences: ``(B, P + canvas)`` int64.
        history: ``(B, P + canvas)`` after every step of the schedule; None unless asked for.
    """

    sequences: Tensor
    history: list[Tensor] | None = None


def install(model: Any, sampler: AnySampler | None = None, *, model_precision: bool = False) -> None:
    """Put our ``diffusion_generate`` on a model; :func:`uninstall` takes it off.

    It takes the published arguments, as keywords or from a ``DreamGenerationConfig``, and refuses others.  At
    temperature 0 it makes Dream's tokens.  What differs is listed in ``docs/integrations.md``.

    Args:
        model: a model of Dream's kind: the logits at p - 1 predict position p.
        sampler: decodes instead of Dream's algorithms: a :class:`Decoder`, the name of one, a file written by
            ``Sampler.save``, or a sampler of this model.  It decodes its template, or ``max_new_tokens`` if it has
            none.
        model_precision: compute and compare confidences in the precision of the model's logits, as Dream does, instead
            of float32, to reproduce published scores.

    Raises:
        NapDecodeError: no sampler, or one of another model; one that would ignore ``model_precision``.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = demo.load()
        >>> install(model)
        >>> model.diffusion_generate(torch.tensor([[5, 6]]), step=8)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no argument of diffusion_generate 'step'. Did ...
        >>> uninstall(model)
    """
    if sampler is not None:
        refuse({"model_precision": model_precision}, {"model_precision": False}, "the sampler decides that")
        if isinstance(sampler, Sampler):
            check_same_model(sampler, model)
        else:
            find(sampler)
    owner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hands on what is set
    before = vars(owner).get("diffusion_generate")
    if isinstance(before, _DiffusionGenerate):
        before = before.before
    owner.diffusion_generate = _DiffusionGenerate(model, sampler, model_precision, before)


def uninstall(model: Any) -> None:
    """Take our ``diffusion_generate`` off a model, which then has its own again, if it had one.

    Raises:
        NapDecodeError: it is not there.
    """
    owner = getattr(model, "_orig_mod", model)
    installed = vars(owner).get("diffusion_generate")
    if not isinstance(installed, _DiffusionGenerate):
        raise NapDecodeError(f"nothing is installed on this {type(model).__name__}; install(model) does it")
    del owner.diffusion_generate
    if installed.before is not None:
        owner.diffusion_generate = installed.before


@dataclass(frozen=True, eq=False)
class _DiffusionGenerate:
    model: Any
    sampler: AnySampler | None
    model_precision: bool
    before: Any  # what the instance had under this name

    def __call__(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Tensor | DiffusionOutput:
        for name in kwargs:
            check_name("argument of diffusion_generate", name, (*_CONFIG, *_HOOKS, "attention_mask"))
        if not isinstance(inputs, Tensor) or inputs.ndim != 2:
            raise NapDecodeError(f"inputs must be a tensor (B, P) of token ids, but are {inputs!r:.80}")
        options = self._options(generation_config, kwargs)
        is_dict = options["return_dict"] or options["return_dict_in_generate"]
        if not is_dict:
            refuse(options, options | {"output_history": False}, "return_dict_in_generate is not set")
        hooks = [kwargs.get(name) for name in _HOOKS]
        tokens_hook: Hook = hooks[0] or (lambda step, tokens, logits: tokens)
        logits_hook: Hook = hooks[1] or (lambda step, tokens, logits: logits)
        sampler = self._bind(options, generation_config, kwargs)
        ids, attention_mask = self._expand(inputs, kwargs.get("attention_mask"), options)
        template = sampler.template or CanvasTemplate.plain(self._length(ids.shape[1], options))
        canvas, rows = _canvas(ids, attention_mask, template, sampler.denoiser, tokens_hook)
        if hooks == [None, None]:
            output = sampler.decode(canvas)
            steps = options["steps"] if self.sampler is None else int(output.trace.step.max()) + 1
            history = [output.trace.canvas_at(step + 1) for step in range(steps if options["output_history"] else 0)]
            history = [rows.padded(tokens) for tokens in history]
        else:
            hooked = HookedDenoiser(sampler.denoiser, rows, tokens_hook, logits_hook)
            output = Sampler(hooked, decoder=Recounting.of(sampler.decoder)).decode(canvas, callback=hooked.after_step)
            history = hooked.history
        sequences = rows.padded(output.sequences).to(inputs.device)
        if not is_dict:
            return sequences
        kept = [tokens.to(inputs.device) for tokens in history] if options["output_history"] else None
        return DiffusionOutput(sequences, kept)

    @property
    def _model_config(self) -> Any:
        return getattr(innermost(self.model), "config", None)

    def _options(self, generation_config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords go before the generation config, or, as in Dream, what the model's config has under these names."""
        source = self._model_config if generation_config is None else generation_config
        found = {name: getattr(source, name, None) for name in _CONFIG}
        if generation_config is None:
            found["return_dict"] = None  # in a model's config it is about forward
        found |= {name: value for name, value in kwargs.items() if name in _CONFIG}
        options = {name: _CONFIG[name] if value is None else value for name, value in found.items()}
        if options["mask_token_id"] is None and generation_config is not None:
            own = getattr(innermost(self.model), "generation_config", None)
            options["mask_token_id"] = getattr(own, "mask_token_id", None)
        return options

    def _bind(self, options: dict[str, Any], generation_config: Any, kwargs: dict[str, Any]) -> Sampler:
        def denoiser() -> Denoiser:
            family = replace(find_family(self._model_config), shift=True)  # as Dream, whatever the model
            return Denoiser(self.model, mask_token_id=options["mask_token_id"], family=family)

        if self.sampler is not None:
            given = {name: value for name, value in vars(generation_config or object).items() if name in _RULE} | kwargs
            ineffective = {name: given[name] for name in _RULE if given.get(name) is not None}
            refuse(ineffective, _RULE, "the sampler that was installed decides that")
            sampler = bind(self.sampler, self.model, denoiser)
            if sampler.template is not None:
                lengths = {name: kwargs[name] for name in _LENGTH if name in kwargs}
                refuse(lengths, dict.fromkeys(lengths), "the sampler that was installed has a template")
            return sampler
        rule = {name: options[name] for name in _RULE if name != "alg"}
        rule["top_p"] = None if rule["top_p"] is not None and rule["top_p"] >= 1 else rule["top_p"]
        check_name("alg", options["alg"], ALGORITHMS)
        if options["alg"] == "origin":
            refuse({"alg_temp": rule.pop("alg_temp") or None}, {}, "alg='origin' chooses positions at random")
        decoder = decoders.make(f"dream_{options['alg']}", **rule)
        return Sampler(denoiser(), decoder=decoder.set(**PUBLISHED_PRECISION) if self.model_precision else decoder)

    def _expand(self, ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if attention_mask is None:
            if options["pad_token_id"] is not None and bool((ids == options["pad_token_id"]).any()):
                warnings.warn(
                    "there is padding in inputs, but no attention_mask, so it is read as text; pass attention_mask=",
                    UserWarning,
                    stacklevel=3,
                )
            attention_mask = torch.ones_like(ids)
        elif attention_mask.shape != ids.shape:
            shapes = f"{tuple(attention_mask.shape)} and {tuple(ids.shape)}"
            raise NapDecodeError(f"attention_mask and inputs must have one shape, but have {shapes}")
        check_integer("num_return_sequences", options["num_return_sequences"], 1)
        count = int(options["num_return_sequences"])
        return ids.repeat_interleave(count, dim=0), attention_mask.repeat_interleave(count, dim=0)

    def _length(self, prompt: int, options: dict[str, Any]) -> int:
        """Slots to decode after a prompt of so many tokens."""
        length, longest = options["max_new_tokens"], options["max_length"]
        if length is None:
            length = longest - prompt
            if longest == _LENGTH["max_length"]:  # as in Dream, the default does not count the prompt
                limit = getattr(self._model_config, "max_position_embeddings", None) or 2**31
                length = min(longest, limit - prompt)
        check_integer(f"the number of new tokens (max_length={longest}, less a prompt of {prompt})", length, 1)
        return int(length)


def _canvas(
    ids: Tensor, attention_mask: Tensor, template: CanvasTemplate, denoiser: Denoiser, hook: Hook
) -> tuple[Canvas, Padded]:
    """The template behind the prompts; as in Dream, masks in a prompt are decoded too."""
    layout, blocks = (torch.tensor(row) for row in template.encode(denoiser.tokenizer, denoiser.mask_token_id))
    ids, attention_mask = ids.to(denoiser.device), attention_mask.to(denoiser.device)
    tokens = edited(hook, None, torch.cat([ids, layout.to(ids).expand(len(ids), -1)], dim=1), None)
    there = torch.nn.functional.pad(attention_mask, (0, len(layout)), value=1).bool()
    rows = Padded(tokens, there)
    block = torch.cat([torch.zeros_like(ids), blocks.to(ids).clamp(min=0).expand(len(ids), -1)], dim=1)
    is_open = (tokens == denoiser.mask_token_id) & there
    is_prompt = torch.arange(tokens.shape[1], device=tokens.device) < ids.shape[1]
    canvas = Canvas(
        tokens=rows.to_canvas(tokens.where(there, denoiser.pad_token_id)),
        block=rows.to_canvas(block.where(is_open, -1)),
        attention_mask=rows.to_canvas(there.long()),
        prompt=rows.to_canvas(there & is_prompt & ~is_open),
        block_names=tuple(b.name for b in template.blocks),
        held=tuple(b.held for b in template.blocks),
    )
    return canvas, rows
