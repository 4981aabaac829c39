"""What a decode costs beside bare forward passes and textbook loops; writes its section of docs/benchmarks.md.

    python examples/study_speed.py                  # on the processor, a quarter of an hour: docs/speed_cpu.json
    python examples/study_speed.py --device cuda    # all that needs a GPU, ten minutes: docs/speed_cuda.json
    python examples/study_speed.py --small --json FILE    # that this command works
    python examples/study_speed.py --draw           # the sections again, from the files

On a GPU it runs the tests of tests/test_cuda.py first (extra ``test``), and 8B-shaped models.  Weights are random; what
does not fit into the time any more is left out, and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nap_decode import NapDecodeError
from nap_decode.bench import Shape, Workload, benchmark, environment, ladder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
SECONDS = {"cpu": float("inf"), "cuda": 540.0}
"""Nothing new begins later; the longest row takes about a minute on a GPU."""
IN_TURN = Workload(prompt_length=512, new_tokens=512, steps=128, blocks=16, scheduler="semi-autoregressive")
SHORT_IN_TURN = Workload(prompt_length=256, new_tokens=256, steps=32, blocks=8, scheduler="semi-autoregressive")
MEDIUM = "hidden=256,layers=6,heads=4,intermediate=704"
RUNS: dict[str, list[tuple[str, Workload, str | bool]]] = {
    "cpu": [
        ("small", Workload(steps=8), False),
        ("small", Workload(steps=8, temperature=1.0), False),
        (MEDIUM, Workload(steps=8, new_tokens=128, batch_size=8, ragged=True), False),
        (f"{MEDIUM},vocab=126464", Workload(steps=8, new_tokens=128), False),
        (f"{MEDIUM},vocab=8192,block_size=32", SHORT_IN_TURN, False),
        (f"{MEDIUM},vocab=8192,block_size=32", replace(SHORT_IN_TURN, steps=64), False),
    ],
    "cuda": [
        ("llada-8b", Workload(), False),
        ("llada-8b", Workload(), "graphs"),
        ("llada-8b", Workload(temperature=1.0), False),
        ("llada-8b", Workload(batch_size=8, ragged=True), False),
        ("llada-8b", Workload(batch_size=8, ragged=True), "graphs"),
        ("llada-8b", Workload(prompt_length=512, new_tokens=1024, blocks=4), False),
        ("sdar-8b", IN_TURN, False),
        ("sdar-8b", IN_TURN, "graphs"),
        ("dream-7b", Workload(), False),
        ("dream-7b", Workload(batch_size=8), False),
    ],
}
"""Shape, what is decoded, and ``compile=``; runs of one shape stand together."""
LADDERS: list[tuple[str, str, tuple[int, ...], int]] = [
    ("tiny", "blocks", (1, 2, 4, 8, 16, 32), 9),
    ("hidden=64,layers=2,heads=2,intermediate=128,vocab=8192,block_size=32", "canvas", (256, 512, 1024, 2048, 4096), 3),
]
"""Shape, dimension, sizes and repetitions; on the processor only, where nothing hides behind what runs meanwhile."""
SMALL = "hidden=32,layers=2,heads=2,intermediate=48,vocab=300"


def record_of(device: str) -> Path:
    """Where what was measured on a kind of device is kept."""
    return ROOT / "docs" / f"speed_{device}.json"


def run_tests(only: str | None) -> dict[str, int]:
    """How many passed, failed, and were skipped."""
    chosen = [] if only is None else ["-k", only]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_cuda.py", *chosen]
    try:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS["cuda"] / 2)
    except subprocess.TimeoutExpired as error:
        print(f"the tests did not end: {error}", flush=True)
        return {"passed": 0, "failed": 1, "skipped": 0}
    print(run.stdout, flush=True)
    last = run.stdout.rstrip().rpartition("\n")[2]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    return {"passed": 0, "failed": int(run.returncode != 0), "skipped": 0} | counts


def measure(device: str, is_small: bool, end: float, record: dict[str, Any], file: Path) -> None:
    """Run the benchmarks; the file is written after each."""
    kind, shape, model = device.partition(":")[0], None, None
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    for name, workload, mode in RUNS[kind][:1] if is_small else RUNS[kind]:
        title = f"{name}, {workload}, compile={mode!r}"
        if time.perf_counter() > end:
            record["left_out"].append(f"{title}: no time was left")
            continue
        try:
            if shape != (wanted := Shape.parse(name)):
                shape, model = wanted, None  # before the next is made
                gc.collect()
                model = (Shape.parse(SMALL) if is_small else shape).build(dtype=dtype, device=device)
            result = benchmark(model, workload, family=shape.family, repeats=1 if is_small else 3, compile=mode)
        except (NapDecodeError, torch.OutOfMemoryError) as error:
            record["left_out"].append(f"{title}: {str(error).splitlines()[0]}")
            continue
        print(f"\n{result}", flush=True)
        facts = result.to_dict()
        del facts["environment"]
        record["rows"].append({"shape": name, "compile": mode} | facts)
        file.write_text(json.dumps(record, indent=1) + "\n")
    for name, dimension, sizes, repeats in LADDERS if kind == "cpu" else ():
        some, often = (sizes[:2], 1) if is_small else (sizes, repeats)
        grown = ladder(Shape.parse(name), {dimension: some}, repeats=often, limit=900.0, device=device)
        print(f"\n{grown}", flush=True)
        facts = grown.to_dict()
        del facts["environment"]
        record["ladders"].append({"name": name, "dimension": dimension} | facts)
    file.write_text(json.dumps(record, indent=1) + "\n")


def fill_in(page: str, device: str, record: dict[str, Any] | None) -> str:
    """The page with its section on a kind of device renewed; without a record, it says that there is none."""
    begin, end = f"<!-- {device} -->\n", f"<!-- end of {device} -->"
    before, rest = page.split(begin)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{section(record)}\n\n{end}{after}"


def section(record: dict[str, Any] | None) -> str:
    """What was measured on a device."""
    if record is None:
        return (
            "Not run yet: no such device has been at hand. `python examples/study_speed.py --device cuda` runs it, and "
            "writes this section."
        )
    machine, versions = record["machine"], record["versions"]
    tests = record.get("tests")
    lines = [
        f"{machine.get('gpu', machine.get('cpu', machine['device']))}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, nap_decode {versions['nap_decode']}, {record['date'][:10]}; random weights, "
        f"medians of {len(record['rows'][0]['loops']['ours']['seconds']) if record['rows'] else 0}.",
    ]
    if tests is not None:
        counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        lines[-1] += f" Tests: {counts}."
    head = [
        "shape",
        "decoded",
        "`compile=`",
        "ms per step: bare, ours",
        "overhead (least to largest)",
        "faster than the textbook",
        "time by the textbook's that keeps blocks",
        "positions forwarded",
        "waits per step",
        "extra memory by the textbook's",
    ]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in record["rows"]:
        loops, middle, steps = row["loops"], row["median_ratios"], row["workload"]["steps"]
        bare = loops.get("bare", loops["full"])
        times = (f"{1e3 * statistics.median(loop['seconds']) / steps:.2f}" for loop in (bare, loops["ours"]))
        waits, memory = loops["ours"]["syncs_per_step"], row["memory_ratio"]
        overhead = row["ratios"]["overhead"]
        some, every = row["positions"]
        cells = [
            f"`{row['shape']}`",
            str(Workload(**row["workload"])),
            f"`{row['compile']!r}`",
            ", ".join(times),
            f"{100 * middle['overhead']:.1f} % ({100 * min(overhead):.1f} to {100 * max(overhead):.1f})",
            f"{middle['speedup']:.2f}x",
            f"{middle['cached']:.2f}" if "cached" in middle else "-",
            f"{some} of {every}",
            "-" if waits is None else f"{waits:g}",
            "-" if memory is None else f"{memory:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for grown in record["ladders"]:
        fits = grown["fits"][grown["dimension"]]
        sizes = list(grown["seconds"][grown["dimension"]])
        lines += [
            "",
            f"Milliseconds per step by {grown['dimension']}, `{grown['name']}`; exponents of the growth: "
            + ", ".join(f"{name} {fits[name]['exponent']:.2f}" for name in ("bare", "ours"))
            + ".",
            "",
            f"| {grown['dimension']} | {' | '.join(map(str, sizes))} |",
            "|---" * (len(sizes) + 1) + "|",
            *(
                f"| {name} | {' | '.join(f'{1e3 * cost:.2f}' for cost in grown['costs'][grown['dimension']][name])} |"
                for name in ("bare", "ours")
            ),
        ]
    if record["left_out"]:
        lines += ["", "Left out, or failed:", "", *(f"* {title}" for title in record["left_out"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """All of it; 1 if a test fails, or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a few tests, one small model and few sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of the one in docs; the page stays as it is")
    parser.add_argument("--draw", action="store_true", help="write the page's sections again, and measure nothing")
    args = parser.parse_args(arguments)
    kind = args.device.partition(":")[0]
    if kind not in RUNS:
        parser.error(f"--device must be {' or '.join(RUNS)}, but is {args.device}")
    if kind == "cuda" and not args.draw and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no CUDA device")
    if args.small and args.json is None:
        parser.error("the files in docs are for all of it; name another one with --json")
    file = args.json or record_of(kind)
    record: dict[str, Any] | None = None
    if not args.draw:
        end = time.perf_counter() + SECONDS[kind]
        record = {"script": "examples/study_speed.py"} | environment(args.device)
        record |= {"rows": [], "ladders": [], "left_out": []}
        if kind == "cuda" or args.small:
            record["tests"] = run_tests("fixed_step_loop and ragged" if args.small else None)
        measure(args.device, args.small, end, record, file)
    if args.json is None:
        page = PAGE.read_text()
        for name in RUNS:
            page = fill_in(page, name, json.loads(record_of(name).read_text()) if record_of(name).exists() else None)
        PAGE.write_text(page)
    if record is None:
        return 0
    tests = record.get("tests", {"passed": 1, "failed": 0})
    return 0 if record["rows"] and tests["passed"] and not tests["failed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
