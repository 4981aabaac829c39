"""Whole steps as CUDA graphs: a small model's step is hundreds of kernels, each shorter than its launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from nap_decode.model.rows import Rows, copy_of, tensors

if TYPE_CHECKING:
    from nap_decode.run.loop import StepInputs
    from nap_decode.run.state import RowState

TakeStep: TypeAlias = "Callable[[StepInputs, Rows, int, int], tuple[RowState, Tensor | None, int]]"
Record: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function as often as it likes, and returns something that does the same again."""

_BUCKETS = 8
"""Numbers of slots for which a step is captured: eighths of what there is to decode in a row."""
_SHAPES = 16
"""Shapes of batches that are remembered."""


@dataclass(frozen=True, eq=False)
class _Graph:
    replay: Callable[[], None]
    passes: int
    step: TakeStep  # which owns tensors that the graph reads


class StepGraphs:
    """Takes steps by replaying graphs, one for each shape of batch and each of a few numbers of slots.

    A graph works on tensors of its own, into which a step is copied; all graphs of a shape share them.

    Args:
        record: captures a function; a :class:`CudaRecorder`, unless a test wants another.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._inputs: dict[object, StepInputs] = {}
        self._graphs: dict[object, _Graph] = {}
        self._turn = threading.Lock()  # threads that share these graphs work in the same tensors

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def __call__(
        self, take_step: TakeStep, most: int, inputs: StepInputs, rows: Rows, width: int, total: int
    ) -> tuple[RowState, Tensor | None, int]:
        """See :meth:`Decoding.take_step`.

        Args:
            take_step: takes a step.
            most: slots to decode in the row that has most.
            inputs: see there.
            rows: see there.
            width: see there.
            total: not looked at: a graph is for a number of rows and of slots in each.
        """
        num_rows, num_columns = inputs.state.tokens.shape
        shape = (num_rows, num_columns, inputs.quota.shape[1], rows.is_padded)
        unit = -(-most // _BUCKETS)
        width = -(-width // unit) * unit
        with self._turn:
            own = self._inputs.get(shape)
            if own is None:
                if len(self._inputs) == _SHAPES:
                    self._inputs.clear()
                    self._graphs.clear()
                own = self._inputs[shape] = copy_of(inputs)
            _copy(inputs, own)
            graph = self._graphs.get((shape, width))
            if graph is None:
                graph = self._graphs[shape, width] = self._capture(take_step, own, rows, width)
            graph.replay()
            # A copy, because somebody else may decode with these graphs before the caller goes on.
            return copy_of(own.state), None, graph.passes

    def _capture(self, take_step: TakeStep, own: StepInputs, rows: Rows, width: int) -> _Graph:
        before, passes = copy_of(own.state), 0

        def step() -> None:
            nonlocal passes
            # Rows of the graph's own, and new ones, so that whatever is derived from them is derived in the graph.
            again = Rows(rows.lengths, own.layout.prompt, own.layout.present)
            state, _, passes = take_step(
                replace(own, layout=replace(own.layout)), again, width, width * len(rows.lengths)
            )
            _copy(state, own.state)

        replay = self.record(step)
        _copy(before, own.state)
        return _Graph(replay, passes, take_step)


def _copy(given: Any, own: Any) -> None:
    for theirs, mine in zip(tensors(given), tensors(own), strict=True):
        if theirs is not mine:
            mine.copy_(theirs, non_blocking=True)


class CudaRecorder:
    """Captures functions as CUDA graphs that share one pool of memory, since they run one after the other.

    Args:
        device: where they run.
    """

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
