"""Keys and values that passes keep for the next ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Store:
    """What a model made of the rows of a batch, and which positions of them a call of it brings.

    Args:
        states: ``(B, heads, W, D)`` each; made by the first call, overwritten in place by the others.
        number: B, rows of the batch.
        width: W, columns.
        rows: ``(n,)`` int64, the rows that are called; None if all are.
        positions: ``(n, P)`` int64, the positions that are called; None if all are.
    """

    states: dict[str, Tensor]
    number: int
    width: int
    rows: Tensor | None = None
    positions: Tensor | None = None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; see :meth:`put`."""
        return self.put(f"keys {layer}", keys), self.put(f"values {layer}", values)

    def put(self, name: str, new: Tensor) -> Tensor:
        """``(n, heads, P, D)`` of what is called ``-> (n, heads, W, D)`` of all positions of these rows."""
        if self.rows is None and self.positions is None:
            self.states[name] = new.contiguous()
            return new  # as it came, so that the pass is what it is without a store
        if name not in self.states:
            self.states[name] = new.new_zeros(self.number, new.shape[1], self.width, new.shape[3])
        kept = self.states[name]
        some = kept if self.rows is None else kept.index_select(0, self.rows)
        if self.positions is None:
            some = new
        else:
            index = self.positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            some = some.scatter_(2, index, new)
        if self.rows is not None:
            kept.index_copy_(0, self.rows, some)
        return some
