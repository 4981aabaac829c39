"""Growth of a step's cost with the sizes of a decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name
from nap_decode.bench.loops import make_loops
from nap_decode.bench.observation import Say, environment, interleave, seconds_of
from nap_decode.bench.workload import SHAPES, Shape, Workload
from nap_decode.model.denoiser import Denoiser

_STEPS, _PROMPT = 8, 64


@dataclass(frozen=True)
class Fit:
    """Growth of a cost with a size, by least squares.

    Args:
        intercept: a of cost = a + b size.
        slope: b.
        r_squared: share of the cost's variance that the line explains; None if the cost does not vary.
        exponent: c of cost = d size^c, fitted to logarithms; None if some cost is not positive.

    Example:
        >>> fit = fit_growth([1, 2, 4], [5, 7, 11])
        >>> round(fit.intercept, 6), round(fit.slope, 6), round(fit.r_squared, 6)
        (3.0, 2.0, 1.0)
    """

    intercept: float
    slope: float
    r_squared: float | None
    exponent: float | None


def fit_growth(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fit costs at two or more different sizes.

    Raises:
        NapDecodeError: fewer than two different sizes.
    """
    x, y = np.array(sizes, dtype=float), np.array(costs, dtype=float)
    if len(set(sizes)) < 2:
        raise NapDecodeError(f"growth cannot be fitted to the sizes {list(sizes)}; two different ones are needed")
    slope, intercept = np.polyfit(x, y, 1)
    total, rest = ((y - y.mean()) ** 2).sum(), ((y - intercept - slope * x) ** 2).sum()
    exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if (y > 0).all() else None
    return Fit(float(intercept), float(slope), float(1 - rest / total) if total > 0 else None, exponent)


LADDER: dict[str, tuple[int, ...]] = {
    "canvas": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32),
    "blocks": (1, 2, 4, 8, 16, 32),
    "vocabulary": (1024, 4096, 16384, 32768, 65536, 126464, 152064),
}
"""Sizes of each dimension; the canvas is counted with its prompt of 64.  The others stay at a canvas of 320 (256 new
tokens in 8 steps, so that each of 32 blocks commits at every step), one row, one block and the shape's vocabulary."""


@dataclass(frozen=True)
class LadderResult:
    """Measurements by :func:`ladder`; ``str()`` is a table for each dimension.

    Args:
        shape: of the model.
        seconds: dimension -> size -> ``"bare"`` and ``"ours"`` -> seconds per step in each repetition.
        skipped: dimension -> sizes that would have taken longer than the limit.
        environment: see :func:`environment`, with dtype, options and seed.
    """

    shape: Shape
    seconds: dict[str, dict[int, dict[str, list[float]]]]
    skipped: dict[str, list[int]]
    environment: dict[str, Any] = field(default_factory=dict)

    def costs(self, dimension: str) -> dict[str, list[float]]:
        """Median seconds per step at each size: of bare and ours, and of what ours takes longer in a repetition."""
        points = self.seconds[dimension].values()
        times = {name: [np.array(point[name]) for point in points] for name in ("bare", "ours")}
        times["overhead"] = [ours - bare for bare, ours in zip(times["bare"], times["ours"], strict=True)]
        return {name: [float(np.median(one)) for one in values] for name, values in times.items()}

    def fits(self, dimension: str) -> dict[str, Fit]:
        """Fits of all costs; none with fewer than two sizes."""
        sizes = list(self.seconds[dimension])
        return {name: fit_growth(sizes, cost) for name, cost in self.costs(dimension).items() if len(sizes) > 1}

    def spread(self, dimension: str) -> float:
        """The largest median, over sizes, of our cost by that of the smallest size in the same repetition, less 1."""
        ours = np.array([point["ours"] for point in self.seconds[dimension].values()])  # sizes x repetitions
        ratios = np.median(ours / ours[0], axis=1)
        return float(ratios.max() / ratios.min() - 1)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        fits = {d: {name: dataclasses.asdict(fit) for name, fit in self.fits(d).items()} for d in self.seconds}
        return dataclasses.asdict(self) | {"costs": {d: self.costs(d) for d in self.seconds}, "fits": fits}

    def __str__(self) -> str:
        lines = [f"Milliseconds per step; {self.shape}"]
        for dimension, points in self.seconds.items():
            costs = self.costs(dimension)
            lines += ["", f"{dimension:<14}" + "".join(f"{name:>12}" for name in costs)]
            for i, size in enumerate(points):
                lines.append(f"{size:<14}" + "".join(f"{1e3 * cost[i]:>12.3f}" for cost in costs.values()))
            for name, fit in self.fits(dimension).items():
                line = f"{1e3 * fit.intercept:.3g} + {1e3 * fit.slope:.3g} x {dimension}"
                r_squared = "-" if fit.r_squared is None else f"{fit.r_squared:.3f}"
                exponent = "-" if fit.exponent is None else f"{fit.exponent:.2f}"
                lines.append(f"{name}: {line} (R² {r_squared}); exponent {exponent}")
            if dimension == "blocks" and points:
                lines.append(f"ours, largest over smallest: {100 * self.spread(dimension):+.1f}%")
            if self.skipped[dimension]:
                lines.append(f"skipped, over the limit: {', '.join(map(str, self.skipped[dimension]))}")
        return "\n".join(lines)


def ladder(
    shape: Shape | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    temperature: float = 0.0,
    repeats: int = 5,
    limit: float = 60.0,
    seed: int = 0,
    compile: str | bool | None = None,
    progress: Say | None = None,
) -> LadderResult:
    """Measure bare forward passes and our loop at growing sizes, one dimension at a time.

    All sizes of a dimension take turns in every repetition.

    Args:
        shape: of the model; a small one by default, beside which the loop's own cost shows.
        sizes: of each dimension; see :data:`LADDER`.
        dtype: the model's precision.
        device: where to run.
        temperature: see :class:`Workload`.
        repeats: repetitions after a warm-up.
        limit: seconds that all repetitions of one size may take; larger sizes are skipped.
        seed: of weights, prompts and draws.
        compile: passed on to :class:`Sampler`, unless it is None.
        progress: called with a line of text now and then.

    Example:
        >>> shape = Shape.parse("hidden=16,layers=1,heads=1,intermediate=16,vocab=32")
        >>> result = ladder(shape, {"blocks": (1, 2)}, repeats=1)
        >>> list(result.costs("blocks")), len(result.costs("blocks")["ours"])
        (['bare', 'ours', 'overhead'], 2)
    """
    check_integer("repeats", repeats, 1)
    check_between("limit", limit, 0.0, float("inf"))
    shape, sizes, say = shape or SHAPES["tiny"], LADDER if sizes is None else sizes, progress or (lambda _: None)
    for dimension in sizes:
        check_name("dimension of the ladder", dimension, LADDER)
    base = Workload(prompt_length=_PROMPT, steps=_STEPS, temperature=temperature, seed=seed)
    names = ("bare", "ours")
    seconds: dict[str, dict[int, dict[str, list[float]]]] = {}
    skipped: dict[str, list[int]] = {}
    for dimension, rungs in sizes.items():
        functions: dict[tuple[int, str], Callable[[], Any]] = {}
        skipped[dimension], denoiser = [], None
        for size in sorted(rungs):
            if skipped[dimension]:
                skipped[dimension].append(size)
                continue
            say(f"warming up: {dimension} {size}")
            if denoiser is None or dimension == "vocabulary":
                own = dataclasses.replace(shape, vocab=size) if dimension == "vocabulary" else shape
                denoiser = Denoiser(own.build(dtype=dtype, device=device, seed=seed))
            changed: dict[str, dict[str, Any]] = {
                "canvas": {"new_tokens": size - _PROMPT},
                "batch": {"batch_size": size},
                "blocks": {"blocks": size},
            }
            workload = dataclasses.replace(base, **changed.get(dimension, {}))
            loops = make_loops(denoiser, workload.canvas(denoiser), workload, compile)
            for name in names:
                loops[name]()
            if sum(seconds_of(loops[name], denoiser.device) for name in names) * repeats > limit:
                skipped[dimension].append(size)
            else:
                functions |= {(size, name): loops[name] for name in names}
        times = interleave(functions, repeats, torch.device(device), say)
        seconds[dimension] = {
            size: {name: [t / _STEPS for t in times[size, name]] for name in names} for size, _ in functions
        }
    about = {"dtype": str(dtype).removeprefix("torch."), "temperature": temperature, "seed": seed, "compile": compile}
    return LadderResult(shape, seconds, skipped, environment(device) | about)
