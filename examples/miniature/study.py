"""The results of the study, looked up: estimates with errors, best decoders, and what things are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from examples.miniature.evaluate import DECODERS, Result

TOKENS_PER_STEP = (1, 2, 3, 4, 6, 8, 12, 18)
SAME_RECIPE = ("paths", "joined", "identical", "chain", "short", "terse")
"""Kinds that were trained by the same recipe."""
PATHS = ("paths", "paths_best", "clock_paths")
CHAINS = ("chain", "chain_best", "clock_chain")
FORCED = tuple(name for name in DECODERS if name.startswith("parallel_forced"))

KIND_NAMES = {
    "paths": "three paths and a summary",
    "joined": "three solutions joined",
    "identical": "one path three times",
    "chain": "long chain",
    "short": "short chain, padded",
    "terse": "short chain alone",
    "paths_best": "paths, own recipe",
    "chain_best": "long chain, own recipe",
    "clock_paths": "three paths and a summary",
    "clock_chain": "long chain",
}
DECODER_NAMES = {
    "any_order": "any-order",
    "parallel_forced": "parallel-forced",
    "parallel_forced_shared": "parallel-forced, last step shared",
    "parallel_forced_0.8": "parallel-forced, summary from 80 %",
    "parallel_forced_0": "parallel-forced, summary along",
    "parallel_forced_thirds": "parallel-forced, three thirds",
    "blocks_in_turn": "one path after the other",
    "semi_autoregressive_3": "semi-autoregressive, 3",
    "semi_autoregressive_6": "semi-autoregressive, 6",
    "semi_autoregressive_12": "semi-autoregressive, 12",
    "semi_autoregressive_18": "semi-autoregressive, 18",
    "left_to_right": "left to right",
    "random": "random order",
    "threshold": "threshold",
    "entropy_bounded": "entropy-bounded",
}


@dataclass(frozen=True)
class Estimate:
    """A share in percent with its standard error.

    Args:
        percent: mean over the seeds of training.
        error: the larger of two standard errors: that of the mean over seeds, each with problems of its own, and the
            binomial one of all problems and two more, one right and one wrong.  (Three seeds may agree by chance, and
            a thousand right answers do not mean that there are no wrong ones.)
    """

    percent: float
    error: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Estimate:
        """Of one cell, from the results of its seeds."""
        return cls._of_shares([result.correct / result.problems for result in results], _binomial(results))

    @classmethod
    def of_difference(cls, ones: Sequence[Result], others: Sequence[Result]) -> Estimate:
        """Of one cell less another one of the same models, seed by seed: what models have in common cancels out.

        The binomial error is that of other problems for each of the two, which is more than that of the same ones.
        """
        shares = [
            one.correct / one.problems - other.correct / other.problems for one, other in zip(ones, others, strict=True)
        ]
        return cls._of_shares(shares, _binomial(ones) + _binomial(others))

    @classmethod
    def _of_shares(cls, shares: Sequence[float], binomial: float) -> Estimate:
        seeds, mean = len(shares), sum(shares) / len(shares)
        between = sum((share - mean) ** 2 for share in shares) / (seeds - 1) / seeds if seeds > 1 else 0.0
        return cls(100 * mean, 100 * math.sqrt(max(binomial, between)))

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """With ``+`` for differences, whose sign is always written."""
        return f"{self.percent:{sign}.1f} ± {self.error:.1f}"

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two, whose models and so errors are independent."""
        return Estimate(self.percent - other.percent, math.hypot(self.error, other.error))


def _binomial(results: Sequence[Result]) -> float:
    """Squared standard error of a share, of all problems and two more."""
    problems, right = sum(result.problems for result in results) + 2, sum(result.correct for result in results) + 1
    return right * (problems - right) / problems**3


class Study:
    """The results, by what they are of.

    Args:
        results: of all models, decoders and splits.
        task: whose results to look at.
    """

    def __init__(self, results: Iterable[Result], task: str = "nim_sum") -> None:
        self.results = [result for result in results if result.task == task]

    def cell(self, kind: str, decoder: str, value: float, split: str = "test") -> list[Result]:
        """The results of all seeds."""
        return [
            result
            for result in self.results
            if (result.kind, result.decoder, result.value, result.split) == (kind, decoder, value, split)
        ]

    def estimate(self, kind: str, decoder: str, value: float, split: str = "test") -> Estimate | None:
        """Of the share of right answers; None if that was not measured."""
        results = self.cell(kind, decoder, value, split)
        return Estimate.of(results) if results else None

    def gap(self, one: tuple[str, str], other: tuple[str, str], value: float) -> Estimate | None:
        """One kind and decoder less another; None if that was not measured.

        Decoders of the same kind are compared model by model.
        """
        if one[0] != other[0]:
            ours, theirs = self.estimate(*one, value), self.estimate(*other, value)
            return ours - theirs if ours and theirs else None
        first, second = ({result.seed: result for result in self.cell(*cell, value)} for cell in (one, other))
        seeds = sorted(first.keys() & second.keys())
        return Estimate.of_difference([first[s] for s in seeds], [second[s] for s in seeds]) if seeds else None

    def mean(self, name: str, kind: str, decoder: str, value: float) -> float:
        """Of a field of the results, over the seeds.

        Raises:
            ZeroDivisionError: nothing was measured.
        """
        results = self.cell(kind, decoder, value)
        return float(sum(getattr(result, name) for result in results) / len(results))

    def curve(self, kind: str, decoder: str) -> dict[int, Estimate]:
        """Estimates by tokens per step; empty for decoders that have none."""
        if DECODERS[decoder].setting != "tokens_per_step":
            return {}
        found = {value: self.estimate(kind, decoder, value) for value in TOKENS_PER_STEP}
        return {value: estimate for value, estimate in found.items() if estimate is not None}

    def best(self, kinds: Sequence[str], decoders: Sequence[str], value: float) -> tuple[str, str] | None:
        """Kind and decoder that answer most of the problems *set aside for choosing*."""
        found = {
            (kind, decoder): estimate.percent
            for kind in kinds
            for decoder in decoders
            if DECODERS[decoder].setting == "tokens_per_step"
            and (estimate := self.estimate(kind, decoder, value, "tune")) is not None
        }
        return max(found, key=lambda pair: found[pair]) if found else None

    def at_best(self, kinds: Sequence[str], value: float) -> tuple[str, str, Estimate] | None:
        """The best kind and decoder, and how they do on the problems to report by; None if that was not measured."""
        best = self.best(kinds, list(DECODERS), value)
        estimate = None if best is None else self.estimate(*best, value)
        return None if best is None or estimate is None else (*best, estimate)

    def best_seed(self, kind: str) -> int:
        """The training whose model answers most of the problems set aside for choosing, each by its best decoder.

        At 4 to 12 tokens per step on average: fewer tell no model from another, and more are beyond all of them.

        Raises:
            ValueError: nothing was measured.
        """
        seeds = sorted({result.seed for result in self.results if (result.kind, result.split) == (kind, "tune")})
        return max(seeds, key=lambda seed: sum(self._best_share(kind, seed, value) for value in (4, 6, 8, 12)))

    def _best_share(self, kind: str, seed: int, value: float) -> float:
        """Of right answers of one model, by the best decoder with so many tokens per step."""
        return max(
            result.correct / result.problems
            for result in self.results
            if (result.kind, result.seed, result.split, result.setting, result.value)
            == (kind, seed, "tune", "tokens_per_step", value)
        )

    def kinds(self, names: Iterable[str]) -> list[str]:
        """Those of the names that there are results for."""
        present = {result.kind for result in self.results}
        return [name for name in names if name in present]
