"""Time, memory and synchronisations of a function, and the machine that it ran on."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from nap_decode.base.version import __version__

Say: TypeAlias = Callable[[str], None]
"""Called with a line of text about progress."""


def extra_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a function takes at most beyond what there was before; None where that cannot be told.  Warms up.

    What is kept from the first run for the next is counted.  On the CPU it is every block that torch's allocator hands
    out, what an operation or compiled code takes for its own use included; scratch space of the matrix libraries
    (oneDNN, MKL) is not torch's, and not seen.
    """
    if device.type == "cpu":
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            function()
        recorded: Any = profile.profiler
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        changes: list[int] = [event.nbytes() for event in events]
        return max(accumulate(changes, initial=0))
    if device.type != "cuda":
        function()
        return None
    before = torch.cuda.memory_allocated(device)
    function()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def count_syncs() -> Iterator[Callable[[], int]]:
    """While open, torch notes what makes the host wait for CUDA; yields a function that says how often so far."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def syncs_per_step(function: Callable[[], Any], forward: nn.Module) -> float | None:
    """How often a function waits for CUDA in a step, from its first forward pass to its last.

    Every pass calls ``forward`` once; if fewer than two calls are seen (a replayed CUDA graph shows none), the answer
    is None.
    """
    marks: list[int] = []
    with count_syncs() as count:
        handle = forward.register_forward_pre_hook(lambda *_: marks.append(count()))
        try:
            function()
        finally:
            handle.remove()
    return (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None


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
        took = sum(values[-1] for values in seconds.values())
        say(f"repetition {repetition + 1} of {repeats}: {took:.3g} s")
    return seconds


def environment(device: torch.device | str) -> dict[str, Any]:
    """Machine, versions and date, for the record."""
    import transformers

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
