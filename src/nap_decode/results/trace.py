"""What happened when: the record of a decode."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError

_FORMAT = 1
_FACTS = ("block_names", "mask_token_id", "end_token_ids")
_TENSORS = ("tokens", "block", "step", "confidence", "forward_passes")
_OPTIONAL = ("closed", "forwarded")


@dataclass(frozen=True, eq=False)
class DecodeTrace:
    """For every slot the step that committed it and its confidence then; no canvas is kept per step.

    Args:
        tokens: ``(B, L)`` int64, the canvas at the end.
        block: ``(B, L)`` int64, block of every decoded slot, -1 for clamped slots and padding.
        step: ``(B, L)`` int64, index of the step that committed the slot, -1 if it was not decoded.
        confidence: ``(B, L)`` float32, confidence when it was committed, nan where there is none.
        forward_passes: ``(B,)`` int64, forward passes that each row took part in.
        block_names: names of the blocks.
        mask_token_id: the mask id.
        end_token_ids: ids that end a block; what follows them in the block is padding.
        closed: ``(B, L)`` bool, slots behind the end of their block that were filled without being decoded, at
            the step in ``step``; None if blocks were not closed.
        forwarded: ``(B, S)`` int64, positions that each forward pass computed, 0 behind a row's last; with guidance
            those of both branches.  A pass that computed the whole row is a refresh.  None if all were.

    Example:
        >>> trace = DecodeTrace(
        ...     tokens=torch.tensor([[5, 6, 7]]), block=torch.tensor([[-1, 0, 0]]),
        ...     step=torch.tensor([[-1, 1, 0]]), confidence=torch.tensor([[torch.nan, 0.9, 0.8]]),
        ...     forward_passes=torch.tensor([2]), block_names=("completion",), mask_token_id=1)
        >>> trace.canvas_at(1).tolist()
        [[5, 1, 7]]
    """

    tokens: Tensor
    block: Tensor
    step: Tensor
    confidence: Tensor
    forward_passes: Tensor
    block_names: tuple[str, ...]
    mask_token_id: int
    end_token_ids: tuple[int, ...] = ()
    closed: Tensor | None = None
    forwarded: Tensor | None = None

    def canvas_at(self, steps: int) -> Tensor:
        """``(B, L)``: the canvas after this many steps; a slot that changed its token is masked until its last one."""
        return torch.where(self.step >= steps, self.mask_token_id, self.tokens)

    def before_end(self) -> Tensor:
        """``(B, L)`` bool: decoded slots before the first end token of their block; none that is still masked."""
        is_end = torch.isin(self.tokens, self.tokens.new_tensor(self.end_token_ids))
        is_behind = is_end | (ends_before(self.tokens, self.block, self.end_token_ids) > 0)
        return (self.block >= 0) & (self.step >= 0) & ~is_behind

    def masked(self) -> Tensor:
        """``(B, L)`` bool: slots that were not decoded, because the decode was interrupted."""
        return (self.block >= 0) & (self.step < 0)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one ``.npz`` file, which numpy can read without unpickling."""
        header = json.dumps({"format": _FORMAT} | {name: getattr(self, name) for name in _FACTS})
        names = [*_TENSORS, *(name for name in _OPTIONAL if getattr(self, name) is not None)]
        arrays = {name: getattr(self, name).cpu().numpy() for name in names}
        with open(path, "wb") as file:  # an open file, because numpy would add .npz to a bare name
            np.savez_compressed(file, header=np.array(header), **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> DecodeTrace:
        """Read what :meth:`save` wrote.

        Raises:
            NapDecodeError: the file is not a trace, or of a newer format.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(str(arrays["header"]))
                found = header["format"]
                values: dict[str, Any] = {}
                if found <= _FORMAT:
                    values = {name: header[name] for name in _FACTS}
                    names = [*_TENSORS, *(name for name in _OPTIONAL if name in arrays)]
                    values |= {name: torch.from_numpy(arrays[name]) for name in names}
        except (KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise NapDecodeError(f"{path} is not a trace written by DecodeTrace.save ({error})") from error
        if found > _FORMAT:
            raise NapDecodeError(f"{path} has trace format {found}, but this version reads {_FORMAT}; update it")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists)


def ends_before(tokens: Tensor, block: Tensor, end_token_ids: Sequence[int]) -> Tensor:
    """How many of the end tokens stand before each slot in its block, ``(B, L)`` int64; 0 where there is no block.

    Example:
        >>> ends_before(torch.tensor([[2, 5, 2, 7, 2, 9]]), torch.tensor([[-1, 0, 0, 0, 1, 1]]), [2]).tolist()
        [[0, 0, 0, 1, 0, 1]]
    """
    is_end = torch.isin(tokens, torch.tensor(end_token_ids, dtype=tokens.dtype, device=tokens.device))
    counts = torch.zeros_like(tokens)
    for index in range(int(block.max()) + 1):
        inside = block == index
        ended = (is_end & inside).long()
        counts += (ended.cumsum(1) - ended) * inside
    return counts
