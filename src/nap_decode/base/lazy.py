"""Properties that are computed once, also by compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from typing_extensions import Self

Value = TypeVar("Value")


class lazy(Generic[Value]):  # noqa: N801 - it is used as a decorator, like property
    """A property that is computed when it is first asked for, and kept.

    It does what ``functools.cached_property`` does, but ``torch.compile`` can see through it: that of Python 3.10
    and 3.11 takes a lock.

    Example:
        >>> class Sum:
        ...     @lazy
        ...     def total(self) -> int:
        ...         print("adding up")
        ...         return 3
        >>> numbers = Sum()
        >>> numbers.total + numbers.total
        adding up
        6
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function, self.name = function, f"_lazy_{function.__name__}"
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...
    def __get__(self, owner: object | None, kind: type) -> Self | Value:
        """See :class:`property`."""
        if owner is None:
            return self
        if not hasattr(owner, self.name):
            object.__setattr__(owner, self.name, self.function(owner))  # the owner may be frozen
        value: Value = getattr(owner, self.name)
        return value
