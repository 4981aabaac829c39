"""Counter-based random numbers: every draw is a function of (row seed, step, stream, position).

A draw that is computed instead of consumed cannot depend on the other rows of a batch, on padding or on the order in
which positions are visited.  The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), applied once per coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN_STREAM = 1  # draws that choose a token
CONFIDENCE_STREAM = 2  # that serve as a confidence
SELECTION_STREAM = 3  # that choose positions
SCHEDULE_STREAM = 4  # that decide how many tokens a step commits

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _mix(z: Tensor) -> Tensor:
    # int64 products wrap around, as SplitMix64 wants; `>>` keeps the sign, so it is masked off.
    z = (z ^ ((z >> 30) & 0x3_FFFF_FFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1F_FFFF_FFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1_FFFF_FFFF)


def _wrap(number: int) -> int:
    """The signed 64-bit integer that is congruent modulo 2**64."""
    return (number + 2**63) % 2**64 - 2**63


def row_seeds(seed: int, rows: Sequence[int]) -> Tensor:
    """Seeds of rows, ``(n,)`` int64, each from ``seed`` and the row's number.

    Example:
        >>> bool((row_seeds(7, range(4))[2:] == row_seeds(7, [2, 3])).all())
        True
    """
    base = torch.full((len(rows),), _wrap(seed), device="cpu")
    return _mix(_mix(base) + (torch.tensor(list(rows), dtype=torch.int64, device="cpu") + 1) * _GOLDEN)


def uniform(seeds: Tensor, step: Tensor | int, stream: int, positions: Tensor) -> Tensor:
    """Uniform draws on ``[0, 1)``, ``(B, K)`` float32 with 24 random bits.

    Args:
        seeds: ``(B,)`` int64, one per row.
        step: index of the decoding step, or ``(B,)`` int64, one per row.
        stream: which use the draws serve; different streams are independent.
        positions: ``(B, K)`` int64, the position each draw belongs to.
    """
    offset = (step * 8 + stream + 1) * 0x632B_E59B_D9B4_E019
    key = _mix(seeds + (offset if isinstance(offset, Tensor) else _wrap(offset)))
    bits = _mix(key[:, None] + (positions + 1) * _GOLDEN)
    return ((bits >> 40) & 0xFF_FFFF).to(torch.float32) * 2.0**-24
