"""Whole turns as CUDA graphs: a small model's turn is hundreds of kernels, each shorter than its launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nap_decode.base.batching import copy_of, mapped, tensors
from nap_decode.base.rows import Rows

Take: TypeAlias = Callable[[Any, Rows, int, int], "tuple[Any, Tensor | None, int]"]
"""Takes a turn, see :meth:`nap_decode.run.loop.Loop.step`: what it reads, the rows, K and T."""
Record: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function as often as it likes, and returns something that does the same again."""

_BUCKETS = 8
"""Numbers of slots for which a turn is captured: eighths of what there is to decode in a row."""
_SHAPES = 16
"""Shapes of batches that are remembered."""


class Graphs:
    """Takes turns by replaying graphs, one for each shape of batch and each of a few numbers of slots.

    A graph works on tensors of its own, into which a turn is copied; all graphs of a shape share them.  Batches are
    filled up with idle rows to a power of two, so that there are few shapes.

    Args:
        record: captures a function; a :class:`CudaRecorder`, unless a test wants another.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._turns: dict[object, Any] = {}  # by shape
        self._graphs: dict[object, tuple[Callable[[], None], int, Take]] = {}  # by shape and number of slots
        self._lock = threading.Lock()  # threads that share these graphs work in the same tensors

    def __call__(self, take: Take, most: int, turn: Any, rows: Rows, width: int) -> tuple[Any, Tensor | None, int]:
        """Take a turn.

        Args:
            take: takes one.
            most: slots to decode in the row that has most.
            turn: what it reads: ``state``, ``given``, ``is_open``, ``quota`` and ``step``.
            rows: the rows.
            width: K.
        """
        number = len(rows.lengths)
        idle = (1 << (number - 1).bit_length()) - number
        shape = (number + idle, rows.width, turn.quota.shape[1], rows.is_padded)
        unit = -(-most // _BUCKETS)
        width = -(-width // unit) * unit
        with self._lock:
            own = self._turns.get(shape)
            if own is None:
                if len(self._turns) == _SHAPES:
                    self._turns.clear()
                    self._graphs.clear()
                filled = mapped(turn, lambda tensor: torch.cat([tensor, *[tensor[-1:]] * idle]))
                own = self._turns[shape] = copy_of(filled)
            _copy(turn, own)
            own.is_open[number:] = False
            if (shape, width) not in self._graphs:
                self._graphs[shape, width] = self._capture(take, own, (*rows.lengths, *[rows.width] * idle), width)
            replay, passes, _ = self._graphs[shape, width]
            replay()
            # A copy, because somebody else may decode with these graphs before the caller goes on.
            return copy_of(mapped(own.state, lambda tensor: tensor[:number])), None, passes

    def _capture(
        self, take: Take, own: Any, lengths: tuple[int, ...], width: int
    ) -> tuple[Callable[[], None], int, Take]:
        """What replays a turn, its forward passes, and what takes it, which owns tensors that the graph reads."""
        before, passes = copy_of(own.state), 0

        def step() -> None:
            nonlocal passes
            # Rows of the graph's own, and new ones, so that whatever is derived from them is derived in the graph.
            rows = Rows(lengths, own.given.prompt, own.given.present)
            state, _, passes = take(replace(own, given=replace(own.given)), rows, width, width * len(lengths))
            _copy(state, own.state)

        replay = self.record(step)
        _copy(before, own.state)
        return replay, passes, take


def _copy(given: Any, own: Any) -> None:
    """Overwrite the first rows."""
    for theirs, mine in zip(tensors(given), tensors(own), strict=True):
        if theirs is not mine:
            mine[: len(theirs)].copy_(theirs, non_blocking=True)


class CudaRecorder:
    """Captures functions as CUDA graphs that share one pool of memory, since they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run it a few times, as lazy initialisations cannot be captured, then capture it."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                function()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay
