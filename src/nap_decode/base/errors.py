"""The one exception of the package, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch


class NapDecodeError(ValueError):
    """Something was asked for that cannot be done; the message says what, why and how to mend it.

    Example:
        >>> from nap_decode import AnyOrderScheduler
        >>> AnyOrderScheduler(steps=0)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: steps must be a whole number of at least 1, but is 0
    """


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number: numpy's will do, a ``bool`` will not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise unless ``value`` is a whole number (see :func:`is_whole`) of at least ``minimum``."""
    if not is_whole(value) or int(value) < minimum:
        raise NapDecodeError(f"{name} must be a whole number of at least {minimum}, but is {value!r}")


def check_seed(seed: Any) -> int:
    """A seed as the signed 64-bit integer that is congruent modulo 2**64; any whole number will do.

    Raises:
        NapDecodeError: ``seed`` is no whole number.
    """
    if not (is_whole(seed) or (isinstance(seed, torch.Tensor) and seed.ndim == 0 and seed.dtype == torch.int64)):
        raise NapDecodeError(f"a seed must be a whole number, but is {seed!r}")
    return (int(seed) + 2**63) % 2**64 - 2**63


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a ``bool``: the text "False" is true."""
    if not isinstance(value, bool):
        raise NapDecodeError(f"{name} must be True or False, but is {value!r}")


def check_tensor(what: str, value: Any, shape: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raise unless ``value`` is a tensor of this shape and type; None stands for any type."""
    is_tensor = isinstance(value, torch.Tensor)
    if not is_tensor or value.shape != shape or dtype not in (None, value.dtype):
        got = f"{value.dtype} {tuple(value.shape)}" if is_tensor else f"{value!r:.80}"
        raise NapDecodeError(f"{what} must be {dtype or 'numbers'} {tuple(shape)}, but is {got}")


def check_ids(what: str, ids: Any) -> list[int]:
    """Token ids as a list of plain numbers; raises unless they are whole numbers of at least 0."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # tensors and arrays
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes):
        raise NapDecodeError(f"{what} must be a list of token ids, but is {ids!r:.80}")
    ids = list(ids)
    for token in ids:
        if type(token) is not int or token < 0:  # the check itself takes a while for long texts
            check_integer(f"a token id of {what}", token, 0)
    return [int(token) for token in ids]


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless ``value`` is a finite number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high or math.isinf(value):
        allowed = (
            f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number of at least {low:g}"
        )
        raise NapDecodeError(f"{name} must be {allowed}, but is {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number; infinities will do."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise NapDecodeError(f"{name} must be a number, but is {value!r}")


def check_part(name: str, value: Any, kind: type, example: str) -> None:
    """Raise unless ``value`` is an object of this kind of part."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise NapDecodeError(f"{name} must be {article} {kind.__name__}, such as {example}, but is {value!r:.80}")


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise unless ``name`` is one of ``known``; the message suggests the nearest."""
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise NapDecodeError(f"there is no {what} {name!r}. {hint}Known: {', '.join(names)}")


def refuse(options: Mapping[str, Any], defaults: Mapping[str, Any], why: str) -> None:
    """Raise if any of the options was given, which would have no effect.

    Args:
        options: names and values.
        defaults: values that count as not given.
        why: they have no effect.
    """
    given = [f"{name}={value!r:.80}" for name, value in options.items() if value != defaults.get(name)]
    if given:
        raise NapDecodeError(f"{', '.join(given)} would have no effect: {why}. Leave it out")


def check_tokenizer(tokenizer: Any, num_embeddings: int | None) -> None:
    """Compare the ids of a tokenizer with those of a model.

    A model may have more of them, because its vocabulary was padded, and a tokenizer a few that were added to it and
    that no text has; everything else is a tokenizer of another model.

    Args:
        tokenizer: whatever has ``get_vocab``; None passes.
        num_embeddings: ids that the model has; None, if that is not known, passes.

    Raises:
        NapDecodeError: the tokenizer's own ids go beyond the model's.

    Warns:
        UserWarning: the model has more than twice as many ids, and more than padding explains.
    """
    if tokenizer is None or num_embeddings is None:
        return
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    highest = max((number for token, number in vocabulary.items() if token not in added), default=0)
    if highest >= num_embeddings:
        raise NapDecodeError(
            f"the tokenizer has ids up to {highest}, but the model has {num_embeddings}, from 0 to "
            f"{num_embeddings - 1}; take the tokenizer that the model was trained with"
        )
    if num_embeddings > max(2 * len(vocabulary), len(vocabulary) + 512):
        warnings.warn(
            f"the tokenizer has {len(vocabulary)} ids, but the model {num_embeddings}; only those of the tokenizer can "
            "be emitted. Is it the one that the model was trained with?",
            stacklevel=3,
        )
