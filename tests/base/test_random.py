from __future__ import annotations

import numpy as np
import pytest
import torch

from nap_decode import NapDecodeError
from nap_decode.base.errors import check_seed
from nap_decode.base.random import row_seeds, uniform


def splitmix_finaliser(z):
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_agrees_with_splitmix64_in_python_integers():
    seeds = row_seeds(12345, range(3))
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    for row in range(3):
        expected = splitmix_finaliser((splitmix_finaliser(12345) + (row + 1) * golden) & mask)
        assert int(seeds[row]) % 2**64 == expected
    draws = uniform(seeds, 7, 1, torch.tensor([[0, 5]] * 3))
    for row in range(3):
        key = splitmix_finaliser((int(seeds[row]) + (7 * 8 + 1 + 1) * 0x632BE59BD9B4E019) & mask)
        for k, position in enumerate((0, 5)):
            bits = splitmix_finaliser((key + (position + 1) * golden) & mask)
            assert float(draws[row, k]) == (bits >> 40) / 2**24


def test_a_row_draws_by_its_number_and_its_own_step():
    """Whatever rows stand beside it, and however far these have come."""
    seeds = row_seeds(7, [5, 0, 2])
    assert seeds.tolist() == [row_seeds(7, range(6)).tolist()[row] for row in (5, 0, 2)]
    positions = torch.tensor([[3, 1], [0, 2], [4, 4]])
    together = uniform(seeds, torch.tensor([4, 0, 9]), 2, positions)
    for row, step in enumerate((4, 0, 9)):
        alone = uniform(seeds[row : row + 1], step, 2, positions[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(row_seeds(0, range(200)), 0, 1, torch.arange(500).expand(200, -1)).double()
    assert abs(float(draws.mean()) - 0.5) < 4 * (1 / 12 / 100_000) ** 0.5
    assert float(draws.max()) < 1
    counts = torch.histc(draws, 100, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 99 + 4 * (2 * 99) ** 0.5
    for a, b in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / 100_000**0.5


@pytest.mark.parametrize("other", [(1, 1), (0, 2)])
def test_steps_and_streams_are_independent(other):
    positions = torch.arange(10_000)[None]
    seeds = row_seeds(0, range(1))
    pair = torch.stack([uniform(seeds, 0, 1, positions)[0], uniform(seeds, *other, positions)[0]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.04


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**63, 2**80])
def test_any_whole_number_is_a_seed(seed):
    assert len(row_seeds(seed, range(4)).unique()) == 4
    assert -(2**63) <= check_seed(seed) < 2**63
    assert (check_seed(seed) - seed) % 2**64 == 0


@pytest.mark.parametrize("seed", [1.5, "a", None])
def test_what_is_no_seed(seed):
    with pytest.raises(NapDecodeError, match="a seed must be a whole number, but is"):
        check_seed(seed)


def test_numbers_of_numpy_and_torch_are_seeds():
    assert check_seed(np.int64(3)) == check_seed(torch.tensor(3)) == 3
