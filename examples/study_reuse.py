"""What reuse of keys and values saves and costs: accuracy, agreement, and time; writes docs/reuse.json.

    python examples/study_reuse.py                      # everything: about an hour on two cores
    python examples/study_reuse.py --only accuracy      # one part; the others stay as they are in the file
    python examples/study_reuse.py --policies drift     # of accuracy and agreement what begins so; the same
    python examples/study_reuse.py --draw               # tables and picture of docs/reuse.md from the file

The picture needs ``pip install 'nap_decode[viz]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nap_decode import (
    AnyOrderScheduler,
    BlockReuse,
    CanvasTemplate,
    CommittedReuse,
    Decoder,
    Denoiser,
    DriftReuse,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    PromptReuse,
    Sampler,
    Scheduler,
    SemiAutoregressiveScheduler,
    demo,
)
from nap_decode.base.rows import Rows
from nap_decode.bench import Shape, Workload, environment
from nap_decode.bench.observation import interleave
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, sample_problems
from nap_decode.speed.reuse import Glance, Kept, Reuse

DOCS = Path(__file__).parents[1] / "docs"
SEED = 6000


@dataclass(frozen=True, kw_only=True)
class TrueValues(DriftReuse):
    """An oracle: the share whose values differ most, by cosine, from those that are kept.

    No criterion by the similarity of values can know more: a pass that computes everything tells what they would be.
    """

    exact: Denoiser | None = None

    def select(self, glance: Glance) -> Tensor:
        assert self.exact is not None
        rows = Rows(tuple(glance.present.sum(1).tolist()), glance.prompt, glance.present)
        memory: dict[str, Kept] = {}
        first = torch.zeros_like(glance.tokens[:, :1])
        self.exact.predict(rows, glance.tokens, first, first.flatten(), kept=memory)
        kept = glance.kept.states
        likeness = [
            torch.cosine_similarity(true.transpose(1, 2).flatten(2), kept[name].transpose(1, 2).flatten(2), dim=2)
            for name, true in memory["given"].states.items()
            if name.startswith("values") and name in kept
        ]
        pending = 1 - torch.stack(likeness).mean(0) if likeness else glance.pending
        return super().select(replace(glance, pending=pending))


POLICIES: dict[str, Reuse | None] = {
    "none": None,
    "prompt, refresh every 8": PromptReuse(refresh_every=8),
    "block": BlockReuse(),
    "block, with suffix": BlockReuse(with_suffix=True),
    "committed": CommittedReuse(),
    "committed, delay 2": CommittedReuse(delay=2),
    "committed, refresh every 8": CommittedReuse(refresh_every=8),
    "drift, share 0.8": DriftReuse(share=0.8),
    "drift, share 0.6": DriftReuse(share=0.6),
    "drift, share 0.5": DriftReuse(share=0.5),
    "drift, share 0.4": DriftReuse(share=0.4),
    "drift, max_age 4": DriftReuse(max_age=4),
    "drift, committed to any age": DriftReuse(max_age_committed=None),
    "true values, share 0.6": TrueValues(),
}
PATHS = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
CHAIN = CanvasTemplate.plain(NUM_PATHS * PATH_LENGTH + SUMMARY_LENGTH)
DECODERS: dict[str, tuple[str, CanvasTemplate, Callable[[int], Scheduler], str]] = {
    "paths, parallel-forced": ("paths", PATHS, lambda k: MacroParallelScheduler(tokens_per_step=k), "probability"),
    "paths, any-order": ("paths", PATHS, lambda k: AnyOrderScheduler(tokens_per_step=k), "probability"),
    "chain, left to right": ("chain", CHAIN, lambda k: AnyOrderScheduler(tokens_per_step=k), "leftmost"),
    "chain, any-order": ("chain", CHAIN, lambda k: AnyOrderScheduler(tokens_per_step=k), "probability"),
    "chain, blocks of 12": (
        "chain",
        CHAIN,
        lambda k: SemiAutoregressiveScheduler(tokens_per_step=k, block_length=12),
        "probability",
    ),
}
SHAPES = {
    "canvas 256, width 256": (
        Shape(hidden=256, layers=6, heads=4, intermediate=704, vocab=4096),
        Workload(prompt_length=128, new_tokens=256, steps=32, blocks=4),
    ),
    "canvas 512, width 256, 2 tokens per step": (
        Shape(hidden=256, layers=6, heads=4, intermediate=704, vocab=4096),
        Workload(prompt_length=128, new_tokens=512, steps=256, blocks=4),
    ),
    "canvas 512, width 512": (
        Shape(hidden=512, layers=8, heads=8, intermediate=1408, vocab=8192),
        Workload(prompt_length=256, new_tokens=512, steps=32, blocks=4),
    ),
}
TIMED = (Shape(layers=8), Workload(prompt_length=512, new_tokens=1024, steps=32, blocks=4))


def measure_accuracy(num_problems: int, policies: Mapping[str, Reuse | None]) -> dict[str, Any]:
    """Exact answers and FLOPs of the embedded models."""
    problems = sample_problems(num_problems, SEED)
    results: dict[str, Any] = {"problems": num_problems, "seed": SEED, "rows": []}
    for decoder, (trained_on, template, scheduler, confidence) in DECODERS.items():
        denoiser = Denoiser(*demo.load(trained_on))
        for tokens_per_step in (2, 4, 6):
            for policy, reuse in policies.items():
                if isinstance(reuse, TrueValues):
                    reuse = replace(reuse, exact=denoiser.replace(reuse=PromptReuse(refresh_every=1)))
                sampler = Sampler(
                    denoiser if reuse is None else denoiser.replace(reuse=reuse),
                    decoder=Decoder(scheduler(tokens_per_step), MicroConfidenceCommitter(confidence=confidence)),
                    template=template,
                )
                out = sampler([problem.prompt for problem in problems], progress=False)
                texts = out.summary if trained_on == "paths" else out.text
                right = sum(problem.is_correct(text) for problem, text in zip(problems, texts, strict=True))
                row = {
                    "decoder": decoder,
                    "tokens_per_step": tokens_per_step,
                    "policy": policy,
                    "right": right,
                    "flops": sum(out.flops()) / sum(out.flops(exact=True)),
                }
                results["rows"].append(row)
                print(row, flush=True)
    return results


@torch.no_grad()
def follow(model: Any, workload: Workload, policies: Mapping[str, Reuse]) -> dict[str, dict[str, float]]:
    """Beside an exact decode: does reuse choose the same tokens, and what does it say on the exact decode's way?"""
    exact = Denoiser(model)
    canvas = workload.canvas(exact)
    truth = Sampler(exact, decoder=workload.decoder()).decode(canvas, progress=False).trace
    denoisers = {name: exact.replace(reuse=policy) for name, policy in policies.items()}
    rows, decoded = canvas.rows, truth.block >= 0
    kept: dict[str, dict[str, Kept]] = {name: {} for name in policies}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in policies}
    for step in range(workload.steps):
        tokens = truth.canvas_at(step)
        slots = ((tokens == exact.mask_token_id) & rows.present).nonzero()[:, 1][None]
        places = torch.arange(slots.shape[1])
        true = exact.predict(rows, tokens, slots, places).logits.double().log_softmax(-1)
        for name, denoiser in denoisers.items():
            logits = denoiser.predict(rows, tokens, slots, places, kept=kept[name]).logits
            found = logits.double().log_softmax(-1)
            divergence = (true.exp() * (true - found)).sum(-1).mean()
            same = (true.argmax(-1) == found.argmax(-1)).double().mean()
            sums[name] += torch.stack([divergence, same]) / workload.steps
    results = {}
    for name, denoiser in denoisers.items():
        out = Sampler(denoiser, decoder=workload.decoder()).decode(canvas, progress=False)
        results[name] = {
            "equal_tokens": float((truth.tokens == out.trace.tokens)[decoded].double().mean()),
            "divergence": float(sums[name][0]),
            "same_most_likely": float(sums[name][1]),
            "flops": out.flops()[0] / out.flops(exact=True)[0],
        }
        print(name, results[name], flush=True)
    return results


def measure_agreement(policies: Mapping[str, Reuse | None]) -> dict[str, Any]:
    """Models of random weights at larger sizes."""
    reusing = {name: policy for name, policy in policies.items() if not isinstance(policy, TrueValues | None)}
    return {
        "rows": [
            {"shape": name, "policy": policy} | row
            for name, (shape, workload) in SHAPES.items()
            for policy, row in follow(shape.build(), workload, reusing).items()
        ]
    }


def with_those_of_others(new: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and rows of policies that were not measured now, in the order of the tables."""
    measured = {row["policy"] for row in new["rows"]}
    rows = new["rows"] + [row for row in known.get("rows", ()) if row["policy"] in POLICIES.keys() - measured]
    subjects, names = [*DECODERS, *SHAPES], [*POLICIES]

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        subject = subjects.index(row.get("decoder") or row["shape"])
        return subject, row.get("tokens_per_step", 0), names.index(row["policy"])

    return new | {"rows": sorted(rows, key=place)}


def measure_time(device: str, repeats: int) -> dict[str, Any]:
    """Seconds of whole decodes, each policy beside the exact decode."""
    shape, workload = TIMED
    model = shape.build(device=device)
    samplers = {
        name: Sampler(Denoiser(model, reuse=POLICIES[name]), decoder=workload.decoder())
        for name in ("none", "prompt, refresh every 8", "committed", "drift, share 0.6")
    }
    canvas = workload.canvas(samplers["none"].denoiser)
    outputs = {name: sampler.decode(canvas, progress=False) for name, sampler in samplers.items()}  # warms up, too
    decodes = {name: lambda s=sampler: s.decode(canvas, progress=False) for name, sampler in samplers.items()}
    seconds = interleave(decodes, repeats, torch.device(device), lambda text: print(text, flush=True))
    rows = [
        {
            "policy": name,
            "seconds": statistics.median(values),
            "time": statistics.median(own / exact for own, exact in zip(values, seconds["none"], strict=True)),
            "flops": outputs[name].flops()[0] / outputs[name].flops(exact=True)[0],
        }
        for name, values in seconds.items()
    ]
    return {"repeats": repeats, "environment": environment(device), "rows": rows}


Key = tuple[str, int]


def _by_decoder(record: dict[str, Any]) -> dict[Key, dict[str, tuple[float, float]]]:
    """Exact answers in percent and how many times fewer FLOPs, by decoder and tokens per step, and by policy."""
    found: dict[Key, dict[str, tuple[float, float]]] = {}
    for row in record["accuracy"]["rows"]:
        percent = 100 * row["right"] / record["accuracy"]["problems"]
        found.setdefault((row["decoder"], row["tokens_per_step"]), {})[row["policy"]] = percent, 1 / row["flops"]
    return found


def accuracy_table(record: dict[str, Any]) -> str:
    """A table for each decoder."""
    found = _by_decoder(record)
    lines = []
    for decoder in dict.fromkeys(decoder for decoder, _ in found):
        columns = [found[key] for key in found if key[0] == decoder]
        head = " | ".join(f"{k} tokens per step" for name, k in found if name == decoder)
        lines += [f"| {decoder}: reuse | {head} |", "|---" * (len(columns) + 1) + "|"]
        for policy in columns[0]:
            cells = " | ".join(f"{percent:.1f} ({fewer:.2f}x)" for percent, fewer in (c[policy] for c in columns))
            lines.append(f"| {policy} | {cells} |")
        lines.append("")
    return "\n".join(lines[:-1])


def frontier_table(record: dict[str, Any]) -> str:
    """The fewest FLOPs for at most so many points lost."""
    head = ["decoder", "tokens per step", "exact", *(f"at most {points} points lost" for points in (0.5, 2))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (decoder, k), policies in _by_decoder(record).items():
        exact = policies["none"][0]
        cells = []
        for points in (0.5, 2):
            allowed = {
                name: fewer
                for name, (percent, fewer) in policies.items()
                if exact - percent <= points + 1e-9 and not isinstance(POLICIES.get(name), TrueValues)
            }
            best = max(allowed, key=lambda name: allowed[name])
            cells.append("-" if best == "none" else f"{allowed[best]:.2f}x: {best} ({policies[best][0]:.1f})")
        lines.append(f"| {decoder} | {k} | {exact:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement_table(record: dict[str, Any]) -> str:
    """What models of random weights say."""
    head = ["shape", "policy", "fewer FLOPs", "equal tokens, %", "same most likely, %", "divergence, nats"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        f"| {row['shape']} | {row['policy']} | {1 / row['flops']:.2f}x | {100 * row['equal_tokens']:.1f} | "
        f"{100 * row['same_most_likely']:.1f} | {row['divergence']:.3f} |"
        for row in record["agreement"]["rows"]
    ]
    return "\n".join(lines)


def time_table(record: dict[str, Any]) -> str:
    """Whole decodes."""
    lines = ["| device | policy | seconds | times as fast | fewer FLOPs |", "|---|---|---|---|---|"]
    for name, part in record.items():
        if name.startswith("time "):
            lines += [
                f"| {name[5:]} | {row['policy']} | {row['seconds']:.1f} | {1 / row['time']:.2f} | "
                f"{1 / row['flops']:.2f}x |"
                for row in part["rows"]
            ]
    return "\n".join(lines)


TABLES = {"frontier": frontier_table, "accuracy": accuracy_table, "agreement": agreement_table, "time": time_table}


def fill_in(page: str, record: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    for name, table in TABLES.items():
        before, rest = page.split(f"<!-- reuse: {name} -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        page = f"{before}<!-- reuse: {name} -->\n\n{table(record)}\n\n<!-- end -->{after}"
    return page


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy against FLOPs, a panel for each decoder of the path-trained model."""
    from matplotlib import pyplot

    from nap_decode.measure.viz.plots import COLOURS, MARKERS

    pyplot.switch_backend("Agg")
    number = record["accuracy"]["problems"]
    decoders = ("paths, parallel-forced", "paths, any-order")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    families = {name: name.split(",")[0] for name, policy in POLICIES.items() if not isinstance(policy, TrueValues)}
    kinds = list(dict.fromkeys(families.values()))
    for ax, decoder in zip(axes, decoders, strict=True):
        for place, kind in enumerate(kinds):
            for k, size in ((2, 5), (4, 8), (6, 11)):
                rows = [
                    row
                    for row in record["accuracy"]["rows"]
                    if (row["decoder"], row["tokens_per_step"], families.get(row["policy"])) == (decoder, k, kind)
                ]
                share = [row["right"] / number for row in rows]
                ax.errorbar(
                    [1 / row["flops"] for row in rows],
                    [100 * p for p in share],
                    yerr=[100 * math.sqrt(p * (1 - p) / number) for p in share],
                    linestyle="none",
                    marker=MARKERS[place],
                    color=COLOURS[place],
                    markersize=size,
                    alpha=0.8,
                    label=kind if k == 4 else None,
                )
        ax.set(title=decoder, xlabel="times fewer FLOPs than exact decoding", ylim=(0, 103))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("exact answer, %")
    axes[0].legend(title="reuse; larger marks are\n2, 4, 6 tokens per step", fontsize="small", loc="lower left")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("accuracy", "agreement", "time"))
    parser.add_argument("--policies", default="", help="begins of names, with commas: those that are measured")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="of the timed decodes")
    parser.add_argument("--device", default="cpu", help="of the timed decodes")
    parser.add_argument("--draw", action="store_true", help="measure nothing; renew docs/reuse.md")
    args = parser.parse_args()

    file, page = DOCS / "reuse.json", DOCS / "reuse.md"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    policies = {name: policy for name, policy in POLICIES.items() if name.startswith(tuple(args.policies.split(",")))}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "accuracy": lambda: measure_accuracy(args.problems, policies),
        "agreement": lambda: measure_agreement(policies),
        "time": lambda: measure_time(args.device, args.repeats),
    }
    for name, measure in parts.items():
        if not args.draw and args.only in (None, name):
            place = name
            if name == "time":
                is_cuda = args.device.startswith("cuda")
                place = f"time {torch.cuda.get_device_name() if is_cuda else environment('cpu')['machine']['cpu']}"
            found = measure()
            record[place] = found if name == "time" else with_those_of_others(found, record.get(name, {}))
            file.write_text(json.dumps(record, indent=1) + "\n")
    if not {"accuracy", "agreement"} <= record.keys():
        raise SystemExit(f"{page} is left as it is until the other parts are measured, too")
    page.write_text(fill_in(page.read_text(), record))
    draw(record, DOCS / "images" / "reuse.png")


if __name__ == "__main__":
    main()
