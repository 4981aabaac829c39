"""What transformers' ``generate`` was called with, and which of it can be honoured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Names that users write, and names of logits processors.  What is not here is refused if somebody gave it.

GENERATE_ARGUMENTS = ("inputs", "generation_config", "use_model_defaults", "logits_processor", "stopping_criteria")
GENERATE_INPUTS = ("input_ids", "attention_mask")

_LENGTH = ("max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_PROCESSED = ("suppress_tokens", "bad_words_ids", "sequence_bias", "repetition_penalty", "remove_invalid_values")
_NEITHER = ("use_cache", "disable_compile", "transformers_version", "renormalize_logits")
HONOURED_OPTIONS = {*_LENGTH, *_IDS, *_PROCESSED, *_NEITHER, "do_sample"}
# A checkpoint says these of its usual decoding.  They ask for something if it is the call that has them.
CACHE_OPTIONS = ("cache_implementation", "cache_config", "compile_config")
DRAWING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

PENALTY = "RepetitionPenaltyLogitsProcessor"
BIAS = "SequenceBiasLogitsProcessor"  # from which that of bad_words_ids inherits
WHOLE_CANVAS_PROCESSORS = {
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    PENALTY,
    BIAS,
}


@dataclass(frozen=True)
class GivenToGenerate:
    """Arguments of a call of ``generate``, as opposed to what it makes for its own loops."""

    named: Mapping[str, Any]
    """Those in its signature that do not have their defaults."""
    keywords: Mapping[str, Any]
    """The others, for the generation config and the model, without those of :func:`custom_generate`."""

    @staticmethod
    def under_way(model: Any) -> GivenToGenerate | None:
        """Arguments of the call of the model's ``generate`` that is under way; None if there is none.

        ``generate`` drops some of its arguments (a streamer, an assistant model), and passes others on among what it
        makes, whose names change from release to release.  Its frame has them all, under the names that users write.
        """
        from transformers import GenerationMixin

        function = inspect.unwrap(GenerationMixin.generate)
        (this, *parameters) = inspect.signature(function).parameters.values()
        frame = inspect.currentframe()
        while frame is not None and (
            frame.f_code is not function.__code__ or frame.f_locals.get(this.name) is not model
        ):
            frame = frame.f_back
        if frame is None:
            return None
        named, keywords = {}, {}
        for parameter in parameters:
            value = frame.f_locals.get(parameter.name, parameter.default)
            if parameter.kind is parameter.VAR_KEYWORD:
                keywords = dict(value)
            elif value is not parameter.default:
                named[parameter.name] = value
        return GivenToGenerate(named, keywords)


def neutral_options() -> dict[str, Any]:
    """Options of a ``GenerationConfig`` that ask for nothing, with their values."""
    from transformers import GenerationConfig

    # Without the private method, options whose neutral value it alone knows are refused by name.
    neutral: dict[str, Any] = {**vars(GenerationConfig())}
    return neutral | getattr(GenerationConfig, "_get_default_generation_params", dict)()


def generate_calls_functions() -> bool:
    """Whether ``generate`` takes a function as ``custom_generate``; before 4.57, if any, the name of a repository."""
    from transformers import GenerationMixin

    parameter = inspect.signature(GenerationMixin.generate).parameters.get("custom_generate")
    return parameter is not None and (
        parameter.annotation is parameter.empty or "Callable" in str(parameter.annotation)
    )
