"""Decode held-out problems with a model of the study, by many decoders, with the library's public API alone.

    python -m examples.miniature.evaluate runs/paths-0

Writes ``results.csv`` into the model's directory, a line for each decoder and setting; lines that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.miniature.data import LAYOUTS, PATH_LENGTH, SUMMARY_LENGTH, TASKS, Layout, Task
from nap_decode import (
    AnyOrderScheduler,
    ARnessMeter,
    Block,
    CanvasTemplate,
    Decoder,
    Denoiser,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    Sampler,
    SamplerOutput,
    Scheduler,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
)
from nap_decode.decoders.eb_sampler import EntropyBoundSelection

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS_FILE = "results.csv"
TOKENS_PER_STEP = (18, 12, 8, 6, 4, 3, 2, 1)  # the fast ones first
SPLITS = {"tune": 20_000, "test": 30_000}
"""Seeds of the problems, to which that of the model is added.  Recipes and decoders are chosen on ``tune``."""


Line = TypeVar("Line", bound="DataclassInstance")


@dataclass(frozen=True)
class Method:
    """A decoder with one free setting.

    Args:
        name: of the decoder.
        make: from a Denoiser, a template and a value of the setting to a sampler.
        setting: what the value means.
        values: of the setting.
        layouts: that it is for; all if empty.
    """

    name: str
    make: Callable[[Denoiser, CanvasTemplate, float], Sampler]
    setting: str = "tokens_per_step"
    values: tuple[float, ...] = TOKENS_PER_STEP
    layouts: tuple[str, ...] = ()


def _fixed(
    name: str,
    scheduler: Callable[[int], Scheduler],
    *,
    confidence: str = "probability",
    layouts: tuple[str, ...] = (),
    template: CanvasTemplate | None = None,
) -> Method:
    """So many tokens at each step."""
    own = template

    def make(denoiser: Denoiser, template: CanvasTemplate, value: float) -> Sampler:
        committer = MicroConfidenceCommitter(confidence=confidence)
        return Sampler(denoiser, decoder=Decoder(scheduler(int(value)), committer), template=own or template)

    return Method(name, make, layouts=layouts)


def _adaptive(name: str, selection: type[Any], setting: str, values: tuple[float, ...], confidence: str) -> Method:
    """As many tokens as the model is sure of, at least one."""

    def make(denoiser: Denoiser, template: CanvasTemplate, value: float) -> Sampler:
        committer = MicroConfidenceCommitter(confidence=confidence, selection=selection(value))
        return Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1), committer), template=template)

    return Method(name, make, setting, values)


_WITH_PATHS = ("paths", "identical")
_WITHOUT_PATHS = ("chain", "joined")
_THIRDS = CanvasTemplate(
    (*(Block(f"third {j + 1}", PATH_LENGTH) for j in range(3)), Block("answer", SUMMARY_LENGTH, held=True))
)
DECODERS = {
    decoder.name: decoder
    for decoder in (
        _fixed("any_order", lambda k: AnyOrderScheduler(tokens_per_step=k)),
        _fixed("parallel_forced", lambda k: MacroParallelScheduler(tokens_per_step=k), layouts=_WITH_PATHS),
        _fixed(
            "parallel_forced_shared",
            lambda k: MacroParallelScheduler(tokens_per_step=k, share_last_step=True),
            layouts=_WITH_PATHS,
        ),
        _fixed(
            "parallel_forced_0.8",
            lambda k: MacroParallelScheduler(tokens_per_step=k, hold_until=0.8),
            layouts=_WITH_PATHS,
        ),
        _fixed(
            "parallel_forced_0",
            lambda k: MacroParallelScheduler(tokens_per_step=k, hold_until=0.0),
            layouts=_WITH_PATHS,
        ),
        # What the parallel-forced scheduler does to text that was not written in parallel.
        _fixed(
            "parallel_forced_thirds",
            lambda k: MacroParallelScheduler(tokens_per_step=k, share_last_step=True),
            layouts=_WITHOUT_PATHS,
            template=_THIRDS,
        ),
        _fixed("blocks_in_turn", lambda k: SemiAutoregressiveScheduler(tokens_per_step=k), layouts=_WITH_PATHS),
        _fixed("semi_autoregressive_3", lambda k: SemiAutoregressiveScheduler(tokens_per_step=k, block_length=3)),
        _fixed("semi_autoregressive_6", lambda k: SemiAutoregressiveScheduler(tokens_per_step=k, block_length=6)),
        _fixed("semi_autoregressive_12", lambda k: SemiAutoregressiveScheduler(tokens_per_step=k, block_length=12)),
        _fixed("semi_autoregressive_18", lambda k: SemiAutoregressiveScheduler(tokens_per_step=k, block_length=18)),
        _adaptive("threshold", ThresholdSelection, "threshold", (0.5, 0.7, 0.9, 0.99), "probability"),
        _adaptive("entropy_bounded", EntropyBoundSelection, "gamma", (2.0, 0.5, 0.1, 0.01), "negative_entropy"),
        _fixed("left_to_right", lambda k: AnyOrderScheduler(tokens_per_step=k), confidence="leftmost"),
        _fixed("random", lambda k: AnyOrderScheduler(tokens_per_step=k), confidence="random"),
    )
}


@dataclass(frozen=True)
class Result:
    """One line of the results.

    Args:
        task: of the model.
        kind: of the model: the name of its configuration.
        seed: of the model's training.
        split: ``"tune"`` or ``"test"``.
        decoder: its name.
        setting: which setting ``value`` is of.
        value: of the setting.
        problems: decoded.
        correct: of them, with the right token in the slot of the answer.
        path_ends_correct: share of the solutions on the canvas that end in the right state.
        forward_passes: mean per problem.
        tokens_per_forward: mean; tokens before the end of their block by forward passes.
        arness_global: Global-ARness@1.
        arness_local: Local-ARness@1.
        arness_blocks: Global-ARness@1 of every block on its own, with blanks between; of the canvas's own blocks.
    """

    task: str
    kind: str
    seed: int
    split: str
    decoder: str
    setting: str
    value: float
    problems: int
    correct: int
    path_ends_correct: float
    forward_passes: float
    tokens_per_forward: float
    arness_global: float
    arness_local: float
    arness_blocks: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is a result of."""
        return (self.task, self.kind, self.seed, self.split, self.decoder, self.value)


def read_lines(file: Path, kind: type[Line]) -> list[Line]:
    """The lines of a CSV file as instances of a dataclass whose fields are texts, whole numbers and numbers."""
    types: dict[str, type] = {
        field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(kind)
    }
    with file.open(newline="") as lines:
        return [kind(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(lines)]


def read_results(file: Path) -> list[Result]:
    """The results of a model; none if there is no such file."""
    return read_lines(file, Result) if file.exists() else []


def write_results(results: Iterable[Result], file: Path) -> None:
    """Write a file anew."""
    with (part := file.with_suffix(".part")).open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    part.rename(file)


def score(task: Task, layout: Layout, operands: np.ndarray[Any, Any], output: SamplerOutput) -> tuple[int, float]:
    """Right answers, and the share of solutions that end in the right state."""
    rows = len(operands)
    slots = rearrange(output.trace.tokens[output.canvas.decodable.cpu()], "(n c) -> n c", n=rows).numpy()
    right = task.state_ids(task.answer(operands))
    ends = slots[:, list(layout.path_ends)]
    return int((slots[:, layout.answer_slot] == right).sum()), float((ends == right[:, None]).mean())


class Evaluation:
    """A model of the study and its problems.

    Args:
        directory: of the model, made by ``train``.
        device: for torch.
        dtype: of the model.
        compiles: compile the body of the model.
        batch: problems decoded at once.
    """

    def __init__(
        self, directory: Path, *, device: str = "cpu", dtype: str = "float32", compiles: bool = False, batch: int = 350
    ) -> None:
        record = json.loads((directory / "training_log.json").read_text())
        self.kind: str = record["config"]["name"]
        self.seed: int = record["seed"]
        self.task = TASKS[record["config"]["task"]]
        self.layout = LAYOUTS[record["config"]["layout"]]
        self.batch = batch
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=getattr(torch, dtype))
        if compiles:
            model.model.compile()  # in place: the output layer stays apart, as it is asked of few positions only
        self.denoiser = Denoiser(
            model.to(device).eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)
        )

    def decoders(self, names: Sequence[str] = ()) -> list[Method]:
        """Those that are for this layout, all or some of them."""
        unknown = sorted(set(names) - set(DECODERS))
        if unknown:
            raise ValueError(f"there is no decoder {', '.join(unknown)}; there are {', '.join(DECODERS)}")
        return [
            decoder
            for decoder in DECODERS.values()
            if decoder.name in (names or DECODERS) and (not decoder.layouts or self.layout.name in decoder.layouts)
        ]

    def is_possible(self, decoder: Method, value: float) -> bool:
        """Whether there are as many steps as there are phases, and a phase as long as there is."""
        sampler = decoder.make(self.denoiser, self.layout.template, value)
        scheduler = sampler.decoder.scheduler
        if decoder.setting != "tokens_per_step" or not isinstance(scheduler, SemiAutoregressiveScheduler):
            return True
        template = sampler.template or self.layout.template
        lengths = [block.length for block in template.blocks]
        total, block_length = sum(lengths), scheduler.block_length
        num_blocks = len(lengths) if block_length is None else math.ceil(total / block_length)
        return num_blocks <= math.ceil(total / value) and (block_length or total) <= total

    def measure(self, decoder: Method, value: float, split: str, problems: int) -> Result:
        """Decode the problems of a split, always the same ones."""
        sampler = decoder.make(self.denoiser, self.layout.template, value)
        operands = self.task.sample(np.random.default_rng(SPLITS[split] + self.seed), problems)
        correct, ends, forwards, per_forward, meter = 0, 0.0, 0.0, 0.0, ARnessMeter()
        for start in range(0, problems, self.batch):
            some = operands[start : start + self.batch]
            output = sampler([self.task.prompt(row) for row in some], seed=start, progress=False)
            right, share = score(self.task, self.layout, some, output)
            correct += right
            ends += share * len(some)
            forwards += float(output.trace.forward_passes.sum())
            per_forward += sum(output.tokens_per_forward)
            meter.update(output.trace)
        arness = meter.compute()
        return Result(
            task=self.task.name,
            kind=self.kind,
            seed=self.seed,
            split=split,
            decoder=decoder.name,
            setting=decoder.setting,
            value=value,
            problems=problems,
            correct=correct,
            path_ends_correct=round(ends / problems, 4),
            forward_passes=round(forwards / problems, 3),
            tokens_per_forward=round(per_forward / problems, 3),
            arness_global=round(arness.global_at[1], 4),
            arness_local=round(arness.local_at[1], 4),
            arness_blocks=" ".join(f"{block.global_at[1]:.3f}" for block in arness.blocks.values()),
        )


def evaluate(
    directory: Path,
    *,
    splits: dict[str, int],
    names: Sequence[str] = (),
    values: Sequence[float] = (),
    **options: Any,
) -> list[Result]:
    """Measure a model, and write what was not there to its results.

    Args:
        directory: of the model.
        splits: problems of each split.
        names: of decoders; all by default.
        values: of tokens per step; all by default.
        options: see :class:`Evaluation`.
    """
    file = directory / RESULTS_FILE
    results = {result.key: result for result in read_results(file)}
    evaluation = Evaluation(directory, **options)
    started = time.perf_counter()
    for decoder in evaluation.decoders(names):
        for value in decoder.values:
            if values and decoder.setting == "tokens_per_step" and value not in values:
                continue
            for split, problems in splits.items():
                key = (evaluation.task.name, evaluation.kind, evaluation.seed, split, decoder.name, value)
                if key in results and results[key].problems >= problems:
                    continue
                if not evaluation.is_possible(decoder, value):
                    continue
                result = evaluation.measure(decoder, value, split, problems)
                # Read again: another process may have measured other decoders meanwhile.
                results = {other.key: other for other in read_results(file)} | {key: result}
                write_results(results.values(), file)
                print(
                    f"{directory.name}: {split} {decoder.name} {decoder.setting} {value:g}: "
                    f"{100 * result.correct / problems:.1f} %  {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
    return list(results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="directories that train.py wrote")
    parser.add_argument("--tune", type=int, default=500, help="problems to choose recipes and decoders on")
    parser.add_argument("--test", type=int, default=700, help="problems to report")
    parser.add_argument("--decoders", nargs="*", default=[], help="all by default")
    parser.add_argument("--tokens-per-step", nargs="*", type=int, default=[], help="all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    splits = {name: number for name, number in (("tune", args.tune), ("test", args.test)) if number}
    for directory in args.models:
        evaluate(
            directory,
            splits=splits,
            names=args.decoders,
            values=args.tokens_per_step,
            device=args.device,
            dtype=args.dtype,
            compiles=args.compile,
        )


if __name__ == "__main__":
    main()
