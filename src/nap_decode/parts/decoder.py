"""How to decode, as data: without the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from nap_decode.base.errors import NapDecodeError, check_ids, check_name, check_part, refuse
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.parts.needs import Needs
from nap_decode.parts.schedule import EvenSchedule
from nap_decode.parts.scheduler import AnyOrderScheduler, Scheduler

Path = tuple[str, ...]


@dataclass(frozen=True)
class Decoder:
    """A way to decode, which a :class:`~nap_decode.Sampler` carries out with a model.

    It can be compared, hashed, pickled, saved and described.  :mod:`nap_decode.decoders` has the field's.

    Args:
        scheduler: how many tokens each block may commit at each step; one anywhere by default.
        committer: which positions and tokens; :class:`MicroConfidenceCommitter` at temperature 0 by default.
        close_on: ids that end a block of the canvas, or ``"end"`` for those of the model.  Once such an id and
            everything before it are committed, the rest of the block is filled with the padding id without being
            decoded, and its share of the budget goes to the other blocks; with a fixed schedule, fewer steps are taken.

    Example:
        >>> from nap_decode import MacroParallelScheduler, decoders
        >>> decoder = decoders.klass(threshold=0.8).set(temperature=0.7, block_length=16)
        >>> decoder.set(scheduler=MacroParallelScheduler()).scheduler
        MacroParallelScheduler(steps=None, tokens_per_step=None, schedule=EvenSchedule(), hold_until=1.0, ...)
        >>> decoder.set(treshold=0.9)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no option of this decoder 'treshold'. Did you mean ...
    """

    scheduler: Scheduler = AnyOrderScheduler()
    committer: Committer = MicroConfidenceCommitter()
    close_on: Sequence[int] | str = ()

    def __post_init__(self) -> None:
        check_part("scheduler", self.scheduler, Scheduler, "AnyOrderScheduler(steps=8)")
        check_part("committer", self.committer, Committer, "MicroConfidenceCommitter()")
        if isinstance(self.close_on, str):
            check_name("way to close blocks", self.close_on, ["end"])
        else:  # a tuple, to be compared, hashed and saved
            object.__setattr__(self, "close_on", tuple(check_ids("close_on", self.close_on)))
        if self.needs.adaptive:
            scheduler = self.scheduler
            refuse(
                {"schedule": scheduler.schedule, "share_last_step": scheduler.shares_steps(), "steps": scheduler.steps},
                {"schedule": EvenSchedule(), "share_last_step": False},
                "the committer decides how many tokens a step commits (at least tokens_per_step)",
            )

    @property
    def needs(self) -> Needs:
        """Those of its parts."""
        return self.scheduler.needs | self.committer.needs

    def options(self, **exchanged: Any) -> dict[str, list[Path]]:
        """All options of its parts by name, once these are exchanged, and the parts that have them, as paths."""
        found: dict[str, list[Path]] = {}
        for path in _options(self, exchanged):
            found.setdefault(path[-1], []).append(path[:-1])
        return found

    def set(self, **options: Any) -> Decoder:
        """The same with options of its parts exchanged, each by its name; of steps and tokens_per_step, the other goes.

        A part that is exchanged takes its options with it (with a scheduler goes its ``tokens_per_step``); any given
        along with the new one are the new one's.  Refused is an option that no part has, or more than one.
        """
        found = self.options(**options)
        for name in options:
            check_name("option of this decoder", name, found)
            if len(found[name]) > 1:
                homes = " and ".join(".".join(path) for path in found[name])
                raise NapDecodeError(f"{name} is an option of {homes}; exchange the part")
        changed: Decoder = _changed(self, {(*found[name][0], name): value for name, value in options.items()})
        return changed


def _options(part: Any, exchanged: Mapping[str, Any]) -> Iterator[Path]:
    """The paths of all options of a part and of the parts in it, once some are exchanged."""
    for name in (field.name for field in fields(part) if field.init):
        yield (name,)
        value = exchanged.get(name, getattr(part, name))
        if is_part(value):
            # What is given is taken as it is, even if it has an option of its own name.
            inner = _options(value, {other: v for other, v in exchanged.items() if other != name})
            yield from ((name, *path) for path in inner if path[-1] != name or name not in exchanged)


def _changed(part: Any, changes: Mapping[Path, Any]) -> Any:
    """A part with changes inside it; all at once, as one option may depend on another."""
    options = {path[0]: value for path, value in changes.items() if len(path) == 1}
    either = getattr(part, "either", ())
    if any(options.get(name) is not None for name in either):
        options = dict.fromkeys(either) | options
    for name in dict.fromkeys(path[0] for path in changes if len(path) > 1):
        inside = {path[1:]: value for path, value in changes.items() if len(path) > 1 and path[0] == name}
        options[name] = _changed(options.get(name, getattr(part, name)), inside)
    return replace(part, **options)


def is_part(value: Any) -> bool:
    """Whether this has options: a dataclass, not its type."""
    return is_dataclass(value) and not isinstance(value, type)
