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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.results.trace import DecodeTrace

_BEGIN = "call watch.begin() before each decode if this is a new one"
_NO_IDS = ("mask", "position", "type", "label", "cache", "past")  # what other integers (B, L) are called


class Watch:
    """What :meth:`ARnessMeter.watch` saw."""

    def __init__(self, mask_token_id: int, end_token_ids: tuple[int, ...], num_rows: int | None) -> None:
        self.mask_token_id = mask_token_id
        self.end_token_ids = end_token_ids
        self.num_rows = num_rows
        self._decodes: list[_Watched] = []
        self._recent: list[_Watched] = []  # since the last begin, the one that was called last at the end
        self._ids_name: str | None = None
        self._was_called = False

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
            if not self._was_called:  # nothing is lost yet; later the loop is let run on
                raise NapDecodeError("the watched model was called without input_ids (B, L) of whole numbers")
            self._refuse("came without ids (B, L) of whole numbers")
            return
        self._was_called = True
        call = _Call.read(ids[: self.num_rows].detach().cpu().clone(), inputs, self.mask_token_id)
        for decode in self._likeliest(call):
            if decode.take(call, resume=decode is not self._recent[-1]):
                self._recent.remove(decode)
                self._recent.append(decode)
                return
        if call.is_part and (self._recent or not call.is_shifted):
            reason = "shows a part of a row, by its cache or positions, that does not go on from what was seen"
            self._refuse(call.unclear or f"{reason}; {_BEGIN}")
            return
        self._recent.append(_Watched.begin(call, self.mask_token_id))
        self._decodes.append(self._recent[-1])

    def _find_ids(self, inputs: dict[str, Any]) -> Tensor | None:
        if inputs.get("input_ids") is not None:
            inputs = {"input_ids": inputs["input_ids"]}
        elif inputs.get("inputs_embeds") is not None:
            return None
        found = {name: value for name, value in inputs.items() if _is_ids(name, value)}
        if self._ids_name not in found:
            with_mask = [name for name, ids in found.items() if bool((ids == self.mask_token_id).any())]
            self._ids_name = next(iter([*with_mask, *found]), None)
        return None if self._ids_name is None else found[self._ids_name]

    def _likeliest(self, call: _Call) -> list[_Watched]:
        """The decodes that a call may belong to: the one with its cache first, then by their last calls."""
        recent = self._recent[::-1]
        own = [decode for decode in recent if call.cache is not None and decode.cache is call.cache]
        if call.is_part and not own and sum(decode.could_show(call) for decode in recent) > 1:
            recent[0].refuse(f"shows a part of a row that fits into several decodes; {_BEGIN}")
        return own or recent

    def _refuse(self, reason: str) -> None:
        """Note a call that nobody could take."""
        if not self._recent:
            self._recent.append(_Watched.begin(_Call(torch.empty(0, 0, dtype=torch.int64)), self.mask_token_id))
            self._decodes.append(self._recent[-1])
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
        decodes = self._with_masks()
        recent = [decode for decode in reversed(self._recent) if decode in decodes] or decodes[-1:]
        for decode in recent:  # what could not be followed may have been a call of any of them
            decode.check_followed()
        last = next((decode for decode in recent if decode.can_give(sequences, self.num_rows)), recent[0])
        return last.trace(sequences, self.end_token_ids, self.num_rows)

    def traces(self) -> list[DecodeTrace]:
        """All decodes, in order.

        Raises:
            NapDecodeError: as :meth:`trace`, for any of them.
        """
        return [decode.trace(None, self.end_token_ids, self.num_rows) for decode in self._with_masks()]

    def _with_masks(self) -> list[_Watched]:
        """The decodes; what was called without a mask, for a likelihood or to fill a cache, is none."""
        if not self._was_called:
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
    told: Tensor | None = None  # (W,) ascending positions that it gives; columns, unless rows are padded on the left
    columns: Tensor | None = None  # (W,) columns that it gives
    past: int = 0  # positions in its cache
    cache: object | None = None  # a cache that is filled as the loop goes on
    unclear: str = ""  # what may say where they stand, and is not understood
    is_padded: bool = False  # whether positions are not columns, if this is a whole row

    @classmethod
    def read(cls, ids: Tensor, inputs: dict[str, Any], mask_token_id: int) -> _Call:
        width = ids.shape[1]
        unclear = [name for name, value in inputs.items() if _is_foreign(name, value, width)]
        caches = {name: value for name, value in inputs.items() if _is_cache(value)}
        name = next((name for name in ("past_key_values", "cache") if name in caches), next(iter(caches), ""))
        past = _length(caches[name]) if name else 0
        if past is None:
            unclear.append(name)
        columns, arange = None, torch.arange(width)
        place = inputs.get("replace_position")
        if isinstance(place, Tensor) and place.dtype == torch.bool and place.ndim == 2:  # Fast-dLLM: (B, L)
            place = place.cpu()
            if bool((place == place[:1]).all()) and int(place[0].sum()) == width:
                columns = place[0].nonzero()[:, 0]
            else:
                unclear.append("replace_position")
        elif place is not None and past is not None:  # Fast-dLLM v2: counted from the end of the cache
            columns = past + int(place) + arange
        cached = inputs.get("cache_position")
        if (
            columns is None
            and isinstance(cached, Tensor)
            and cached.shape == (width,)
            and not cached.is_floating_point()
        ):
            columns = cached.cpu()
        rows = _positions(inputs.get("position_ids"), width)
        told = rows[0] if len(rows) and bool((rows == rows[:1]).all()) else None
        shadow = _shadow(told, ids == mask_token_id)
        if shadow and columns is None and not past:  # WINO
            ids, rows = ids[:, :-shadow], rows[:, :-shadow]
        if told is not None and not bool((told.diff() > 0).all()):
            told = None
        cache = caches[name] if name and hasattr(caches[name], "get_seq_length") else None
        reason = (
            f"comes with {' and '.join(unclear)}, which does not say which part of the row it shows" if unclear else ""
        )
        is_padded = not bool((rows == torch.arange(rows.shape[1])).all())
        return cls(ids, told, columns, past or 0, cache, reason, is_padded)

    @property
    def is_part(self) -> bool:
        """Whether something says that there is more of the row than the call shows."""
        starts = [int(given[0]) for given in (self.columns, self.told) if given is not None and len(given)]
        return bool(self.unclear) or self.past > 0 or any(start > 0 for start in starts)

    @property
    def is_shifted(self) -> bool:
        """Whether nothing but positions that do not start at 0 says so."""
        return not self.unclear and not self.past and self.columns is None

    def places(self, length: int, is_padded: bool) -> Iterator[Tensor]:
        """The columns that the ids may stand at in a row of a length, most telling first."""
        width = self.ids.shape[1]
        if self.columns is not None:
            yield self.columns
            return
        if width == length or not self.is_part:
            yield torch.arange(width)
        if self.unclear:
            return
        if self.told is not None and not is_padded:
            yield self.told
        if self.past:
            yield self.past + torch.arange(width)


@dataclass(eq=False)
class _Watched:
    mask_token_id: int
    ids: Tensor  # (B, L) as last shown
    step: Tensor  # (B, L) call that committed a slot, -1 for none yet
    decodable: Tensor  # (B, L) masked when first shown
    masked_at: Tensor  # (B, L) last call that showed a slot masked
    passes: Tensor  # (B,) calls that showed a row
    last_call: Tensor  # (B,) the last of them
    is_padded: bool  # positions are not columns
    cache: object | None
    calls: int = 1
    problem: str = ""
    is_bare: bool = field(init=False)  # began with nothing but masks
    is_guided: bool = False  # by calls of their own
    previous: tuple[Tensor, Tensor] | None = None  # columns and ids, until a twin of it comes

    def __post_init__(self) -> None:
        self.is_bare = bool(self.decodable.all())

    @classmethod
    def begin(cls, call: _Call, mask_token_id: int) -> _Watched:
        ids, masked = call.ids, call.ids == mask_token_id
        return cls(
            mask_token_id=mask_token_id,
            ids=ids,
            step=torch.full_like(ids, -1),
            decodable=masked,
            masked_at=torch.where(masked, 0, -1),
            passes=torch.ones(len(ids), dtype=torch.int64),
            last_call=torch.zeros(len(ids), dtype=torch.int64),
            is_padded=call.is_padded,
            cache=call.cache,
        )

    def refuse(self, reason: str) -> None:
        """Remember the first thing that could not be followed."""
        self.problem = self.problem or f"call {self.calls} {reason}"

    def could_show(self, call: _Call) -> bool:
        """Whether a part stands inside of the row and contradicts nothing that was seen."""
        length = self.ids.shape[1]
        return len(call.ids) == len(self.ids) and any(
            int(columns.max()) < length and self._agrees(call.ids, columns, self.ids != self.mask_token_id)
            for columns in call.places(length, self.is_padded)
        )

    def take(self, call: _Call, resume: bool = False) -> bool:
        """Take in one more call; False if it does not belong to this decode."""
        ids, length = call.ids, self.ids.shape[1]
        if not self.ids.numel():  # stands for what could not be seen
            return True
        if len(ids) == 2 * len(self.ids):  # guidance that was off before
            upper, lower = ids.chunk(2)
            ids = next((a for a, b in ((upper, lower), (lower, upper)) if self._is_masked_copy(b, a)), ids)
        if len(ids) > len(self.ids):
            return self._refuse_alternatives(ids)
        rows = torch.arange(len(ids)) if len(ids) == len(self.ids) else None
        places = [p for p in call.places(length, self.is_padded) if self._goes_on(p)]
        if rows is None:
            return any(self._take_some(ids, columns, call) for columns in places)
        for known in (self.ids != self.mask_token_id, ~self.decodable):  # a loop may revise what it committed
            for columns in places:
                if self._agrees(ids, columns, known):
                    return self._follow(ids, rows, columns, call, resume)
        for columns in places:
            if int(columns.max()) < length and self._is_masked_copy(
                ids, self.ids[:, columns], self.decodable[:, columns]
            ):
                self.is_guided = True  # the unconditional branch
                return True
        if not call.is_part and not resume and self._shows_a_slice(ids):
            self.refuse(f"shows {ids.shape[1]} of {length} columns, and nothing says which; {_BEGIN}")
            return True
        return False

    def _goes_on(self, columns: Tensor) -> bool:
        """Whether columns lie in the row, or go on behind it without a gap."""
        new = columns[columns >= self.ids.shape[1]]
        return torch.equal(new, self.ids.shape[1] + torch.arange(len(new))) and bool((columns >= 0).all())

    def _agrees(self, ids: Tensor, columns: Tensor, known: Tensor) -> bool:
        old = columns < self.ids.shape[1]
        return not bool(((ids[:, old] != self.ids[:, columns[old]]) & known[:, columns[old]]).any())

    def _is_masked_copy(self, ids: Tensor, of: Tensor, apart_from: Tensor | None = None) -> bool:
        """Whether ids are others with some of them masked."""
        changed = ids != of
        if apart_from is not None:
            changed = changed & ~apart_from
        return bool(changed.any()) and bool((ids == self.mask_token_id)[changed].all())

    def _take_some(self, ids: Tensor, columns: Tensor, call: _Call) -> bool:
        """Take a call that shows some of the rows, because the others are finished."""
        old = columns < self.ids.shape[1]
        shown = self.ids[:, columns[old]]
        known = shown != self.mask_token_id
        fits = ~((ids[:, None, old] != shown) & known).any(-1)  # (b, B)
        if not bool(fits.any(1).all()):
            return False
        # A row of which more is known tells more; an unconditional branch fits anything.
        score = torch.where(fits, known.sum(1), -1)
        best = score == score.amax(1, keepdim=True)
        rows = best.int().argmax(1)
        if not self._has_progress(ids, rows, columns):
            return False
        if bool((best.sum(1) > 1).any()) or len(set(rows.tolist())) < len(rows):
            self.refuse(f"shows {len(ids)} of {len(self.ids)} rows, and the ids do not say which; {_BEGIN}")
            return True
        left = self._conditional(len(rows))
        if torch.equal(rows, left):  # guidance that is switched off
            self._keep(left)
            rows = torch.arange(len(rows))
        return self._follow(ids, rows, columns, call, resume=False)

    def _keep(self, rows: Tensor) -> None:
        self.ids, self.step, self.decodable = self.ids[rows], self.step[rows], self.decodable[rows]
        self.masked_at, self.passes, self.last_call = self.masked_at[rows], self.passes[rows], self.last_call[rows]

    def _has_progress(self, ids: Tensor, rows: Tensor, columns: Tensor) -> bool:
        """Whether something that is to be decoded is no longer masked."""
        old = columns < self.ids.shape[1]
        return bool((self.decodable[rows][:, columns[old]] & (ids[:, old] != self.mask_token_id)).any())

    def _refuse_alternatives(self, ids: Tensor) -> bool:
        """Whether there are more rows than before that all go on from one that was seen (LoPA)."""
        width = self.ids.shape[1]
        if ids.shape[1] != width:
            return False
        fits = ~((ids[:, None] != self.ids) & (self.ids != self.mask_token_id)).any(-1)  # (b, B)
        if not bool(fits.any(1).all()) or not self._has_progress(ids, fits.int().argmax(1), torch.arange(width)):
            return False
        self.refuse(
            f"shows {len(ids)} rows that go on from {len(self.ids)}: of alternatives it is not told which is kept"
        )
        return True

    def _shows_a_slice(self, ids: Tensor) -> bool:
        """Whether ids fit into the row, though not at its start."""
        width, length = ids.shape[1], self.ids.shape[1]
        starts_anew = bool((~self.decodable[:, 0] & (ids[:, 0] == self.ids[:, 0])).all())
        return not starts_anew and any(
            self._agrees(ids, start + torch.arange(width), self.ids != self.mask_token_id)
            for start in range(1, length - width + 1)
        )

    def _follow(self, ids: Tensor, rows: Tensor, columns: Tensor, call: _Call, resume: bool) -> bool:
        masked = ids == self.mask_token_id
        old, length = columns < self.ids.shape[1], self.ids.shape[1]
        is_whole = torch.equal(columns, torch.arange(len(columns)))
        if is_whole and not call.is_part:
            open_again = bool(masked[:, old][self.decodable[rows][:, columns[old]]].all())
            if self.is_bare and self.calls == 2 and bool((self.step >= 0).any()):
                committed = (self.step >= 0)[rows][:, columns[old]]
                if bool(masked[:, old][committed].all()):
                    self.refuse(
                        "masks again all that call 1 had unmasked in rows of nothing but masks: an unconditional "
                        f"branch that is called first cannot be followed; {_BEGIN}"
                    )
                    return True
            if open_again and bool((self.step >= 0).any()) and len(columns) >= length:
                return False  # the same prompt decoded anew
            # A shorter prompt or another look at this one shows nothing that was decoded.
            if (resume or len(columns) < length) and not self._has_progress(ids, rows, columns):
                return False
        if self._is_twin(columns, ids, is_whole):
            return True
        self._grow(int(columns.max()) + 1 if len(columns) else 0, rows, columns, masked)
        here = (rows[:, None], columns[None])
        step = torch.where(masked, -1, self.step[here])  # a slot that is masked again counts when committed for good
        # It is the last call that showed it masked whose logits decoded it.
        newly = self.decodable[here] & ~masked & (step < 0)
        self.step[here] = torch.where(newly, self.masked_at[here], step)
        self.masked_at[here] = torch.where(masked, self.calls, self.masked_at[here])
        self.ids[here] = ids
        self.passes[rows] += 1
        self.last_call[rows] = self.calls
        self.cache = call.cache if call.cache is not None else self.cache
        self.calls += 1
        return True

    def _is_twin(self, columns: Tensor, ids: Tensor, is_whole: bool) -> bool:
        """Whether this is a part that a guided loop shows a second time, to the unconditional branch's cache."""
        is_twin = self.is_guided and not is_whole and self.previous is not None
        is_twin = is_twin and all(map(torch.equal, self.previous or (), (columns, ids)))
        self.previous = None if is_twin else (columns, ids)
        return is_twin

    def _grow(self, length: int, rows: Tensor, columns: Tensor, masked: Tensor) -> None:
        grown = length - self.ids.shape[1]
        if grown <= 0:
            return

        def pad(x: Tensor, value: Any) -> Tensor:
            return torch.nn.functional.pad(x, (0, grown), value=value)

        new = columns >= self.ids.shape[1]
        self.ids, self.step = pad(self.ids, self.mask_token_id), pad(self.step, -1)
        self.decodable, self.masked_at = pad(self.decodable, False), pad(self.masked_at, -1)
        self.decodable[rows[:, None], columns[new][None]] = masked[:, new]

    def check_followed(self) -> None:
        if self.problem:
            raise NapDecodeError(f"the watched decode could not be followed: {self.problem}")

    def can_give(self, sequences: Tensor | None, num_rows: int | None) -> bool:
        """Whether sequences contradict nothing that was seen."""
        if sequences is None:
            return True
        ids = self.ids if num_rows is not None else self.ids[self._conditional(len(sequences))]
        tokens = sequences[:num_rows].cpu()
        return tokens.shape == ids.shape and bool(((tokens == ids) | (ids == self.mask_token_id)).all())

    def trace(self, sequences: Tensor | None, end_token_ids: tuple[int, ...], num_rows: int | None) -> DecodeTrace:
        self.check_followed()
        tokens = None if sequences is None else sequences[:num_rows].detach().cpu().clone()
        kept = torch.arange(len(self.ids))
        if num_rows is None:
            kept = self._conditional(None if tokens is None else len(tokens))
        ids, decodable, step = self.ids[kept], self.decodable[kept], self.step[kept]
        waiting = decodable & (step < 0)  # for the last commits, which are seen by no call
        tokens = ids if tokens is None else tokens
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
        if sequences is None:
            lost = waiting & (self.masked_at[kept] < self.last_call[kept, None])
            if bool(lost.any()):
                raise NapDecodeError(
                    f"{int(lost.sum())} of {int(decodable.sum())} slots were masked when the model was last called "
                    "with them, before the last call; pass trace the sequences that the loop returned"
                )
        else:
            waiting &= tokens != self.mask_token_id
        return DecodeTrace(
            tokens=tokens,
            block=torch.where(decodable, 0, -1),
            step=torch.where(waiting, self.masked_at[kept], step),
            confidence=torch.full(tokens.shape, torch.nan),
            forward_passes=self.passes[kept],
            block_names=("completion",),
            mask_token_id=self.mask_token_id,
            end_token_ids=end_token_ids,
        )

    def _conditional(self, wanted: int | None) -> Tensor:
        """The rows that are not an unconditional branch: another row with its prompt masked, and masked to the end."""
        is_branch, is_sure = [], []
        for ids, decodable in zip(self.ids, self.decodable, strict=True):
            prompt = decodable & ~self.decodable  # (B, L) of each other row, where this one is masked
            is_of = prompt.any(1) & (~prompt | (ids == self.mask_token_id)).all(1)
            is_of &= ((ids == self.ids) | prompt).all(1) & (decodable | ~self.decodable).all(1)
            is_branch.append(bool(is_of.any()))
            is_sure.append(bool(decodable.all()) or bool((self.step[is_of] >= 0).any()))
        rows = torch.arange(len(self.ids))
        kept = rows[~torch.tensor(is_branch, dtype=torch.bool)]
        if len(kept) == len(rows) or wanted == len(rows):
            return rows
        if wanted is None and not all(sure for sure, branch in zip(is_sure, is_branch, strict=True) if branch):
            raise NapDecodeError(
                "some rows are others with more masks: the unconditional branch of guidance, or texts with other "
                "holes? Pass num_rows, the number of rows to look at, or the sequences that the loop returned"
            )
        return kept


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a call, those without a name by their number."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [str(i) for i in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def _is_ids(name: str, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and value.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
        and not any(word in name for word in _NO_IDS)
    )


def _is_foreign(name: str, value: Any, width: int) -> bool:
    """Whether positions are given of other columns than the ids have (dKV-Cache)."""
    is_tensor = isinstance(value, Tensor) and value.ndim > 0
    return "position" in name and name != "replace_position" and is_tensor and value.shape[-1] != width


def _is_cache(value: Any) -> bool:
    """Whether it is a cache, or keys and values in sequences (not just a list of tensors, as images may be)."""

    def has_keys(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(has_keys(part) for part in value)
        return isinstance(value, Tensor) and value.ndim > 2

    is_nested = isinstance(value, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in value)
    return hasattr(value, "get_seq_length") or (is_nested and has_keys(value))


def _length(cache: Any) -> int | None:
    """Positions in a cache: one that says so, or keys and values ``(..., positions, features)`` for every layer."""
    try:
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        lengths = {part.shape[-2] for layer in cache for part in layer if part is not None}
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return None
    return lengths.pop() if len(lengths) == 1 else None


def _positions(value: Any, width: int) -> Tensor:
    """``(1 or B, W)``; no rows if none are given."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or value.shape[-1] != width:
        return torch.empty(0, width, dtype=torch.int64)
    return value.detach().cpu().reshape(-1, width)


def _shadow(positions: Tensor | None, masked: Tensor) -> int:
    """How many masked columns at the end stand at positions that others have before them."""
    if positions is None or not bool((positions.diff() <= 0).any()):
        return 0
    start = int((positions.diff() <= 0).nonzero()[-1]) + 1
    first, last = int(positions[start]), int(positions[-1])
    is_repeated = first > 0 and last <= int(positions[:start].max()) and bool(masked[:, start:].all())
    return len(positions) - start if is_repeated else 0
