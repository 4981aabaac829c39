"""Curate training data with a teacher: sample paths for each problem, keep those that come to the right answer.

    python examples/bulk_generate.py --problems 200 --samples 4 --output curated/
    python examples/bulk_generate.py --problems 200 --samples 4 --output curated/ --workers 2

The teacher is the embedded model, decoded at a high temperature and many tokens per step, so that some paths go
wrong.  Each of a problem's samples is a row of its own, with an id and so a seed of its own.  A problem whose three
paths were found becomes a line of ``training.jsonl``: its prompt, the paths, and the known answer as the summary.
Finished rows are in ``curated/rows``: run the command again after an interruption, or with more problems or samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nap_decode import CanvasTemplate, Sampler, bulk, decoders, demo
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems

TEMPLATE = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
DECODER = decoders.make("parallel_forced", tokens_per_step=12, temperature=1.2)


def make_rows(problems: Iterable[NimSum], samples: int) -> list[dict[str, Any]]:
    """A row for every sample of every problem."""
    return [
        {"id": f"{problem.prompt} sample {number}", "prompt": problem.prompt, "answer": problem.answer}
        for problem in problems
        for number in range(samples)
    ]


def curate(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The problems for each of whose paths a sample came to the right answer, with the first such path.

    The paths of a canvas begin at different digits, so a path is only ever put in its own place.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        answer = json.loads(row["extra"])["answer"]
        line = found.setdefault(row["prompt"], {"prompt": row["prompt"], "paths": {}, "summary": str(answer)})
        for name, text in row["blocks"].items():
            if name != "summary" and len(text.split()) == PATH_LENGTH and text.split()[-1] == str(answer):
                line["paths"].setdefault(name, text)
    complete = (line for line in found.values() if len(line["paths"]) == NUM_PATHS)
    return [line | {"paths": [line["paths"][name] for name in sorted(line["paths"])]} for line in complete]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4, help="canvases for each problem")
    parser.add_argument("--workers", type=int, default=1, help="with more than one, on Ray")
    parser.add_argument("--output", type=Path, required=True, help="directory")
    args = parser.parse_args()

    rows = make_rows(sample_problems(args.problems, seed=0), args.samples)
    directory = args.output / "rows"
    if args.workers > 1:
        from nap_decode.integrations.ray import generate

        generate(
            rows,
            model=demo.load,
            sampler=DECODER,
            template=TEMPLATE,
            output=directory,
            max_batch=32,
            concurrency=args.workers,
        ).materialize()
    else:
        print(bulk.generate(rows, Sampler(*demo.load(), DECODER, template=TEMPLATE), directory, max_batch=32))

    results = bulk.read_results(directory).to_pylist()
    training = curate(results)
    with (args.output / "training.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in training)
    right = sum(row["summary"] == str(json.loads(row["extra"])["answer"]) for row in results)
    print(f"{right} of {len(results)} summaries are right; {len(training)} of {args.problems} problems are complete")


if __name__ == "__main__":
    main()
