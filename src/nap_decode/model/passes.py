"""Calling a model for all rows of a batch: at once, in groups of one length, or for some positions of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nap_decode.model.call import Frame, ModelCall
from nap_decode.model.head import Output, take
from nap_decode.model.rows import Rows
from nap_decode.speed.kv import Store
from nap_decode.speed.reuse import Kept, Reuse


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows that are called together."""

    index: Tensor | None  # (n,) which of them; None if all
    width: int  # columns that they have
    frame: Frame


class ForwardPass:
    """Calls a model for the same rows again and again; what depends on nothing but the rows is made once.

    Args:
        call: calls the model.
        rows: B rows.
        is_grouped: whether rows of different length are called one length after the other.
        mask_token_id: what stands in shadows.
    """

    def __init__(self, call: ModelCall, rows: Rows, is_grouped: bool, mask_token_id: int) -> None:
        self.call, self.rows, self.is_grouped, self.mask_token_id = call, rows, is_grouped, mask_token_id
        self._parts: dict[int, list[_Part]] = {}

    def __call__(self, tokens: Tensor, wanted: Tensor, shadows: tuple[Tensor, Tensor] | None) -> Output:
        """One forward pass.

        Args:
            tokens: ``(N, W)`` int64; N is a multiple of B.
            wanted: ``(N, K)`` int64, see :meth:`ModelCall.__call__`.
            shadows: see there.
        """
        found, order = [], []
        for part in self._split(len(tokens)):
            ids, places, some = tokens, wanted, shadows
            if part.index is not None:
                ids, places = tokens[part.index, : part.width], wanted[part.index]
                some = None if shadows is None else (shadows[0][part.index], shadows[1][part.index])
                order.append(part.index)
            output = self.call(ids, part.frame, places, some, mask_token_id=self.mask_token_id)
            found.append(output.rows)
        if not order:
            return output
        values = torch.cat(found)
        return output._replace(rows=torch.empty_like(values).index_copy_(0, torch.cat(order).to(values.device), values))

    def _split(self, number: int) -> list[_Part]:
        """The calls to make for so many rows."""
        if number not in self._parts:
            self._parts[number] = self._grouped(number) if self.is_grouped else [self._together(number)]
        return self._parts[number]

    def _together(self, number: int) -> _Part:
        present = self.rows.present.repeat(number // len(self.rows.prompt), 1) if self.rows.is_padded else None
        shape = number, self.rows.width
        return _Part(None, self.rows.width, self.call.frame(shape, present, self.rows.prompt.device))

    def _grouped(self, number: int) -> list[_Part]:
        once, device = len(self.rows.prompt), self.rows.prompt.device
        first = torch.arange(0, number, once, device=device)[:, None]  # of each copy of the batch
        return [
            _Part((first + some).flatten(), width, self.call.frame((number // once * len(some), width), None, device))
            for some, width in self.rows.groups
        ]


class ReusingPass:
    """Calls a model for those positions of the same rows that a policy chooses.

    Args:
        call: calls the model, which hides padding.
        rows: B rows.
        policy: chooses.
    """

    def __init__(self, call: ModelCall, rows: Rows, policy: Reuse) -> None:
        self.call, self.rows, self.policy = call, rows, policy
        present = rows.present if rows.is_padded else None
        self._frame = call.frame((len(rows.lengths), rows.width), present, rows.prompt.device)

    def __call__(self, tokens: Tensor, wanted: Tensor, is_wanted: Tensor, kept: Kept) -> tuple[Output, Kept]:
        """One forward pass, of one call for rows that are computed as a whole, and one for the others.

        Args:
            tokens: ``(B, W)`` int64.
            wanted: ``(B, K)`` int64, positions of the output.
            is_wanted: ``(B, K)`` bool, which of them mean something.
            kept: of earlier passes; its keys, values and outputs are overwritten.

        Returns:
            Outputs ``(B, K, ...)``, and what is known now.
        """
        wanted = wanted.clamp(min=0)
        # Added up, as a position may stand there twice: as a slot, and to fill up.
        where = torch.zeros_like(tokens).scatter_add_(1, wanted, is_wanted.long()) > 0
        computed, whole, kept = self.policy.plan(kept, tokens, where, self.rows.prompt, self.rows.present)
        counts, is_whole = torch.stack([computed.sum(1), whole.long()]).tolist()  # the one place that waits
        groups = [[row for row, flag in enumerate(is_whole) if bool(flag) == kind] for kind in (True, False)]
        outputs = []
        for kind, some in zip((True, False), groups, strict=True):
            if some:
                index = torch.tensor(some, device=tokens.device)
                most = None if kind else max(1, *(counts[row] for row in some))
                only = None if len(some) == len(tokens) else index
                outputs.append((index, self._compute(tokens, wanted, computed, kept, only, most)))
        output = outputs[0][1]
        if len(outputs) == 1:
            return output, kept
        rows = output.rows.new_empty(len(tokens), *output.rows.shape[1:])
        for index, some_output in outputs:
            rows.index_copy_(0, index.to(rows.device), some_output.rows)
        return output._replace(rows=rows), kept

    def _compute(
        self, tokens: Tensor, wanted: Tensor, computed: Tensor, kept: Kept, index: Tensor | None, most: int | None
    ) -> Output:
        """Call the model for some rows: for ``most`` positions of each, or for all."""
        number, width = tokens.shape
        if index is not None:
            tokens, wanted, computed = tokens[index], wanted[index], computed[index]
        present = self.rows.present if index is None else self.rows.present[index]
        positions = None
        if most is None:
            options = self._frame.options
            if index is not None:
                hidden = present if self.rows.is_padded else None
                options = self.call.frame(tokens.shape, hidden, tokens.device).options
            ids = tokens
        else:
            positions = computed.long().argsort(dim=1, descending=True, stable=True)[:, :most]
            # Rows with fewer positions bring one of theirs more than once, which changes nothing.
            positions = torch.where(computed.gather(1, positions), positions, positions[:, :1])
            options, ids = self.call.some_positions(positions, present), tokens.gather(1, positions)
        # Everything is made anew where everything is called: compiled code would look at what was there before.
        store = Store({} if most is None and index is None else kept.states, number, width, index, positions)
        if self.policy.leaves_out_wanted:
            every = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            output = self.call.storing(ids, options, every, store)
            output = output._replace(rows=take(store.put("outputs", output.rows[:, None])[:, 0], wanted))
        else:
            places = wanted if positions is None else _places(positions, width).gather(1, wanted)
            output = self.call.storing(ids, options, places, store)
        kept.states.update(store.states)
        return output


def _places(positions: Tensor, width: int) -> Tensor:
    """``(n, P) -> (n, W)``: where each position stands among these, 0 if it does not."""
    places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    return torch.zeros(len(positions), width, dtype=torch.int64, device=positions.device).scatter_(1, positions, places)
