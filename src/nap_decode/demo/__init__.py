"""The embedded checkpoint: a tiny masked-diffusion model, trained on parallel paths, and its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nap_decode.demo.problems import NUM_DIGITS, NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems
from nap_decode.errors import NapDecodeError

__all__ = [
    "CHECKPOINT",
    "NUM_DIGITS",
    "NUM_PATHS",
    "PATH_LENGTH",
    "SUMMARY_LENGTH",
    "NimSum",
    "load",
    "sample_problems",
]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory that ``from_pretrained`` takes."""


def load() -> tuple[Any, Any]:
    """The embedded model, in evaluation mode, and its tokenizer.

    Raises:
        NapDecodeError: transformers is older than 5; its Llama attends to the past only.

    Example:
        >>> model, tokenizer = load()
        >>> tokenizer.mask_token, model.num_parameters()
        ('<mask>', 855680)
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if int(transformers.__version__.split(".")[0]) < 5:
        raise NapDecodeError(
            "the embedded model is a decoder that attends both ways, which transformers can do since version 5, but "
            f"{transformers.__version__} is installed; run pip install 'transformers>=5'"
        )
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
