"""``model.generate(..., custom_generate=sampler.custom_generate)`` of transformers 4.57 or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.integrations import _generate
from nap_decode.integrations._shared import bind, refuse
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import ends_before
from nap_decode.run.sampler import Sampler
from nap_decode.run.watch import Streams


def for_generate(sampler: Sampler) -> Callable[..., Tensor | SamplerOutput]:
    """:func:`custom_generate` with the sampler filled in.

    Raises:
        NapDecodeError: ``generate`` of this release of transformers calls no functions.
    """
    if not _generate.generate_calls_functions():
        import transformers

        raise NapDecodeError(
            f"generate(custom_generate=) of transformers {transformers.__version__} takes no function; install 4.57 or "
            "later, or call sampler.generate(input_ids, attention_mask, max_new_tokens=...)"
        )
    return partial(custom_generate, sampler)


def custom_generate(
    sampler: Sampler,
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
        sampler: decodes.
        model: the model whose ``generate`` was called; the sampler's.
        input_ids: ``(B, P)`` int64, expanded to ``num_return_sequences``.
        logits_processor: added to those of the sampler's Denoiser.
        stopping_criteria: those that ``generate`` makes of the length and the end tokens.
        generation_config: prepared by ``generate``.
        seed: see :meth:`Sampler.decode`.
        row_seeds: see :meth:`Sampler.decode`.
        stream_to: a transformers streamer, or a list of them, one for each row; see :meth:`Sampler.decode`.
            (``generate``'s own ``streamer=`` is not passed on to custom functions.)
        model_kwargs: the attention mask, and what ``generate`` prepares for its own loops.

    Returns:
        ``(B, P + canvas)`` int64: prompts as given; behind an end token that ``generation_config.eos_token_id`` names,
        padding to the end of its block.  Or a :class:`SamplerOutput` with such ``sequences``.

    Raises:
        NapDecodeError: something that is not honoured.
    """
    bind(sampler, model, lambda: sampler.denoiser)
    given = _generate.GivenToGenerate.under_way(model)
    attention_mask = model_kwargs.pop("attention_mask", None)
    if given is None:  # somebody else calls, and means what is passed
        given = _generate.GivenToGenerate(
            {"stopping_criteria": stopping_criteria, "logits_processor": logits_processor}, model_kwargs
        )
    _check_made({name: value for name, value in model_kwargs.items() if name not in given.keywords})
    _check_named(given.named)
    _check_config(generation_config, sampler, getattr(model, "generation_config", None), given.keywords)
    rest = {name: value for name, value in given.keywords.items() if not hasattr(generation_config, name)}
    _check_inputs(input_ids, attention_mask, rest)
    prompt = input_ids.shape[1]
    ends, pad = generation_config.eos_token_id, generation_config.pad_token_id
    denoiser = sampler.denoiser.replace(
        logits_processor=(*sampler.denoiser.logits_processor, *_processors(logits_processor, generation_config, given)),
        end_token_ids=[ends] if isinstance(ends, int) else ends,
    )
    bound = sampler.replace(denoiser=denoiser)
    streams = None
    if stream_to is not None:
        streams = Streams(
            stream_to,
            list(input_ids[:, None]),
            [prompt] * len(input_ids),
            ends=() if ends is None else bound.denoiser.end_token_ids,
            is_final=not bound.committer.revises,
        )
    output = bound.generate(
        input_ids,
        attention_mask,
        max_new_tokens=_slots(bound, prompt, generation_config, model),
        seed=seed,
        row_seeds=row_seeds,
        callback=streams,
        return_dict_in_generate=True,
    )
    assert isinstance(output, SamplerOutput)
    sequences = torch.cat([input_ids, output.sequences[:, prompt:].to(input_ids.device)], dim=1)
    if ends is not None:
        behind = ends_before(sequences, output.canvas.block.to(sequences.device), denoiser.end_token_ids) > 0
        sequences = sequences.masked_fill(behind, denoiser.end_token_ids[0] if pad is None else pad)
    if streams is not None:
        streams.end(output.sequences, output.canvas.block)
    return replace(output, sequences=sequences) if generation_config.return_dict_in_generate else sequences


def _check_named(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that ``generate`` has for its own loops alone, and criteria other than those it makes."""
    known = (*_generate.GENERATE_ARGUMENTS, "custom_generate")
    dropped = {name: value for name, value in arguments.items() if name not in known and value is not False}
    why = "it is for generate's own loops"
    refuse(dropped, {}, f"{why}; a streamer can be passed as stream_to=" if "streamer" in dropped else why)
    for criterion in arguments.get("stopping_criteria") or ():
        raise NapDecodeError(
            f"{type(criterion).__name__} cannot stop a decoder that fills in slots in any order; leave it out, and "
            "cut the text afterwards, or pass max_new_tokens= or eos_token_id="
        )


def _check_config(config: Any, sampler: Sampler, checkpoint: Any, keywords: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect, except what the checkpoint alone says of caches and of drawing."""
    neutral = _generate.neutral_options()
    usual = {} if checkpoint is None else vars(checkpoint)
    options = {
        name: value for name, value in vars(config).items() if name[0] != "_" and name not in _generate.HONOURED_OPTIONS
    }
    given = {
        name: value
        for name, value in options.items()
        if name in keywords or value not in (usual.get(name), neutral.get(name))
    }
    draws = {name: given[name] for name in _generate.DRAWING_OPTIONS if name in given}
    asked = {
        name: value
        for name, value in options.items()
        if name in given or (name in neutral and name not in _generate.CACHE_OPTIONS)
    }
    # False and 0 ask nothing.
    asked = {name: value for name, value in asked.items() if value and name not in _generate.DRAWING_OPTIONS}
    refuse(asked, neutral, f"{type(sampler).__name__} does not implement it")
    why = "the sampler draws as it was made to; give these options to it"
    if sampler.committer.is_random:
        refuse(draws, {}, why)  # temperature=1.0, too, which need not be the sampler's
        if keywords.get("do_sample") is False:
            raise NapDecodeError(
                "do_sample=False, but the sampler draws; make it without temperature=, or leave it out"
            )
    else:
        refuse({name: value for name, value in draws.items() if value}, neutral, why)  # temperature=0 is what is done
        if getattr(config, "do_sample", False):
            raise NapDecodeError(
                "do_sample=True, but the sampler draws nothing; make it with temperature=, or pass do_sample=False"
            )


def _check_made(made: Mapping[str, Any]) -> None:
    """Refuse what is not of the kinds that ``generate`` makes for its own loops, by whatever name it is passed."""
    for name, value in _generate.items():
        is_flag = value is None or isinstance(value, bool) or value == 1  # use_cache, logits_to_keep
        if not (isinstance(value, Tensor) or is_flag or type(value).__module__.startswith("transformers.")):
            raise NapDecodeError(f"custom_generate(...) got {name}={value!r:.80}, which it does not know; leave it out")


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None, given: Mapping[str, Any]) -> None:
    """Refuse inputs of the model, but for those that a decode is the same with as without."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for name, value in given.items():
        if value is None or value is False or name in _generate.GENERATE_INPUTS:
            continue
        if "position" in name and isinstance(value, Tensor):
            if bool((value != mask.cumsum(1) - 1)[mask.bool()].any()):
                raise NapDecodeError(f"{name} other than those that follow from attention_mask are not passed on")
        elif name == "token_type_ids" and isinstance(value, Tensor):
            if bool(value.any()):
                raise NapDecodeError("token_type_ids other than 0 are not passed on to the model")
        elif hasattr(value, "get_seq_length"):
            if value.get_seq_length() > 0:
                raise NapDecodeError(f"{name} cannot be used: what is masked later changes what earlier positions say")
        else:
            raise NapDecodeError(
                f"generate(...) got {name}, which decoding by unmasking does not pass on to the model; leave it out, "
                "or wrap the model in a function that adds it"
            )


def _processors(processors: Sequence[Any], config: Any, given: _generate.GivenToGenerate) -> list[Any]:
    """Those that may be called with a whole canvas.  A class that is not transformers' is taken at its word."""
    kept = []
    for processor in processors:
        kind = next(kind for kind in type(processor).__mro__ if "__call__" in vars(kind))  # whose code it runs
        if not kind.__module__.startswith("transformers."):
            kept.append(processor)
            continue
        is_given = any(processor is other for other in given.named.get("logits_processor") or ())
        draws = {name: getattr(processor, name) for name in _generate.DRAWING_OPTIONS if hasattr(processor, name)}
        if draws and config.do_sample and not is_given and draws.items() <= vars(config).items():
            continue  # generate's or the checkpoint's default, see _check_config
        if kind.__name__ == _generate.PENALTY and not is_given:
            processor = kind(processor.penalty)  # without generate's count of padding, which is on the left
        what = None if kind.__name__ in _generate.WHOLE_CANVAS_PROCESSORS else ""
        if kind.__name__ == _generate.BIAS and any(len(ids) > 1 for ids in processor.sequence_bias):
            what = " for sequences of several tokens"
        elif kind.__name__ == _generate.PENALTY and processor.prompt_ignore_length:
            what = " with prompt_ignore_length"
        if what is not None:
            raise NapDecodeError(
                f"{type(processor).__name__}{what} reads its input as a prefix, or warps what the sampler has options "
                "for; leave out what it is made for"
            )
        kept.append(processor)
    return kept


def _slots(sampler: Sampler, prompt: int, config: Any, model: Any) -> int | None:
    """Slots to decode; None for the sampler's template."""
    if sampler.template is None or config.max_new_tokens is not None:
        return int(config.max_length) - prompt
    default = min(20 + prompt, getattr(model.config, "max_position_embeddings", None) or 2**31)
    needed = prompt + len(sampler.template.encode(sampler.tokenizer, sampler.denoiser.mask_token_id)[0])
    if needed > config.max_length != default:
        raise NapDecodeError(
            f"the prompt and the sampler's template take {needed} tokens, more than max_length={config.max_length}"
        )
    return None
