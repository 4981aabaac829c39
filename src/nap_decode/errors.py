"""The one exception of the package, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class NapDecodeError(ValueError):
    """Something was asked for that cannot be done; the message says what, why and how to mend it.

    Example:
        >>> from nap_decode import AnyOrderScheduler
        >>> AnyOrderScheduler(steps=0)
        Traceback (most recent call last):
        ...
        nap_decode.errors.NapDecodeError: steps must be a whole number of at least 1, but is 0
    """


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise unless ``value`` is a whole number (numpy's will do, a ``bool`` will not) of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise NapDecodeError(f"{name} must be a whole number of at least {minimum}, but is {value!r}")


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


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise unless ``name`` is one of ``known``; the message suggests the nearest."""
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise NapDecodeError(f"there is no {what} {name!r}. {hint}Known: {', '.join(names)}")
