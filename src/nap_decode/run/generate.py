"""``model.generate(..., custom_generate=sampler.custom_generate)`` of transformers 4.57 or later.

transformers' arguments, options and logits processors are known by name here alone; what is not known is refused if
somebody gave it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, refuse
from nap_decode.model import foreign
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import ends_before
from nap_decode.run.watch import Streams

_ARGUMENTS = ("inputs", "generation_config", "use_model_defaults", "logits_processor", "stopping_criteria")
_LENGTHS = ("max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_PROCESSED = ("suppress_tokens", "bad_words_ids", "sequence_bias", "repetition_penalty", "remove_invalid_values")
_NEITHER = ("use_cache", "disable_compile", "transformers_version", "renormalize_logits")
_HONOURED = {*_LENGTHS, *_IDS, *_PROCESSED, *_NEITHER, "do_sample"}
# A checkpoint says these of its usual decoding.  They ask for something if it is the call that has them.
_CACHES = ("cache_implementation", "cache_config", "compile_config")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_PENALTY = "RepetitionPenaltyLogitsProcessor"
_BIAS = "SequenceBiasLogitsProcessor"  # from which that of bad_words_ids inherits
_WHOLE_CANVAS = ("SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", _PENALTY, _BIAS)


def for_generate(sampler: Any) -> Callable[..., Tensor | SamplerOutput]:
    """:func:`custom_generate` with the sampler filled in; raises if ``generate`` of this release calls no functions."""
    import transformers

    parameter = inspect.signature(transformers.GenerationMixin.generate).parameters.get("custom_generate")
    annotation = None if parameter is None else parameter.annotation
    # Before 4.57 it takes, if any, the name of a repository.
    if annotation is not inspect.Parameter.empty and "Callable" not in str(annotation):
        raise NapDecodeError(
            f"generate(custom_generate=) of transformers {transformers.__version__} takes no function; install 4.57 or "
            "later, or call sampler.generate(input_ids, attention_mask, max_new_tokens=...)"
        )
    return partial(custom_generate, sampler)


def check_same_model(sampler: Any, model: Any) -> None:
    """Raise unless a sampler is one of this model, wrappers apart that change nothing."""
    own, given = foreign.unwrapped(sampler.denoiser.model), foreign.unwrapped(model)
    if (
        own[-1] is not given[-1]
        or foreign.virtual_tokens(own) != foreign.virtual_tokens(given)
        or list(map(id, foreign.wrappers_of_others(own[0]))) != list(map(id, foreign.wrappers_of_others(given[0])))
    ):
        raise NapDecodeError(
            f"the sampler is for another model ({type(own[0]).__name__}) than it is run with ({type(model).__name__}); "
            "make it with this model, or pass its decoder instead"
        )


def custom_generate(
    sampler: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: Any = None,
    *,
    seed: int | None = None,
    row_seeds: Sequence[int] | None = None,
    stream_to: Any = None,
    **model_kwargs: Any,
) -> Tensor | SamplerOutput:
    """What ``generate`` calls instead of its own loop; ``sampler.custom_generate`` has the sampler filled in.

    ``docs/integrations.md`` says what of a generation config is honoured; everything else is refused by name.

    Args:
        sampler: a :class:`~nap_decode.Sampler` of the model.
        model: the model whose ``generate`` was called.
        input_ids: ``(B, P)`` int64, expanded to ``num_return_sequences``.
        logits_processor: added to those of the sampler's Denoiser.
        stopping_criteria: those that ``generate`` makes of the length and the end tokens.
        generation_config: prepared by ``generate``.
        seed: see :class:`RunOptions`.
        row_seeds: see :class:`RunOptions`.
        stream_to: see ``streamer`` of :class:`RunOptions`.  (``generate``'s own ``streamer=`` is not passed on.)
        model_kwargs: the attention mask, and what ``generate`` prepares for its own loops.

    Returns:
        ``(B, P + canvas)`` int64: prompts as given; behind an end token that ``generation_config.eos_token_id`` names,
        padding to the end of its block.  Or a :class:`SamplerOutput` with such ``sequences``.

    Raises:
        NapDecodeError: something that is not honoured.
    """
    check_same_model(sampler, model)
    attention_mask = model_kwargs.pop("attention_mask", None)
    given, keywords = _given(model) or (
        {"stopping_criteria": stopping_criteria, "logits_processor": logits_processor},
        model_kwargs,  # somebody else calls, and means what is passed
    )
    _check_made({name: value for name, value in model_kwargs.items() if name not in keywords})
    _check_named(given)
    _check_config(generation_config, sampler, getattr(model, "generation_config", None), keywords)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check_inputs(mask, {n: v for n, v in keywords.items() if not hasattr(generation_config, n)})
    ends, pad = generation_config.eos_token_id, generation_config.pad_token_id
    processors = _processors(logits_processor, generation_config, given.get("logits_processor") or ())
    denoiser = sampler.denoiser.replace(
        logits_processor=(*sampler.denoiser.logits_processor, *processors),
        end_token_ids=[ends] if isinstance(ends, int) else ends,
    )
    bound, prompt = sampler.over(denoiser), input_ids.shape[1]
    follows = bound.template is not None and generation_config.max_new_tokens is None
    canvas = bound.canvas(
        {"input_ids": input_ids, "attention_mask": mask},
        max_new_tokens=None if follows else int(generation_config.max_length) - prompt,
    )
    slots = int(canvas.row_lengths[0] - mask[0].sum())
    if follows:
        default = min(20 + prompt, getattr(model.config, "max_position_embeddings", None) or 2**31)
        if prompt + slots > generation_config.max_length != default:
            raise NapDecodeError(
                f"the prompt and the sampler's template take {prompt + slots} tokens, more than max_length="
                f"{generation_config.max_length}"
            )
    streams = None
    if stream_to is not None:
        cut = () if ends is None else denoiser.end_token_ids
        streams = Streams(stream_to, canvas, ends=cut, is_final=not bound.decoder.needs.committed)
    output: SamplerOutput = bound.decode(canvas, seed=seed, row_seeds=row_seeds, callback=streams)
    # The canvas's rows begin in column 0; prompts come back as they were given.
    columns = canvas.row_lengths[:, None] - slots + torch.arange(slots, device="cpu")
    decoded, block = output.trace.tokens.gather(1, columns), output.trace.block.gather(1, columns)
    if ends is not None:
        behind = ends_before(decoded, block, denoiser.end_token_ids) > 0
        decoded = decoded.masked_fill(behind, denoiser.end_token_ids[0] if pad is None else pad)
    sequences = torch.cat([input_ids, decoded.to(input_ids.device)], dim=1)
    if streams is not None:
        streams.end(output.trace.tokens, ~output.trace.masked())
    return replace(output, sequences=sequences) if generation_config.return_dict_in_generate else sequences


# ---------------------------------------------------------------------------------------- what was given


def _given(model: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """What the call of the model's ``generate`` that is under way was given; None if there is no such call.

    First the arguments in its signature that do not have their defaults, then those for the config and the model.
    ``generate`` drops some of its arguments (a streamer, an assistant model), and passes others on among what it makes
    for its own loops, whose names change from release to release.  Its frame has them all, as users write them.
    """
    from transformers import GenerationMixin

    function = inspect.unwrap(GenerationMixin.generate)
    this, *parameters = inspect.signature(function).parameters.values()
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code is not function.__code__ or frame.f_locals.get(this.name) is not model):
        frame = frame.f_back
    if frame is None:
        return None
    values = {p.name: frame.f_locals.get(p.name, p.default) for p in parameters}
    keywords = [values.pop(p.name) for p in parameters if p.kind is p.VAR_KEYWORD]
    named = {p.name: values[p.name] for p in parameters if values.get(p.name, p.default) is not p.default}
    return named, dict(*keywords)


def _check_named(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that ``generate`` has for its own loops alone, and criteria other than those it makes."""
    known = (*_ARGUMENTS, "custom_generate")
    dropped = {name: value for name, value in arguments.items() if name not in known and value is not False}
    why = "it is for generate's own loops"
    refuse(dropped, {}, f"{why}; a streamer can be passed as stream_to=" if "streamer" in dropped else why)
    for criterion in arguments.get("stopping_criteria") or ():
        raise NapDecodeError(
            f"{type(criterion).__name__} cannot stop a decoder that fills in slots in any order; leave it out, and "
            "cut the text afterwards, or pass max_new_tokens= or eos_token_id="
        )


def _check_config(config: Any, sampler: Any, checkpoint: Any, keywords: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect, except what the checkpoint alone says of caches and of drawing."""
    from transformers import GenerationConfig

    # Without the private method, options whose neutral value it alone knows are refused by name.
    neutral = vars(GenerationConfig()) | getattr(GenerationConfig, "_get_default_generation_params", dict)()
    usual = {} if checkpoint is None else vars(checkpoint)
    options = {name: value for name, value in vars(config).items() if name[0] != "_" and name not in _HONOURED}
    given = {n: v for n, v in options.items() if n in keywords or v not in (usual.get(n), neutral.get(n))}
    asked = given | {n: v for n, v in options.items() if n in neutral and n not in _CACHES}
    asked = {n: v for n, v in asked.items() if v and n not in _DRAWS}  # False and 0 ask nothing
    refuse(asked, neutral, f"{type(sampler).__name__} does not implement it")
    # temperature=1.0 need not be the sampler's, if it draws; temperature=0 is what is done, if it does not.
    is_random, do_sample = sampler.decoder.needs.random, getattr(config, "do_sample", False)
    draws = {name: given[name] for name in _DRAWS if name in given and (is_random or given[name])}
    refuse(draws, {} if is_random else neutral, "the sampler draws as it was made to; give these options to it")
    if is_random and keywords.get("do_sample") is False:
        raise NapDecodeError("do_sample=False, but the sampler draws; make it without temperature=, or leave it out")
    if do_sample and not is_random:
        raise NapDecodeError(
            "do_sample=True, but the sampler draws nothing; make it with temperature=, or pass do_sample=False"
        )


def _check_made(made: Mapping[str, Any]) -> None:
    """Refuse what is not of the kinds that ``generate`` makes for its own loops, by whatever name it is passed."""
    for name, value in made.items():
        is_flag = value is None or isinstance(value, bool) or value == 1  # use_cache, logits_to_keep
        if not (isinstance(value, Tensor) or is_flag or type(value).__module__.startswith("transformers.")):
            raise NapDecodeError(f"custom_generate(...) got {name}={value!r:.80}, which it does not know; leave it out")


def _check_inputs(mask: Tensor, given: Mapping[str, Any]) -> None:
    """Refuse inputs of the model, but for those that a decode is the same with as without."""
    for name, value in given.items():
        if value is None or value is False or name in ("input_ids", "attention_mask"):
            continue
        if "position" in name and isinstance(value, Tensor):
            if bool((value != mask.cumsum(1) - 1)[mask.bool()].any()):
                raise NapDecodeError(f"{name} other than those that follow from attention_mask are not passed on")
        elif name == "token_type_ids" and isinstance(value, Tensor):
            if bool(value.any()):
                raise NapDecodeError("token_type_ids other than 0 are not passed on to the model")
        elif not hasattr(value, "get_seq_length"):
            raise NapDecodeError(
                f"generate(...) got {name}, which decoding by unmasking does not pass on to the model; leave it out, "
                "or wrap the model in a function that adds it"
            )
        elif value.get_seq_length() > 0:
            raise NapDecodeError(f"{name} cannot be used: what is masked later changes what earlier positions say")


def _processors(processors: Sequence[Any], config: Any, given: Sequence[Any]) -> list[Any]:
    """Those that may be called with a whole canvas.  A class that is not transformers' is taken at its word."""
    kept = []
    for processor in processors:
        kind = next(kind for kind in type(processor).__mro__ if "__call__" in vars(kind))  # whose code it runs
        if not kind.__module__.startswith("transformers."):
            kept.append(processor)
            continue
        is_given = any(processor is other for other in given)
        draws = {name: getattr(processor, name) for name in _DRAWS if hasattr(processor, name)}
        if draws and config.do_sample and not is_given and draws.items() <= vars(config).items():
            continue  # generate's or the checkpoint's default, see _check_config
        if kind.__name__ == _PENALTY and not is_given:
            processor = kind(processor.penalty)  # without generate's count of padding, which is on the left
        what = None if kind.__name__ in _WHOLE_CANVAS else ""
        if kind.__name__ == _BIAS and any(len(ids) > 1 for ids in processor.sequence_bias):
            what = " for sequences of several tokens"
        elif kind.__name__ == _PENALTY and processor.prompt_ignore_length:
            what = " with prompt_ignore_length"
        if what is not None:
            raise NapDecodeError(
                f"{type(processor).__name__}{what} reads its input as a prefix, or warps what the sampler has options "
                "for; leave out what it is made for"
            )
        kept.append(processor)
    return kept
