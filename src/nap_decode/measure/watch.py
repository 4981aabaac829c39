"""Watching somebody else's loop: which slot was committed after which call of the model?

A call shows ids and where in the row they stand: all of it, or the part that the call's cache or positions tell::

    whole row         [p p p | . . . . | . . . .]      no cache
    suffix                   [ x . . .   . . . .]      a cache of 3 positions
    window                   [ x . . . ]               replace_position, cache_position or position_ids
    appended block                      ... + [. . .]  a cache of the whole row so far

What cannot be placed for sure is not guessed: the loop runs on, and the trace is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nap_decode.base.errors import NapDecodeError
from nap_decode.results.trace import DecodeTrace

_BEGIN = "call watch.begin() before each decode if this is a new one"
_NO_IDS = ("mask", "position", "type", "label", "cache", "past")  # what other integers (B, L) are called
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Watch:
    """The record of a foreign loop, made by :meth:`ARnessMeter.watch`."""

    def __init__(self, mask_token_id: int, end_token_ids: tuple[int, ...], num_rows: int | None) -> None:
        self.mask_token_id, self.end_token_ids, self.num_rows = mask_token_id, end_token_ids, num_rows
        self._decodes: list[_Watched] = []
        self._recent: list[_Watched] = []  # since the last begin, the one that was called last at the end
        self._ids_name: str | None = None

    def begin(self) -> None:
        """Take the next call for the first one of a new decode."""
        self._recent = []

    def _seeing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def seen(*args: Any, **kwargs: Any) -> Any:
            self._see(_by_name(forward, args, kwargs))
            return forward(*args, **kwargs)

        seen.only_looks = True  # type: ignore[attr-defined]
        return seen

    def _see(self, inputs: dict[str, Any]) -> None:
        ids = self._find_ids(inputs)
        if ids is None:
            if not self._decodes:  # nothing is lost yet; later the loop is let run on
                raise NapDecodeError("the watched model was called without input_ids (B, L) of whole numbers")
            self._refuse("came without ids (B, L) of whole numbers")
            return
        call = _Call.read(ids[: self.num_rows].detach().cpu().clone(), inputs, self.mask_token_id)
        recent = self._recent[::-1]
        own = [decode for decode in recent if call.cache is not None and decode.cache is call.cache]
        if call.is_part and not own and sum(decode.could_show(call) for decode in recent) > 1:
            recent[0].refuse(f"shows a part of a row that fits into several decodes; {_BEGIN}")
        for decode in own or recent:
            if decode.take(call, resume=decode is not recent[0]):
                self._recent.remove(decode)
                self._recent.append(decode)
                return
        is_shifted = not call.unclear and not call.past and call.columns is None  # by position_ids alone
        if call.is_part and (recent or not is_shifted):
            reason = "shows a part of a row, by its cache or positions, that does not go on from what was seen"
            self._refuse(call.unclear or f"{reason}; {_BEGIN}")
        else:
            self._begin(call)

    def _find_ids(self, inputs: dict[str, Any]) -> Tensor | None:
        if inputs.get("input_ids") is not None:
            inputs = {"input_ids": inputs["input_ids"]}
        elif inputs.get("inputs_embeds") is not None:
            return None
        found = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.ndim == 2 and value.dtype in _INTEGERS
            if not any(word in name for word in _NO_IDS)
        }
        if self._ids_name not in found:
            with_mask = [name for name, ids in found.items() if bool((ids == self.mask_token_id).any())]
            self._ids_name = next(iter([*with_mask, *found]), None)
        return None if self._ids_name is None else found[self._ids_name]

    def _begin(self, call: _Call) -> None:
        self._recent.append(_Watched(call, self.mask_token_id))
        self._decodes.append(self._recent[-1])

    def _refuse(self, reason: str) -> None:
        """Note a call that nobody could take."""
        if not self._recent:
            self._begin(_Call(torch.empty(0, 0, dtype=torch.int64)))
        self._recent[-1].refuse(reason)

    def trace(self, sequences: Tensor | None = None) -> DecodeTrace:
        """The last decode; with ``sequences`` the last that they can have come from.

        Args:
            sequences: ``(B, L)`` what the loop returned, for the tokens of the last commits; without it
                they are unknown and stay the mask id.  Slots that it has masked were not decoded.

        Raises:
            NapDecodeError: the model was not called, or never with a mask; a call could not be followed, or does not
                tell what it shows; ``sequences`` is not what it was called with; without ``sequences``, slots that
                were masked when a call last showed them are not in their row's last call.
        """
        decodes, errors = self._with_masks(), []
        recent = [decode for decode in reversed(self._recent) if decode in decodes] or decodes[-1:]
        for decode in recent:  # what could not be followed may have been a call of any of them
            decode.check_followed()
        for decode in recent[:1] if sequences is None else recent:
            try:
                return decode.trace(sequences, self.end_token_ids, self.num_rows)
            except NapDecodeError as error:
                errors.append(error)
        raise errors[0]

    def traces(self) -> list[DecodeTrace]:
        """All decodes, in order; errors are those of :meth:`trace`, for any of them."""
        return [decode.trace(None, self.end_token_ids, self.num_rows) for decode in self._with_masks()]

    def _with_masks(self) -> list[_Watched]:
        """The decodes; what was called without a mask, for a likelihood or to fill a cache, is none."""
        if not self._decodes:
            raise NapDecodeError("the watched model was not called inside the with block")
        decodes = [decode for decode in self._decodes if decode.problem or bool(decode.decodable.any())]
        if not decodes:
            raise NapDecodeError(
                f"the watched model was never called with the mask id {self.mask_token_id}; is mask_token_id right?"
            )
        return decodes


@dataclass(frozen=True)
class _Call:
    """Ids, and what a call says about where in the row they stand."""

    ids: Tensor  # (B, W)
    columns: Tensor | None = None  # (W,) columns that it gives
    told: Tensor | None = None  # (W,) ascending positions that it gives; columns, unless rows are padded on the left
    is_padded: bool = False  # whether positions are not columns, if this is a whole row
    past: int = 0  # positions in its cache
    cache: object | None = None  # a cache that is filled as the loop goes on
    unclear: str = ""  # what may say where they stand, and is not understood

    @classmethod
    def read(cls, ids: Tensor, inputs: dict[str, Any], mask_token_id: int) -> _Call:
        width, arange = ids.shape[1], torch.arange(ids.shape[1])
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
        unclear = [  # positions of other columns than the ids have (dKV-Cache)
            name
            for name, value in given.items()
            if "position" in name and name != "replace_position" and value.shape[-1] != width
        ]
        caches = {name: past for name, value in inputs.items() if (past := _past(value)) is not None}
        name = next((name for name in ("past_key_values", "cache", *caches) if name in caches), "")
        past, cache = caches.get(name, 0), inputs.get(name)
        unclear += [name] * (past < 0)
        place, cached, columns = inputs.get("replace_position"), given.get("cache_position"), None
        if isinstance(place, Tensor) and place.dtype == torch.bool and place.ndim == 2:  # Fast-dLLM: (B, L)
            columns = place[0].cpu().nonzero()[:, 0]
            if len(columns) != width or bool((place != place[:1]).any()):
                columns = None
                unclear.append("replace_position")
        elif place is not None and past >= 0:  # Fast-dLLM v2: counted from the end of the cache
            columns = past + int(place) + arange
        if columns is None and cached is not None and cached.shape == (width,) and not cached.is_floating_point():
            columns = cached.cpu()
        told, is_padded, positions = None, False, given.get("position_ids")
        if positions is not None and positions.ndim < 3 and positions.shape[-1] == width:
            rows = positions.detach().cpu().reshape(-1, width)
            told = rows[0] if bool((rows == rows[:1]).all()) else None
            shadow = _shadow(told, ids == mask_token_id)
            if shadow and columns is None and past <= 0:
                ids, rows = ids[:, :-shadow], rows[:, :-shadow]
            is_padded = bool((rows != arange[: rows.shape[1]]).any())
            if told is not None and not bool((told.diff() > 0).all()):
                told = None
        reason = f"comes with {' and '.join(unclear)}, which does not say which part of the row it shows"
        cache = cache if hasattr(cache, "get_seq_length") else None
        return cls(ids, columns, told, is_padded, max(past, 0), cache, reason if unclear else "")

    @property
    def is_part(self) -> bool:
        """Whether something says that there is more of the row than the call shows."""
        starts = [int(given[0]) for given in (self.columns, self.told) if given is not None and len(given)]
        return bool(self.unclear) or self.past > 0 or any(start > 0 for start in starts)


class _Watched:
    """One decode: its rows as last shown, and when each slot was committed."""

    def __init__(self, call: _Call, mask_token_id: int) -> None:
        self.mask_token_id, self.cache, self.is_padded = mask_token_id, call.cache, call.is_padded
        self.ids = call.ids  # (B, L)
        self.step = torch.full_like(call.ids, -1)  # (B, L) call that committed a slot, -1 for none yet
        self.masked_at = (call.ids == mask_token_id).long() - 1  # (B, L) last call that showed a slot masked, or -1
        self.passes = torch.ones(len(call.ids), dtype=torch.int64)  # (B,) calls that showed a row
        self.last_call = torch.zeros(len(call.ids), dtype=torch.int64)  # (B,) the last of them
        self.calls, self.problem = 1, ""
        self.is_guided = False  # by calls of their own
        self.previous: tuple[Tensor, ...] = ()  # columns and ids, until a twin of it comes

    @property
    def decodable(self) -> Tensor:
        """``(B, L)``: masked when first shown; what was given is never masked."""
        return self.masked_at >= 0

    def refuse(self, reason: str) -> bool:
        """Remember the first thing that could not be followed; the call is taken."""
        self.problem = self.problem or f"call {self.calls} {reason}"
        return True

    def could_show(self, call: _Call) -> bool:
        """Whether a part stands inside of the row and contradicts nothing that was seen."""
        places = [columns for columns in self._places(call) if int(columns.max()) < self.ids.shape[1]]
        return len(call.ids) == len(self.ids) and any(self._agrees(call.ids, columns) for columns in places)

    def take(self, call: _Call, resume: bool) -> bool:
        """Take in one more call; False if it does not belong to this decode."""
        ids, length = call.ids, self.ids.shape[1]
        if not self.ids.numel():  # stands for what could not be seen
            return True
        if len(ids) == 2 * len(self.ids):  # guidance that was off before
            upper, lower = ids.chunk(2)
            ids = next((a for a, b in ((upper, lower), (lower, upper)) if self._is_masked(b, a)), ids)
        places = self._places(call)
        if len(ids) < len(self.ids):
            return any(self._take_some(ids, columns, call) for columns in places)
        if len(ids) > len(self.ids):
            if ids.shape[1] != length:
                return False
            fits = self._fits(ids, torch.arange(length)) >= 0
            if not bool(fits.any(1).all()) or not self._has_progress(ids, fits.int().argmax(1), torch.arange(length)):
                return False
            several = f"shows {len(ids)} rows that go on from {len(self.ids)}"
            return self.refuse(f"{several}: of alternatives it is not told which is kept")  # LoPA
        for is_revised in (False, True):  # a loop may revise what it committed
            for columns in places:
                if self._agrees(ids, columns, is_revised):
                    return self._follow(ids, torch.arange(len(ids)), columns, call, resume)
        inside = [columns for columns in places if int(columns.max()) < length]
        if any(self._is_masked(ids, self.ids[:, at], ~self.decodable[:, at]) for at in inside):
            self.is_guided = True  # the unconditional branch
            return True
        if not call.is_part and not resume and self._shows_a_slice(ids):
            return self.refuse(f"shows {ids.shape[1]} of {length} columns, and nothing says which; {_BEGIN}")
        return False

    def _places(self, call: _Call) -> list[Tensor]:
        """The columns that a call may show, most telling first: in the row, or going on behind it without a gap."""
        arange, length = torch.arange(call.ids.shape[1]), self.ids.shape[1]
        places = [arange] if len(arange) == length or not call.is_part else []
        if call.told is not None and not self.is_padded and not call.unclear:
            places.append(call.told)
        if call.past and not call.unclear:
            places.append(call.past + arange)
        places = places if call.columns is None else [call.columns]
        behind = [columns[columns >= length] - length for columns in places]
        return [p for p, new in zip(places, behind, strict=True) if bool((p >= 0).all()) and _is_range(new)]

    def _overlap(self, ids: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, what was shown, and what is to be decoded, as far as columns lie in the row."""
        old = columns < self.ids.shape[1]
        return ids[:, old], self.ids[:, columns[old]], self.decodable[:, columns[old]]

    def _agrees(self, ids: Tensor, columns: Tensor, is_revised: bool = False) -> bool:
        """Whether each row contradicts nothing that was seen of it, or that was given."""
        ids, shown, decodable = self._overlap(ids, columns)
        return not bool(((ids != shown) & (~decodable if is_revised else shown != self.mask_token_id)).any())

    def _fits(self, ids: Tensor, columns: Tensor) -> Tensor:
        """``(b, B)``: how much is known of each row that one of the ids contradicts nowhere; -1 of the others."""
        ids, shown, _ = self._overlap(ids, columns)
        known = shown != self.mask_token_id
        return torch.where(((ids[:, None] != shown) & known).any(-1), -1, known.sum(1))

    def _is_masked(self, ids: Tensor, of: Tensor, where: Tensor | bool = True) -> bool:
        """Whether ids are others with some of them masked."""
        changed = (ids != of) & where
        return bool(changed.any()) and bool((ids == self.mask_token_id)[changed].all())

    def _has_progress(self, ids: Tensor, rows: Tensor, columns: Tensor) -> bool:
        """Whether something that is to be decoded is no longer masked."""
        ids, _, decodable = self._overlap(ids, columns)
        return bool((decodable[rows] & (ids != self.mask_token_id)).any())

    def _shows_a_slice(self, ids: Tensor) -> bool:
        """Whether ids fit into the row, though not at its start."""
        starts_anew = bool((~self.decodable[:, 0] & (ids[:, 0] == self.ids[:, 0])).all())
        starts = range(1, self.ids.shape[1] - ids.shape[1] + 1)
        return not starts_anew and any(self._agrees(ids, start + torch.arange(ids.shape[1])) for start in starts)

    def _take_some(self, ids: Tensor, columns: Tensor, call: _Call) -> bool:
        """Take a call that shows some of the rows, because the others are finished."""
        fits = self._fits(ids, columns)
        # A row of which more is known tells more; an unconditional branch fits anything.
        best = fits == fits.amax(1, keepdim=True)
        rows = best.int().argmax(1)
        if bool((fits < 0).all(1).any()) or not self._has_progress(ids, rows, columns):
            return False
        if bool((best.sum(1) > 1).any()) or len(set(rows.tolist())) < len(rows):
            return self.refuse(f"shows {len(ids)} of {len(self.ids)} rows, and the ids do not say which; {_BEGIN}")
        if torch.equal(rows, self._conditional(len(rows))):  # guidance that is switched off
            for name in ("ids", "step", "masked_at", "passes", "last_call"):
                setattr(self, name, getattr(self, name)[rows])
            rows = torch.arange(len(rows))
        return self._follow(ids, rows, columns, call, resume=False)

    def _follow(self, ids: Tensor, rows: Tensor, columns: Tensor, call: _Call, resume: bool) -> bool:
        masked, length = ids == self.mask_token_id, self.ids.shape[1]
        is_whole, has_begun = _is_range(columns), bool((self.step >= 0).any())
        if is_whole and not call.is_part:
            shown = slice(min(len(columns), length))
            committed = (self.step >= 0)[rows, shown]
            if has_begun and self.calls == 2 and bool(self.decodable.all() & masked[:, shown][committed].all()):
                return self.refuse(
                    "masks again all that call 1 had unmasked in rows of nothing but masks: an unconditional "
                    f"branch that is called first cannot be followed; {_BEGIN}"
                )
            has_progress = self._has_progress(ids, rows, columns)
            # The same prompt decoded anew; or a shorter prompt, or another look at this one, that shows nothing new.
            if not has_progress and (has_begun or resume or len(columns) < length):
                return False
        # A part that a guided loop shows a second time, to the unconditional branch's cache?
        is_twin = self.is_guided and not is_whole and bool(self.previous)
        is_twin = is_twin and all(map(torch.equal, self.previous, (columns, ids)))
        self.previous = () if is_twin else (columns, ids)
        if is_twin:
            return True
        grown = max(int(columns.max()) + 1 - length, 0) if len(columns) else 0
        for name, fill in (("ids", self.mask_token_id), ("step", -1), ("masked_at", -1)):
            setattr(self, name, pad(getattr(self, name), (0, grown), value=fill))
        here = (rows[:, None], columns[None])
        step, masked_at = self.step[here], self.masked_at[here]
        # It is the last call that showed a slot masked whose logits decoded it; masked again, it counts once more.
        self.step[here] = torch.where(masked, -1, torch.where(step < 0, masked_at, step))
        self.masked_at[here] = torch.where(masked, self.calls, masked_at)
        self.ids[here] = ids
        self.passes[rows] += 1
        self.last_call[rows] = self.calls
        self.cache = call.cache if call.cache is not None else self.cache
        self.calls += 1
        return True

    def check_followed(self) -> None:
        if self.problem:
            raise NapDecodeError(f"the watched decode could not be followed: {self.problem}")

    def trace(self, sequences: Tensor | None, end_token_ids: tuple[int, ...], num_rows: int | None) -> DecodeTrace:
        self.check_followed()
        wanted = None if sequences is None else len(sequences)
        kept = torch.arange(len(self.ids)) if num_rows is not None else self._conditional(wanted)
        ids, decodable, step, masked_at = (x[kept] for x in (self.ids, self.decodable, self.step, self.masked_at))
        tokens = ids if sequences is None else sequences[:num_rows].detach().cpu().clone()
        waiting = decodable & (step < 0)  # for the last commits, which are seen by no call
        lost = int((waiting & (masked_at < self.last_call[kept, None])).sum())
        if sequences is None and lost:
            raise NapDecodeError(
                f"{lost} of {int(decodable.sum())} slots were masked when the model was last called "
                "with them, before the last call; pass trace the sequences that the loop returned"
            )
        if tokens.shape != ids.shape:
            raise NapDecodeError(
                f"sequences {tuple(tokens.shape)} must have the shape of the ids that the model was called with, "
                f"{tuple(ids.shape)}"
            )
        if bool(((tokens != ids) & (ids != self.mask_token_id)).any()):
            raise NapDecodeError(
                "sequences differ from the ids that the model was called with where those were not masked; are the "
                "rows padded on another side, or was this another decode?"
            )
        if sequences is not None:
            waiting &= tokens != self.mask_token_id
        return DecodeTrace(
            tokens=tokens,
            block=torch.where(decodable, 0, -1),
            step=torch.where(waiting, masked_at, step),
            confidence=torch.full(tokens.shape, torch.nan),
            forward_passes=self.passes[kept],
            block_names=("completion",),
            mask_token_id=self.mask_token_id,
            end_token_ids=end_token_ids,
        )

    def _conditional(self, wanted: int | None) -> Tensor:
        """The rows that are not an unconditional branch: another row with its prompt masked, and masked to the end."""
        rows, one = torch.arange(len(self.ids)), self.decodable[:, None]
        more = one & ~self.decodable
        same = (self.ids[:, None] == self.ids) & (one | ~self.decodable)  # (B, B, L)
        is_of = more.any(-1) & torch.where(more, (self.ids == self.mask_token_id)[:, None], same).all(-1)  # (B, B)
        is_branch = is_of.any(1)
        is_sure = self.decodable.all(1) | (is_of & (self.step >= 0).any(1)).any(1)
        if not bool(is_branch.any()) or wanted == len(rows):
            return rows
        if wanted is None and bool((is_branch & ~is_sure).any()):
            raise NapDecodeError(
                "some rows are others with more masks: the unconditional branch of guidance, or texts with other "
                "holes? Pass num_rows, the number of rows to look at, or the sequences that the loop returned"
            )
        return rows[~is_branch]


def _is_range(columns: Tensor) -> bool:
    return torch.equal(columns, torch.arange(len(columns)))


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a call, those without a name by their number."""
    try:
        parameters = [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [str(i) for i in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def _past(value: Any) -> int | None:
    """Positions in a cache, or in keys and values ``(..., positions, features)`` of every layer; -1 if that is unclear.

    None if it is neither (but a list of tensors, as images may be).
    """
    try:
        if hasattr(value, "get_seq_length"):
            return int(value.get_seq_length())
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return -1

    def leaves(value: Any) -> list[Any]:
        return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]

    tensors = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
    is_nested = isinstance(value, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in value)
    if not is_nested or all(tensor.ndim < 3 for tensor in tensors):
        return None
    lengths = {tensor.shape[-2] if tensor.ndim > 1 else -1 for tensor in tensors}
    return lengths.pop() if len(lengths) == 1 else -1


def _shadow(positions: Tensor | None, masked: Tensor) -> int:
    """How many masked columns at the end stand at positions that others have before them (WINO)."""
    if positions is None or not bool((positions.diff() <= 0).any()):
        return 0
    start = int((positions.diff() <= 0).nonzero()[-1]) + 1
    first, last = int(positions[start]), int(positions[-1])
    is_repeated = first > 0 and last <= int(positions[:start].max()) and bool(masked[:, start:].all())
    return len(positions) - start if is_repeated else 0
