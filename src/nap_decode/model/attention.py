"""Which token may look at which, and the forms in which models want to be told."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(
    positions: Tensor,
    present: Tensor,
    *,
    queries: Tensor | None = None,
    block_size: int | None = None,
    num_shadows: int = 0,
) -> Tensor:
    """Where each query may look, ``(N, Q, W)`` bool: rows are queries, columns are keys.

    With a block size attention is block-causal: both ways inside a block and back to earlier blocks, blocks
    being counted from position 0.  The last ``num_shadows`` columns are shadows: second versions of slots,
    behind the row.  Nothing in the row sees a shadow; a shadow sees the row but for its own slot::

             a  b  c  d | b' d'
        a    x  x  x  x | .  .
        b    x  x  x  x | .  .      b' and d' are the shadows of b and d
        c    x  x  x  x | .  .
        d    x  x  x  x | .  .
        b'   x  .  x  x | x  x
        d'   x  x  x  . | x  x

    Args:
        positions: ``(N, W)`` int64, those of the slots that shadows stand for included.
        present: ``(N, W)`` bool, false for padding, which nothing sees.
        queries: ``(N, Q)`` int64, positions that look; all by default, and with shadows.
        block_size: positions of a block; None if all see all.
        num_shadows: columns at the end that are shadows.
    """
    queries = positions if queries is None else queries
    seen = present[:, None, :].expand(-1, queries.shape[1], -1)
    if block_size is not None:
        seen = seen & (positions[:, None, :] // block_size <= queries[:, :, None] // block_size)
    if num_shadows:
        width = positions.shape[1]
        columns = torch.arange(width, device=positions.device)
        is_shadow = columns >= width - num_shadows
        own = positions[:, :, None] == positions[:, None, :]
        seen = seen & torch.where(is_shadow[:, None], is_shadow | ~own, ~is_shadow)
        # Whatever sees nothing at all becomes nan, and spreads.
        seen = seen | (columns[:, None] == columns)
    return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as what is added to attention scores: 0 where a query may look, else the lowest number there is."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
