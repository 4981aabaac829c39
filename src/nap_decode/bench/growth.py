"""Growth of a step's cost with the sizes of a decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name
from nap_decode.bench.loops import make_loops
from nap_decode.bench.observation import Say, environment, interleave, seconds_of
from nap_decode.bench.workload import SHAPES, Shape, Workload
from nap_decode.measure.arness import table
from nap_decode.model.denoiser import Denoiser

_BASE = Workload(prompt_length=64, new_tokens=256, steps=8)
LADDER: dict[str, tuple[int, ...]] = {
    "canvas": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32),
    "blocks": (1, 2, 4, 8, 16, 32),
    "vocabulary": (1024, 4096, 16384, 32768, 65536, 126464, 152064),
}
"""Sizes of each dimension; the canvas is counted with its prompt of 64.  The others stay at a canvas of 320 (256 new
tokens in 8 steps, so that each of 32 blocks commits at every step), one row, one block and the shape's vocabulary.
Of a block-causal shape the model's blocks are decoded in turn, 4 tokens per step, whatever the canvas."""


class Fit(NamedTuple):
    """Growth of a cost with a size, by least squares: cost = intercept + slope * size, and cost ~ size ** exponent."""

    intercept: float
    slope: float
    r_squared: float | None
    """Share of the cost's variance that the line explains; None if the cost does not vary."""
    exponent: float | None
    """Fitted to logarithms; None if some cost is not positive."""


def fit_growth(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fit costs at two or more sizes."""
    x, y = np.array(sizes, dtype=float), np.array(costs, dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - intercept - slope * x
    r_squared = float(1 - rest.var() / y.var()) if y.var() > 0 else None
    exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if (y > 0).all() else None
    return Fit(float(intercept), float(slope), r_squared, exponent)


@dataclass(frozen=True)
class LadderResult:
    """Measurements by :func:`ladder`; ``str()`` is a table for each dimension.

    Args:
        shape: of the model.
        seconds: dimension -> size -> ``"bare"`` and ``"ours"`` -> seconds per step in each repetition.
        skipped: dimension -> sizes that would have taken longer than the limit.
        environment: machine, versions and date, with dtype, options and seed.
    """

    shape: Shape
    seconds: dict[str, dict[int, dict[str, list[float]]]]
    skipped: dict[str, list[int]]
    environment: dict[str, Any]

    def costs(self, dimension: str) -> dict[str, list[float]]:
        """Median seconds per step at each size: of bare and ours, and of what ours takes longer in a repetition."""
        times = {
            name: np.array([point[name] for point in self.seconds[dimension].values()]) for name in ("bare", "ours")
        }
        times["overhead"] = times["ours"] - times["bare"]  # sizes x repetitions
        return {name: np.median(values, axis=1).tolist() if len(values) else [] for name, values in times.items()}

    def fits(self, dimension: str) -> dict[str, Fit]:
        """Fits of all costs by :func:`fit_growth`; none with fewer than two sizes."""
        sizes = list(self.seconds[dimension])
        return {name: fit_growth(sizes, cost) for name, cost in self.costs(dimension).items() if len(sizes) > 1}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self) | {
            "costs": {dimension: self.costs(dimension) for dimension in self.seconds},
            "fits": {d: {name: fit._asdict() for name, fit in self.fits(d).items()} for d in self.seconds},
        }

    def __str__(self) -> str:
        lines = [f"Milliseconds per step; {self.shape}"]
        for dimension, points in self.seconds.items():
            costs = self.costs(dimension)
            rows = [[str(size), *(f"{1e3 * cost[i]:.3f}" for cost in costs.values())] for i, size in enumerate(points)]
            lines += ["", *table([[dimension, *costs], *rows])]
            for name, fit in self.fits(dimension).items():
                line = f"{1e3 * fit.intercept:.3g} + {1e3 * fit.slope:.3g} x {dimension}"
                r_squared, exponent = ("-" if value is None else f"{value:.2f}" for value in fit[2:])
                lines.append(f"{name}: {line} (R² {r_squared}); exponent {exponent}")
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
    compile: str | bool = False,
    progress: Say | None = None,
) -> LadderResult:
    """Measure bare forward passes and our loop at growing sizes, one dimension at a time.

    All sizes of a dimension take turns in every repetition.

    Args:
        shape: of the model; a small one by default, beside which the loop's own cost shows.
        sizes: of each dimension; all of :data:`LADDER` by default, but for blocks if those are the model's.
        dtype: the model's precision.
        device: where to run.
        temperature: see :class:`Workload`.
        repeats: repetitions after a warm-up.
        limit: seconds that all repetitions of one size may take; larger sizes are skipped.
        seed: of weights, prompts and draws.
        compile: see :class:`Sampler`.
        progress: called with a line of text now and then.

    Example:
        >>> shape = Shape.parse("hidden=16,layers=1,heads=1,intermediate=16,vocab=32")
        >>> result = ladder(shape, {"blocks": (1, 2)}, repeats=1)
        >>> list(result.costs("blocks")), len(result.costs("blocks")["ours"])
        (['bare', 'ours', 'overhead'], 2)
    """
    check_integer("repeats", repeats, 1)
    check_between("limit", limit, 0.0, float("inf"))
    shape, say = shape or SHAPES["tiny"], progress or (lambda _: None)
    if sizes is None:
        sizes = {name: rungs for name, rungs in LADDER.items() if name != "blocks" or shape.block_size is None}
    for dimension in sizes:
        check_name("dimension of the ladder", dimension, LADDER)
    base = dataclasses.replace(_BASE, temperature=temperature, seed=seed)
    size = shape.block_size or 1
    if base.prompt_length % size or base.new_tokens % size or (shape.block_size is not None and "blocks" in sizes):
        raise NapDecodeError(
            f"block_size={size} must divide the ladder's prompt of {base.prompt_length}, and takes the place of the "
            f"dimension blocks; the dimensions are {', '.join(sizes)}"
        )
    seconds: dict[str, dict[int, dict[str, list[float]]]] = {}
    skipped: dict[str, list[int]] = {}
    for dimension, rungs in sizes.items():
        functions: dict[tuple[int, str], Callable[[], Any]] = {}
        steps: dict[int, int] = {}
        skipped[dimension], denoiser = [], None
        for size in sorted(rungs):
            say(f"warming up: {dimension} {size}")
            if denoiser is None or dimension == "vocabulary":
                own = dataclasses.replace(shape, vocab=size) if dimension == "vocabulary" else shape
                denoiser = Denoiser(own.build(dtype=dtype, device=device, seed=seed), family=own.family)
            changed: dict[str, dict[str, Any]] = {
                "canvas": {"new_tokens": size - base.prompt_length},
                "batch": {"batch_size": size},
                "blocks": {"blocks": size},
                "vocabulary": {},
            }
            workload = dataclasses.replace(base, **changed[dimension])
            if shape.block_size is not None:
                new = workload.new_tokens
                in_turn: dict[str, Any] = {"scheduler": "semi-autoregressive", "blocks": new // shape.block_size}
                workload = dataclasses.replace(workload, steps=new // 4, **in_turn)
            steps[size] = workload.steps
            loops = make_loops(denoiser, workload.canvas(denoiser), workload, compile)
            mine = {(size, name): loops[name] for name in ("bare", "ours")}
            for loop in mine.values():
                loop()
            if sum(seconds_of(loop, denoiser.device) for loop in mine.values()) * repeats > limit:
                skipped[dimension] = [rung for rung in sorted(rungs) if rung >= size]
                break
            functions |= mine
        times = interleave(functions, repeats, torch.device(device), say)
        seconds[dimension] = {}
        for (size, name), values in times.items():
            seconds[dimension].setdefault(size, {})[name] = [value / steps[size] for value in values]
    about = {"dtype": str(dtype).removeprefix("torch."), "temperature": temperature, "seed": seed, "compile": compile}
    return LadderResult(shape, seconds, skipped, environment(device) | about)
