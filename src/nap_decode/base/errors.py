"""The one exception of the package, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
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
    """Raise unless ``value`` is a whole number of at least ``minimum``."""
    if not is_whole(value) or int(value) < minimum:
        raise NapDecodeError(f"{name} must be a whole number of at least {minimum}, but is {value!r}")


def check_seed(seed: Any) -> int:
    """A seed as the signed 64-bit integer that is congruent modulo 2**64; raises unless it is a whole number."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless ``value`` is a finite number with ``low <= value <= high``."""
    if not _is_number(value) or not low <= float(value) <= high or math.isinf(value):
        allowed = f"number from {low:g} to {high:g}" if math.isfinite(high) else f"finite number of at least {low:g}"
        raise NapDecodeError(f"{name} must be a {allowed}, but is {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number; infinities will do."""
    if not _is_number(value):
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
    """Raise if an option is not what it is by default (None unless said): it would have no effect, as ``why`` says."""
    given = [f"{name}={value!r:.80}" for name, value in options.items() if value != defaults.get(name)]
    if given:
        raise NapDecodeError(f"{', '.join(given)} would have no effect: {why}. Leave it out")
