"""The rows of a batch as the model sees them: they begin in column 0, so that columns are positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nap_decode.base.batching import append, copy_of, host_tensor, join, narrow, select, tensors, to_device
from nap_decode.canvas import Canvas

__all__ = ["Rows", "append", "copy_of", "host_tensor", "join", "narrow", "select", "tensors", "to_device"]


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
        return cls(tuple(canvas.attention_mask.sum(1).tolist()), canvas.prompt)

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
