"""How well does accuracy hold up as more tokens are decoded per forward pass?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from nap_decode.base.errors import NapDecodeError, check_between


def accuracy_under_parallelism(
    points: Iterable[Sequence[float]], *, best: float | None = None, alpha: float = 3.0, tolerance: float = 5.0
) -> float:
    """AUP of one decoder: the weighted area under accuracy against tokens per forward pass.

    With points ordered by parallelism rho_1 < ... < rho_m, accuracies y_i and the best accuracy y_max that any
    decoder reached on the task (d3LLM, arXiv 2601.07568)::

        AUP  = rho_1 y_1 + sum_(i>1) (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2
        W(y) = min(exp(-alpha (1 - y / y_max)), 1)

    Points more than ``tolerance`` below y_1 are left out, so speed that costs more accuracy than that is worth
    nothing.  Without a loss of accuracy it is the plain area: accuracy times the highest parallelism.

    *Our deviations*: where the authors' script stops if the fastest point is more than ``tolerance`` below y_1, it
    is left out like any other, as in their definition; of points with equal parallelism the most accurate counts.

    Args:
        points: tokens per forward pass and accuracy in percent, in any order; more entries are not looked at.
        best: y_max in percent, by default of these points.  To compare decoders, give the best of all.
        alpha: how much a loss of accuracy costs.
        tolerance: loss in percentage points from which on a point does not count.

    Example:
        >>> accuracy_under_parallelism([(1, 80), (2, 80), (4, 80)])
        320.0
        >>> round(accuracy_under_parallelism([(1, 80), (2, 80), (4, 76)]), 1)
        305.4
    """
    check_between("best", 100.0 if best is None else best, 0.0, 100.0)
    check_between("alpha", alpha, 0.0, math.inf)
    check_between("tolerance", tolerance, 0.0, math.inf)
    curve: dict[float, float] = {}
    for parallelism, accuracy in check_points(points):
        curve[parallelism] = max(accuracy, curve.get(parallelism, 0.0))
    first = curve[min(curve)]
    best = max(curve.values()) if best is None else best

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-alpha * (1 - accuracy / best)), 1.0) if best else 0.0

    kept = [(rho, curve[rho]) for rho in sorted(curve) if curve[rho] >= first - tolerance]
    area = kept[0][0] * first
    for (before, earlier), (rho, accuracy) in pairwise(kept):
        area += (rho - before) * (weighted(earlier) + weighted(accuracy)) / 2
    return area


def check_points(points: Iterable[Sequence[float]]) -> list[tuple[float, float]]:
    """The first two entries of every point; raises if they are not in percent, or there are none."""
    points = list(points)
    if not points:
        raise NapDecodeError("there are no points; give (tokens per forward pass, accuracy in percent) of each run")
    pairs = []
    for point in points:
        if not isinstance(point, Sequence) or len(point) < 2:
            raise NapDecodeError(f"a point must be a tuple of tokens per forward pass and accuracy, but is {point!r}")
        check_between("tokens per forward pass", point[0], 0.0, math.inf)
        check_between("an accuracy in percent", point[1], 0.0, 100.0)
        if point[0] == 0:
            raise NapDecodeError("tokens per forward pass must be above 0, but are 0 at a point")
        pairs.append((float(point[0]), float(point[1])))
    highest = max(accuracy for _, accuracy in pairs)
    if 0 < highest <= 1:
        raise NapDecodeError(f"accuracies must be in percent, but the highest is {highest:g}; multiply them by 100")
    return pairs
