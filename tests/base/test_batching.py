"""Batches of tensors: rows picked, joined and padded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nap_decode.base.batching import copy_of, host_tensor, in_runs, join, narrow, pad_to, select, tensors

CPU = torch.device("cpu")


def test_host_tensor():
    got = host_tensor([], CPU)
    assert got.dtype == torch.int64
    assert host_tensor((3, 2), CPU).tolist() == [3, 2]


# -------------------------------------------------------------------------------------------- runs


@given(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=12), st.integers(0, 11))
def test_in_runs(pairs, turn):
    pairs = sorted(pairs, key=lambda pair: pair[0])
    other = sorted(pairs[turn:] + pairs[:turn], key=lambda pair: pair[0])
    where = torch.tensor([[w for _, w in row] for row in (pairs, other)])
    block = torch.tensor([[b for b, _ in row] for row in (pairs, other)])
    got = in_runs(where, block)
    assert got.dtype == torch.int64
    for row, own in zip(got.tolist(), (pairs, other), strict=True):
        assert row == [sum(w for b, w in own[:i] if b == own[i][0]) for i in range(len(own))]


# -------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class Batch:
    name: str
    lengths: Tensor  # (B,)
    tokens: Tensor  # (B, W)
    open: Tensor  # (B, S, M)
    memory: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def total(self):
        return int(self.lengths.sum())


def batch(rows, width, steps=2, blocks=1, first=0, name="a"):
    numbers = torch.arange(first, first + rows)
    return Batch(
        name,
        numbers,
        10 * numbers[:, None] + torch.arange(width),
        torch.ones(rows, steps, blocks, dtype=torch.bool),
        {"kept": numbers[:, None] * torch.ones(3)},
    )


def test_select():
    given, index = batch(4, 3), torch.tensor([2, 0])
    assert given.total == 6
    got = select(given, index, index)
    assert got.name == "a"
    assert got.lengths.tolist() == [2, 0]
    assert got.tokens.tolist() == [[20, 21, 22], [0, 1, 2]]
    assert got.open.shape == (2, 2, 1)
    assert got.memory["kept"].tolist() == [[2.0] * 3, [0.0] * 3]
    assert got.total == 2  # not what was known of the other rows
    assert given.tokens.shape == (4, 3)
    assert select({"x": given.lengths}, index, index)["x"].tolist() == [2, 0]
    assert select(Batch, index, index) is Batch  # only objects have rows


def test_select_takes_the_index_from_where_the_rows_are():
    host, device = torch.tensor([1]), torch.tensor([1, 0], device="meta")  # which would be of one size otherwise
    both = {"host": torch.tensor([4, 5]), "device": torch.zeros(2, 3, device="meta")}
    got = select(both, host, device)
    assert got["host"].tolist() == [5]
    assert got["device"].shape == (2, 3)


def test_narrow():
    got = narrow(batch(2, 5, steps=4), 3)
    assert got.tokens.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert got.lengths.tolist() == [0, 1]
    assert got.open.shape == (2, 4, 1)


@given(*[st.integers(1, 4)] * 8)
def test_join(rows, width, steps, blocks, other_rows, other_width, other_steps, other_blocks):
    first = batch(rows, width, steps, blocks)
    second = batch(other_rows, other_width, other_steps, other_blocks, first=rows, name="b")
    got = join(first, second, {"tokens": -1})
    assert got.name == "a"
    assert got.memory is first.memory  # no tensor
    assert got.lengths.tolist() == list(range(rows + other_rows))
    most = max(width, other_width)
    for row in range(rows + other_rows):
        own = width if row < rows else other_width
        assert got.tokens[row].tolist() == [10 * row + c for c in range(own)] + [-1] * (most - own)
        there = (steps, blocks) if row < rows else (other_steps, other_blocks)
        assert got.open[row].sum() == there[0] * there[1]
        assert got.open[row, : there[0], : there[1]].all()
    assert got.open.shape[1:] == (max(steps, other_steps), max(blocks, other_blocks))
    assert got.open.dtype == torch.bool


@dataclass(frozen=True, eq=False)
class Nested:
    inner: Batch
    other: Tensor  # (B, S)


def test_joining_what_is_nested():
    """Fills go by the names of the fields, wherever they are."""
    first, second = Nested(batch(1, 2), torch.zeros(1, 1)), Nested(batch(1, 4), torch.ones(1, 2))
    got = join(first, second, {"tokens": -1})
    assert got.inner.tokens.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]
    assert got.other.tolist() == [[0, 0], [1, 1]]
    index = torch.tensor([1])
    own = select(replace(got, inner=replace(got.inner, memory={})), index, index)
    assert own.inner.tokens.tolist() == [[0, 1, 2, 3]]
    assert own.other.tolist() == [[1, 1]]


def test_tensors_come_in_order():
    given = batch(2, 3)
    want = [given.lengths, given.tokens, given.open, given.memory["kept"]]
    assert all(a is b for a, b in zip(tensors(given), want, strict=True))
    assert tensors("nothing") == []


def test_copies_may_be_overwritten():
    given = replace(batch(2, 3), tokens=torch.zeros(2, 1).expand(2, 3))
    copied = copy_of(given)
    for own, other in zip(tensors(copied), tensors(given), strict=True):
        assert torch.equal(own, other)
        own.copy_(torch.rand(own.shape))  # of an expanded tensor this would raise
    assert given.lengths.tolist() == [0, 1]
    assert given.tokens.tolist() == [[0] * 3] * 2


def test_joining_and_selecting_undo_each_other():
    first, second = batch(2, 3), batch(3, 5, first=2)
    together = replace(join(first, second, {}), memory={})
    index = torch.arange(2)
    back = narrow(select(together, index, index), 3)
    assert torch.equal(back.tokens, first.tokens)
    index = torch.arange(2, 5)
    assert torch.equal(select(together, index, index).tokens, second.tokens)


def test_rows_of_other_dimensions_do_not_join():
    with pytest.raises(ValueError, match="zip"):
        join(batch(1, 2), Batch("b", torch.zeros(1), torch.zeros(1, 2, 2), torch.ones(1, 1, 1)), {})


@given(st.tuples(*[st.integers(0, 4)] * 3), st.tuples(*[st.integers(0, 4)] * 2))
def test_pad_to(shape, sizes):
    values = torch.randn(shape)
    got = pad_to(values, sizes, -9)
    assert got.shape == (shape[0], *sizes)
    a, b = (min(pair) for pair in zip(shape[1:], sizes, strict=True))
    assert torch.equal(got[:, :a, :b], values[:, :a, :b])
    assert (got[:, a:] == -9).all()
    assert (got[:, :, b:] == -9).all()


def test_padding_nothing_copies_nothing():
    values = torch.zeros(2, 3)
    assert pad_to(values, (3,)) is values
    assert pad_to(values[:, 0], ()).shape == (2,)
    assert pad_to(values, (4,))[:, 3].tolist() == [0, 0]
    assert pad_to(values.bool(), (4,), True)[:, 3].tolist() == [True, True]
