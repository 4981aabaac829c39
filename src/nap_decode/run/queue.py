"""Prompts of a stream that wait until there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from nap_decode.base.errors import NapDecodeError
from nap_decode.prompts import Prompt, encode_prompts, is_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Waiting(NamedTuple):
    """A prompt that waits."""

    number: int
    ids: list[int]
    seed: int | None  # if it has one of its own


class Queue:
    """Prompts, and the room that there is: rows of a batch, and rows by tokens of the longest, with its canvas."""

    def __init__(self, prompts: Iterator[Waiting], canvas_length: int, max_batch: int, max_tokens: int | None) -> None:
        self.prompts, self.canvas_length = prompts, canvas_length
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.first = next(prompts, None)

    def take(self, size: int, width: int) -> list[Waiting]:
        """Those that there is room for beside a batch of so many rows and columns."""
        coming: list[Waiting] = []
        while self.first is not None and size + len(coming) < self.max_batch:
            length = len(self.first.ids) + self.canvas_length
            width = max(width, length)
            if self.max_tokens is not None and length > self.max_tokens:
                raise NapDecodeError(
                    f"prompt {self.first.number} and its canvas take {length} tokens, more than max_tokens="
                    f"{self.max_tokens}; raise it, or shorten the prompt"
                )
            if self.max_tokens is not None and (size + len(coming) + 1) * width > self.max_tokens:
                break
            coming.append(self.first)
            self.first = next(self.prompts, None)
        return coming


def longest_first(
    prompts: Iterable[Prompt],
    row_seeds: Iterable[int] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    window: int,
) -> Iterator[Waiting]:
    """Prompts with their numbers and seeds, from the longest to the shortest of each window."""
    numbered, number, seeds = enumerate(prompts), -1, None if row_seeds is None else iter(row_seeds)
    while some := list(islice(numbered, window)):
        rows = []
        for number, prompt in some:
            if is_part(prompt):
                raise NapDecodeError(
                    f"a stream takes many prompts, but number {number} of them is {prompt!r:.80}; put a single one "
                    "into a list of its own"
                )
            seed = None
            if seeds is not None and (seed := next(seeds, None)) is None:
                raise _seeds_error(f"{number}, and more prompts")
            rows.append(Waiting(number, encode_prompts([prompt], tokenizer)[0][0], seed))
        yield from sorted(rows, key=lambda row: -len(row.ids))
    if seeds is not None and next(seeds, None) is not None:
        raise _seeds_error(f"more than {number + 1} prompts")


def _seeds_error(there_are: str) -> NapDecodeError:
    return NapDecodeError(f"row_seeds must be one for every prompt, but there are {there_are}")
