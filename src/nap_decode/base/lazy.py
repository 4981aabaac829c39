"""Properties that are computed once: ``functools.cached_property``, but ``torch.compile`` can see through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["lazy"]

if TYPE_CHECKING:
    from functools import cached_property as lazy
else:

    class lazy:  # noqa: N801 - it is used as a decorator, like property
        """See the module: before Python 3.12 the standard one has a lock."""

        def __init__(self, function: Any) -> None:
            self.function, self.name = function, f"_lazy_{function.__name__}"
            self.__doc__ = function.__doc__

        def __get__(self, owner: Any, kind: type) -> Any:
            """See :class:`property`."""
            if owner is None:
                return self
            if not hasattr(owner, self.name):
                object.__setattr__(owner, self.name, self.function(owner))  # the owner may be frozen
            return getattr(owner, self.name)
