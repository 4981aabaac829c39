"""Time, memory and synchronisations of a function, and the machine that it ran on."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Say: TypeAlias = Callable[[str], None]
"""Called with a line of text about progress."""


class MemoryTracker:
    """While open, torch's profiler records what is allocated and freed on the CPU; ``live`` and ``peak`` add it up.

    That is every block that torch's allocator hands out, what an operation or compiled code takes for its own
    use included; adding up the results of operations, as a dispatch mode sees them, misses these.  Scratch space
    of the matrix libraries (oneDNN, MKL) is not torch's, and not seen.

    Example:
        >>> with MemoryTracker() as memory:
        ...     thousand = torch.zeros(1000, dtype=torch.float64)
        ...     view = (thousand + 1)[:10]  # keeps all of its storage
        ...     del view
        >>> memory.live, memory.peak // 1000  # bytes more than at the start: at the end, and at most
        (8000, 16)
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> MemoryTracker:
        self._profile.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.stop()
        recorded: Any = self._profile.profiler
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.live += event.nbytes()
            self.peak = max(self.peak, self.live)


_WAITS = frozenset(
    ("_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim", "_unique2")
)
"""Operations whose result, or whose shape, the host has to wait for."""


class SyncCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, counts the operations that make the host wait for the device.

    On CUDA by torch's own debugging of synchronisations; elsewhere by name (reading a value, shapes that depend on
    values, indexing by bool, copies to the host).  The CPU never waits for itself, so what is counted there is
    what would wait elsewhere; copies to the host cannot be seen there, and what is read from tensors that
    would live on the host anyway is counted too.  Compiled code runs uncompiled meanwhile.

    Args:
        device: where the loop runs.
        forward: a module that every forward pass calls once; then those between the first and the last
            pass are told apart from those before and after the loop.

    Example:
        >>> with SyncCounter() as syncs:
        ...     largest = torch.arange(5).max().item()
        >>> syncs.count, syncs.per_step
        (1, None)
    """

    def __init__(self, device: torch.device | str = "cpu", forward: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.forward = torch.device(device), forward
        self._marks: list[int] = []
        self._caught: list[warnings.WarningMessage] = []
        self._seen = 0
        self._stack = ExitStack()

    @property
    def count(self) -> int:
        """All of them."""
        return self._seen + sum("called a synchronizing" in str(warning.message) for warning in self._caught)

    @property
    def per_step(self) -> float | None:
        """In the loop; None if fewer than two forward passes were seen (a replayed CUDA graph shows none)."""
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1) if len(self._marks) > 1 else None

    def __enter__(self) -> SyncCounter:
        if self.forward is not None:
            handle = self.forward.register_forward_pre_hook(lambda *_: self._marks.append(self.count))
            self._stack.callback(handle.remove)
        if self.device.type == "cuda":
            self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        else:
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack.push(super().__exit__)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._seen += _waits(func.overloadpacket.__name__, args, kwargs)
        return func(*args, **kwargs)


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        is_fill = name != "index" and args[2].numel() == 1  # of one value, in place of which there is none
        return not is_fill and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name in ("_to_copy", "copy_"):
        source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
        return bool(source.device.type != "cpu" and str(target).startswith("cpu"))
    return name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def observe(function: Callable[[], Any], device: torch.device, forward: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """Run a function until it is warm, for its memory, and for its synchronisations.

    Args:
        function: the loop.
        device: where it runs.
        forward: see :class:`SyncCounter`.

    Returns:
        Its result, and its costs by the names that :class:`~nap_decode.bench.Loop` has for them.
    """
    before, extra = _allocated(device), None
    # What is kept from the first run for the next is counted.
    with MemoryTracker() if device.type == "cpu" else nullcontext() as memory:
        function()
    gc.collect()
    if memory is not None:
        extra = memory.peak
    elif device.type == "cuda":
        kept = max(0, _allocated(device) - before)
        torch.cuda.reset_peak_memory_stats(device)
        before = _allocated(device)
        function()
        extra = kept + torch.cuda.max_memory_allocated(device) - before
    with SyncCounter(device, forward) as syncs:
        result = function()
    return result, {"extra_bytes": extra, "syncs": syncs.count, "syncs_per_step": syncs.per_step}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device is done with it."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def interleave(
    functions: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device, say: Say
) -> dict[Any, list[float]]:
    """Seconds of each function in each repetition; every other repetition goes backwards."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for repetition in range(repeats):
        for name in list(functions)[:: 1 if repetition % 2 == 0 else -1]:
            seconds[name].append(seconds_of(functions[name], device))
        latest = ", ".join(f"{name} {values[-1]:.3g} s" for name, values in seconds.items())
        say(f"repetition {repetition + 1} of {repeats}" + (f": {latest}" if len(seconds) < 6 else ""))
    return seconds


def environment(device: torch.device | str) -> dict[str, Any]:
    """Machine, versions and date, for the record.

    Example:
        >>> sorted(environment("cpu"))
        ['date', 'machine', 'versions']
    """
    import transformers

    from nap_decode.base.version import __version__

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "nap_decode": __version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
