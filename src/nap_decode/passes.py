"""Calling a model for all rows of a batch: at once, or in groups of one length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nap_decode.calling import Frame, ModelCall
from nap_decode.heads import Output
from nap_decode.rows import Rows


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows that are called together."""

    index: Tensor | None  # (n,) which of them; None if all
    width: int  # columns that they have
    frame: Frame


class ForwardPass:
    """Calls a model for the same rows again and again; what depends on nothing but the rows is made once.

    Args:
        call: calls the model.
        rows: B rows.
        is_grouped: whether rows of different length are called one length after the other.
        mask_token_id: what stands in shadows.
    """

    def __init__(self, call: ModelCall, rows: Rows, is_grouped: bool, mask_token_id: int) -> None:
        self.call, self.rows, self.is_grouped, self.mask_token_id = call, rows, is_grouped, mask_token_id
        self._parts: dict[int, list[_Part]] = {}

    def __call__(self, tokens: Tensor, wanted: Tensor, shadows: tuple[Tensor, Tensor] | None) -> Output:
        """One forward pass.

        Args:
            tokens: ``(N, W)`` int64; N is a multiple of B.
            wanted: ``(N, K)`` int64, see :meth:`ModelCall.__call__`.
            shadows: see there.
        """
        found, order = [], []
        for part in self._split(len(tokens)):
            ids, places, some = tokens, wanted, shadows
            if part.index is not None:
                ids, places = tokens[part.index, : part.width], wanted[part.index]
                some = None if shadows is None else (shadows[0][part.index], shadows[1][part.index])
                order.append(part.index)
            output = self.call(ids, part.frame, places, some, mask_token_id=self.mask_token_id)
            found.append(output.rows)
        if not order:
            return output
        values = torch.cat(found)
        return output._replace(rows=torch.empty_like(values).index_copy_(0, torch.cat(order).to(values.device), values))

    def _split(self, number: int) -> list[_Part]:
        """The calls to make for so many rows."""
        if number not in self._parts:
            self._parts[number] = self._grouped(number) if self.is_grouped else [self._together(number)]
        return self._parts[number]

    def _together(self, number: int) -> _Part:
        present = self.rows.present.repeat(number // len(self.rows.prompt), 1) if self.rows.is_padded else None
        shape = number, self.rows.width
        return _Part(None, self.rows.width, self.call.frame(shape, present, self.rows.prompt.device))

    def _grouped(self, number: int) -> list[_Part]:
        once, device = len(self.rows.prompt), self.rows.prompt.device
        first = torch.arange(0, number, once, device=device)[:, None]  # of each copy of the batch
        return [
            _Part((first + some).flatten(), width, self.call.frame((number // once * len(some), width), None, device))
            for some, width in self.rows.groups
        ]
