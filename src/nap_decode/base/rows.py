"""The rows of a batch as the model sees them: they begin in column 0, so that columns are positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.batching import host_tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """What stays as it is while rows are decoded.

    Args:
        lengths: tokens of each of the B rows, known on the host.
        prompt: ``(B, W)`` bool, the slots that the unconditional branch of classifier-free guidance masks.
        mask: what ``present`` is, if it is there already.

    Example:
        >>> rows = Rows((3, 2), torch.zeros(2, 3, dtype=torch.bool))
        >>> rows.width, rows.present.long().tolist()
        (3, [[1, 1, 1], [1, 1, 0]])
    """

    lengths: tuple[int, ...]
    prompt: Tensor
    mask: Tensor | None = None
    made: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # by forward passes, for the next

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
