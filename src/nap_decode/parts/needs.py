"""What a part of a decoder needs of the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from nap_decode.base.errors import NapDecodeError


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of a part; those of a whole are ``|`` of its parts'.

    Args:
        adaptive: the number of tokens that a step commits depends on the model.
        random: results depend on the seed.
        memory: something is kept from step to step.
        committed: committed slots of the open blocks are looked at, too.
        left_out: predictions at committed slots leave out what stands in the slot itself, which not every model can.
        previous: the logits of the step before are kept in memory.
        ahead: it is told what would be open with one token more, see :attr:`~nap_decode.parts.Slots.ahead`; only of an
            adaptive part.
        statistics: what is asked of each prediction besides the confidence: functions of
            :class:`~nap_decode.parts.confidence.Candidates`, or their names.

    Example:
        >>> (Needs(adaptive=True) | Needs(random=True)).adaptive
        True
    """

    adaptive: bool = False
    random: bool = False
    memory: bool = False
    committed: bool = False
    left_out: bool = False
    previous: bool = False
    ahead: bool = False
    statistics: tuple[str | Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, tuple | list):
            raise NapDecodeError(
                f'statistics of Needs must be a tuple, such as ("negative_entropy",), but are {self.statistics!r:.80}'
            )
        object.__setattr__(self, "statistics", tuple(dict.fromkeys(self.statistics)))

    def __or__(self, other: Needs) -> Needs:
        """What either needs."""
        if not isinstance(other, Needs):
            raise NapDecodeError(f"the needs of a part must be Needs, such as Needs(adaptive=True), not {other!r:.80}")
        flags = {f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)}
        return Needs(**flags | {"statistics": self.statistics + other.statistics})
