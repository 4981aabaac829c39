"""Every question to a distribution against the slow and obvious answer, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode.base.random import row_seeds, uniform
from nap_decode.model.statistics import Distribution, reduce

SIZES = [1, 2, 3, 255, 256, 257, 300, 511, 512, 513, 769, 1000]
"""Vocabularies around the stretches of 256 ids that are looked through one at a time."""
BANS = ["none", "first", "last", "some", "a stretch", "the best", "all but one", "all"]
LARGEST_DRAW = 1 - 2**-24


def make_logits(kind, rows, size, dtype, generator):
    logits = 3 * torch.randn(rows, size, dtype=dtype, generator=generator)
    if kind == "ties":
        logits = logits.round()
    elif kind == "flat":
        logits = torch.full_like(logits, -2.5)
    elif kind == "far":  # 1e4 apart, so that all but few weigh nothing
        logits = 1e4 * logits.round()
    elif kind == "impossible":  # most of them, but not all
        keep = torch.rand(rows, size, generator=generator) < 0.1
        keep[:, torch.randint(size, (1,), generator=generator)] = True
        logits = logits.where(keep, -torch.inf)
    elif kind == "one hot":
        logits = torch.full_like(logits, -torch.inf)
        logits[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = 7.0
    return logits


def make_banned(kind, logits, generator):
    size = logits.shape[1]
    banned = {
        "none": [],
        "first": [0],
        "last": [size - 1],
        "some": torch.randperm(size, generator=generator)[: size // 3].tolist(),
        "a stretch": range(256 * ((size - 1) // 512), min(256 * ((size - 1) // 512) + 256, size)),
        "the best": logits.argmax(1).unique().tolist(),
        "all but one": [i for i in range(size) if i != size // 2],
        "all": range(size),
    }[kind]
    return torch.tensor(sorted(banned), dtype=torch.int64)


kinds = st.sampled_from(["normal", "ties", "flat", "far", "impossible", "one hot"])
dtypes = st.sampled_from([torch.float32, torch.float64])
cases = st.tuples(
    st.integers(0, 2**20), kinds, st.integers(1, 4), st.sampled_from(SIZES), dtypes, st.sampled_from(BANS)
)
"""What is needed to make logits and banned ids; they themselves would fill the screen when a test fails."""


def make(case):
    """Logits ``(R, V)`` and banned ids."""
    seed, kind, rows, size, dtype, bans = case
    generator = torch.Generator().manual_seed(seed)
    logits = make_logits(kind, rows, size, dtype, generator)
    return logits, make_banned(bans, logits, generator)


def bits(values):
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


def close(got, want, logits):
    """To the precision that logits of this size have."""
    size = logits[logits.isfinite()].abs().max().clamp(min=10)
    tolerance = 8 * torch.finfo(got.dtype).eps * float(size)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=400)
@given(cases)
def test_the_largest(case):
    logits, banned = make(case)
    distribution = Distribution(logits.clone(), banned)
    allowed = logits.index_fill(1, banned, -torch.inf)
    assert torch.equal(distribution.allowed, allowed)
    assert torch.equal(distribution.best, allowed.max(1).values)
    mode = torch.tensor([row.index(max(row)) for row in allowed.tolist()])  # the lowest of equals
    assert torch.equal(distribution.mode, mode)
    others = logits.scatter(1, mode[:, None], -torch.inf)
    possible = distribution.best > -torch.inf
    assert torch.equal(distribution.second[possible], others.max(1).values[possible])


@settings(max_examples=400)
@given(cases)
def test_sums(case):
    logits, banned = make(case)
    distribution = Distribution(logits.clone(), banned)
    exact = logits.double()
    close(distribution.log_normalizer, exact.logsumexp(1), logits)
    p = exact.softmax(1)
    close(distribution.negative_entropy, (p * p.log()).where(p > 0, 0).sum(1), logits)


@settings(max_examples=200)
@given(cases, st.permutations(["best", "mode", "second", "log_normalizer", "negative_entropy", "draw"]))
def test_logits_come_back_as_they_were(case, questions):
    """Bit for bit, whatever was asked before; and the answers do not depend on what was asked before."""
    logits, banned = make(case)
    logits[0, 0] = -0.0
    distribution = Distribution(logits.clone(), banned)
    draws = torch.full((len(logits),), 0.5)
    for name in questions:
        got, alone = (getattr(d, name) for d in (distribution, Distribution(logits.clone(), banned)))
        got, alone = (got(draws), alone(draws)) if name == "draw" else (got, alone)
        assert torch.equal(got.nan_to_num(9.0), alone.nan_to_num(9.0))
    assert torch.equal(bits(distribution.logits), bits(logits))
    assert torch.equal(bits(distribution.allowed), bits(logits.index_fill(1, banned, -torch.inf)))


@pytest.mark.parametrize("banned", [None, torch.tensor([], dtype=torch.int64)])
def test_without_banned_ids_nothing_is_copied(banned):
    logits = torch.randn(2, 300)
    distribution = Distribution(logits, banned)
    assert distribution.logits is distribution.allowed is logits


@pytest.mark.parametrize("size", SIZES)
def test_rows_without_numbers_say_so(size):
    """Their best is nan, what is drawn is some id all the same, and other rows do not suffer."""
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    whole = Distribution(logits[[0, 2]].clone())
    for where in {0, size // 2, size - 1}:
        broken = logits.clone()
        broken[1, where] = torch.nan
        distribution = Distribution(broken)
        assert distribution.best.isnan().tolist() == [False, True, False]
        assert distribution.mode[1] == where
        assert distribution.log_normalizer[1].isnan()
        assert distribution.negative_entropy[1].isnan()
        for name in ("best", "mode", "second", "log_normalizer", "negative_entropy"):
            assert torch.equal(getattr(distribution, name)[[0, 2]], getattr(whole, name))
        for draw in (0.0, 0.3, LARGEST_DRAW):
            draws = torch.full((3,), draw)
            got = distribution.draw(draws)
            assert 0 <= got[1] < size
            assert torch.equal(got[[0, 2]], whole.draw(draws[:2]))


@pytest.mark.parametrize("size", SIZES)
def test_where_nothing_is_possible_some_id_is_drawn(size):
    everything = torch.arange(size)
    impossible = torch.full((2, size), -torch.inf)
    for distribution in (Distribution(impossible), Distribution(torch.randn(2, size), everything)):
        assert (distribution.best == -torch.inf).all()
        for draw in (0.0, 0.3, LARGEST_DRAW):
            got = distribution.draw(torch.full((2,), draw))
            assert ((got >= 0) & (got < size)).all()


def check_draws(logits, banned, draws):
    """Of one row: every draw lies on the stretch of [0, 1) that belongs to the id, up to rounding."""
    allowed = logits.index_fill(1, banned, -torch.inf)
    rows = allowed.expand(len(draws), -1).clone()
    ids = Distribution(rows).draw(draws)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, Distribution(logits.repeat(len(draws), 1), banned).draw(draws))
    weights = (allowed - allowed.max()).exp()[0]
    assert (weights[ids] > 0).all()
    assert not torch.isin(ids, banned).any()
    upper = allowed[0].double().softmax(0).cumsum(0)
    lower = upper - allowed[0].double().softmax(0)
    tolerance = 1e-6 if logits.dtype == torch.float32 else 1e-12
    assert (lower[ids] <= draws.double() + tolerance).all()
    assert (draws.double() <= upper[ids] + tolerance).all()


@settings(max_examples=300)
@given(cases, st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=20))
def test_draws_invert_the_distribution_function(case, integers):
    logits, banned = make(case)
    draws = torch.tensor([0, 2**24 - 1, *integers], dtype=torch.float32) * 2**-24
    for row in logits[:, None]:
        if (row.index_fill(1, banned, -torch.inf) > -torch.inf).any():
            check_draws(row, banned, draws)


@settings(max_examples=200)
@given(cases)
def test_draws_at_boundaries(case):
    """As near to where one id ends and another begins as a draw can be, where rounding decides."""
    logits, banned = make(case)
    row = logits[:1]
    allowed = row.index_fill(1, banned, -torch.inf)
    if (allowed > -torch.inf).any():
        ends = allowed[0].double().softmax(0).cumsum(0).unique()[-400:]
        grid = ((ends * 2**24).floor()[:, None] + torch.arange(-2, 3)).flatten().clamp(0, 2**24 - 1)
        check_draws(row, banned, grid.float() * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("banned", [[], [0], [256, 257], [299]])
@pytest.mark.parametrize("size", [6, 300])
def test_the_law_is_exact(size, banned, dtype):
    """Evenly spaced draws fall on every id as often as its share of them, but for one at either end."""
    banned = torch.tensor([i for i in banned if i < size], dtype=torch.int64)
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size), dtype=dtype)
    number = 2**13
    draws = (torch.arange(number) + 0.5) / number
    ids = Distribution(logits.repeat(number, 1), banned).draw(draws)
    share = logits.index_fill(1, banned, -torch.inf)[0].double().softmax(0)
    assert ((torch.bincount(ids, minlength=size) - number * share).abs() <= 1 + 1e-2).all()
    assert (ids.diff() >= 0).all()


@pytest.mark.parametrize("size", [6, 520])
def test_the_law_of_the_rows_own_draws(size):
    number = 20_000 if size < 100 else 8_000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    draws = uniform(row_seeds(5, range(number)), 3, 1, torch.zeros(number, 1, dtype=torch.int64))[:, 0]
    seen = torch.zeros(size, dtype=torch.int64)
    for part in draws.split(1000):
        ids = Distribution(logits.repeat(len(part), 1), torch.tensor([2])).draw(part)
        seen += torch.bincount(ids, minlength=size)
    want = number * logits.index_fill(1, torch.tensor([2]), -torch.inf)[0].double().softmax(0)
    assert seen[2] == 0
    degrees = size - 2
    chi2 = float(((seen - want) ** 2 / want).where(want > 0, 0).sum())
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees) + 10


@pytest.mark.parametrize(("seed", "integer"), [(163, 4283981), (87, 4487599), (219, 4904995)])
def test_ids_that_weigh_nothing_in_front_of_a_stretch(seed, integer):
    """Rounding takes these draws to before the first weight of their stretch, where the ids are banned."""
    row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed))
    banned = torch.arange(256, 320)
    draws = torch.arange(integer - 50, integer + 50).float() * 2**-24
    check_draws(row, banned, draws)
    ids = Distribution(row.repeat(100, 1), banned).draw(draws)
    assert set(ids.tolist()) == {255, 320}
    assert ids[50] == 320


# -------------------------------------------------------------------------------------------- other ways to ask

properties = st.lists(st.sampled_from(["best", "mode", "second", "log_normalizer", "negative_entropy"]), unique=True)


@settings(max_examples=200)
@given(cases, properties)
def test_spent_logits_gave_the_same_answers(case, names):
    logits, banned = make(case)
    spent, whole = Distribution(logits.clone(), banned), Distribution(logits.clone(), banned)
    spent.spend(iter(names))
    for name in {"mode", "best", *names}:
        assert torch.equal(getattr(spent, name), getattr(whole, name))


@settings(max_examples=200)
@given(cases, properties, st.integers(1, 3), st.booleans())
def test_spent_parts_joined_are_the_whole(case, names, rows, is_known):
    """Whether the parts looked for the properties themselves, or were told."""
    logits, banned = make(case)
    whole, parts = Distribution(logits.clone(), banned), []
    for some in logits.clone().split(rows):
        part = Distribution(some, banned)
        if is_known:
            part.know(names, reduce(some, banned, tuple(names), None)[0])
        part.spend(names)
        parts.append(part)
    joined = Distribution.joined(parts)
    for name in {"mode", "best", *names}:
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_spent_logits_are_gone():
    spent = Distribution(torch.randn(2, 300))
    spent.spend(["log_normalizer"])
    with pytest.raises(AttributeError, match="_given"):
        _ = spent.logits


@settings(max_examples=200)
@given(cases, properties, st.booleans())
def test_all_at_once(case, names, draws):
    logits, banned = make(case)
    before, whole = logits.clone(), Distribution(logits.clone(), banned)
    uniform = torch.full((len(logits),), 0.4) if draws else None
    values, drawn = reduce(logits, banned, tuple(names), uniform)
    assert torch.equal(bits(logits), bits(before))
    for name, value in zip(names, values, strict=True):
        assert torch.equal(value, getattr(whole, name))
    assert drawn is None if uniform is None else torch.equal(drawn, whole.draw(uniform))


def test_what_is_known_is_not_computed():
    known = Distribution(torch.tensor([[0.0, 1.0]]))
    best, second = torch.tensor([5.0]), torch.tensor([4.0])
    known.know(("best", "second"), (best, second))
    assert known.best is best
    assert known.second is second
    assert known.mode.tolist() == [1]


@settings(max_examples=100)
@given(cases, st.booleans())
def test_the_logit_of_an_id(case, looked):
    """That of what may be emitted, whether banned ids were taken out by then or not."""
    logits, banned = make(case)
    distribution = Distribution(logits.clone(), banned)
    if looked:
        assert distribution.best.shape == (len(logits),)
    allowed = [i for i in range(logits.shape[1]) if i not in set(banned.tolist())]
    for i in allowed[:3] + allowed[-3:]:
        assert torch.equal(distribution.logit(torch.full((len(logits),), i)), logits[:, i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("banned", [[], [0, 299]])
def test_low_precision_is_looked_at_in_float32(dtype, banned):
    """And left as it is, since what is looked at is a copy."""
    banned = torch.tensor(banned, dtype=torch.int64)
    given = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, wide = given.clone(), Distribution(given.float(), banned)
    distribution, draws = Distribution(given, banned), torch.tensor([0.1, 0.5, 0.9])
    for name in ("allowed", "best", "mode", "second", "log_normalizer", "negative_entropy", "logits"):
        got = getattr(distribution, name)
        assert got.dtype == getattr(wide, name).dtype
        assert torch.equal(got, getattr(wide, name))
    assert torch.equal(distribution.draw(draws), wide.draw(draws))
    assert distribution.logit(torch.tensor([1, 2, 3])).dtype == torch.float32
    assert torch.equal(given, before)


def test_a_row_at_a_time_or_all_at_once():
    generator = torch.Generator().manual_seed(3)
    logits, draws = torch.randn(7, 700, generator=generator), torch.rand(7, generator=generator)
    banned = torch.tensor([3, 699])
    together = Distribution(logits.clone(), banned)
    for i, name in itertools.product(range(7), ("best", "mode", "second", "log_normalizer", "negative_entropy")):
        alone = getattr(Distribution(logits[i : i + 1].clone(), banned), name)
        torch.testing.assert_close(alone[0], getattr(together, name)[i])
    drawn = together.draw(draws)
    for i in range(7):
        assert Distribution(logits[i : i + 1].clone(), banned).draw(draws[i : i + 1]) == drawn[i]
