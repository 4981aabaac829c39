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
from nap_decode.bench.observation import Say, environment, interleave, observe
from nap_decode.bench.workload import Workload
from nap_decode.model.denoiser import Denoiser

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
        syncs: operations that wait for the device, see :class:`SyncCounter`.
        syncs_per_step: those in the loop; None where it cannot be told.
    """

    seconds: list[float]
    tokens: int | None
    extra_bytes: int | None
    syncs: int
    syncs_per_step: float | None


@dataclass(frozen=True)
class BenchmarkResult:
    """Measurements by :func:`benchmark`; ``str()`` is a table.

    Args:
        workload: what was decoded.
        model: facts about the model.
        loops: by name: ``"bare"`` (missing if the model cannot be called in two parts), ``"full"``,
            ``"textbook"``, ``"ours"``.
        identical: share of the slots where textbook and ours have the same token; None if tokens were drawn.
        environment: see :func:`environment`.
    """

    workload: Workload
    model: dict[str, Any]
    loops: dict[str, Loop]
    identical: float | None
    environment: dict[str, Any]

    @property
    def ratios(self) -> dict[str, list[float]]:
        """For each repetition; without ``"bare"``, ``"full"`` stands for it.

        ``overhead``: ours / bare - 1.  ``speedup``: textbook / ours.  ``attainable``: textbook / bare, the speedup
        of a loop that costs nothing but its forward passes; ``attained``: speedup / attainable.
        ``attainable_by_head``: full / bare, what leaving out unwanted rows of the output layer is worth by
        itself; ``attained_by_head``: speedup / that.
        """
        return {name: values.tolist() for name, values in self._ratios(lambda loop: np.array(loop.seconds)).items()}

    @property
    def least(self) -> dict[str, float]:
        """The same of the shortest times of each loop: sturdier where other work disturbs."""
        return {name: float(value) for name, value in self._ratios(lambda loop: np.min(loop.seconds)).items()}

    def _ratios(self, seconds: Callable[[Loop], Any]) -> dict[str, Any]:
        full, textbook, ours = (seconds(self.loops[name]) for name in ("full", "textbook", "ours"))
        bare = seconds(self.loops["bare"]) if "bare" in self.loops else full
        return {
            "overhead": ours / bare - 1,
            "speedup": textbook / ours,
            "attainable": textbook / bare,
            "attained": bare / ours,
            "attainable_by_head": full / bare,
            "attained_by_head": textbook / ours * bare / full,
        }

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
        w, m, least = self.workload, self.model, self.least
        over = "bare" if "bare" in self.loops else "full"
        names = {
            "bare": "bare forward x steps",
            "full": "full forward x steps",
            "textbook": "textbook loop",
            "ours": f"nap_decode{', ' + str(m['compile']) if m['compile'] else ''}",
        }
        lines = [
            f"{m['name']}: {m['parameters'] / 1e6:.3g} M parameters, {m['vocabulary']} ids, {m['dtype']}, "
            f"{m['device']}",
            f"{w.batch_size} row{'s' * (w.batch_size > 1)}{', ragged' * w.ragged}, prompt {w.prompt_length}, "
            f"{w.new_tokens} new tokens in {w.blocks} block{'s' * (w.blocks > 1)} ({w.scheduler}), {w.steps} steps, "
            f"temperature {w.temperature:g}; medians of {len(self.loops['ours'].seconds)}",
            "",
            f"{'':<28}{'seconds':>9}{'ms/step':>9}{'tokens/s':>10}{'extra MiB':>11}{'syncs/step':>12}",
        ]
        for key, loop in self.loops.items():
            seconds = statistics.median(loop.seconds)
            rate = "-" if loop.tokens is None else f"{loop.tokens / seconds:.1f}"
            memory = "?" if loop.extra_bytes is None else f"{loop.extra_bytes / 2**20:.1f}"
            syncs = f"{loop.syncs} in all" if loop.syncs_per_step is None else f"{loop.syncs_per_step:.3g}"
            per_step = f"{1e3 * seconds / w.steps:.2f}"
            lines.append(f"{names[key]:<28}{seconds:>9.3f}{per_step:>9}{rate:>10}{memory:>11}{syncs:>12}")

        def said(name: str, unit: str, scale: float = 1.0) -> str:
            low, middle, high = (scale * f(self.ratios[name]) for f in (min, statistics.median, max))
            return f"{middle:.3g}{unit} ({low:.3g} to {high:.3g})"

        if over == "full":
            lines += ["", "Body and output layer of this model do not make the whole; bare is the full forward."]
        lines += [
            "",
            f"overhead over the {over} forward      {said('overhead', '%', 100)}",
            f"faster than the textbook loop       {said('speedup', 'x')}",
            f"attainable: forward passes alone    {said('attainable', 'x')}; attained {said('attained', '%', 100)}",
            f"attainable: full / {over} forward     {said('attainable_by_head', 'x')}; "
            f"attained {said('attained_by_head', '%', 100)}",
            f"of the shortest times               {100 * least['overhead']:.3g}% overhead, {least['speedup']:.3g}x; "
            f"attained {100 * least['attained']:.3g}%",
        ]
        if self.memory_ratio is not None:
            lines.append(f"extra memory, by the textbook's     {self.memory_ratio:.3g}")
        if self.identical is not None:
            same = "identical" if self.identical == 1 else f"{100 * self.identical:.2f}% equal"
            lines.append(f"tokens, beside the textbook's       {same}")
        return "\n".join(lines)


def benchmark(
    model: Any,
    workload: Workload | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mask_token_id: int | None = None,
    repeats: int = 5,
    compile: str | bool | None = None,
    progress: Say | None = None,
) -> BenchmarkResult:
    """Measure bare forward passes, the textbook loop and ours side by side.

    Args:
        model: a transformers model.
        workload: what to decode.
        tokenizer: see :class:`Denoiser`.
        mask_token_id: see :class:`Denoiser`.
        repeats: repetitions of all loops, after a warm-up.
        compile: passed on to :class:`Sampler`, unless it is None.
        progress: called with a line of text now and then.

    Raises:
        NapDecodeError: no transformers model, or one that needs an attention mask the benchmark does not make.

    Example:
        >>> from nap_decode import demo
        >>> result = benchmark(demo.load()[0], Workload(new_tokens=8, steps=4), repeats=1)
        >>> list(result.loops), result.identical
        (['bare', 'full', 'textbook', 'ours'], 1.0)
    """
    check_integer("repeats", repeats, 1)
    workload, say = workload or Workload(), progress or (lambda _: None)
    denoiser = Denoiser(model, tokenizer, mask_token_id=mask_token_id)
    if denoiser.call.config is None:
        raise NapDecodeError("the benchmark calls the model itself, and needs a transformers model for that")
    canvas, device = workload.canvas(denoiser), denoiser.device
    denoiser.check(canvas)
    functions = make_loops(denoiser, canvas, workload, compile)
    forward = model.get_input_embeddings()  # which every pass calls, of the body as of the whole

    results, costs = {}, {}
    for name, function in functions.items():
        say(f"warming up, and counting memory and synchronisations: {name}")
        results[name], costs[name] = observe(function, device, forward)
    seconds = interleave(functions, repeats, device, say)

    output, theirs = results["ours"], results["textbook"]
    if output.forward_passes != workload.steps:
        raise NapDecodeError(f"{workload.steps} steps were asked for, but {output.forward_passes} were made")
    traces = {"ours": output.trace, "textbook": dataclasses.replace(output.trace, tokens=theirs.cpu())}
    tokens = {name: int(trace.before_end().sum()) for name, trace in traces.items()}
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
        loops={name: Loop(seconds[name], tokens.get(name), **costs[name]) for name in functions},
        identical=None
        if workload.temperature
        else float((theirs == output.sequences)[canvas.decodable].float().mean()),
        environment=environment(device),
    )
