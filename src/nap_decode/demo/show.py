"""The output of ``nap-decode demo``: a canvas filling up, and a table of models and decoders."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TextIO

from nap_decode.canvas import CanvasTemplate
from nap_decode.decoders.llada import left_to_right, llada_low_confidence
from nap_decode.decoders.nap import parallel_forced
from nap_decode.demo import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, load, sample_problems
from nap_decode.measure.arness import ARnessMeter
from nap_decode.model.denoiser import Denoiser
from nap_decode.run.sampler import Sampler
from nap_decode.run.state import DecodeState

HELD_OUT_SEED = 20_261_121
"""Seed of the problems; training uses seeds below 1000."""

_COLOURS = (36, 35, 33, 32, 34, 31)
_TEMPLATES = {
    "paths": CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH),
    "chain": CanvasTemplate.plain(NUM_PATHS * PATH_LENGTH + SUMMARY_LENGTH),
}


class LiveCanvas:
    """A callback that draws the first row of the canvas after every step.

    In a terminal the drawing is renewed in place after a ``pause`` in seconds, one colour per block, fresh tokens in
    bold; elsewhere every step is written out, plain.
    """

    def __init__(self, tokenizer: Any, file: TextIO, pause: float = 0.25) -> None:
        self.tokenizer, self.file, self.pause = tokenizer, file, pause
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
        for column in range(int(state.canvas.attention_mask[0].sum())):
            text = "." if masked[column] else words[column]
            if block[column] < 0:  # the prompt has a line of its own, and a header begins one
                if line and (block[column - 1] >= 0 or prompt[column - 1] != prompt[column]):
                    yield " ".join(line)
                    line = []
            elif live:
                style = f"{'1;' if fresh[column] else ''}{_COLOURS[block[column] % len(_COLOURS)]}"
                text = f"\x1b[{style}m{text}\x1b[0m"
            line.append(text)
        yield " ".join(line)


_COLUMNS = (  # of the table: what the model was trained on, a name, and the decoder
    ("paths", "parallel-forced", parallel_forced()),
    ("paths", "any-order", llada_low_confidence()),
    ("chain", "any-order", llada_low_confidence()),
    ("chain", "left to right", left_to_right()),
)


def run_demo(
    *, problems: int = 50, tokens_per_step: Sequence[int] = (1, 2, 3, 4, 6, 8, 12), file: TextIO | None = None
) -> None:
    """Decode a held-out problem while one looks on, and print a table of decoders, averaged over ``problems``."""
    file = file or sys.stdout
    say = partial(print, file=file, flush=True)
    denoisers = {name: Denoiser(*load(name)) for name in _TEMPLATES}
    held_out = sample_problems(problems, HELD_OUT_SEED)

    first = held_out[0]
    say("The nim-sum (exclusive or) of twelve digits, by three paths and a summary.")
    say("Parallel-forced decoding, 4 tokens per step:\n")
    sampler = Sampler(denoisers["paths"], decoder=parallel_forced(), template=_TEMPLATES["paths"])
    output = sampler(first.prompt, callback=LiveCanvas(sampler.tokenizer, file), progress=False)
    verdict = "correct" if first.is_correct(str(output.summary)) else f"wrong, it is {first.answer}"
    say(
        f"\nThe answer {output.summary} is {verdict}: {output.forward_passes} forward passes, "
        f"{output.tokens_per_forward[0]:.1f} tokens per forward pass.\n"
    )

    length = _TEMPLATES["chain"].blocks[0].length
    say(f"{problems} held-out problems, {length} tokens each.  Two models, the same training: one")
    say("writes three paths and a summary, the other one long chain of states and operands.")
    say("Right answers in percent, and Global AR-ness@1 (left to right is 1):\n")
    say(f"{'':16}{'trained on parallel paths':^36}{'trained on long chains':^36}".rstrip())
    say(f"{'tokens':>6}{'forward':>9} {''.join(f'{name:^18}' for _, name, _ in _COLUMNS)}".rstrip())
    say(f"{'a step':>6}{'passes':>9} {'    right    AR   ' * len(_COLUMNS)}".rstrip())
    prompts = [problem.prompt for problem in held_out]
    for k in tokens_per_step:
        cells = []
        for trained_on, _, decoder in _COLUMNS:
            decoder, template = decoder.set(tokens_per_step=k), _TEMPLATES[trained_on]
            output = Sampler(denoisers[trained_on], decoder=decoder, template=template)(prompts, progress=False)
            answers = output.summary if trained_on == "paths" else output.text
            correct = sum(p.is_correct(text) for p, text in zip(held_out, answers, strict=True))
            meter = ARnessMeter()
            meter.update(output.trace)
            cells.append(f"{100 * correct / problems:9.1f}{meter.compute().global_at[1]:6.2f}   ")
        say(f"{k:>6}{output.forward_passes:>9} {''.join(cells)}".rstrip())
