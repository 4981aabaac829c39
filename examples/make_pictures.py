"""Draw the pictures of docs/pictures.md: decodes of the embedded model, and how accurate they are.

    python examples/make_pictures.py                         # writes docs/images/
    python examples/make_pictures.py --measure 150           # measures the accuracies of frontier.json anew, in minutes
    python examples/make_pictures.py --browser chromium      # takes screenshots of what a notebook shows

Needs ``pip install 'nap_decode[viz]'``; the screenshots need a browser that knows Chromium's options.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

from nap_decode import (
    AnyOrderScheduler,
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
    demo,
)
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, NimSum, sample_problems
from nap_decode.measure import viz
from nap_decode.results import html

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TEMPLATE = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
PROMPT = "6 0 6 4 6 2 1 2 4 7 0 6 ="
SEED = 5000
TOKENS_PER_STEP = (1, 2, 3, 4, 6, 8, 12)
THRESHOLDS = (0.99, 0.9, 0.7, 0.5, 0.3)


def draw_order(outputs: dict[str, SamplerOutput], path: Path) -> None:
    """One panel for each decoder, as in the paper's Figure 1."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(outputs), figsize=(11, 3.6), layout="constrained", sharey=True)
    for ax, (name, output) in zip(axes, outputs.items(), strict=True):
        viz.plot_order(output, ax=ax)
        ax.set_title(name)
        ax.label_outer()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_arness(outputs: dict[str, SamplerOutput], path: Path) -> None:
    """The whole canvas, and the first path on its own."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    viz.plot_arness(outputs, ax=axes[0])
    viz.plot_arness(outputs, block="path 1", ax=axes[1])
    axes[1].get_legend().remove()  # it is the same
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def measure(sampler: Sampler, problems: list[NimSum]) -> tuple[float, float, float]:
    """Tokens per forward pass, accuracy in percent, and its standard error."""
    output = sampler([problem.prompt for problem in problems], progress=False)
    right = sum(problem.is_correct(text) for problem, text in zip(problems, output.summary, strict=True))
    share = right / len(problems)
    error = 100 * math.sqrt(share * (1 - share) / len(problems))
    return round(sum(output.tokens_per_forward) / len(problems), 2), round(100 * share, 1), round(error, 1)


def measure_frontier(denoiser: Denoiser, num_problems: int) -> dict[str, list[tuple[float, float, float]]]:
    """The points of several decoders."""
    problems = sample_problems(num_problems, SEED)
    schedulers: dict[str, list[Scheduler]] = {
        "parallel-forced": [MacroParallelScheduler(tokens_per_step=k) for k in TOKENS_PER_STEP],
        "any-order": [AnyOrderScheduler(tokens_per_step=k) for k in TOKENS_PER_STEP],
        # Its four blocks take a step each at least.
        "semi-autoregressive": [SemiAutoregressiveScheduler(tokens_per_step=k) for k in TOKENS_PER_STEP if k < 12],
    }
    results = {
        name: [
            measure(Sampler(denoiser, decoder=Decoder(scheduler), template=TEMPLATE), problems) for scheduler in some
        ]
        for name, some in schedulers.items()
    }
    results["any-order, threshold"] = [
        measure(
            Sampler(
                denoiser,
                decoder=Decoder(
                    AnyOrderScheduler(tokens_per_step=1),
                    MicroConfidenceCommitter(selection=ThresholdSelection(threshold)),
                ),
                template=TEMPLATE,
            ),
            problems,
        )
        for threshold in THRESHOLDS
    ]
    return results


def take_screenshots(output: SamplerOutput, browser: str) -> None:
    """What a notebook shows for an output, on a light and on a dark page."""
    for name, colours in (("light", "#ffffff;color:#111111"), ("dark", "#111111;color:#e0e0e0")):
        with tempfile.TemporaryDirectory() as folder:
            page = html.to_page(f"<style>body{{background:{colours}}}</style>{output._repr_html_()}", "nap_decode")
            (Path(folder) / "page.html").write_text(page, encoding="utf-8")
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=760,470"]
            options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}/profile"]
            options += [f"--screenshot={IMAGES / f'output_{name}.png'}", f"file://{folder}/page.html"]
            subprocess.run([browser, *options], check=True, capture_output=True, timeout=60)


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="PROBLEMS", help="measure accuracies anew, on so many problems")
    parser.add_argument("--browser", help="a Chromium, to take screenshots of HTML")
    args = parser.parse_args()

    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    IMAGES.mkdir(exist_ok=True)
    denoiser = Denoiser(*demo.load())

    def decode(scheduler: Scheduler) -> SamplerOutput:
        return Sampler(denoiser, decoder=Decoder(scheduler), template=TEMPLATE)(PROMPT, progress=False)

    outputs = {
        "left to right": decode(SemiAutoregressiveScheduler(tokens_per_step=1, block_length=1)),
        "any-order": decode(AnyOrderScheduler(tokens_per_step=1)),
        "parallel-forced": decode(MacroParallelScheduler(tokens_per_step=1)),
    }
    draw_order(outputs, IMAGES / "order.png")
    draw_arness(outputs, IMAGES / "arness.png")
    record = IMAGES / "frontier.json"
    if args.measure:
        measured = {"problems": args.measure, "results": measure_frontier(denoiser, args.measure)}
        record.write_text(json.dumps(measured, indent=1) + "\n")
    viz.plot_frontier(json.loads(record.read_text())["results"])
    pyplot.savefig(IMAGES / "frontier.png", dpi=100)

    output = decode(MacroParallelScheduler(tokens_per_step=3))
    viz.animate(output).save(IMAGES / "canvas.gif")
    viz.animate(output).save(IMAGES / "canvas.html")
    if args.browser:
        take_screenshots(output, args.browser)
    total = sum(file.stat().st_size for file in IMAGES.iterdir())
    print(f"{IMAGES}: {total / 1000:.0f} kB")


if __name__ == "__main__":
    main()
