"""``model.generate(..., custom_generate=sampler.custom_generate)`` of transformers 4.57 or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nap_decode.errors import NapDecodeError
from nap_decode.integrations._shared import bind, refuse
from nap_decode.live import Streams
from nap_decode.output import SamplerOutput
from nap_decode.sampler import Sampler
from nap_decode.trace import ends_before

# What generate(...) makes for its own loops, or leaves to the logits processors, which are looked at one by one.
_LENGTH = ("max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_CACHE = ("use_cache", "cache_implementation", "cache_config", "disable_compile", "compile_config")
_PROCESSED = ("suppress_tokens", "bad_words_ids", "sequence_bias", "repetition_penalty", "remove_invalid_values")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HONOURED = {*_LENGTH, *_IDS, *_CACHE, *_PROCESSED, "do_sample", "transformers_version", "renormalize_logits"}
_PREPARED = ("use_cache", "past_key_values", "cache_position", "logits_to_keep", "position_ids", "token_type_ids")
_PROCESSORS = (
    "SuppressTokensLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
_BIASES = ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor")
_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


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
        stopping_criteria: the length and the end token only.
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
    _check_config(generation_config, sampler)
    attention_mask = model_kwargs.pop("attention_mask", None)
    _check_inputs(input_ids, attention_mask, model_kwargs)
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in _CRITERIA:
            raise NapDecodeError(
                f"{type(criterion).__name__} cannot stop a decoder that fills in slots in any order; leave it out, and "
                "cut the text afterwards"
            )
    prompt = input_ids.shape[1]
    ends, pad = generation_config.eos_token_id, generation_config.pad_token_id
    denoiser = sampler.denoiser.replace(
        logits_processor=(*sampler.denoiser.logits_processor, *_processors(logits_processor, generation_config)),
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


def _check_config(config: Any, sampler: Sampler) -> None:
    from transformers import GenerationConfig

    neutral = vars(GenerationConfig()) | getattr(GenerationConfig, "_get_default_generation_params", dict)()
    neutral = {name: value for name, value in neutral.items() if name[0] != "_" and name not in _HONOURED}
    asked = {name: value for name in neutral if (value := getattr(config, name, None))}  # False, 0 and None ask nothing
    draws = {name: asked.pop(name) for name in _DRAWS if name in asked}
    refuse(asked, neutral, f"{type(sampler).__name__} does not implement it")
    if getattr(config, "do_sample", False):
        refuse(draws, neutral, "the sampler draws as it was made to; give these options to it")
        if not sampler.committer.is_random:
            raise NapDecodeError(
                "do_sample=True, but the sampler draws nothing; make it with temperature=, or pass do_sample=False"
            )


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None, model_kwargs: dict[str, Any]) -> None:
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in _PREPARED}
    if given:
        raise NapDecodeError(
            f"generate(...) got {', '.join(sorted(given))}, which decoding by unmasking does not pass on to the model; "
            "leave it out, or wrap the model in a function that adds it"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = model_kwargs.get("position_ids")
    if positions is not None and bool((positions != mask.cumsum(1) - 1)[mask.bool()].any()):
        raise NapDecodeError("position_ids other than those that follow from attention_mask are not passed on")
    types = model_kwargs.get("token_type_ids")
    if types is not None and bool(types.any()):
        raise NapDecodeError("token_type_ids other than 0 are not passed on to the model")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise NapDecodeError("past_key_values cannot be used: what is masked later changes what earlier positions say")


def _processors(processors: Sequence[Any], config: Any) -> list[Any]:
    """Those that may be called with a whole canvas.  Classes that are not transformers' are taken at their word."""
    kept = []
    for processor in processors:
        name = type(processor).__name__
        if name == "TopKLogitsWarper" and config.do_sample and processor.top_k == config.top_k:
            continue  # generate's own default, see _check_config
        positional = name in _BIASES and any(len(ids) > 1 for ids in processor.sequence_bias)
        if type(processor).__module__.startswith("transformers.") and (
            positional or name not in (*_PROCESSORS, *_BIASES)
        ):
            raise NapDecodeError(
                f"{name}{' for sequences of several tokens' if positional else ''} reads its input as a prefix, or "
                "warps what the sampler has options for; leave out what it is made for"
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
