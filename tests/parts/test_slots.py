from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nap_decode import Canvas, CanvasTemplate
from nap_decode.base.random import row_seeds, uniform
from nap_decode.parts.slots import Slots

BLOCKS = 3


def test_slots_are_packed_to_the_left():
    template = CanvasTemplate.nap(2, path_length=2, summary_length=1, path_header=[(7,), (7,)], summary_header=(7,))
    canvas = Canvas.from_prompts([[5, 5], [5]], template, mask_token_id=1)
    masked = canvas.decodable.clone()
    masked[0, 3] = False  # the first slot of path 1 is committed
    block = canvas.block
    is_open = torch.tensor([[True, False, True], [False, True, False]])
    quota = torch.tensor([[1, 0, 1], [0, 2, 0]])
    packed = Slots.pack(
        masked & is_open.gather(1, block.clamp(min=0)),
        block,
        quota,
        width=2,
        total=4,
        seeds=row_seeds(0, range(2)),
        step=torch.tensor([4, 4]),
        row_tokens=canvas.tokens,
        row_offsets=torch.arange(10).expand(2, -1),
    )
    # Columns are positions: the second row is a token shorter, and has its padding behind.
    assert packed.index.tolist() == [[4, 9], [5, 6]]
    assert packed.block.tolist() == [[0, 2], [1, 1]]
    assert packed.offsets.tolist() == [[4, 9], [5, 6]]
    assert packed.tokens.tolist() == [[1, 1], [1, 1]]
    spread = packed.spread(torch.tensor([[10, 20], [40, 50]])).masked_fill(packed.rank < 0, -1)
    assert spread.tolist() == [[-1] * 4 + [10] + [-1] * 4 + [20], [-1] * 5 + [40, 50, -1, -1, -1]]


@st.composite
def columns(draw):
    """Rows of blocks ``(B, W)``, -1 for none, which of their slots are wanted and committed, and room to spare."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))

    def table(values):
        return torch.tensor([[draw(values) for _ in range(width)] for _ in range(rows)])

    block = table(st.integers(-1, BLOCKS - 1))
    wanted = table(st.integers(0, 2)).bool() & (block >= 0)
    if draw(st.integers(0, 3)) == 0:
        wanted = block >= 0  # which may be all there is
    return block, wanted, table(st.booleans()), draw(st.integers(0, 3)), draw(st.integers(0, 5))


def pack(case, **options):
    block, wanted, committed, wider, more = case
    rows, width = block.shape
    most = max(1, int(wanted.sum(1).max())) + wider
    generator = torch.Generator().manual_seed(0)
    fields = {
        "width": most,
        "total": max(1, int(wanted.sum())) + more,
        "committed": committed,
        "seeds": row_seeds(1, range(rows)),
        "step": torch.arange(rows),
        "row_tokens": torch.randint(50, (rows, width), generator=generator),
        "row_offsets": torch.randint(50, (rows, width), generator=generator),
    }
    return Slots.pack(wanted, block, torch.ones(rows, BLOCKS, dtype=torch.int64), **(fields | options))


def expected(case):
    """For every row, the columns wanted."""
    return [[c for c, w in enumerate(row) if w] for row in case[1].tolist()]


@given(columns())
def test_packing(case):
    block, _, committed, _, _ = case
    packed = pack(case)
    width = packed.index.shape[1]
    wants = expected(case)
    for row, want in enumerate(wants):
        spare = width - len(want)
        assert packed.index[row].tolist() == want + [0] * spare
        assert packed.block[row].tolist() == block[row, want].tolist() + [BLOCKS] * spare
        assert packed.committed[row].tolist() == committed[row, want].tolist() + [False] * spare
        assert packed.tokens[row, : len(want)].tolist() == packed.row_tokens[row, want].tolist()
        assert packed.offsets[row, : len(want)].tolist() == packed.row_offsets[row, want].tolist()
        assert packed.rank[row].tolist() == [want.index(c) if c in want else -1 for c in range(block.shape[1])]
        held = [bool(c) for c in committed[row, want]]
        assert packed.open[row].tolist() == [not h for h in held] + [False] * spare
        kept = [BLOCKS if h else int(block[row, c]) for c, h in zip(want, held, strict=True)]
        assert packed.open_block[row].tolist() == kept + [BLOCKS] * spare
    assert not pack(case, committed=None).committed.any()


@given(columns())
def test_places_are_the_slots_row_after_row(case):
    packed = pack(case)
    width = packed.index.shape[1]
    want = [row * width + i for row, own in enumerate(expected(case)) for i in range(len(own))]
    total = max(1, len(want)) + case[4]
    places = packed.places.tolist()
    if total >= packed.block.numel():  # there is nothing to leave out
        assert places == list(range(packed.block.numel()))
    else:
        assert places == want + [0] * (total - len(want))


@given(columns(), st.integers(1, 3))
def test_unpacking(case, times):
    """Also of slots repeated, and whatever there is more of them than needed."""
    packed = pack(case).repeat(times)
    there = (packed.block < BLOCKS).flatten()
    own = torch.arange(packed.block.numel())
    for values in (own, own[:, None] + torch.tensor([0.0, 0.5])):
        got = packed.unpack(values[packed.places])
        assert got.shape == (*packed.block.shape, *values.shape[1:])
        assert torch.equal(got.flatten(0, 1)[there], values[there])


def test_a_place_named_twice_is_unpacked_from_the_first():
    """The two may differ in rounding, and the order of writing is an accelerator's own."""
    wanted = torch.tensor([[True, True], [True, False]])
    case = (torch.where(wanted, 0, -1), wanted, torch.zeros_like(wanted), 0, 0)
    packed = pack(case, width=3, total=5)
    assert packed.places.tolist() == [0, 1, 3, 0, 0]
    assert packed.unpack(torch.tensor([1.0, 2.0, 3.0, 8.0, 9.0]))[:, 0].tolist() == [1.0, 3.0]


@given(columns(), st.integers(1, 3))
def test_repeating(case, times):
    packed = pack(case, memory={"a": torch.zeros(1)})
    repeated = packed.repeat(times)
    rows, width = packed.block.shape
    names = ("index", "block", "committed", "rank", "quota", "seeds", "step", "row_tokens", "row_offsets")
    for name in (*names, "tokens", "open", "offsets"):
        own, got = getattr(packed, name), getattr(repeated, name)
        assert len(got) == times * rows
        for part in got.split(rows):
            assert torch.equal(part, own)
    assert repeated.memory is packed.memory
    want = [place + i * rows * width for i in range(times) for place in packed.places.tolist()]
    assert repeated.places.tolist() == want


@given(columns())
def test_spreading(case):
    packed = pack(case)
    values = torch.arange(packed.block.numel()).view_as(packed.block)
    got = packed.spread(values)
    for row, want in enumerate(expected(case)):
        assert got[row, want].tolist() == values[row, : len(want)].tolist()


@given(columns())
def test_blocks_of_slots(case):
    block, _, committed, _, _ = case
    packed = pack(case)
    counts = packed.count(packed.committed)
    per_slot = packed.per_slot(torch.arange(1, 1 + counts.numel()).view_as(counts))
    for row, want in enumerate(expected(case)):
        for b in range(BLOCKS):
            assert counts[row, b] == sum(bool(committed[row, c]) for c in want if block[row, c] == b)
        spare = packed.index.shape[1] - len(want)
        assert per_slot[row].tolist() == [1 + row * BLOCKS + int(block[row, c]) for c in want] + [0] * spare


@given(columns())
def test_draws_belong_to_positions(case):
    """Not to places, which depend on what else is open."""
    packed = pack(case)
    got = packed.uniform(3)
    for row, want in enumerate(expected(case)):
        for place, column in enumerate(want):
            alone = uniform(packed.seeds[row : row + 1], row, 3, torch.tensor([[column]]))
            assert got[row, place] == alone[0, 0]


@pytest.mark.parametrize("width", [2, 4, 6])
def test_what_is_kept_follows_the_width(width):
    """Rows that joined made the batch wider; when they had left, it was narrow again."""
    before = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    slots = Slots.of(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1), memory={"a": before})
    got = slots.kept("a", torch.full((2, width), 9))
    assert got.tolist() == [[*row, 0, 0][:width] for row in before.tolist()]
    assert slots.memory["a"] is before
    deep = Slots.of(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1), memory={"a": before[:, :, None]})
    assert deep.kept("a", torch.ones(2, width, 2)).shape == (2, width, 2)


def test_what_was_never_kept():
    slots = Slots.of(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1))
    like = torch.full((2, 4), 7)
    assert slots.kept("a", like) is like
    assert slots.memory == {}


def test_recalling():
    """Slots of columns 1, 2 and 4 now; columns 2 and 4 were the first and the second before."""
    slots = Slots.of(
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 1),
        index=torch.tensor([[1, 2, 4]]),
        rank=torch.tensor([[-1, 0, 1, -1, 2, -1]]),
        memory={"before": torch.tensor([[-1, -1, 0, -1, 1, 2]]) + 1},
    )
    place, known = slots.recall("before")
    assert place.tolist() == [[0, 0, 1]]
    assert known.tolist() == [[False, True, True]]
    assert not slots.recall("never")[1].any()
