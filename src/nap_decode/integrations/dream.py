"""Dream's ``diffusion_generate`` (``generation_utils.py`` of HKUNLP/Dream), for any of our samplers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError, check_integer, check_name, refuse
from nap_decode.base.random import SCHEDULE_STREAM
from nap_decode.base.rows import Rows
from nap_decode.canvas import Canvas, CanvasTemplate
from nap_decode.integrations._shared import AnySampler, Padded, dream_decoder, find, make
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.foreign import innermost
from nap_decode.model.prediction import Prediction
from nap_decode.parts.committer import Committer, Predict
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.needs import Needs
from nap_decode.parts.scheduler import AnyOrderScheduler
from nap_decode.parts.slots import Decision, Slots
from nap_decode.run.generate import check_same_model
from nap_decode.run.sampler import Sampler
from nap_decode.run.state import DecodeState

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
_RULE = {"alg": "origin", "steps": 512, "eps": 1e-3, "temperature": 0.0, "top_p": None, "top_k": None, "alg_temp": None}
_LENGTH = {"max_length": 20, "max_new_tokens": None}
_TOKENS = {"mask_token_id": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_OUTPUT = {"num_return_sequences": 1, "output_history": False, "return_dict_in_generate": False, "return_dict": False}
_CONFIG: dict[str, Any] = _RULE | _LENGTH | _TOKENS | _OUTPUT  # DreamGenerationConfig's fields and their defaults
_HOOKS = ("generation_tokens_hook_func", "generation_logits_hook_func")
Hook: TypeAlias = Callable[[Any, Tensor, Any], Tensor]
"""``(step, tokens (B, L), logits (B, L, V))`` -> such tokens or logits, whichever it is for; entry p of the logits is
for position p.  Step and logits are None before the first step."""


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
    how: Any = sampler
    if sampler is not None:
        refuse({"model_precision": model_precision or None}, {}, "the sampler decides that")
        if isinstance(sampler, Sampler):
            check_same_model(sampler, model)
        else:
            how = find(sampler)
    owner = _owner(model)
    before = vars(owner).get("diffusion_generate")
    if isinstance(before, _DiffusionGenerate):
        before = before.before
    owner.diffusion_generate = _DiffusionGenerate(model, how, model_precision, before)


def _owner(model: Any) -> Any:
    """The module that gets what is set on a model: torch.compile's wrapper hands it on."""
    return getattr(model, "_orig_mod", model)


def uninstall(model: Any) -> None:
    """Take our ``diffusion_generate`` off a model, which then has its own again, if it had one.

    Raises:
        NapDecodeError: it is not there.
    """
    owner = _owner(model)
    installed = vars(owner).get("diffusion_generate")
    if not isinstance(installed, _DiffusionGenerate):
        raise NapDecodeError(f"nothing is installed on this {type(model).__name__}; install(model) does it")
    del owner.diffusion_generate
    if installed.before is not None:
        owner.diffusion_generate = installed.before


@dataclass(frozen=True, eq=False)
class _DiffusionGenerate:
    model: Any
    how: Sampler | dict[str, Any] | None  # as find found it
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
            steps = options["steps"] if self.how is None else int(output.trace.step.max()) + 1
            history = [output.trace.canvas_at(step + 1) for step in range(steps if options["output_history"] else 0)]
            history = [rows.padded(tokens) for tokens in history]
        else:
            hooked = _HookedDenoiser(sampler.denoiser, rows, tokens_hook, logits_hook)
            output = Sampler(hooked, decoder=_Recounting.of(sampler.decoder)).decode(canvas, callback=hooked.after_step)
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
        how = self.how
        if how is None:
            rule = {name: options[name] for name in _RULE if name != "alg"}
            if options["alg"] == "origin":
                refuse({"alg_temp": rule.pop("alg_temp") or None}, {}, "alg='origin' chooses positions at random")
            how = {"decoder": dream_decoder(options["alg"], ALGORITHMS, rule)}
        else:
            given = {**vars(generation_config or object), **kwargs}
            ineffective = {name: given[name] for name in _RULE if given.get(name) is not None}
            refuse(ineffective, _RULE, "the sampler that was installed decides that")
        if isinstance(how, Sampler):
            sampler = how
        else:
            own = {"mask_token_id": options["mask_token_id"], "model_precision": self.model_precision}
            sampler = make(how, self.model, is_shifted=True, **own)
        if sampler.template is not None:
            refuse({name: kwargs.get(name) for name in _LENGTH}, {}, "the sampler that was installed has a template")
        return sampler

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
    tokens = _edited(hook, None, torch.cat([ids, layout.to(ids).expand(len(ids), -1)], dim=1), None)
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


# ----------------------------------------------------------------------------------------------- hooks


class _HookedDenoiser(Denoiser):
    """A Denoiser that asks for all logits and lets hooks change them, and after the step the tokens."""

    def __init__(self, denoiser: Denoiser, shown: Padded, tokens_hook: Hook, logits_hook: Hook) -> None:
        vars(self).update(vars(denoiser))  # one that is set up already: nothing is probed again
        self.shown, self.tokens_hook, self.logits_hook = shown, tokens_hook, logits_hook
        self.reuse = None  # a hook wants all logits, of this step
        self.seen: Tensor | None = None
        self.history: list[Tensor] = []  # the rows after every step

    @override
    def predict(self, rows: Rows, tokens: Tensor, wanted: Tensor, places: Tensor, **options: Any) -> Prediction:
        if options.get("hidden") is not None or len(tokens) > len(rows.lengths):
            raise NapDecodeError("a decoder that looks at other canvases besides its own cannot show logits to hooks")
        every = torch.arange(tokens.numel(), device=tokens.device)
        prediction = super().predict(rows, tokens, every.view_as(tokens) % rows.width, every)
        logits = self.shown.padded(prediction.logits)  # (B, L, V)
        changed = self.logits_hook(len(self.history), self.shown.padded(tokens), logits)
        self.seen = _checked("generation_logits_hook_func must return logits", changed, logits)
        column = self.shown.order.gather(1, wanted.clamp(min=0))
        chosen = self.seen.take_along_dim(column[:, :, None], dim=1)  # (B, K, V)
        return Prediction.of(chosen, banned=prediction.banned, places=places)

    def after_step(self, state: DecodeState) -> Tensor:
        """The callback to decode with; while one looks on, no row leaves the batch."""
        tokens = _edited(self.tokens_hook, len(self.history), self.shown.padded(state.tokens), self.seen)
        self.history.append(tokens.clone())
        return self.shown.to_canvas(tokens)


def _edited(hook: Hook, step: int | None, tokens: Tensor, logits: Tensor | None) -> Tensor:
    """What a hook makes of the tokens."""
    return _checked("generation_tokens_hook_func must return the tokens", hook(step, tokens, logits), tokens)


def _checked(what: str, changed: Any, given: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != given.shape:
        raise NapDecodeError(f"{what} {tuple(given.shape)}, not {changed!r:.80}")
    return changed


@dataclass(frozen=True)
class _Recounting(Committer):
    """Goes by the masks there are, as in Dream, and not by a plan; under an AnyOrderScheduler without steps.

    Every step is taken, also if it commits nothing or nothing is masked: the hooks may change the canvas at each.
    """

    inner: Committer
    shares: tuple[float, ...]  # of the masks that each step commits
    draws: bool  # whether each mask has that chance

    @staticmethod
    def of(decoder: Decoder) -> Decoder:
        """The same for Dream's schedules; other decoders as they are."""
        scheduler, eps = decoder.scheduler, getattr(decoder.scheduler.schedule, "eps", None)
        if eps is None or scheduler.steps is None or not isinstance(scheduler, AnyOrderScheduler):
            return decoder
        times = torch.linspace(1, eps, scheduler.steps + 1)  # in float32 as there, because rounding decides
        shares = (*(1 - times[1:-1] / times[:-2]).tolist(), 1.0)
        committer = _Recounting(decoder.committer, shares, scheduler.needs.random)
        return Decoder(AnyOrderScheduler(), committer, decoder.close_on)

    @property
    @override
    def needs(self) -> Needs:  # committed, so that blocks without a mask may stay open
        return self.inner.needs | Needs(adaptive=True, committed=True, random=self.draws)

    @property
    @override
    def patience(self) -> int:
        return len(self.shares)

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Decision:
        step, last = int(slots.step.max()), len(self.shares) - 1
        if step > last:
            raise NapDecodeError(
                f"generation_tokens_hook_func left masks after step {last}, the last of steps={last + 1}; mask slots "
                "earlier, or ask for more steps"
            )
        share = torch.tensor(self.shares[step])
        counted = slots.open & (slots.uniform(SCHEDULE_STREAM) < share) if self.draws else slots.open
        quota = slots.count(counted) if self.draws else (slots.count(counted).float() * share).long()
        decision = self.inner(replace(slots, quota=quota), predict)
        return replace(decision, unsettled=torch.full_like(quota, step < last, dtype=torch.bool))
