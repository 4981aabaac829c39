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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nap_decode.errors import NapDecodeError, check_integer
from nap_decode.trace import DecodeTrace

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ARness:
    """Order measures, each per sequence and then averaged over sequences; nan where none is defined.

    Args:
        sequences: number of sequences averaged over.
        global_at: Global@k by k; 1 for left to right.
        global_lower: its lower bound over the orders inside steps (descending positions).  It is at the
            same time the step-level value, which asks whether p_c is among the k smallest of what was
            masked at the start of its step: in descending order nothing below p_c has been removed yet.
        global_upper: its upper bound (ascending positions).
        local_at: Local@k by k; 1 for left to right, nan for sequences of at most k tokens.
        kendall_tau: tau-b between position and step, ties allowed; 1 for left to right, -1 for right to
            left, nan if everything was committed in one step.
        tokens_per_step: tokens by steps that commit at least one ("AFP").
        tokens_per_forward: tokens before the end of their block by forward passes ("TPF").
        blocks: the same measures for every block on its own: order and positions restricted to it.
        before_end: the same measures without the padding after each block's end; None if no trace says which
            tokens end a block, or nothing stands before them.

    Example:
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
        rows = [header, self._cells("all", ks), *(part._cells(name, ks) for name, part in self.blocks.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def _cells(self, name: str, ks: list[int]) -> list[str]:
        def bounded(k: int) -> str:
            return f"{self.global_at[k]:.4f} ({self.global_lower[k]:.4f} to {self.global_upper[k]:.4f})"

        values = (self.kendall_tau, self.tokens_per_step, self.tokens_per_forward)
        local = [f"{self.local_at[k]:.4f}" for k in ks]
        return [name, *map(bounded, ks), *local, *(f"{value:.4f}" for value in values)]


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
        # By block name ("" for the whole sequence) and whether only what stands before the end is counted:
        # one dict of measures for every sequence.
        self._values: dict[tuple[str, bool], list[dict[str, float]]] = {}

    def update(self, trace: DecodeTrace) -> None:
        """Add the sequences of a trace."""
        before_end = trace.before_end().numpy()
        block = np.where(trace.step.numpy() < 0, -1, trace.block.numpy())  # what an interruption left masked
        if trace.closed is not None:  # what was filled without being decoded has no place in the order
            block = np.where(trace.closed.numpy(), -1, block)
        scopes = {False: block >= 0} | ({True: before_end} if trace.end_token_ids else {})
        regions = {"": block >= 0} | {name: block == j for j, name in enumerate(trace.block_names)}
        for row in range(len(block)):
            for trimmed, scope in scopes.items():
                for name, region in regions.items():
                    counted = scope[row] & region[row]
                    if counted.any():
                        step, confidence = trace.step[row].numpy()[counted], trace.confidence[row].numpy()[counted]
                        values = _measure(step, confidence, self.ks)
                        tokens = int((counted & before_end[row]).sum())
                        values["tokens_per_forward"] = tokens / max(int(trace.forward_passes[row]), 1)
                        self._values.setdefault((name, trimmed), []).append(values)

    def compute(self) -> ARness:
        """The averages over all sequences so far.

        Raises:
            NapDecodeError: there are none.
        """
        if not self._values:
            raise NapDecodeError("nothing was measured; call update with a trace first")
        blocks, trimmed = (
            {name: self._average(values) for (name, t), values in self._values.items() if name and t == wanted}
            for wanted in (False, True)
        )
        before_end = None
        if ("", True) in self._values:
            before_end = replace(self._average(self._values["", True]), blocks=trimmed)
        return replace(self._average(self._values["", False]), blocks=blocks, before_end=before_end)

    def _average(self, sequences: list[dict[str, float]]) -> ARness:
        def mean(name: str) -> float:
            values = [s[name] for s in sequences if not np.isnan(s[name])]
            return float(np.mean(values)) if values else float("nan")

        return ARness(
            sequences=len(sequences),
            global_at={k: mean(f"global@{k}") for k in self.ks},
            global_lower={k: mean(f"lower@{k}") for k in self.ks},
            global_upper={k: mean(f"upper@{k}") for k in self.ks},
            local_at={k: mean(f"local@{k}") for k in self.ks},
            kendall_tau=mean("kendall_tau"),
            tokens_per_step=mean("tokens_per_step"),
            tokens_per_forward=mean("tokens_per_forward"),
        )

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

        What a call finds unmasked that was masked at the call before was committed in between.  The last
        commits are seen by no call; ``trace`` counts them as made after the last one.  A call with another
        number of rows, with fewer columns, or with a changed prompt begins a new decode, and so does
        ``watch.begin()`` (needed between decodes of one prompt that take one call each);
        ``watch.traces()`` returns one trace for each.  A loop that appends masked blocks on the right as it
        goes is followed.  A call that differs from the decode by a masked prompt only is taken for the
        unconditional branch of guidance and left out.

        Args:
            model: the module that the loop calls with ``input_ids`` (by name, or as first argument).
            mask_token_id: the mask id.
            end_token_ids: ids that end a text, to tell tokens from the padding after them.
            num_rows: look at the first rows only; a loop with classifier-free guidance usually stacks the
                unconditional branch below the conditional one.
        """
        watch = Watch(mask_token_id, tuple(end_token_ids), num_rows)
        handle = model.register_forward_pre_hook(watch._see, with_kwargs=True)
        try:
            yield watch
        finally:
            handle.remove()


class Watch:
    """What :meth:`ARnessMeter.watch` saw."""

    def __init__(self, mask_token_id: int, end_token_ids: tuple[int, ...], num_rows: int | None) -> None:
        self.mask_token_id = mask_token_id
        self.end_token_ids = end_token_ids
        self.num_rows = num_rows
        self._decodes: list[_Watched] = []
        self._fresh = True

    def begin(self) -> None:
        """Take the next call for the first one of a new decode."""
        self._fresh = True

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise NapDecodeError("the watched model was called without input_ids (B, L) of whole numbers")
        ids = ids[: self.num_rows].detach().cpu().clone()
        if self._fresh or not self._decodes[-1].advance(ids):
            self._decodes.append(_Watched.begin(ids, self.mask_token_id))
        self._fresh = False

    def trace(self, sequences: Tensor | None = None) -> DecodeTrace:
        """The last decode.

        Args:
            sequences: ``(B, L)`` what the loop returned, for the tokens of the last commits; without it
                they are unknown and stay the mask id.

        Raises:
            NapDecodeError: the model was not called; ``sequences`` is not what it was called with.
        """
        if not self._decodes:
            raise NapDecodeError("the watched model was not called inside the with block")
        return self._decodes[-1].trace(sequences, self.end_token_ids)

    def traces(self) -> list[DecodeTrace]:
        """All decodes, in order."""
        return [decode.trace(None, self.end_token_ids) for decode in self._decodes]


@dataclass
class _Watched:
    ids: Tensor  # (B, L) as of the last call
    step: Tensor  # (B, L) call after which a slot was committed, -1 for none yet
    decodable: Tensor  # (B, L) masked when first seen
    mask_token_id: int
    calls: int = 1

    @classmethod
    def begin(cls, ids: Tensor, mask_token_id: int) -> _Watched:
        return cls(ids, torch.full_like(ids, -1), ids == mask_token_id, mask_token_id)

    def advance(self, ids: Tensor) -> bool:
        """Take in one more call; False if it does not belong to this decode."""
        old = self.ids.shape[1]
        if ids.shape[0] != self.ids.shape[0] or ids.shape[1] < old:
            return False
        masked = ids == self.mask_token_id
        changed = (ids[:, :old] != self.ids) & ~self.decodable
        if bool(changed.any()):
            # With no change but masks, it is the unconditional branch of guidance.
            return ids.shape[1] == old and bool(masked[changed].all())
        if bool((self.decodable & masked[:, :old]).sum() == self.decodable.sum()) and self.step.max() >= 0:
            return False  # everything is masked again: the same prompt decoded anew
        grown = ids.shape[1] - old
        self.decodable = torch.cat([self.decodable, masked[:, old:]], dim=1)
        step = torch.nn.functional.pad(self.step, (0, grown), value=-1)
        # A slot that is masked again (a loop that revises) counts when it is committed for good.
        step = torch.where(masked, -1, step)
        self.step = torch.where(self.decodable & ~masked & (step < 0), self.calls - 1, step)
        self.ids = ids
        self.calls += 1
        return True

    def trace(self, sequences: Tensor | None, end_token_ids: tuple[int, ...]) -> DecodeTrace:
        tokens = self.ids if sequences is None else sequences[: len(self.ids)].detach().cpu().clone()
        if tokens.shape != self.ids.shape:
            raise NapDecodeError(
                f"sequences {tuple(tokens.shape)} must have the shape of the ids that the model was called with, "
                f"{tuple(self.ids.shape)}"
            )
        if bool(((tokens != self.ids) & (self.ids != self.mask_token_id)).any()):
            raise NapDecodeError(
                "sequences differ from the ids that the model was called with where those were not masked; are the "
                "rows padded on another side, or was this another decode?"
            )
        last = self.decodable & (self.step < 0)
        return DecodeTrace(
            tokens=tokens,
            block=torch.where(self.decodable, 0, -1),
            step=torch.where(last, self.calls - 1, self.step),
            confidence=torch.full(tokens.shape, torch.nan),
            forward_passes=torch.full((len(tokens),), self.calls),
            block_names=("completion",),
            mask_token_id=self.mask_token_id,
            end_token_ids=end_token_ids,
        )


def _measure(step: _Ints, confidence: NDArray[np.float32], ks: Sequence[int]) -> dict[str, float]:
    """All measures of one sequence of T slots, given by step and confidence in order of position."""
    positions = np.arange(len(step))
    orders: dict[str, _Ints] = {
        "global": np.lexsort((positions, -np.nan_to_num(confidence, nan=np.inf), step)),
        "upper": np.lexsort((positions, step)),
        "lower": np.lexsort((-positions, step)),
    }
    values = {"kendall_tau": _kendall_tau(step), "tokens_per_step": len(step) / len(np.unique(step))}
    for name, order in orders.items():
        skipped = _masked_below(order)
        for k in ks:
            values[f"{name}@{k}"] = float(np.mean(skipped < k))
    for k in ks:
        values[f"local@{k}"] = _local(orders["global"], k)
    return values


def _masked_below(order: _Ints) -> _Ints:
    """For each commit the number of lower positions that are still masked then, ``(T,)``."""
    place = np.argsort(order)  # place[p]: when position p is committed
    later = place[None, :] > place[:, None]  # (T, T): column committed after row
    below = np.tril(later, -1).sum(1)
    return np.asarray(below[order])


def _local(order: _Ints, k: int) -> float:
    if len(order) <= k:
        return float("nan")
    # A run of k steps of +1 that ends at c: windows of k consecutive differences, all 1.
    ascending = np.diff(order) == 1
    runs = np.lib.stride_tricks.sliding_window_view(ascending, k).all(1)
    return float(runs.mean())


def _kendall_tau(step: _Ints) -> float:
    """Tau-b between index and value; indices have no ties, values may."""
    later = step[None, :] > step[:, None]  # (T, T)
    concordant, discordant = int(np.triu(later, 1).sum()), int(np.tril(later, -1).sum())
    untied, pairs = concordant + discordant, len(step) * (len(step) - 1) // 2
    return (concordant - discordant) / float(np.sqrt(float(untied) * pairs)) if untied else float("nan")
