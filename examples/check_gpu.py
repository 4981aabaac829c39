"""All that needs a GPU, in ten minutes: the tests of tests/test_cuda.py, and benchmarks of 8B-shaped models.

    python examples/check_gpu.py                  # writes docs/gpu.json, and its section of docs/benchmarks.md
    python examples/check_gpu.py --device cpu --small --json FILE    # that this command works
    python examples/check_gpu.py --draw           # the section again, from docs/gpu.json

Weights are random.  What does not fit into the time any more is left out, and named.  Needs the extra ``test``.
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
from pathlib import Path
from typing import Any

import torch

from nap_decode import NapDecodeError
from nap_decode.bench import SHAPES, Shape, Workload, benchmark, environment

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs" / "gpu.json", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- end of gpu -->"
SECONDS = 540.0
"""Nothing new begins later; the longest row takes about a minute."""
RUNS: list[tuple[str, Workload, str | bool]] = [
    ("llada-8b", Workload(), False),
    ("llada-8b", Workload(), "graphs"),
    ("llada-8b", Workload(temperature=1.0), False),
    ("llada-8b", Workload(batch_size=8, ragged=True), False),
    ("llada-8b", Workload(batch_size=8, ragged=True), "graphs"),
    ("llada-8b", Workload(prompt_length=512, new_tokens=1024, blocks=4), False),
    ("dream-7b", Workload(), False),
    ("dream-7b", Workload(batch_size=8), False),
]
"""Shape, what is decoded, and ``compile=``; runs of one shape stand together."""
SMALL = Shape(hidden=32, layers=2, heads=2, intermediate=48, vocab=300)


def run_tests(only: str | None) -> dict[str, int]:
    """How many passed, failed, and were skipped."""
    chosen = [] if only is None else ["-k", only]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_cuda.py", *chosen]
    try:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS / 2)
    except subprocess.TimeoutExpired as error:
        print(f"the tests did not end: {error}", flush=True)
        return {"passed": 0, "failed": 1, "skipped": 0}
    print(run.stdout, flush=True)
    last = run.stdout.rstrip().rpartition("\n")[2]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    return {"passed": 0, "failed": int(run.returncode != 0), "skipped": 0} | counts


def measure(device: str, is_small: bool, limit: float, record: dict[str, Any], file: Path) -> None:
    """Run the benchmarks; the file is written after each."""
    begun, shape, model = time.perf_counter(), None, None
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    for name, workload, mode in RUNS[:1] if is_small else RUNS:
        title = f"{name}, {workload}, compile={mode!r}"
        if time.perf_counter() - begun > limit:
            record["left_out"].append(f"{title}: no time was left")
            continue
        try:
            if shape != name:
                model = None  # before the next is made
                gc.collect()
                shape, model = name, (SMALL if is_small else SHAPES[name]).build(dtype=dtype, device=device)
            result = benchmark(model, workload, repeats=1 if is_small else 3, compile=mode)
        except (NapDecodeError, torch.OutOfMemoryError) as error:
            record["left_out"].append(f"{title}: {str(error).splitlines()[0]}")
            continue
        print(f"\n{result}", flush=True)
        facts = result.to_dict()
        del facts["environment"]
        record["rows"].append({"shape": name, "compile": mode} | facts)
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.write_text(json.dumps(record, indent=1) + "\n")


def fill_in(page: str, record: dict[str, Any] | None) -> str:
    """The page with its section on GPUs renewed; without a record, it says that there is none."""
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{tables(record)}\n\n{END}{after}"


def tables(record: dict[str, Any] | None) -> str:
    """The section."""
    if record is None:
        return "Not run yet: no GPU has been at hand. `python examples/check_gpu.py` runs it, and writes this section."
    machine, versions, tests = (record[name] for name in ("machine", "versions", "tests"))
    lines = [
        f"{machine.get('gpu', machine['device'])}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"nap_decode {versions['nap_decode']}, {record['date'][:10]}; random weights, medians. Tests: "
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.",
        "",
        "| shape | decoded | `compile=` | ms per step: bare, ours | overhead | faster than the textbook "
        "| waits per step | extra memory by the textbook's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        loops, ratios, steps = row["loops"], row["median_ratios"], row["workload"]["steps"]
        bare = loops.get("bare", loops["full"])
        times = (f"{1e3 * statistics.median(loop['seconds']) / steps:.2f}" for loop in (bare, loops["ours"]))
        waits, memory = loops["ours"]["syncs_per_step"], row["memory_ratio"]
        cells = [
            f"`{row['shape']}`",
            str(Workload(**row["workload"])),
            f"`{row['compile']!r}`",
            ", ".join(times),
            f"{100 * ratios['overhead']:.1f} %",
            f"{ratios['speedup']:.2f}x",
            "-" if waits is None else f"{waits:g}",
            "-" if memory is None else f"{memory:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if record["left_out"]:
        lines += ["", "Left out, or failed:", "", *(f"* {title}" for title in record["left_out"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """All of it; 1 if a test fails, or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a few tests and one small model")
    parser.add_argument("--json", type=Path, default=RECORD, metavar="FILE")
    parser.add_argument("--draw", action="store_true", help="write the page's section again, and measure nothing")
    args = parser.parse_args(arguments)
    is_gpu = args.device.startswith("cuda")
    if is_gpu and not args.draw and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no CUDA device")
    if (args.small or not is_gpu) and args.json == RECORD:
        parser.error("docs/gpu.json is for all of it, on a GPU; name another file with --json")
    if not args.draw:
        begun = time.perf_counter()
        started = {"script": "examples/check_gpu.py"} | environment(args.device) | {"rows": [], "left_out": []}
        started["tests"] = run_tests("fixed_step_loop and ragged" if args.small else None)
        args.json.write_text(json.dumps(started, indent=1) + "\n")
        measure(args.device, args.small, SECONDS - (time.perf_counter() - begun), started, args.json)
    record: dict[str, Any] | None = json.loads(args.json.read_text()) if args.json.exists() else None
    if args.json == RECORD:
        PAGE.write_text(fill_in(PAGE.read_text(), record))
    if args.draw or record is None:
        return 0
    tests = record["tests"]
    return 0 if record["rows"] and tests["passed"] and not tests["failed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
