"""What rows of logits say: the largest, the normaliser, a draw, each found in as few passes over them as can be.

The vocabulary is long, and what a decoder does with logits is bound by reading them.  So nothing is computed that is
not asked for, ids that must not be emitted are taken out in place, and what is looked for is looked for in two stages:
first the largest (or the sum) of every 256 ids, then inside the 256 that count.  On a CPU that is four to eight times
as fast as ``torch.max`` with indices, ``topk`` or ``cumsum`` over all ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.lazy import lazy

_STRETCH = 256
# What of the logits a property is found in, if that is not the property itself.
_FOUND_IN = {"best": "_maxima", "mode": "_best_stretch", "second": "_best_stretch", "log_normalizer": "_mass"}


class Distribution:
    """The distributions of R rows of logits, and their restriction to ids that may be emitted.

    Softmax and draws are in float32, or in float64 if the logits are.

    Args:
        logits: ``(R, V)`` floating point; overwritten, if it is in that precision.
        banned: ``(N,)`` int64, ids that must not be emitted; none by default.

    Example:
        >>> distribution = Distribution(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), banned=torch.tensor([1]))
        >>> distribution.best.tolist(), distribution.mode.tolist(), distribution.second.tolist()
        ([2.0], [2], [3.0])
        >>> distribution.logits.tolist()
        [[0.0, 3.0, 2.0, 1.0]]
    """

    def __init__(self, logits: Tensor, banned: Tensor | None = None) -> None:
        self._given = logits
        self.banned = banned if banned is not None and len(banned) else None
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.vocab_size = logits.shape[1]
        self._is_spent = False

    @lazy
    def _banned_logits(self) -> Tensor | None:
        """``(R, N)``, taken before they are overwritten."""
        return None if self.banned is None else self._given.index_select(1, self.banned).to(self.dtype)

    @lazy
    def allowed(self) -> Tensor:
        """``(R, V)``: the logits, ``-inf`` for banned ids."""
        if self._banned_logits is None or self.banned is None:
            return self._given.to(self.dtype)
        return self._given.to(self.dtype).index_fill_(1, self.banned, -torch.inf)

    @lazy
    def logits(self) -> Tensor:
        """``(R, V)``: the logits of all ids; a copy if any is banned."""
        if self._banned_logits is None or self.banned is None:
            return self.allowed
        return self.allowed.index_copy(1, self.banned, self._banned_logits)

    def logit(self, ids: Tensor) -> Tensor:
        """``(R,)``: the logits of one id for each row, none of them banned."""
        return self._given.gather(1, ids[:, None])[:, 0].to(self.dtype)

    @property
    def precision(self) -> torch.dtype:
        """The dtype that probabilities are computed in."""
        return self.dtype

    def without(self, ids: Tensor) -> Distribution:
        """The distributions if these ids ``(N,)`` did not exist."""
        return type(self)(self.logits.index_fill(1, ids, -torch.inf).to(self.precision))

    def spend(self, names: Iterable[str]) -> None:
        """Give the logits up for what ``best``, ``mode`` and the named properties need of them.

        The weights are then computed in the logits' place, which is a third faster, and what is left is small: see
        :meth:`joined`.  Nothing else may be asked for afterwards.
        """
        for name in ("best", "mode", *sorted(names, key=lambda name: name == "log_normalizer")):
            self._is_spent = name == "log_normalizer"
            if not hasattr(self, f"_lazy_{name}"):
                getattr(self, _FOUND_IN.get(name, name))
        for name in ("allowed", "logits", "_weights", "_masses"):
            self.__dict__.pop(f"_lazy_{name}", None)
        del self._given

    @classmethod
    def joined(cls, parts: Sequence[Distribution]) -> Distribution:
        """All rows of distributions that were spent on the same names; large operations then ask all at once."""
        whole = copy.copy(parts[0])
        if len(parts) > 1:
            for name, value in vars(parts[0]).items():
                if name.startswith("_lazy_") and isinstance(value, Tensor):
                    setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        return whole

    def know(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Take properties from :func:`reduce` of these logits, instead of computing them."""
        for name, value in zip(names, values, strict=True):
            setattr(self, f"_lazy_{name}", value)

    # ---------------------------------------------------------------------------------------- the largest

    @lazy
    def _maxima(self) -> Tensor:
        """``(R, n)``: the largest allowed logit of every stretch of ids."""
        return _by_stretch(self.allowed, "amax")

    @lazy
    def _best_stretch(self) -> Tensor:
        """``(R, 256)``: the allowed logits of the stretch that has the largest; the first of equals."""
        return self._stretch(self._maxima.argmax(1), self.allowed, -torch.inf)[1]

    def _stretch(self, which: Tensor, values: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        """``(R, 256)`` ids of the stretches ``(R,)``, and their values."""
        ids = torch.add(torch.arange(_STRETCH, device=which.device), which[:, None], alpha=_STRETCH)
        size = values.shape[1]
        if size % _STRETCH == 0:
            return ids, values.gather(1, ids)
        return ids, values.gather(1, ids.clamp(max=size - 1)).masked_fill(ids >= size, fill)

    @lazy
    def best(self) -> Tensor:
        """``(R,)``: the largest logit of an id that may be emitted."""
        return self._maxima.amax(1)

    @lazy
    def mode(self) -> Tensor:
        """``(R,)`` int64: the id that has it; the lowest of several."""
        return torch.add(self._best_stretch.argmax(1), self._maxima.argmax(1), alpha=_STRETCH)

    @lazy
    def second(self) -> Tensor:
        """``(R,)``: the largest logit of any other id, banned ones included."""
        inside = self._best_stretch.topk(2, dim=1).values[:, 1]
        if self._maxima.shape[1] > 1:
            inside = torch.maximum(inside, self._maxima.topk(2, dim=1).values[:, 1])
        return inside if self._banned_logits is None else torch.maximum(inside, self._banned_logits.amax(1))

    # ---------------------------------------------------------------------------------------- sums

    @lazy
    def _weights(self) -> Tensor:
        """``(R, V)``: probabilities of the allowed ids by that of the best."""
        shift = self._shift[:, None]
        return (self.allowed.sub_(shift) if self._is_spent else self.allowed - shift).exp_()

    @lazy
    def _shift(self) -> Tensor:
        """``(R,)``: the largest allowed logit, or the lowest number if no id is left."""
        return self.best.clamp(min=torch.finfo(self.best.dtype).min)

    @lazy
    def _masses(self) -> Tensor:
        """``(R, n)``: sums of the weights of every stretch of ids."""
        return _by_stretch(self._weights, "sum")

    @lazy
    def _mass(self) -> Tensor:
        """``(R,)``: the sum of all weights."""
        return self._masses.sum(1)

    @lazy
    def log_normalizer(self) -> Tensor:
        """``(R,)``: log of the sum of exp(logits) over all ids, banned ones included."""
        allowed = self._shift + self._mass.log()
        return allowed if self._banned_logits is None else allowed.logaddexp(self._banned_logits.logsumexp(1))

    @lazy
    def negative_entropy(self) -> Tensor:
        """``(R,)``: sum of p log p over all ids."""
        total = torch.zeros_like(self.best)
        for logits in (self.allowed, self._banned_logits):
            if logits is not None:
                log_p = logits - self.log_normalizer[:, None]
                # An id of logit -inf adds nothing; without the clamp it adds 0 * -inf = nan.
                total = total + (log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)
        return total

    def probability(self, ids: Tensor) -> Tensor:
        """``(R,)``: the probabilities of one id for each row, none of them banned."""
        logit = self.best if ids is self.mode else self.logit(ids)
        return (logit - self.log_normalizer).exp()

    @property
    def margin(self) -> Tensor:
        """``(R,)``: the probability of the best allowed id less that of the best other one."""
        return self.probability(self.mode) - (self.second - self.log_normalizer).exp()

    def draw(self, uniform: Tensor) -> Tensor:
        """One allowed id per row: where the distribution function exceeds the draw, ``(R,) on [0, 1) -> (R,)``."""
        sums = self._masses.cumsum(1)
        target = uniform.to(sums.dtype)[:, None] * sums[:, -1:]
        which = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)  # (R, 1)
        ids, weights = self._stretch(which[:, 0], self._weights, 0)
        inside = weights.cumsum(1)
        before = sums.gather(1, which) - self._masses.gather(1, which)
        # Rounding must carry the draw neither in front of the first id that has any weight, nor past the last.
        last = inside[:, -1:] * (1 - torch.finfo(inside.dtype).eps)
        within = torch.minimum(target - before, last).clamp(min=0)
        place = torch.searchsorted(inside, within, right=True).clamp(max=_STRETCH - 1)
        drawn, weight = ids.gather(1, place)[:, 0], weights.gather(1, place)[:, 0]
        # Without numbers, or without a possible id, nothing has a weight; and what adds up in parallel, as accelerators
        # do, may step on an id that has none.
        return drawn.where(weight > 0, self.mode)


class RoundedDistribution(Distribution):
    """Distributions whose probabilities are rounded to the precision of the logits, as published code does it.

    LLaDA's and Dream's code takes the softmax of the model's own logits, and goes on in that precision.  In bfloat16
    there are two numbers between 0.99 and 1, so that many confidences are equal that are not in float32.

    Example:
        >>> logits = torch.tensor([[8.0, 0.0], [9.0, 0.0]], dtype=torch.bfloat16)
        >>> [of(logits).probability(torch.tensor([0, 0])).tolist() for of in (Distribution, RoundedDistribution)]
        [[0.999..., 0.999...], [1.0, 1.0]]
    """

    @property
    @override
    def precision(self) -> torch.dtype:
        return self._given.dtype

    @lazy
    def _probabilities(self) -> Tensor:
        """``(R, V)``."""
        return self.logits.to(self.precision).softmax(1)

    @override
    def probability(self, ids: Tensor) -> Tensor:
        return self._probabilities.gather(1, ids[:, None])[:, 0].to(self.dtype)

    @property
    @override
    def margin(self) -> Tensor:
        mode = self.mode[:, None]
        others = self._probabilities.scatter(1, mode, -1.0).amax(1)
        return (self._probabilities.gather(1, mode)[:, 0] - others).to(self.dtype)

    @lazy
    def negative_entropy(self) -> Tensor:
        """``(R,)``: sum of p log(p + 1e-10) over all ids, every term of it rounded."""
        return (self._probabilities * (self._probabilities + 1e-10).log()).sum(1).to(self.dtype)


def _by_stretch(values: Tensor, reduction: str) -> Tensor:
    """``(R, V) -> (R, n)``: the ``"amax"`` or ``"sum"`` of every 256 columns, the last ones possibly fewer."""
    whole = values.shape[1] // _STRETCH * _STRETCH
    parts = []
    if whole:
        parts.append(getattr(values[:, :whole].reshape(-1, whole // _STRETCH, _STRETCH), reduction)(2))
    if whole < values.shape[1]:
        parts.append(getattr(values[:, whole:], reduction)(1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Reduce(Protocol):
    """:func:`reduce`, or what ``torch.compile`` makes of it."""

    def __call__(
        self, logits: Tensor, banned: Tensor | None, names: tuple[str, ...], uniform: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """See :func:`reduce`."""


def reduce(
    logits: Tensor, banned: Tensor | None, names: tuple[str, ...], uniform: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Named properties ``(R,)`` of a :class:`Distribution`, and a draw, all at once: compiled, it takes a pass or two.

    The logits ``(R, V)`` are not changed.
    """
    distribution = Distribution(logits.clone(), banned)  # compiled code copies nothing
    drawn = None if uniform is None else distribution.draw(uniform)
    return [getattr(distribution, name) for name in names], drawn
