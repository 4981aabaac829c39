"""Parts as plain data and back, and in words.

Every part is a frozen dataclass of numbers, names and other parts, so that what a sampler does can be written
to a file, compared, and read by people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from numbers import Integral, Real
from types import FunctionType
from typing import Any, TypeAlias

from nap_decode.base.errors import NapDecodeError, check_name
from nap_decode.parts.confidence import STATISTICS
from nap_decode.parts.decoder import is_part

Part: TypeAlias = "type[Any] | Callable[..., Any]"
"""A class or function of yours, which a file names."""

_PACKAGE = "nap_decode."
_HOMES = ("canvas", "parts", "decoders", "speed")
"""Where the package has its parts."""


def to_plain(value: Any) -> Any:
    """A part as JSON can hold it: dataclasses as their options (those that are not the default), and their name.

    Example:
        >>> from nap_decode import AnyOrderScheduler
        >>> to_plain(AnyOrderScheduler(steps=8))
        {'part': 'parts.scheduler.AnyOrderScheduler', 'steps': 8}
    """
    if is_part(value):
        options = {name: to_plain(option) for name, option in _options(value).items()}
        for name in options.keys() & {"part", "function", "own"}:
            raise NapDecodeError(f"{type(value).__name__} cannot be saved with an option called {name!r}; rename it")
        return _named("part", type(value)) | options
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, FunctionType) and value.__name__ != "<lambda>":
        return _named("function", value)
    kind = type(value)
    has_options = any("__init__" in vars(base) or "__new__" in vars(base) for base in kind.__mro__[:-1])
    if callable(value) and not has_options and getattr(value, "__dict__", None) == {}:  # it is nothing but its class
        return _named("part", kind)
    raise NapDecodeError(
        f"{value!r:.80} cannot be saved; make the part a function with a name, or a frozen dataclass of numbers, "
        "texts and other parts"
    )


def from_plain(data: Any, parts: Sequence[Part] = ()) -> Any:
    """The part that :func:`to_plain` wrote; ``parts`` are classes and functions of yours that occur in it.

    Example:
        >>> from_plain({"part": "parts.scheduler.AnyOrderScheduler", "steps": 8})
        AnyOrderScheduler(steps=8, tokens_per_step=None, schedule=EvenSchedule())
    """
    if isinstance(data, list):
        return tuple(from_plain(item, parts) for item in data)
    if not isinstance(data, dict):
        return data
    name = data.get("part", data.get("function"))
    if not isinstance(name, str):
        raise NapDecodeError(f"{data!r:.80} is not a part: it has neither a 'part' nor a 'function'")
    if data.get("own"):
        own = {getattr(part, "__name__", repr(part)): part for part in parts}
        check_name("part of yours (name them in parts=)", name, own)
        part: Any = own[name]
    else:
        part = _of_package(name, FunctionType if "function" in data else type)
    if "function" in data:
        return part
    options = {key: from_plain(value, parts) for key, value in data.items() if key not in ("part", "own")}
    try:
        return part(**options)
    except TypeError as error:
        raise NapDecodeError(f"{name} cannot be made from {options}: {error}") from error


def describe(part: Any) -> str:
    """What a part does, in words: its name and options, the first line of its documentation, and its parts.

    Example:
        >>> from nap_decode import MicroConfidenceCommitter, ThresholdSelection
        >>> print(describe(MicroConfidenceCommitter(selection=ThresholdSelection(0.8))))
        MicroConfidenceCommitter()
          Proposes a token for every open slot, scores it, and commits the best of each block.
          selection: ThresholdSelection(threshold=0.8)
            Every slot that reaches a confidence (Fast-dLLM, arXiv 2505.22618, algorithm 1).
    """
    options = _options(part) if is_dataclass(part) else {}
    inner = {name: option for name, option in options.items() if is_dataclass(option)}
    for name in ("selection", "inner", "committer"):  # which are shown even if they are the default
        if hasattr(part, name):
            inner = {name: getattr(part, name)} | inner
    plain = {name: option for name, option in options.items() if name not in inner}
    shown = ", ".join(f"{name}={getattr(option, '__name__', f'{option!r:.60}')}" for name, option in plain.items())
    lines = [f"{type(part).__name__}({shown})"]
    if (part.__doc__ or "").strip():
        lines.append("  " + part.__doc__.strip().splitlines()[0])
    lines += ["  " + f"{name}: {describe(option)}".replace("\n", "\n  ") for name, option in inner.items()]
    return "\n".join(lines)


def _named(kind: str, part: Part) -> dict[str, Any]:
    """The name of a part: where this package has it, or marked as somebody else's."""
    if part.__module__.startswith(_PACKAGE):
        return {kind: f"{part.__module__.removeprefix(_PACKAGE)}.{part.__qualname__}"}
    return {kind: part.__name__, "own": True}


def _options(part: Any) -> dict[str, Any]:
    """Options that differ from their default."""
    options = {field.name: (getattr(part, field.name), field.default) for field in fields(part) if field.init}
    return {name: value for name, (value, default) in options.items() if not _equal(value, default)}


def _equal(value: Any, default: Any) -> bool:
    try:
        return value is default or bool(value == default)
    except ValueError:  # of an array
        return False


def _of_package(name: str, kind: type) -> Any:
    """A part of this package; nothing else of it, or of any other, can be named by a file."""
    module, _, thing = name.rpartition(".")
    try:
        part = getattr(import_module(_PACKAGE + module), thing) if module.split(".")[0] in _HOMES else None
    except (ImportError, AttributeError):
        part = None
    is_known = is_dataclass(part) if kind is type else part in STATISTICS.values()
    if not is_known or not isinstance(part, kind) or part.__module__ != _PACKAGE + module:
        raise NapDecodeError(
            f"there is no part {name!r} in this version; make it anew, or use the version that wrote it"
        )
    return part
