"""A batch as the loop and the model see it: rows begin in column 0, so that columns are positions.

A canvas is padded on the left, where its users want the padding; the model sees it behind the rows, so that a
row's positions are those it has alone, whether the model takes them from an argument, from the ids or from the
index, and a batch can change its width without moving anything::

    canvas   pad pad  a   b   c        rows   a   b   c  pad
             pad  d   e   f   g    ->         d   e   f   g
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from nap_decode.canvas import Canvas

Batched = TypeVar("Batched")
"""Whatever has the batch as its first dimension."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What stays as it is while rows are decoded.

    Args:
        lengths: tokens of each of the B rows, known on the host.
        prompt: ``(B, W)`` bool, the slots that the unconditional branch of classifier-free guidance masks.
        mask: ``(B, W)`` bool, false for padding, if it is there already.

    Example:
        >>> canvas = Canvas.from_infill([[5, 1, 6], [5, 1]], mask_token_id=1)
        >>> rows = Rows.of(canvas)
        >>> rows.lengths, rows.present.long().tolist()
        ((3, 2), [[1, 1, 1], [1, 1, 0]])
    """

    lengths: tuple[int, ...]
    prompt: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, canvas: Canvas) -> Rows:
        """Those of a canvas."""
        return cls(tuple(canvas.attention_mask.sum(1).tolist()), to_rows(canvas, canvas.prompt, False))

    @property
    def width(self) -> int:
        """W, columns."""
        return self.prompt.shape[1]

    @property
    def is_padded(self) -> bool:
        """Whether any row is shorter than W."""
        return min(self.lengths) < self.width

    @cached_property
    def present(self) -> Tensor:
        """``(B, W)`` bool: false for padding."""
        if self.mask is not None:
            return self.mask
        columns = torch.arange(self.width, device=self.prompt.device)
        return columns < host_tensor(self.lengths, self.prompt.device)[:, None]

    @cached_property
    def groups(self) -> tuple[tuple[Tensor, int], ...]:
        """Rows of one length ``(n,)`` int64, and that length, for every length there is."""
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(row)
        return tuple((host_tensor(rows, self.prompt.device), length) for length, rows in by_length.items())


def host_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """``(N,)`` int64 of numbers on the host, brought to a device without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    return to_device(tensor, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it: a copy from pageable memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_rows(canvas: Canvas, values: Tensor, fill: float) -> Tensor:
    """Values of a canvas's columns in the columns of its rows, ``(B, L) -> (B, W)``; ``fill`` behind a row."""
    columns = torch.arange(canvas.longest, device=values.device) + canvas.padding
    width = values.shape[1]
    return values.gather(1, columns.clamp(max=width - 1)).masked_fill(columns >= width, fill)


def to_canvas(canvas: Canvas, values: Tensor, fill: Tensor | float) -> Tensor:
    """The other way, ``(B, W) -> (B, L)``; ``fill`` where a canvas has padding."""
    columns = torch.arange(canvas.tokens.shape[1], device=values.device) - canvas.padding
    moved = values.gather(1, columns.clamp(0, values.shape[1] - 1))
    return torch.where(columns >= 0, moved, fill)


def in_runs(where: Tensor, block: Tensor) -> Tensor:
    """How many in front of each column, in its run of equal blocks, are true: ``(B, W) bool -> (B, W)`` int64."""
    counts = where.long()
    before = counts.cumsum(1) - counts
    return before - before.gather(1, torch.searchsorted(block, block))


def select(values: Batched, host: Tensor, device: Tensor) -> Batched:
    """Some of the rows of a batch, ``(n,)`` int64 indices on the host and on the device.

    ``values`` is a tensor with the batch as its first dimension, a dict of such, or a dataclass of either.
    """
    mapped: Batched = _map(
        values, lambda tensor: tensor.index_select(0, host if tensor.device == host.device else device)
    )
    return mapped


def narrow(values: Batched, width: int) -> Batched:
    """The first columns ``(B, width)`` of everything that is ``(B, W)``."""
    mapped: Batched = _map(values, lambda tensor: tensor[:, :width] if tensor.ndim == 2 else tensor)
    return mapped


def _map(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _map(value, function) for name, value in values.items()}
    if is_dataclass(values) and not isinstance(values, type):
        return replace(values, **{f.name: _map(getattr(values, f.name), function) for f in fields(values)})
    return values


def tensors(values: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    found: list[Tensor] = []
    _map(values, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def copy_of(values: Batched) -> Batched:
    """The same in tensors of its own, each of which may be overwritten."""
    mapped: Batched = _map(values, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    return mapped


def join(first: Batched, second: Batched, fills: Mapping[str, float]) -> Batched:
    """The rows of one dataclass of tensors, then those of another, each padded at the end of its other dimensions.

    Args:
        first: the one; what is no tensor comes from it.
        second: the other.
        fills: what to pad with, by the name of the field; 0 by default.
    """

    def joined(name: str) -> Any:
        one, other = getattr(first, name), getattr(second, name)
        if is_dataclass(one):
            return join(one, other, fills)
        if not isinstance(one, Tensor):
            return one
        return append(one, other, fills.get(name, 0))

    return replace(first, **{f.name: joined(f.name) for f in fields(first)})  # type: ignore[type-var, arg-type]


def append(first: Tensor, second: Tensor, fill: float = 0) -> Tensor:
    """The rows of one tensor, then those of another, each padded at the end of its other dimensions."""
    sizes = [max(pair) for pair in zip(first.shape[1:], second.shape[1:], strict=True)]
    return torch.cat([pad_to(tensor, sizes, fill) for tensor in (first, second)])


def pad_to(values: Tensor, sizes: Sequence[int], fill: float = 0) -> Tensor:
    """Pad or cut all dimensions but the first at their end."""
    pads = [n for now, size in zip(values.shape[:0:-1], sizes[::-1], strict=True) for n in (0, size - now)]
    return torch.nn.functional.pad(values, pads, value=fill) if any(pads) else values
