"""What is to be decoded: canvases, and the templates and texts they are made from.

A canvas is a batch of token rows in which some slots are still masked.  Rows begin in column 0, so that a column is a
position; padding stands behind them::

     p   p   p   p   p  <1>  M   M   M  <2>  M   M   M  <S>  M     row 0
    -1  -1  -1  -1  -1  -1   0   0   0  -1   1   1   1  -1   2     its blocks
     p   p   p  <1>  M   M   M  <2>  M   M   M  <S>  M  pad pad    row 1

Slots of a block are decoded; everything else is clamped: given, and never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nap_decode.base.batching import to_device
from nap_decode.base.errors import NapDecodeError, check_flag, check_ids, check_integer, check_tensor
from nap_decode.base.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text: TypeAlias = "str | Sequence[int]"
"""Clamped text of a template: a string, tokenized without special tokens, or token ids."""
_TENSORS = ("tokens", "block", "attention_mask", "prompt")


@dataclass(frozen=True)
class Block:
    """A run of slots to decode.

    Args:
        name: what it is called in outputs and measurements.
        length: slots.
        held: whether a macro-parallel scheduler holds it back until the other blocks are done (a summary).

    Example:
        >>> Block("verdict", 8, held=True)
        Block(name='verdict', length=8, held=True)
    """

    name: str
    length: int
    held: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise NapDecodeError(f"the name of a block must be a text, but is {self.name!r:.80}")
        check_integer(f"the length of block {self.name!r}", self.length, 1)
        check_flag(f"held of block {self.name!r}", self.held)


@dataclass(frozen=True)
class CanvasTemplate:
    r"""The layout of what follows a prompt: clamped text and blocks of slots, in order.

    Args:
        parts: text (a string or token ids), which is clamped, and :class:`Block`, which is decoded.

    Raises:
        NapDecodeError: no block, or two of one name; something else than texts, token ids and blocks.

    Example:
        >>> template = CanvasTemplate.nap(num_paths=3, total_length=1022)
        >>> [block.length for block in template.blocks]
        [330, 330, 330, 32]
        >>> CanvasTemplate(("Q: 1 + 1\nA:", Block("answer", 8), "\nDone.")).blocks
        (Block(name='answer', length=8, held=False),)
    """

    parts: tuple[Text | Block, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list):
            raise NapDecodeError(
                f"the parts of a template must be a tuple of texts and Blocks, but are {self.parts!r:.80}"
            )
        # Tuples all through, so that templates can be compared, hashed and saved.
        whole = tuple(p if isinstance(p, Block) else _text("a template's text", p) for p in self.parts)
        object.__setattr__(self, "parts", whole)
        names = [block.name for block in self.blocks]
        if not names:
            raise NapDecodeError("a template needs at least one Block; there is nothing to decode")
        if len(set(names)) < len(names):
            raise NapDecodeError(f"the blocks of a template need different names, but are called {names}")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in order."""
        return tuple(part for part in self.parts if isinstance(part, Block))

    @classmethod
    def plain(cls, length: int) -> CanvasTemplate:
        """``length`` slots after the prompt, as one block called ``"completion"``."""
        return cls((Block("completion", length),))

    @classmethod
    def nap(
        cls,
        num_paths: int = 3,
        *,
        path_length: int | Sequence[int] | None = None,
        summary_length: int = 32,
        total_length: int | None = None,
        path_header: str | Sequence[Text] = "<think {}>",
        summary_header: Text = "<summary>",
        path_footer: str | Sequence[Text] | None = None,
        summary_footer: Text | None = None,
    ) -> CanvasTemplate:
        """NAP's canvas, ``<think 1> R_1 ... <think m> R_m <summary> S`` (arXiv 2602.23225, section 4).

        Args:
            num_paths: m, paths.
            path_length: slots of every path, or of each; 330, as in the paper, unless ``total_length`` says otherwise.
            summary_length: slots of the summary; 0 for none.
            total_length: slots of all blocks together, without headers.  Paths get equal shares, the first ones the
                remainder.
            path_header: text before a path, ``{}`` standing for its number from 1; or one text or id list for each.
            summary_header: text or ids before the summary.
            path_footer: text clamped after a path; by default closing tags are decoded like any token.
            summary_footer: text clamped after the summary.

        Raises:
            NapDecodeError: lengths that do not add up; a header or footer that is neither text nor ids.
        """
        check_integer("num_paths", num_paths, 1)
        check_integer("summary_length", summary_length, 0)
        if path_length is None and total_length is not None:
            check_integer("total_length", total_length, num_paths + summary_length)
            base, rest = divmod(total_length - summary_length, num_paths)
            lengths = [base + (j < rest) for j in range(num_paths)]
        elif isinstance(path_length, Sequence) and not isinstance(path_length, str):
            lengths = list(path_length)
        else:
            lengths = [330 if path_length is None else path_length] * num_paths
        for length in lengths:
            check_integer("path_length", length, 1)
        if len(lengths) != num_paths:
            raise NapDecodeError(f"path_length names {len(lengths)} lengths for num_paths={num_paths}")
        total = sum(lengths) + summary_length
        if total_length is not None:
            check_integer("total_length", total_length, 1)
            if total != total_length:
                raise NapDecodeError(
                    f"block lengths do not add up: paths {lengths} and a summary of {summary_length} make {total}, but "
                    f"total_length is {total_length}; leave one out"
                )
        headers = _texts("path_header", path_header, num_paths)
        footers = _texts("path_footer", "" if path_footer is None else path_footer, num_paths)
        parts: list[Text | Block] = []
        for number, (header, length, footer) in enumerate(zip(headers, lengths, footers, strict=True), 1):
            parts += [header, Block(f"path {number}", length), footer]
        if summary_length:
            footer = _text("summary_footer", "" if summary_footer is None else summary_footer)
            parts += [_text("summary_header", summary_header), Block("summary", summary_length, held=True), footer]
        return cls(tuple(part for part in parts if part not in ("", ())))

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, mask_token_id: int) -> tuple[list[int], list[int]]:
        """Token ids of the layout (masks in the blocks) and the block of every slot (-1: clamped).

        Raises:
            NapDecodeError: text without a tokenizer, or a mask in it.
        """
        check_integer("mask_token_id", mask_token_id, 0)
        ids: list[int] = []
        block: list[int] = []
        num_blocks = 0
        for part in self.parts:
            if isinstance(part, Block):
                ids += [mask_token_id] * part.length
                block += [num_blocks] * part.length
                num_blocks += 1
                continue
            if not isinstance(part, str):
                clamped = list(part)
            elif tokenizer is not None:
                clamped = tokenizer(part, add_special_tokens=False)["input_ids"]
            else:
                raise NapDecodeError(f"the template's text {part!r} needs a tokenizer; pass one, or write token ids")
            if mask_token_id in clamped:
                raise NapDecodeError(
                    f"there is a mask token ({mask_token_id}) in the template's text {part!r:.80}, which would never "
                    "be decoded; slots to decode are a Block"
                )
            ids += clamped
            block += [-1] * len(clamped)
        return ids, block


@dataclass(frozen=True, eq=False)
class Canvas:
    """A batch of rows to decode.  Made by :meth:`from_prompts` or :meth:`from_infill`.

    Args:
        tokens: ``(B, L)`` int64, the mask id in every slot to decode.
        block: ``(B, L)`` int64, the block of every slot to decode, -1 for clamped slots and padding.
        attention_mask: ``(B, L)`` int64, 0 for padding, which is behind a row.
        prompt: ``(B, L)`` bool, the slots that the unconditional branch of classifier-free guidance masks.
        block_names: names of the M blocks.
        held: for each block whether a macro-parallel scheduler holds it back.
        is_infill: whether the blocks are holes in a text rather than what follows a prompt.
        is_single: whether there is one row because one prompt was given, not a batch; outputs then have texts instead
            of lists of texts.

    Raises:
        NapDecodeError: shapes that differ, values of another type, padding elsewhere than behind a row or to be
            decoded, or a block index without a name.

    Example:
        >>> canvas = Canvas.from_prompts(
        ...     [[5, 6], [7]], CanvasTemplate.plain(3), mask_token_id=1, pad_token_id=0)
        >>> canvas.tokens.tolist()
        [[5, 6, 1, 1, 1], [7, 1, 1, 1, 0]]
        >>> canvas.lengths.tolist()
        [[3], [3]]
    """

    tokens: Tensor
    block: Tensor
    attention_mask: Tensor
    prompt: Tensor
    block_names: tuple[str, ...]
    held: tuple[bool, ...]
    is_infill: bool = False
    is_single: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        if len(shape) != 2 or 0 in shape:
            raise NapDecodeError(f"canvas tokens must be (B, L) with B, L >= 1, but are {shape}")
        for name in _TENSORS:
            dtype = torch.bool if name == "prompt" else torch.int64
            check_tensor(f"{name} of a canvas", getattr(self, name), shape, dtype)
        for flag in self.held:
            check_flag("held of a block", flag)
        # Everything is looked at on the host, brought there at once.
        host = torch.stack([self.tokens, self.block, self.attention_mask]).cpu()
        _, block, mask = host
        if bool((mask[:, 1:] > mask[:, :-1]).any() | (mask < 0).any() | (mask > 1).any()):
            raise NapDecodeError("the attention_mask of a canvas must be 1 from column 0 on, then 0 for padding")
        if bool(((block >= 0) & (mask == 0)).any()):
            raise NapDecodeError("padding of a canvas cannot be decoded; its block must be -1")
        highest, number = int(block.max()), len(self.block_names)
        if highest < 0:
            raise NapDecodeError("no slot of the canvas is to be decoded; is the mask token in the text?")
        if highest >= number or len(self.held) != number:
            raise NapDecodeError(
                f"block index {highest} needs {highest + 1} block names and held flags, but there are {number} and "
                f"{len(self.held)}"
            )
        facts = {"host": host, "lengths": count_blocks(block, number), "row_lengths": mask.sum(1)}
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    host: Tensor = field(init=False, repr=False)
    """``(3, B, L)`` int64 on the CPU: tokens, block and attention mask, to be looked at without waiting."""
    lengths: Tensor = field(init=False, repr=False)
    """``(B, M)`` int64 on the CPU: slots of each block."""
    row_lengths: Tensor = field(init=False, repr=False)
    """``(B,)`` int64 on the CPU: tokens of each row."""

    def to(self, device: torch.device | str | None) -> Canvas:
        """The same on a device (torch's default one, if it is None); from the host without waiting for it."""
        other, place = copy.copy(self), torch.get_default_device() if device is None else torch.device(device)
        for name in _TENSORS:
            object.__setattr__(other, name, to_device(getattr(self, name), place))
        return other

    @property
    def decodable(self) -> Tensor:
        """``(B, L)`` bool: the slots to decode."""
        return self.block >= 0

    @property
    def rows(self) -> Rows:
        """The rows as the model sees them."""
        return Rows(tuple(self.row_lengths.tolist()), self.prompt, self.attention_mask.bool())

    @property
    def is_padded(self) -> bool:
        """Whether any row has padding."""
        return int(self.row_lengths.min()) < self.tokens.shape[1]

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        template: CanvasTemplate,
        *,
        mask_token_id: int,
        pad_token_id: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        is_single: bool = False,
    ) -> Canvas:
        """Append a template to every prompt (token ids); the tokenizer is for the template's text."""
        ids, block = template.encode(tokenizer, mask_token_id)
        prompts = [check_ids("a prompt", prompt) for prompt in prompts]
        return cls(
            tokens=_padded([[*prompt, *ids] for prompt in prompts], pad_token_id),
            block=_padded([[-1] * len(prompt) + block for prompt in prompts], -1),
            attention_mask=_padded([[1] * (len(prompt) + len(ids)) for prompt in prompts], 0),
            prompt=_padded([[1] * len(prompt) + [0] * len(ids) for prompt in prompts], 0).bool(),
            block_names=tuple(b.name for b in template.blocks),
            held=tuple(b.held for b in template.blocks),
            is_single=is_single,
        ).to(device)

    @classmethod
    def from_infill(
        cls,
        texts: Sequence[Sequence[int]],
        *,
        mask_token_id: int,
        pad_token_id: int = 0,
        device: torch.device | str | None = None,
        is_single: bool = False,
    ) -> Canvas:
        """Decode the mask tokens in given texts; every run of masks is a block of its own.

        Example:
            >>> Canvas.from_infill([[5, 1, 6, 1, 1]], mask_token_id=1).block.tolist()
            [[-1, 0, -1, 1, 1]]
        """
        check_integer("mask_token_id", mask_token_id, 0)
        texts = [check_ids("a text", text) for text in texts]
        holes = [[token == mask_token_id for token in text] for text in texts]
        blocks, num_blocks = [], 0
        for row in holes:
            starts = (hole and not before for before, hole in zip([False, *row], row, strict=False))
            number = [*accumulate(starts)]
            blocks.append([n - 1 if hole else -1 for n, hole in zip(number, row, strict=True)])
            num_blocks = max([num_blocks, *number[-1:]])
        return cls(
            tokens=_padded(texts, pad_token_id),
            block=_padded(blocks, -1),
            attention_mask=_padded([[1] * len(text) for text in texts], 0),
            prompt=_padded([[not hole for hole in row] for row in holes], 0).bool(),
            block_names=tuple(f"hole {j + 1}" for j in range(num_blocks)),
            held=(False,) * num_blocks,
            is_infill=True,
            is_single=is_single,
        ).to(device)


def count_blocks(block: Tensor, num_blocks: int, where: Tensor | None = None) -> Tensor:
    """Slots of each block, ``(B, L) -> (B, num_blocks)``, counting only those in ``where``."""
    counted = block >= 0 if where is None else where & (block >= 0)
    counts = torch.zeros(block.shape[0], num_blocks, dtype=torch.int64, device=block.device)
    return counts.scatter_add_(1, block.clamp(min=0), counted.long())


def _text(name: str, text: Text) -> Text:
    return text if isinstance(text, str) else tuple(check_ids(name, text))


def _texts(name: str, text: str | Sequence[Text], num_paths: int) -> list[Text]:
    if isinstance(text, str):
        return [text.replace("{}", str(j + 1)) for j in range(num_paths)]
    if not isinstance(text, Sequence) or len(text) != num_paths:
        lists = f"lists {len(text)} texts" if isinstance(text, Sequence) else f"is {text!r:.80}, not a list of texts,"
        raise NapDecodeError(f"{name} {lists} for num_paths={num_paths}")
    return [_text(name, one) for one in text]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """``(B, L)`` int64 on the host, of rows of any length, filled up behind."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64, device="cpu")
