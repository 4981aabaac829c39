"""A decode while it runs: streamers that show its rows, and Ctrl-C that stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas
from nap_decode.results.trace import ends_before
from nap_decode.run.state import State


class Streams:
    """Shows rows to streamers while they are decoded, see ``streamer`` of :class:`RunOptions`.

    Args:
        streamers: one for a single row, or one for every row; None for rows that nobody looks at.
        canvas: what is decoded.
        ends: ids that end a block; what follows them in it is not shown.
        is_final: whether committed tokens stay as they are; if not, they are shown when all is done.

    Raises:
        NapDecodeError: not one streamer for every row, or one that wants logits.
    """

    def __init__(self, streamers: Any, canvas: Canvas, *, ends: Sequence[int], is_final: bool) -> None:
        self.streamers = list(streamers) if isinstance(streamers, list | tuple) else [streamers]
        for streamer in self.streamers:
            if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
                raise NapDecodeError(
                    "a streamer must have put(ids) and end(), such as transformers.TextStreamer(tokenizer), but is "
                    f"{streamer!r:.80}"
                )
            if getattr(streamer, "_takes_logits", False):
                raise NapDecodeError(f"{type(streamer).__name__} wants logits, which samplers do not keep; use another")
        if len(self.streamers) != len(canvas.tokens):
            given = f"{len(self.streamers)} for {len(canvas.tokens)} rows"
            raise NapDecodeError(f"there must be one streamer for every row, or None, but there are {given}")
        self.ends, self.is_final = tuple(ends), is_final
        tokens, self.block, _ = canvas.host
        self.lengths, prompt = canvas.row_lengths.tolist(), canvas.prompt.cpu()
        self.shown: dict[int, int] = {}  # columns that were shown of each row that somebody looks at
        for row, streamer in enumerate(self.streamers):
            if streamer is not None:
                self.shown[row] = int(prompt[row].long().cumprod(0).sum())
                streamer.put(tokens[row, : self.shown[row]])

    def __call__(self, state: State) -> None:
        """Show what is new."""
        tokens, masked = state.tokens.cpu(), state.masked.cpu()
        kept = ends_before(tokens, self.block, self.ends) == 0
        for row, start in list(self.shown.items()):
            length, streamer = self.lengths[row], self.streamers[row]
            if self.is_final:
                gap = masked[row, :length].nonzero()
                start = int(gap[0]) if len(gap) else length
                self._put(row, tokens[row], kept[row], start)
            if hasattr(streamer, "put_draft") and len(draft := tokens[row, start:length][kept[row, start:length]]):
                streamer.put_draft(draft)

    def end(self, tokens: Tensor, decoded: Tensor) -> None:
        """Show the rest of the canvas ``(B, L)`` on the host, where it is decoded."""
        kept = (ends_before(tokens, self.block, self.ends) == 0) & decoded
        for row in list(self.shown):
            self._put(row, tokens[row], kept[row], self.lengths[row])

    def _put(self, row: int, tokens: Tensor, kept: Tensor, stop: int) -> None:
        """Show a row up to a column, and say so if that is its end."""
        start = self.shown[row]
        new = tokens[start:stop][kept[start:stop]]
        if len(new):
            self.streamers[row].put(new)
        self.shown[row] = stop
        if stop == self.lengths[row]:
            self.streamers[row].end()
            del self.shown[row]


@contextmanager
def interrupts(*, caught: bool) -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C is noted down, if it is to be caught; a second one raises ``KeyboardInterrupt`` as ever.

    So a step is never cut in the middle.  Outside the main thread, where Ctrl-C does not arrive, nothing happens.

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
