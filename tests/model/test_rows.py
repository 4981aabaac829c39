from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nap_decode import Canvas, CanvasTemplate
from nap_decode.model.rows import (
    Rows,
    copy_of,
    host_tensor,
    in_runs,
    join,
    narrow,
    pad_to,
    select,
    tensors,
    to_canvas,
    to_rows,
)

CPU = torch.device("cpu")
prompt_lengths = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def canvas_of(lengths, new=2, prompt_width=0):
    """Prompts of these lengths, and as many slots to decode in each row."""
    prompts = [list(range(5, 5 + n)) for n in lengths]
    return Canvas.from_prompts(prompts, CanvasTemplate.plain(new), mask_token_id=1, prompt_width=prompt_width)


def numbered(canvas, start=100):
    shape = canvas.tokens.shape
    return torch.arange(start, start + canvas.tokens.numel()).view(shape)


# -------------------------------------------------------------------------------------------- canvas and rows


@given(prompt_lengths, st.integers(0, 3), st.integers(0, 9))
def test_rows_begin_in_column_0(lengths, more, prompt_width):
    """A canvas may be wider than its longest row; the rows are not."""
    canvas = canvas_of(lengths, prompt_width=prompt_width)
    values, width = numbered(canvas), max(lengths) + 2
    got = to_rows(canvas, values, -7)
    for row, n in enumerate(lengths):
        assert got[row].tolist() == values[row, -(n + 2) :].tolist() + [-7] * (width - n - 2)


@given(prompt_lengths, st.integers(0, 3), st.integers(0, 9))
def test_the_way_to_the_rows_and_back(lengths, more, prompt_width):
    """Rows may have become wider meanwhile, because of others that came."""
    canvas = canvas_of(lengths, prompt_width=prompt_width)
    values, present = numbered(canvas), canvas.attention_mask > 0
    rows = torch.nn.functional.pad(to_rows(canvas, values, -7), (0, more), value=-7)
    assert torch.equal(to_canvas(canvas, rows, -5), values.where(present, -5))
    fills = numbered(canvas, 900)
    assert torch.equal(to_canvas(canvas, rows, fills), values.where(present, fills))
    assert torch.equal(to_rows(canvas, to_canvas(canvas, rows, -5), -7), rows[:, : canvas.longest])


@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.bool, False), (torch.bool, True), (torch.float32, torch.nan), (torch.int64, -1)]
)
def test_dtypes_are_kept(dtype, fill):
    canvas = canvas_of([3, 0])
    values = numbered(canvas).to(dtype)
    rows = to_rows(canvas, values, fill)
    back = to_canvas(canvas, rows, fill)
    assert rows.dtype == back.dtype == dtype
    want = values.where(canvas.attention_mask > 0, torch.tensor(fill, dtype=dtype))
    torch.testing.assert_close(back, want, rtol=0, atol=0, equal_nan=True)


@given(prompt_lengths)
def test_what_is_known_of_rows(lengths):
    canvas = canvas_of(lengths)
    rows = Rows.of(canvas)
    width = max(lengths) + 2
    assert rows.lengths == tuple(n + 2 for n in lengths)
    assert rows.width == width
    assert rows.is_padded == (len(set(lengths)) > 1)
    assert rows.present.tolist() == [[column < n + 2 for column in range(width)] for n in lengths]
    assert rows.prompt.tolist() == [[column < n for column in range(width)] for n in lengths]
    groups = {length: index.tolist() for index, length in rows.groups}
    assert len(groups) == len(rows.groups)
    assert groups == {n: [i for i, m in enumerate(rows.lengths) if m == n] for n in rows.lengths}


def test_rows_may_be_narrower_than_the_batch():
    """Another row made it as wide as it is, and has left."""
    rows = Rows((2, 2), torch.zeros(2, 4, dtype=torch.bool))
    assert rows.is_padded
    assert rows.present.long().tolist() == [[1, 1, 0, 0]] * 2


def test_a_mask_that_is_there_is_not_made_again():
    mask = torch.tensor([[True, True], [True, False]])
    assert Rows((2, 1), mask, mask).present is mask
    made = Rows((2, 1), mask).present
    assert torch.equal(made, mask)


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
