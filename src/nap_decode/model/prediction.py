"""What the model says about slots, a chunk of them at a time: their logits never need to exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nap_decode.model.head import Head

# On the CPU the output layer takes many rows at a time, because every product reads all of its weights; statistics take
# few, which stay in the cache.  An accelerator wants few large kernels.
_HEAD_ROWS, _HEAD_NUMBERS, _CACHED_NUMBERS, _ACCELERATOR_NUMBERS = 384, 2**23, 2**20, 2**25


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """Logits of the slots of a batch, after guidance and logits processors; made when they are looked at.

    Args:
        shape: ``(N, K)``, slots of a batch.
        places: ``(T,)`` int64, which of the flattened slots are asked for; it may name one more than once.
        vocab_size: V, ids that are scored.
        banned: ``(n,)`` int64, ids that must not be proposed.
        dtype: precision of the logits.
        source: ``(S, H)`` hidden states or ``(S, V)`` logits of the S flattened slots; ``(2 * S, ...)`` under
            guidance, the second half being those without the prompt.
        head: makes logits of hidden states; None if the source is logits.
        cfg_scale: strength of guidance; 0 is off.
        process: ``(places (R,), scores (R, V)) -> scores``, the logits processors; None if there are none.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]])
        >>> prediction = Prediction.of(logits, banned=torch.tensor([0]), places=torch.tensor([0, 2]))
        >>> [chunk.tolist() for _, chunk in prediction.chunks()]
        [[[0.0, 1.0], [4.0, 5.0]]]
        >>> prediction.logits.shape
        torch.Size([1, 3, 2])
    """

    shape: tuple[int, int]
    places: Tensor
    vocab_size: int
    banned: Tensor
    dtype: torch.dtype
    source: Tensor
    head: Head | None = None
    cfg_scale: float = 0.0
    process: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, logits: Tensor, *, banned: Tensor, places: Tensor | None = None) -> Prediction:
        """That of logits ``(N, K, V)``, for all slots or those at ``places``."""
        number, width, vocab_size = logits.shape
        if places is None:
            places = torch.arange(number * width, device=logits.device)
        shape, source = (number, width), logits.flatten(0, 1)
        return cls(shape=shape, places=places, vocab_size=vocab_size, banned=banned, dtype=logits.dtype, source=source)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Parts of ``places``, in order, and their logits ``(R, V)``.

        The caller may overwrite them, and must be done with them before taking the next.
        """
        number, most = len(self.places), self._rows_at_once(_CACHED_NUMBERS)
        if "logits" in self.__dict__:
            for part in _parts(number, most):
                yield part, self.logits.flatten(0, 1).index_select(0, self.places[part])
            return
        at_once = most if self.head is None else max(_HEAD_ROWS, self._rows_at_once(_HEAD_NUMBERS))
        with nullcontext() if self.head is None else self.head.passing() as head:
            for part in _parts(number, at_once if self.cfg_scale == 0 else max(1, at_once // 2)):
                branches = self._raw(self.places[part], head)
                for few in _parts(len(branches[0]), most):
                    some = slice(part.start + few.start, part.start + few.stop)
                    yield some, self._processed([branch[few] for branch in branches], self.places[some])

    @cached_property
    def logits(self) -> Tensor:
        """``(N, K, V)``: everything at once; 0 for slots that were not asked for."""
        number, width = self.shape
        everything = torch.zeros(number * width, self.vocab_size, dtype=self.dtype, device=self.places.device)
        for part, logits in self.chunks():
            everything.index_copy_(0, self.places[part], logits)
        return everything.view(number, width, self.vocab_size)

    def _raw(self, places: Tensor, head: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, ...]:
        """Fresh logits ``(R, V)`` as the model gives them: one tensor, or with guidance two."""
        guided = self.cfg_scale != 0
        index = torch.cat([places, places + len(self.source) // 2]) if guided else places
        rows = self.source.index_select(0, index.to(self.source.device))
        logits = (rows if head is None else head(rows)).to(self.places.device)
        return logits.chunk(2) if guided else (logits,)

    def _processed(self, branches: list[Tensor], places: Tensor) -> Tensor:
        logits = branches[0]
        if self.cfg_scale != 0:
            logits = (logits - branches[1]).mul_(self.cfg_scale + 1).add_(branches[1])
        return logits if self.process is None else self.process(places, logits).to(self.dtype)

    def _rows_at_once(self, numbers: int) -> int:
        if self.places.device.type != "cpu":
            numbers = _ACCELERATOR_NUMBERS
        return max(1, numbers // self.vocab_size)


def _parts(number: int, most: int) -> Iterator[slice]:
    """``number`` rows in parts of about one size, ``most`` at the most."""
    size = -(-number // max(1, -(-number // most)))
    for start in range(0, number, max(1, size)):
        yield slice(start, min(start + size, number))
