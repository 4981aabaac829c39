"""The whole study, or a small part of it, from nothing to tables.

    python -m examples.miniature.run --quick      # two models, a few decoders, a table
    python -m examples.miniature.run              # every model, decoder and seed: hours

Models are trained and measured by ``--workers`` processes of one thread each; each model is a directory under
``--output``, with a log.  An interrupted run continues where it stopped.  At the end the results of all models are
joined in ``results.csv``; to renew the tables and figures of the docs from it, copy it to docs/study/ and run
``python -m examples.miniature.report``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from examples.miniature.evaluate import RESULTS_FILE, read_results, write_results
from examples.miniature.study import KIND_NAMES, Study
from examples.miniature.tables import decoders_table, forced_table, gaps_table

CONFIGS = Path(__file__).parent / "configs"
ROOT = Path(__file__).parents[2]
KINDS = tuple(sorted(file.stem for file in CONFIGS.glob("*.yaml")))


@dataclass(frozen=True)
class Plan:
    """What to train and to measure.

    Args:
        kinds: names of configurations.
        seeds: of training, for every kind.
        options: of ``evaluate``.
    """

    kinds: tuple[str, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()

    def models(self) -> Iterator[tuple[str, int]]:
        """Every kind with every seed; all kinds of a seed before the next seed."""
        for seed in self.seeds:
            for kind in self.kinds:
                yield kind, seed


FULL = Plan(KINDS, (0, 1, 2))
QUICK = Plan(
    ("paths_best", "chain_best"),
    (0,),
    (
        *("--tune", "200", "--test", "300", "--tokens-per-step", "4", "6", "8"),
        *("--decoders", "any_order", "parallel_forced", "parallel_forced_shared", "parallel_forced_thirds"),
        *("semi_autoregressive_3", "semi_autoregressive_6", "semi_autoregressive_12"),
    ),
)


def run_model(kind: str, seed: int, output: Path, training: Sequence[str], measuring: Sequence[str]) -> str:
    """Train and measure one model, each in a process of its own that writes to the model's log.

    Raises:
        RuntimeError: a process failed; the message says where its log is.
    """
    name = f"{kind}-{seed}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    config, directory = str(CONFIGS / f"{kind}.yaml"), str(output / name)
    with (output / f"{name}.log").open("a") as log:
        for arguments in (
            ["train", config, "--seed", str(seed), "--output", directory, *training],
            ["evaluate", directory, *measuring],
        ):
            command = [sys.executable, "-m", f"examples.miniature.{arguments[0]}", *arguments[1:]]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}; see {log.name}")
    return name


def run(plan: Plan, output: Path, *, workers: int, training: Sequence[str], measuring: Sequence[str]) -> None:
    """Carry out a plan."""
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run_model, kind, seed, output, training, [*plan.options, *measuring])
            for kind, seed in plan.models()
        ]
        for number, job in enumerate(as_completed(jobs), 1):
            try:
                name = job.result()
            except RuntimeError:
                pool.shutdown(cancel_futures=True)  # what is running goes on to its end and can be continued from
                raise
            minutes = (time.perf_counter() - started) / 60
            print(f"{name} is done, {number} of {len(jobs)} models, {minutes:.1f} minutes", flush=True)
    results = [r for kind, seed in plan.models() for r in read_results(output / f"{kind}-{seed}" / RESULTS_FILE)]
    write_results(results, output / RESULTS_FILE)
    record = {
        "command": " ".join(["python -m examples.miniature.run", *sys.argv[1:]]),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "workers": workers,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    (output / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, a few decoders, 300 problems")
    parser.add_argument("--output", type=Path, default=Path("runs/miniature"), help="directory of models and results")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="of training")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--device", default="cpu", help="for torch")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compile, and multiply in bfloat16: faster on a processor with matrix units for it",
    )
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    plan = Plan(tuple(args.kinds or plan.kinds), tuple(args.seeds or plan.seeds), plan.options)
    place = ["--device", args.device]
    run(
        plan,
        args.output.resolve(),
        workers=args.workers,
        training=[*place, *(["--precision", "bfloat16", "--compile"] if args.fast else [])],
        measuring=[*place, *(["--dtype", "bfloat16", "--compile"] if args.fast else [])],
    )
    study = Study(read_results(args.output / RESULTS_FILE))
    print("\nExact answers in percent, by tokens per step")
    for kind in study.kinds(KIND_NAMES):
        print(f"\n{KIND_NAMES[kind]}\n\n{decoders_table(study, kind)}")
    print(f"\nPaths less the long chain\n\n{gaps_table(study)}")
    print(f"\nParallel-forced less any-order, on paths\n\n{forced_table(study)}")


if __name__ == "__main__":
    main()
