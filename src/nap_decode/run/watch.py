"""A decode while it runs: streamers that show its rows, and Ctrl-C that stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas
from nap_decode.results.trace import ends_before
from nap_decode.run.state import DecodeState


class Streams:
    """Shows rows to streamers of transformers while they are decoded.

    A streamer gets the row's prompt, then its tokens as far as they are decoded without a gap, and ``end()`` as soon
    as the row is finished.  One that has ``put_draft`` gets after every step what is decoded behind the gap, masks
    between.

    Args:
        streamers: one for a single row, or one for every row; None for rows that nobody looks at.
        prompts: ``(P,)`` or ``(1, P)`` int64 of every row, what each streamer gets first.
        starts: the first column behind each prompt.
        ends: ids that end a block; what follows them in it is not shown.
        is_final: whether committed tokens stay as they are; if not, they are shown when all is done.

    Raises:
        NapDecodeError: not one streamer for every row, or one that wants logits.
    """

    def __init__(
        self,
        streamers: Any,
        prompts: Sequence[Tensor],
        starts: Sequence[int],
        *,
        ends: Sequence[int],
        is_final: bool,
    ) -> None:
        several = list(streamers) if isinstance(streamers, Sequence) else [streamers]
        if len(several) != len(prompts):
            raise NapDecodeError(
                f"there must be one streamer for every row, None for rows that nobody looks at, but there are "
                f"{len(several)} for {len(prompts)} row{'s' * (len(prompts) != 1)}"
            )
        for streamer in several:
            if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
                raise NapDecodeError(
                    f"a streamer has put(ids) and end(), such as transformers.TextStreamer(tokenizer); "
                    f"{type(streamer).__name__} has not"
                )
            if getattr(streamer, "_takes_logits", False):
                raise NapDecodeError(f"{type(streamer).__name__} wants logits, which samplers do not keep; use another")
        self.ends, self.is_final = tuple(ends), is_final
        self.shown = {row: start for row, start in enumerate(starts) if several[row] is not None}
        self.streamers = several
        for row in self.shown:
            several[row].put(prompts[row].cpu())

    @classmethod
    def of(cls, streamers: Any, canvas: Canvas, *, ends: Sequence[int], is_final: bool) -> Streams:
        """Those of the rows of a canvas; the prompt of text with holes is what stands before the first."""
        tokens, behind = canvas.tokens.cpu(), (canvas.attention_mask.bool() & ~canvas.prompt).cpu()
        starts = torch.where(behind.any(1), behind.long().argmax(1), tokens.shape[1]).tolist()
        first = canvas.padding[:, 0].tolist()
        prompts = [row[begin:start] for row, begin, start in zip(tokens, first, starts, strict=True)]
        return cls(streamers, prompts, starts, ends=ends, is_final=is_final)

    def __call__(self, state: DecodeState) -> None:
        """Show what is new."""
        tokens, masked = state.tokens.cpu(), state.masked.cpu()
        kept = ends_before(tokens, state.canvas.block.cpu(), self.ends) == 0
        for row, start in list(self.shown.items()):
            streamer = self.streamers[row]
            gap = int(masked[row].long().argmax()) if bool(masked[row].any()) else masked.shape[1]
            if self.is_final:
                self._put(row, tokens[row], kept[row], gap)
                if gap == masked.shape[1]:
                    self._end(row)
                    continue
                start = gap
            draft = tokens[row, start:][kept[row, start:]]
            if hasattr(streamer, "put_draft") and len(draft):
                streamer.put_draft(draft)

    def end(self, tokens: Tensor, block: Tensor, decoded: Tensor | None = None) -> None:
        """Show the rest.

        Args:
            tokens: ``(B, L)`` int64, the canvas at the end.
            block: ``(B, L)`` int64.
            decoded: ``(B, L)`` bool, what may be shown; everything by default.
        """
        kept = ends_before(tokens.cpu(), block.cpu(), self.ends) == 0
        if decoded is not None:
            kept &= decoded.cpu()
        for row in list(self.shown):
            self._put(row, tokens[row].cpu(), kept[row], tokens.shape[1])
            self._end(row)

    def _put(self, row: int, tokens: Tensor, kept: Tensor, stop: int) -> None:
        start = self.shown[row]
        new = tokens[start:stop][kept[start:stop]]
        if len(new):
            self.streamers[row].put(new)
        self.shown[row] = stop

    def _end(self, row: int) -> None:
        self.streamers[row].end()
        del self.shown[row]


@contextmanager
def interrupts(*, caught: bool) -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C is noted down instead of raising ``KeyboardInterrupt``; a second one raises as ever.

    So a step is never cut in the middle.  Outside the main thread, where Ctrl-C does not arrive, nothing happens.

    Args:
        caught: whether to do that at all.

    Yields:
        A function that says whether Ctrl-C was pressed.
    """
    pressed = threading.Event()
    if not caught or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        # None stands for a handler that was not set from Python, which cannot be put back.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
