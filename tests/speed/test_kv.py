"""The store of keys and values."""

from __future__ import annotations

import pytest
import torch

from nap_decode.speed.kv import Store

ROWS, WIDTH = 3, 5


def numbered(rows, columns, start):
    """``(rows, 1 head, columns, 1)`` of different numbers."""
    return torch.arange(start, start + rows * columns).view(rows, 1, columns, 1).double()


@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("positions", [None, [[4, 1], [0, 0]]])
def test_what_is_called_is_overwritten_and_the_rest_stands(rows, positions):
    states = {}
    first = numbered(ROWS, WIDTH, 0)
    assert torch.equal(Store(states, ROWS, WIDTH).put("keys", first), first)
    called = list(range(ROWS)) if rows is None else rows
    positions = None if positions is None else [*positions, [2, 3]][: len(called)]
    columns = [list(range(WIDTH))] * len(called) if positions is None else positions
    new = numbered(len(called), len(columns[0]), 100)
    new[1:2] = new[1:2, :, :1]  # the position that stands there twice, brings the same
    expected = first.clone()
    for n, row in enumerate(called):
        for p, column in enumerate(columns[n]):
            expected[row, 0, column, 0] = new[n, 0, p, 0]
    store = Store(
        states,
        ROWS,
        WIDTH,
        None if rows is None else torch.tensor(rows),
        None if positions is None else torch.tensor(positions),
    )
    assert torch.equal(store.put("keys", new), expected[called])
    assert torch.equal(states["keys"], expected)


def test_a_store_begins_empty():
    states = {}
    store = Store(states, ROWS, WIDTH, torch.tensor([1]), torch.tensor([[3]]))
    keys, values = store.update(0, numbered(1, 1, 7), numbered(1, 1, 8))
    assert (keys.sum(), values.sum()) == (7, 8)
    assert sorted(states) == ["keys 0", "values 0"]
    assert states["keys 0"].shape == (ROWS, 1, WIDTH, 1)
