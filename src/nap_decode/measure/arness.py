"""How autoregressive was a decode?

Global and local AR-ness are those of DiffuCoder (arXiv 2506.20639, appendix A.2), which NAP uses with
k = 1.  With p_c the position of the c-th committed token, M_(c-1) the positions still masked before it and
T tokens in all::

    Global@k = (1/T) #{c : p_c is among the k smallest of M_(c-1)}
    Local@k  = (1/(T - k)) #{c > k : p_(c-k), ..., p_c are consecutive positions, ascending}

Positions are numbered over the decoded slots only, so a header counts for nothing, however many tokens it
has.  The definitions assume one token per step.  With several the order inside a step matters; here it is
by confidence, highest first, ties (and steps without confidences) by lower position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nap_decode.base.errors import NapDecodeError, check_integer
from nap_decode.measure.watch import Watch
from nap_decode.results.trace import DecodeTrace

_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ARness:
    """Order measures, each per sequence and then averaged over sequences; nan where none is defined.

    Args:
        sequences: number of sequences averaged over.
        global_at: Global@k by k; 1 for left to right.
        global_lower: its lower bound over the orders inside steps (descending positions), which is the step-level
            value, too: whether p_c is among the k smallest of what was masked at the start of its step.
        global_upper: its upper bound (ascending positions).
        local_at: Local@k by k; 1 for left to right, nan for sequences of at most k tokens.
        kendall_tau: tau-b between position and step, ties allowed; with one token per step 1 for left to right, -1 for
            right to left; less with several; nan if everything was committed in one step.
        tokens_per_step: tokens by steps that commit at least one ("AFP").
        tokens_per_forward: tokens before the end of their block by forward passes ("TPF").
        blocks: the same measures for every block on its own: order and positions restricted to it.
        before_end: the same measures without the padding after each block's end; None if no trace says which
            tokens end a block, or nothing stands before them.

    Example:
        >>> import torch
        >>> meter = ARnessMeter(ks=(1, 2))
        >>> meter.update(DecodeTrace(
        ...     tokens=torch.tensor([[7, 7, 7, 7]]), block=torch.zeros(1, 4, dtype=torch.int64),
        ...     step=torch.tensor([[0, 1, 0, 1]]), confidence=torch.tensor([[0.9, 0.9, 0.5, 0.5]]),
        ...     forward_passes=torch.tensor([2]), block_names=("completion",), mask_token_id=1))
        >>> measured = meter.compute()  # committed in the order 0 2 | 1 3
        >>> measured.global_at, measured.local_at
        ({1: 0.75, 2: 1.0}, {1: 0.0, 2: 0.0})
    """

    sequences: int
    global_at: dict[int, float]
    global_lower: dict[int, float]
    global_upper: dict[int, float]
    local_at: dict[int, float]
    kendall_tau: float
    tokens_per_step: float
    tokens_per_forward: float
    blocks: dict[str, ARness] = field(default_factory=dict)
    before_end: ARness | None = None

    @property
    def step_level(self) -> dict[int, float]:
        """Global@k with the masks as they stood at the start of the step; see ``global_lower``."""
        return self.global_lower

    def __str__(self) -> str:
        ks = sorted(self.global_at)
        header = ["", *(f"Global@{k} (bounds)" for k in ks), *(f"Local@{k}" for k in ks)]
        header += ["Kendall's tau", "tokens/step", "tokens/forward"]
        rows = [header]
        for name, part in {"all": self, **self.blocks}.items():
            bounded = [
                f"{part.global_at[k]:.4f} ({part.global_lower[k]:.4f} to {part.global_upper[k]:.4f})" for k in ks
            ]
            others = [*(part.local_at[k] for k in ks), part.kendall_tau, part.tokens_per_step, part.tokens_per_forward]
            rows.append([name, *bounded, *(f"{value:.4f}" for value in others)])
        return "\n".join(table(rows))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, the first on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


class ARnessMeter:
    """Measures decodes; like a torchmetrics metric: ``update``, ``compute``, ``reset``.

    Args:
        ks: values of k.

    Raises:
        NapDecodeError: a k below 1.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
        >>> meter = ARnessMeter()
        >>> meter.update(sampler("6 0 6 4 6 2 1 2 4 7 0 6 =").trace)
        >>> 0 < meter.compute().global_at[1] < 1
        True
    """

    def __init__(self, ks: Sequence[int] = (1,)) -> None:
        for k in ks if isinstance(ks, Sequence) else [ks]:
            check_integer("k", k, 1)
        self.ks = tuple(ks) if isinstance(ks, Sequence) else (ks,)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # Of every sequence the fields of ARness; by whether only what stands before the end is counted, and by the
        # name of the block, "" for the whole sequence.
        self._values: dict[bool, dict[str, list[dict[str, Any]]]] = {}

    def update(self, trace: DecodeTrace) -> None:
        """Add the sequences of a trace."""
        decoded, before_end, block = decoded_slots(trace), trace.before_end().numpy(), trace.block.numpy()
        scopes = {False: decoded} | ({True: before_end & decoded} if trace.end_token_ids else {})
        regions = {"": block >= 0} | {name: block == j for j, name in enumerate(trace.block_names)}
        for row in range(len(block)):
            for (trimmed, scope), (name, region) in product(scopes.items(), regions.items()):
                counted = scope[row] & region[row]
                if counted.any():
                    values = _measure(trace.step[row].numpy()[counted], trace.confidence[row].numpy()[counted], self.ks)
                    tokens = int((counted & before_end[row]).sum())
                    values["tokens_per_forward"] = tokens / max(int(trace.forward_passes[row]), 1)
                    self._values.setdefault(trimmed, {}).setdefault(name, []).append(values)

    def compute(self) -> ARness:
        """The averages over all sequences so far; raises if there are none."""
        if not self._values:
            raise NapDecodeError("nothing was measured; call update with a trace first")
        measured = {}
        for trimmed, sequences in self._values.items():
            parts = {name: ARness(len(values), **_average(values)) for name, values in sequences.items()}
            measured[trimmed] = replace(parts.pop(""), blocks=parts)
        return replace(measured[False], before_end=measured.get(True))

    @staticmethod
    @contextmanager
    def watch(
        model: nn.Module, mask_token_id: int, *, end_token_ids: Sequence[int] = (), num_rows: int | None = None
    ) -> Iterator[Watch]:
        """Measure any decoding loop by looking at the ids that the model is called with.

        Inside the ``with`` block run the foreign loop; nothing in it needs to change::

            with ARnessMeter.watch(model, mask_token_id=126336) as watch:
                ids = foreign_generate(model, prompt, ...)
            meter.update(watch.trace(ids))

        A call commits what the next look at the slots finds unmasked.  The last commits are seen by no call; ``trace``
        counts them as made by the last call that showed the slot.  A call may show the whole row or, with a cache, a
        part of it: what stands behind the cache, or the columns that ``replace_position``, ``cache_position`` or
        ``position_ids`` name.  A call with another number of rows, with fewer columns and no cache, or with a changed
        prompt begins a new decode, and so does ``watch.begin()``, needed between decodes of one prompt that take one
        call each.  Rows may leave when they are finished, decodes of different prompts may take turns, and left out are
        calls without a mask that belong to no decode, unconditional branches of guidance (rows, or calls of their own),
        and the columns that WINO repeats at the end.

        A call that does not tell what it shows, as with dKV-Cache's or with several alternatives at once, does not stop
        the loop: ``trace`` and ``traces`` refuse with the reason.  Not to be told from a decode are a call in between
        with the prompt and the length of the decode but other masks, and rows that are exchanged for one another.
        What is appended without having been masked counts as prompt.

        Args:
            model: the module that the loop calls (or whose ``forward``) with ``input_ids``, or with one tensor of whole
                numbers ``(B, L)`` under another name.
            mask_token_id: the mask id.
            end_token_ids: ids that end a text, to tell tokens from the padding after them.
            num_rows: look at the first rows only, and take all of them for rows to be decoded.

        Raises:
            NapDecodeError: at the first call, if it has no such ids.
        """
        watch = Watch(mask_token_id, tuple(end_token_ids), num_rows)
        # A hook would miss loops and wrappers that call model.forward.
        own = vars(model).get("forward")
        model.forward = watch._seeing(model.forward)
        try:
            yield watch
        finally:
            if own is None:
                del model.forward
            else:
                model.forward = own


def decoded_slots(trace: DecodeTrace) -> _Bools:
    """``(B, L)``: slots that have a place in the order; not what an interruption left masked, or what was filled."""
    decoded = (trace.block >= 0) & (trace.step >= 0)
    return (decoded if trace.closed is None else decoded & ~trace.closed).numpy()


def commit_order(step: _Ints, confidence: NDArray[np.float32]) -> _Ints:
    """``(T,)``: positions in the order of their commits, inside a step by confidence, then by position."""
    return np.lexsort((np.arange(len(step)), -np.nan_to_num(confidence, nan=np.inf), step))


def masked_below(order: _Ints) -> _Ints:
    """``(T,)``: for each commit the number of lower positions that are still masked then."""
    place = np.argsort(order)  # place[p]: when position p is committed
    later = place[None, :] > place[:, None]  # (T, T): column committed after row
    return np.asarray(np.tril(later, -1).sum(1)[order])


def ascends(order: _Ints, k: int) -> _Bools:
    """``(T - k,)``: whether each commit from the k-th on ends a run of k + 1 neighbours, ascending."""
    runs = np.concatenate([[0], np.cumsum(np.diff(order) == 1)])
    return np.asarray(runs[k:] - runs[:-k] == k)


def _measure(step: _Ints, confidence: NDArray[np.float32], ks: Sequence[int]) -> dict[str, Any]:
    """Fields of ARness for one sequence of T slots, given by step and confidence in order of position."""
    positions, order = np.arange(len(step)), commit_order(step, confidence)
    orders = {
        "global_at": order,
        "global_lower": np.lexsort((-positions, step)),
        "global_upper": np.lexsort((positions, step)),
    }
    below = {name: masked_below(one) for name, one in orders.items()}
    hits = {k: ascends(order, k) for k in ks}
    return {
        **{name: {k: float(np.mean(skipped < k)) for k in ks} for name, skipped in below.items()},
        "local_at": {k: float(hit.mean()) if len(hit) else float("nan") for k, hit in hits.items()},
        "kendall_tau": _kendall_tau(step),
        "tokens_per_step": len(step) / len(np.unique(step)),
    }


def _kendall_tau(step: _Ints) -> float:
    """Tau-b between index and value; indices have no ties, values may."""
    later = step[None, :] > step[:, None]  # (T, T)
    concordant, discordant = int(np.triu(later, 1).sum()), int(np.tril(later, -1).sum())
    untied, pairs = concordant + discordant, len(step) * (len(step) - 1) // 2
    return (concordant - discordant) / float(np.sqrt(float(untied) * pairs)) if untied else float("nan")


def _average(values: Sequence[Any]) -> Any:
    """The mean of numbers that are not nan; of dicts, that of each entry."""
    if isinstance(values[0], dict):
        return {name: _average([one[name] for one in values]) for name in values[0]}
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
