"""Nim-sum problems: the task that the embedded checkpoints were trained on.

A problem is the exclusive or of :data:`NUM_DIGITS` octal digits.  The operation is associative and
commutative, so one problem has several complete solutions that share no intermediate state: a
path is the list of running totals that starts at some digit and goes round, and every path ends in
the full answer::

    6 0 6 4 6 2 1 2 4 7 0 6 =
    <think 1> 6 0 4 2 0 1 3 7 0 0 6      6^0, ^6, ^4, ^6, ...
    <think 2> 4 5 7 3 4 4 2 4 4 2 6      begins four digits further on
    <think 3> 3 3 5 3 3 5 1 7 5 4 6      begins eight digits further on
    <summary> 6 <eos>

Chance is 12.5 %.  The other model writes a long chain: state, operand, new state, ..., then the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DIGITS = 12
"""Octal digits in a problem."""
NUM_PATHS = 3
"""Independent solutions in a canvas."""
PATH_LENGTH = NUM_DIGITS - 1
"""Running totals in a path; the first one is of two digits."""
SUMMARY_LENGTH = 2
"""The answer and the end-of-text token."""


@dataclass(frozen=True)
class NimSum:
    """One problem.

    Args:
        digits: ``NUM_DIGITS`` octal digits.

    Example:
        >>> problem = NimSum((6, 0, 6, 4, 6, 2, 1, 2, 4, 7, 0, 6))
        >>> problem.prompt
        '6 0 6 4 6 2 1 2 4 7 0 6 ='
        >>> problem.answer
        6
        >>> problem.is_correct(" 6")
        True
    """

    digits: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The problem as the model reads it."""
        return " ".join(map(str, self.digits)) + " ="

    @property
    def answer(self) -> int:
        """The nim-sum, 0 to 7."""
        return int(np.bitwise_xor.reduce(np.array(self.digits)))

    def is_correct(self, text: str) -> bool:
        """Whether the last digit written in ``text`` (a summary or a path) is the answer."""
        written = re.findall(r"[0-7]", text)
        return bool(written) and int(written[-1]) == self.answer


def running_totals(digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """The states of all paths, ``(N, NUM_DIGITS) -> (N, NUM_PATHS, PATH_LENGTH)``."""
    shift = NUM_DIGITS // NUM_PATHS
    rounds = np.stack([np.roll(digits, -shift * j, axis=1) for j in range(NUM_PATHS)], axis=1)
    return np.bitwise_xor.accumulate(rounds, axis=2)[:, :, 1:]


def sample_problems(count: int, seed: int) -> list[NimSum]:
    """Draw ``count`` problems with uniform digits, reproducibly.

    Training uses seeds below 1000 (see ``examples/miniature``); draw held-out problems with
    larger ones.

    Example:
        >>> sample_problems(2, seed=2026) == sample_problems(2, seed=2026)
        True
    """
    digits = np.random.default_rng(seed).integers(0, 8, (count, NUM_DIGITS))
    return [NimSum(tuple(row)) for row in digits.tolist()]
