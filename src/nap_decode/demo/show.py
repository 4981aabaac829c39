"""What ``nap-decode demo`` prints: a canvas filling up, and a table of models and decoders."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from nap_decode.canvas import CanvasTemplate
from nap_decode.demo import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, load, sample_problems
from nap_decode.measure.arness import ARnessMeter
from nap_decode.model.denoiser import Denoiser
from nap_decode.nap import ParallelForcedSampler
from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.scheduler import AnyOrderScheduler, MacroParallelScheduler, Scheduler
from nap_decode.run.sampler import Sampler
from nap_decode.run.state import DecodeState

HELD_OUT_SEED = 20_261_121
"""Seed of the problems; training uses seeds below 1000."""

_COLOURS = (36, 35, 33, 32, 34, 31)
_TEMPLATE = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
_CHAIN = CanvasTemplate.plain(NUM_PATHS * PATH_LENGTH + SUMMARY_LENGTH)


class LiveCanvas:
    """A callback that draws the first row of the canvas after every step.

    In a terminal the drawing is renewed in place, one colour per block, fresh tokens in bold; elsewhere
    every step is written out, plain.

    Args:
        tokenizer: for the words.
        file: where to draw.
        pause: seconds between frames in a terminal.
    """

    def __init__(self, tokenizer: Any, file: TextIO, pause: float = 0.25) -> None:
        self.tokenizer = tokenizer
        self.file = file
        self.pause = pause
        self._height = 0

    def __call__(self, state: DecodeState) -> None:
        """Draw."""
        live = self.file.isatty()
        lines = [f"step {state.step} of {state.total_steps}", *self._lines(state, live)]
        if live and self._height:
            self.file.write(f"\x1b[{self._height}F\x1b[J")  # up to the first line of the last frame, and clear
        self._height = len(lines)
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()
        if live:
            time.sleep(self.pause)

    def _lines(self, state: DecodeState, live: bool) -> Iterator[str]:
        words = self.tokenizer.convert_ids_to_tokens(state.tokens[0].tolist())
        block, masked = state.canvas.block[0].tolist(), state.masked[0].tolist()
        prompt = state.canvas.prompt[0].tolist()
        fresh = (state.commit_step[0] == state.step - 1).tolist()
        line: list[str] = []
        for column, word in enumerate(words):
            if not state.canvas.attention_mask[0, column]:
                continue
            if block[column] < 0:  # the prompt has a line of its own, and a header begins one
                if line and (block[column - 1] >= 0 or prompt[column - 1] != prompt[column]):
                    yield " ".join(line)
                    line = []
                line.append(word)
            else:
                text = "." if masked[column] else word
                style = f"{'1;' if fresh[column] else ''}{_COLOURS[block[column] % len(_COLOURS)]}"
                line.append(f"\x1b[{style}m{text}\x1b[0m" if live else text)
        yield " ".join(line)


@dataclass(frozen=True)
class _Column:
    """A decoder of the table, and the model that it decodes."""

    trained_on: str
    name: str
    scheduler: type[Scheduler]
    confidence: str = "probability"

    def sampler(self, denoiser: Denoiser, tokens_per_step: int) -> Sampler:
        return Sampler(
            denoiser,
            decoder=Decoder(
                self.scheduler(tokens_per_step=tokens_per_step), MicroConfidenceCommitter(confidence=self.confidence)
            ),
            template=_TEMPLATE if self.trained_on == "paths" else _CHAIN,
        )


_COLUMNS = (
    _Column("paths", "parallel-forced", MacroParallelScheduler),
    _Column("paths", "any-order", AnyOrderScheduler),
    _Column("chain", "any-order", AnyOrderScheduler),
    _Column("chain", "left to right", AnyOrderScheduler, confidence="leftmost"),
)


def run_demo(
    *, problems: int = 50, tokens_per_step: Sequence[int] = (1, 2, 3, 4, 6, 8, 12), file: TextIO | None = None
) -> None:
    """Decode held-out problems with the embedded models, and compare decoders on them.

    Args:
        problems: how many the table averages over.
        tokens_per_step: rows of the table.
        file: where to print; stdout by default.
    """
    file = file or sys.stdout
    denoisers = {name: Denoiser(*load(name)) for name in ("paths", "chain")}
    tokenizer = denoisers["paths"].tokenizer
    held_out = sample_problems(problems, HELD_OUT_SEED)

    first = held_out[0]
    print("The nim-sum (exclusive or) of twelve digits, by three paths and a summary.", file=file)
    print("Parallel-forced decoding, 4 tokens per step:\n", file=file)
    sampler = ParallelForcedSampler(denoisers["paths"], template=_TEMPLATE, tokens_per_step=4)
    output = sampler(first.prompt, callback=LiveCanvas(tokenizer, file), progress=False)
    verdict = "correct" if first.is_correct(str(output.summary)) else f"wrong, it is {first.answer}"
    print(f"\nThe answer {output.summary} is {verdict}: {output.forward_passes} forward passes, ", end="", file=file)
    print(f"{output.tokens_per_forward[0]:.1f} tokens per forward pass.\n", file=file)

    print(
        f"{problems} held-out problems, {_CHAIN.blocks[0].length} tokens each.  Two models, the same training: one",
        file=file,
    )
    print("writes three paths and a summary, the other one long chain of states and operands.", file=file)
    print("Right answers in percent, and Global AR-ness@1 (left to right is 1):\n", file=file)
    print(f"{'':16}{'trained on parallel paths':^36}{'trained on long chains':^36}".rstrip(), file=file)
    print(f"{'tokens':>6}{'forward':>9} {''.join(f'{column.name:^18}' for column in _COLUMNS)}".rstrip(), file=file)
    print(f"{'a step':>6}{'passes':>9} {'    right    AR   ' * len(_COLUMNS)}".rstrip(), file=file)
    prompts = [problem.prompt for problem in held_out]
    for k in tokens_per_step:
        cells, passes = [], 0
        for column in _COLUMNS:
            output = column.sampler(denoisers[column.trained_on], k)(prompts, progress=False)
            answers = output.summary if column.trained_on == "paths" else output.text
            correct = sum(p.is_correct(text) for p, text in zip(held_out, answers, strict=True))
            meter = ARnessMeter()
            meter.update(output.trace)
            cells.append(f"{100 * correct / problems:9.1f}{meter.compute().global_at[1]:6.2f}   ")
            passes = output.forward_passes
        print(f"{k:>6}{passes:>9} {''.join(cells)}".rstrip(), file=file, flush=True)
