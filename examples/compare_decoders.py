"""Decode held-out problems with every decoder, under its own scheduler and under NAP's, and tabulate.

    python examples/compare_decoders.py            # writes docs/decoders.json and the tables in docs/decoders.md

Takes about ten minutes on one core.  Decoders with a fixed number of steps commit six tokens at each;
the others decide by themselves, with the options of their papers, and commit at least one.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from nap_decode import ARnessMeter, CanvasTemplate, Denoiser, MacroParallelScheduler, Sampler, decoders, demo
from nap_decode.decoders.calibration import background_frequencies
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems

DOCS = Path(__file__).parents[1] / "docs"
TOKENS_PER_STEP = 6
SEED = 1000
ARRANGEMENTS = ("own scheduler", "macro-parallel")
COLUMNS = {
    "exact": "exact answer, %",
    "forward_passes": "forward passes",
    "tokens_per_forward": "tokens per forward pass",
    "arness": "Global AR-ness@1",
}


def make_sampler(name: str, denoiser: Denoiser, template: CanvasTemplate, arrangement: str) -> Sampler:
    """One decoder, by its own scheduler or by NAP's with the same budget."""
    options: dict[str, Any] = {}
    if name == "pc_sampler":
        texts = [denoiser.tokenizer(p.prompt)["input_ids"] for p in sample_problems(2000, seed=0)]  # type: ignore[misc]
        options["frequencies"] = background_frequencies(texts, vocab_size=denoiser.call.config.vocab_size)
    decoder = decoders.make(name, **options)
    if not decoder.needs.adaptive and name != "mdlm_first_hitting":
        decoder = decoder.set(tokens_per_step=TOKENS_PER_STEP)
    if arrangement == "macro-parallel":
        own = decoder.scheduler
        scheduler = MacroParallelScheduler(tokens_per_step=own.tokens_per_step, schedule=own.schedule)
        decoder = decoder.set(scheduler=scheduler)
    return Sampler(denoiser, decoder=decoder, template=template)


def measure(sampler: Sampler, problems: list[NimSum]) -> dict[str, float]:
    """Accuracy and cost of one sampler."""
    out = sampler([p.prompt for p in problems], seed=SEED, progress=False)
    meter = ARnessMeter()
    meter.update(out.trace)
    correct = sum(p.is_correct(text) for p, text in zip(problems, out.summary, strict=True))
    return {
        "exact": round(100 * correct / len(problems), 1),
        "forward_passes": round(out.trace.forward_passes.double().mean().item(), 1),
        "tokens_per_forward": round(sum(out.tokens_per_forward) / len(problems), 2),
        "arness": round(meter.compute().global_at[1], 2),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a line for every decoder."""
    lines = ["| decoder | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, measured in results.items():
        lines.append(f"| `{name}` | " + " | ".join(f"{measured[column]}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def fill_in(page: str, record: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    for arrangement in ARRANGEMENTS:
        before, rest = page.split(f"<!-- {arrangement} -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        page = f"{before}<!-- {arrangement} -->\n{table(record[arrangement])}\n<!-- end -->{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--output", type=Path, default=DOCS, help="directory of decoders.json and decoders.md")
    args = parser.parse_args()

    denoiser = Denoiser(*demo.load())
    template = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
    problems = sample_problems(args.problems, SEED)
    record: dict[str, Any] = {
        "script": "examples/compare_decoders.py",
        "problems": args.problems,
        "seed": SEED,
        "tokens_per_step": TOKENS_PER_STEP,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for arrangement in ARRANGEMENTS:
        record[arrangement] = {}
        for name in decoders.DECODERS:
            sampler = make_sampler(name, denoiser, template, arrangement)
            record[arrangement][name] = measure(sampler, problems)
            print(f"{arrangement:14} {name:22} {record[arrangement][name]}", flush=True)
    (args.output / "decoders.json").write_text(json.dumps(record, indent=1) + "\n")
    page = args.output / "decoders.md"
    page.write_text(fill_in(page.read_text(), record))


if __name__ == "__main__":
    main()
