"""Decode held-out problems with every preset, under its own scheduler and under NAP's, and tabulate.

    python examples/compare_presets.py            # writes docs/presets.json and the tables in docs/presets.md

Takes about ten minutes on one core.  Presets with a fixed number of steps commit six tokens at each;
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

from nap_decode import ARnessMeter, CanvasTemplate, Denoiser, MacroParallelScheduler, Sampler, demo
from nap_decode.decoders import presets
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems
from nap_decode.parts.confidence import background_frequencies

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
    """One preset, by its own scheduler or by NAP's with the same budget."""
    options: dict[str, Any] = {}
    if name == "pc_sampler":
        texts = [denoiser.tokenizer(p.prompt)["input_ids"] for p in sample_problems(2000, seed=0)]  # type: ignore[misc]
        options["frequencies"] = background_frequencies(texts, vocab_size=denoiser.config.vocab_size)
    sampler = presets.PRESETS[name](denoiser, template=template, **options)
    if not sampler.committer.is_adaptive and name != "mdlm_first_hitting":
        sampler = presets.PRESETS[name](denoiser, template=template, tokens_per_step=TOKENS_PER_STEP, **options)
    if arrangement == "macro-parallel":
        own = sampler.scheduler
        return sampler.replace(
            scheduler=MacroParallelScheduler(tokens_per_step=own.tokens_per_step, schedule=own.schedule)
        )
    return sampler


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
    """A Markdown table with a line for every preset."""
    lines = ["| preset | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
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
    parser.add_argument("--output", type=Path, default=DOCS, help="directory of presets.json and presets.md")
    args = parser.parse_args()

    denoiser = Denoiser(*demo.load())
    template = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
    problems = sample_problems(args.problems, SEED)
    record: dict[str, Any] = {
        "script": "examples/compare_presets.py",
        "problems": args.problems,
        "seed": SEED,
        "tokens_per_step": TOKENS_PER_STEP,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for arrangement in ARRANGEMENTS:
        record[arrangement] = {}
        for name in presets.PRESETS:
            sampler = make_sampler(name, denoiser, template, arrangement)
            record[arrangement][name] = measure(sampler, problems)
            print(f"{arrangement:14} {name:22} {record[arrangement][name]}", flush=True)
    (args.output / "presets.json").write_text(json.dumps(record, indent=1) + "\n")
    page = args.output / "presets.md"
    page.write_text(fill_in(page.read_text(), record))


if __name__ == "__main__":
    main()
