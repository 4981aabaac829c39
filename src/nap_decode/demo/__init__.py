"""The embedded checkpoints: two tiny masked-diffusion models, and their task.

One was trained on parallel paths, the other one on long chains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nap_decode.base.errors import check_name
from nap_decode.checkpoints import load_checkpoint
from nap_decode.demo.problems import NUM_DIGITS, NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems

__all__ = [
    "CHAIN_CHECKPOINT",
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
"""Directory that ``from_pretrained`` takes: the model that was trained on parallel paths."""
CHAIN_CHECKPOINT = Path(__file__).parent / "chain_checkpoint"
"""The model that was trained on long chains, for comparison."""


def load(trained_on: str = "paths") -> tuple[Any, Any]:
    """An embedded model, in evaluation mode, and its tokenizer.

    Both were trained on the same problems with the same compute (see ``examples/miniature``); they differ in how
    the solutions were written.

    Args:
        trained_on: ``"paths"``, three solutions under headers and a summary, or ``"chain"``, one long solution.

    Raises:
        NapDecodeError: another name.

    Example:
        >>> model, tokenizer = load()
        >>> tokenizer.mask_token, model.num_parameters()
        ('<mask>', 855680)
        >>> from nap_decode import Sampler, decoders
        >>> sampler = Sampler(*load("chain"), decoders.left_to_right().set(tokens_per_step=5))
        >>> sampler("6 0 6 4 6 2 1 2 4 7 0 6 =", max_new_tokens=35).text
        ' 6 0 6 6 6 0 0 4 4 4 6 2 2 2 0 0 1 1 1 2 3 3 4 7 7 7 0 0 0 0 0 6 6 6'
    """
    directories = {"paths": CHECKPOINT, "chain": CHAIN_CHECKPOINT}
    check_name("embedded model", trained_on, directories)
    return load_checkpoint(directories[trained_on])
