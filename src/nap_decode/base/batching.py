"""Batches of tensors: rows picked, joined and padded, and brought to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Batched = TypeVar("Batched")
"""A tensor with the batch as its first dimension, a dict of such, or a dataclass of either."""


def host_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """``(N,)`` int64 of numbers on the host, brought to a device without waiting for it."""
    return to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it: a copy from pageable memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any shapes in one copy, as each would wait for the device."""
    whole = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def in_runs(where: Tensor, block: Tensor) -> Tensor:
    """How many in front of each column, in its run of equal blocks, are true: ``(B, W) bool -> (B, W)`` int64."""
    counts = where.long()
    before = counts.cumsum(1) - counts
    return before - before.gather(1, torch.searchsorted(block, block))


def select(values: Batched, host: Tensor, device: Tensor) -> Batched:
    """Some of the rows of a batch, by their indices ``(n,)`` int64, on the host and on the device."""
    return mapped(values, lambda tensor: tensor.index_select(0, host if tensor.device == host.device else device))


def narrow(values: Batched, width: int) -> Batched:
    """The first columns ``(B, width)`` of everything that is ``(B, W)``."""
    return mapped(values, lambda tensor: tensor[:, :width] if tensor.ndim == 2 else tensor)


def copy_of(values: Batched) -> Batched:
    """The same in tensors of its own, each of which may be overwritten."""
    return mapped(values, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def tensors(values: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    found: list[Tensor] = []
    mapped(values, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def mapped(values: Batched, function: Callable[[Tensor], Tensor]) -> Batched:
    """The same with every tensor in it exchanged."""
    changed: Any = values
    if isinstance(values, Tensor):
        changed = function(values)
    elif isinstance(values, dict):
        changed = {name: mapped(value, function) for name, value in values.items()}
    elif is_dataclass(values) and not isinstance(values, type):
        changed = replace(values, **{f.name: mapped(getattr(values, f.name), function) for f in fields(values)})
    return cast(Batched, changed)


def join(first: Batched, second: Batched, fills: Mapping[str, float]) -> Batched:
    """The rows of one dataclass of tensors, then those of another; what is no tensor comes from the first.

    Each is padded at the end of its other dimensions, with what ``fills`` says of its field, 0 by default.
    """

    def joined(name: str) -> Any:
        one, other = getattr(first, name), getattr(second, name)
        if is_dataclass(one):
            return join(one, other, fills)
        return append(one, other, fills.get(name, 0)) if isinstance(one, Tensor) else one

    return replace(first, **{f.name: joined(f.name) for f in fields(first)})  # type: ignore[type-var, arg-type]


def append(first: Tensor, second: Tensor, fill: float = 0) -> Tensor:
    """The rows of one tensor, then those of another, each padded at the end of its other dimensions."""
    sizes = [max(pair) for pair in zip(first.shape[1:], second.shape[1:], strict=True)]
    return torch.cat([pad_to(tensor, sizes, fill) for tensor in (first, second)])


def pad_to(values: Tensor, sizes: Sequence[int], fill: float = 0) -> Tensor:
    """Pad or cut all dimensions but the first at their end."""
    pads = [n for now, size in zip(values.shape[:0:-1], sizes[::-1], strict=True) for n in (0, size - now)]
    return torch.nn.functional.pad(values, pads, value=fill) if any(pads) else values
