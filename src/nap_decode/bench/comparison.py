"""The loops side by side."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nap_decode.base.errors import NapDecodeError, check_integer
from nap_decode.bench.loops import make_loops
from nap_decode.bench.observation import Say, environment, extra_memory, interleave, syncs_per_step
from nap_decode.bench.workload import Workload
from nap_decode.measure.arness import table
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loop:
    """Costs of one of the loops.

    Args:
        seconds: of each repetition.
        tokens: decoded tokens of all rows, prompts excluded and cut at the end token of each block; None for loops
            that decode nothing.
        extra_bytes: peak memory less what there was before the loop's first run; None where it cannot be told.
        syncs_per_step: how often the host waits for CUDA in a step; None on other devices, and for CUDA graphs.
    """

    seconds: list[float]
    tokens: int | None
    extra_bytes: int | None
    syncs_per_step: float | None


@dataclass(frozen=True)
class BenchmarkResult:
    """Measurements by :func:`benchmark`; ``str()`` is a table.

    Args:
        workload: what was decoded.
        model: facts about the model.
        loops: by name: ``"bare"`` (missing if the model cannot be called in two parts), ``"full"``,
            ``"textbook"``, ``"ours"``, and of block-causal models ``"cached"``, the textbook loop that keeps blocks.
        positions: that ours forwards, and that it would if nothing were kept; of all rows.
        flops: of the model's body, likewise; None if that is not known.
        identical: share of the slots where textbook and ours have the same token; None if tokens were drawn.
        environment: machine, versions and date.
    """

    workload: Workload
    model: dict[str, Any]
    loops: dict[str, Loop]
    positions: tuple[int, int]
    flops: tuple[float, float] | None
    identical: float | None
    environment: dict[str, Any]

    @property
    def ratios(self) -> dict[str, list[float]]:
        """For each repetition; without ``"bare"``, ``"full"`` stands for it.

        ``overhead``: ours / bare - 1.  ``speedup``: textbook / ours.  ``attainable``: textbook / bare, the speedup
        of a loop that costs nothing but its forward passes.  ``cached``: ours / the textbook loop with a cache.
        """
        return {name: values.tolist() for name, values in self._ratios(np.array).items()}

    @property
    def least(self) -> dict[str, float]:
        """The same of the shortest times of each loop: sturdier where other work disturbs."""
        return {name: float(value) for name, value in self._ratios(np.min).items()}

    def _ratios(self, of: Callable[[list[float]], Any]) -> dict[str, Any]:
        seconds = {name: of(loop.seconds) for name, loop in self.loops.items()}
        textbook, ours, bare = seconds["textbook"], seconds["ours"], seconds.get("bare", seconds["full"])
        ratios = {"overhead": ours / bare - 1, "speedup": textbook / ours, "attainable": textbook / bare}
        return ratios | ({"cached": ours / seconds["cached"]} if "cached" in seconds else {})

    @property
    def memory_ratio(self) -> float | None:
        """Our extra memory, by the textbook's."""
        ours, textbook = self.loops["ours"].extra_bytes, self.loops["textbook"].extra_bytes
        return ours / textbook if ours is not None and textbook else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, raw times and medians."""
        return dataclasses.asdict(self) | {
            "ratios": self.ratios,
            "median_ratios": {name: statistics.median(values) for name, values in self.ratios.items()},
            "least_ratios": self.least,
            "memory_ratio": self.memory_ratio,
        }

    def __str__(self) -> str:
        m = self.model
        names = {
            "bare": "bare forward x steps",
            "full": "full forward x steps",
            "textbook": "textbook loop",
            "cached": "textbook loop, blocks kept",
            "ours": f"nap_decode{', ' + str(m['compile']) if m['compile'] else ''}",
        }
        rows = [["", "seconds", "ms/step", "tokens/s", "extra MiB", "syncs/step"]]
        for key, loop in self.loops.items():
            seconds = statistics.median(loop.seconds)
            rate = "-" if loop.tokens is None else f"{loop.tokens / seconds:.1f}"
            memory = "?" if loop.extra_bytes is None else f"{loop.extra_bytes / 2**20:.1f}"
            syncs = "?" if loop.syncs_per_step is None else f"{loop.syncs_per_step:.3g}"
            per_step = f"{1e3 * seconds / self.workload.steps:.2f}"
            rows.append([names[key], f"{seconds:.3f}", per_step, rate, memory, syncs])

        def said(name: str, unit: str, scale: float = 1.0) -> str:
            low, middle, high = (scale * f(self.ratios[name]) for f in (min, statistics.median, max))
            return f"{middle:.3g}{unit} ({low:.3g} to {high:.3g}); {scale * self.least[name]:.3g}{unit}"

        bare = "bare" if "bare" in self.loops else "full"
        facts = [
            ["", "median (least to largest); of the shortest times"],
            [f"overhead over the {bare} forward", said("overhead", "%", 100)],
            ["faster than the textbook loop", said("speedup", "x")],
            ["attainable: forward passes alone", said("attainable", "x")],
        ]
        if "cached" in self.loops:
            facts.append(["time, by the cached textbook's", said("cached", "x")])
        some, every = self.positions
        facts.append(["positions forwarded", f"{some} of {every}"])
        if self.flops is not None:
            facts.append(["FLOPs of the body, by those of all", f"{self.flops[0] / self.flops[1]:.3g}"])
        if self.memory_ratio is not None:
            facts.append(["extra memory, by the textbook's", f"{self.memory_ratio:.3g}"])
        if self.identical is not None:
            same = "identical" if self.identical == 1 else f"{100 * self.identical:.2f}% equal"
            facts.append(["tokens, beside the textbook's", same])
        lines = [
            f"{m['name']}: {m['parameters'] / 1e6:.3g} M parameters, {m['vocabulary']} ids, {m['dtype']}, "
            f"{m['device']}",
            f"{self.workload}; medians of {len(self.loops['ours'].seconds)}",
            "",
            *table(rows),
            "",
            *(f"{name:<36}{text}" for name, text in facts),
        ]
        if bare == "full":
            lines += ["", "Body and output layer of this model do not make the whole; bare is the full forward."]
        return "\n".join(lines)


def benchmark(
    model: Any,
    workload: Workload | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mask_token_id: int | None = None,
    family: ModelFamily | None = None,
    repeats: int = 5,
    compile: str | bool = False,
    progress: Say | None = None,
) -> BenchmarkResult:
    """Measure bare forward passes, the textbook loop and ours side by side.

    Args:
        model: a transformers model.
        workload: what to decode.
        tokenizer: see :class:`Denoiser`.
        mask_token_id: see :class:`Denoiser`.
        family: see :class:`Denoiser`.
        repeats: repetitions of all loops, after a warm-up.
        compile: see :class:`Sampler`.
        progress: called with a line of text now and then.

    Raises:
        NapDecodeError: no transformers model.

    Example:
        >>> from nap_decode import demo
        >>> result = benchmark(demo.load()[0], Workload(new_tokens=8, steps=4), repeats=1)
        >>> list(result.loops), result.identical
        (['bare', 'full', 'textbook', 'ours'], 1.0)
    """
    check_integer("repeats", repeats, 1)
    workload, say = workload or Workload(), progress or (lambda _: None)
    denoiser = Denoiser(model, tokenizer, mask_token_id=mask_token_id, family=family)
    if denoiser.call.config is None:
        raise NapDecodeError("the benchmark calls the model itself, and needs a transformers model for that")
    canvas, device = workload.canvas(denoiser), denoiser.device
    denoiser.check(canvas)
    loops = make_loops(denoiser, canvas, workload, compile)
    forward = model.get_input_embeddings()  # which every pass calls, of the body as of the whole

    extra, syncs = {}, {}
    for name, loop in loops.items():
        say(f"warming up, and counting memory: {name}")
        extra[name] = extra_memory(loop, device)
        syncs[name] = syncs_per_step(loop, forward) if device.type == "cuda" else None
    output, theirs = loops["ours"](), loops["textbook"]()
    if output.forward_passes != workload.steps:
        raise NapDecodeError(f"{workload.steps} steps were asked for, but {output.forward_passes} were made")
    traces = {"ours": output.trace, "textbook": dataclasses.replace(output.trace, tokens=theirs.cpu())}
    if "cached" in loops:
        traces["cached"] = dataclasses.replace(output.trace, tokens=loops["cached"]().cpu())
    tokens = {name: int(trace.before_end().sum()) for name, trace in traces.items()}
    seconds = interleave(loops, repeats, device, say)
    is_same = (theirs == output.sequences)[canvas.decodable]
    return BenchmarkResult(
        workload=workload,
        model={
            "name": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": denoiser.call.num_embeddings,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(device),
            "compile": compile,
        },
        loops={name: Loop(seconds[name], tokens.get(name), extra[name], syncs[name]) for name in loops},
        positions=(sum(output.positions_forwarded), sum(output.positions_exact)),
        flops=None if output.cost is None else (sum(output.flops()), sum(output.flops(exact=True))),
        identical=None if workload.temperature else float(is_same.float().mean()),
        environment=environment(device),
    )
