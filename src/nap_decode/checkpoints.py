"""Checkpoints, of whichever kind, and the options of a command that name one."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch

from nap_decode.base.errors import NapDecodeError


def load_checkpoint(
    path: str | PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    bidirectional: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its tokenizer.

    Args:
        path: directory or hub name of a transformers checkpoint.
        device: where the model goes, for example ``"cuda"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for that of the checkpoint.
        bidirectional: set ``is_causal = False`` in the config of a decoder.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        NapDecodeError: the checkpoint lacks weights of the model, or has them in other shapes.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = load_checkpoint(demo.CHECKPOINT)
        >>> model.num_parameters()
        855680
    """
    import transformers

    trust = {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(path, **trust)
    if bidirectional:
        config.is_causal = False
    options = {precision_argument(): dtype}
    model = load_all(auto_class(config), path, config=config, **options, **trust)
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(path, **trust)


def add_model_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, device: str | None = "cpu"
) -> Callable[..., Any]:
    """Add the options that :func:`load_named` reads, and ``--mask-token-id``; returns what adds more to their group."""
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add = parser.add_argument_group("model").add_argument
    add("--model", required=required, help="directory or hub name of a transformers checkpoint")
    default = device or "cuda if there is one, else cpu; accelerate launch decides itself"
    add("--device", default=device, help=f"where to run, for example cuda (default: {default})")
    add("--dtype", choices=dtypes, default="auto", help="default: as the checkpoint")
    add("--mask-token-id", type=int, help="the mask id, if neither tokenizer nor config names it")
    add("--bidirectional", action="store_true", help="set is_causal = False in the config of a decoder")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return add


def check_device(args: argparse.Namespace) -> None:
    """Raise if the options name CUDA where there is none."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise NapDecodeError(f"--device {args.device}: this torch sees no CUDA device")


def load_named(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that options of a command name."""
    names = ("device", "dtype", "bidirectional", "trust_remote_code")
    return load_checkpoint(args.model, **{name: getattr(args, name) for name in names})


def auto_class(config: Any) -> Any:
    """The transformers class that loads a checkpoint with this config."""
    import transformers

    names, remote = config.architectures or [], getattr(config, "auto_map", None) or {}
    if any(name.endswith("ForMaskedLM") for name in names):
        return transformers.AutoModelForMaskedLM
    # A class of the checkpoint's own may be called anything; it says with what to load it.
    for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        if name in remote:
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def load_all(loader: Any, path: str | PathLike[str], **options: Any) -> Any:
    """The model of a checkpoint, by a transformers class, which itself fills up what is missing with random weights.

    Raises:
        NapDecodeError: parameters that the checkpoint does not have, or has in other shapes.

    Warns:
        UserWarning: the model's own code loads it, and does not say what was missing.
    """
    asked = options | {"output_loading_info": True}
    try:
        loaded = loader.from_pretrained(path, **asked)
    except (AttributeError, TypeError):  # code of its own that expects nothing but a model, or fails in any case
        loaded = loader.from_pretrained(path, **options)
    except RuntimeError:  # what transformers raises about shapes, not always with their names, and about more
        _, info = loader.from_pretrained(path, **asked, ignore_mismatched_sizes=True)
        # Some releases add the shapes.
        names = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        if not names:
            raise
        raise NapDecodeError(
            f"{len(names)} weights of the checkpoint {path} have other shapes than its config says: {_some(names)}; "
            "take config and weights of one model"
        ) from None
    if not isinstance(loaded, tuple):
        warnings.warn(
            f"{type(loaded).__name__} loads itself, so that it cannot be seen whether the checkpoint {path} has all "
            "its weights",
            UserWarning,
            stacklevel=3,
        )
        return loaded
    model, info = loaded
    # Those that are tied count once, and buffers, which are computed and not learnt, do not.
    missing = sorted(name for name, _ in model.named_parameters() if name in info["missing_keys"])
    if missing:
        unexpected = sorted(info["unexpected_keys"])
        hint = f", which has {len(unexpected)} others, such as {unexpected[0]}" if unexpected else ""
        raise NapDecodeError(
            f"{len(missing)} weights of {type(model).__name__} are not in the checkpoint {path}{hint}: "
            f"{_some(missing)}. They would be random. Is it complete, and of this architecture? To decode such a model "
            "all the same, load it with transformers and make a sampler of it"
        )
    return model


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def precision_argument() -> str:
    """The name by which ``from_pretrained``, ``from_config`` and configs take a precision; torch_dtype before 4.56."""
    from transformers import PretrainedConfig

    return "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
