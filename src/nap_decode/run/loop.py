"""The loop: rows join a batch, take steps together, and leave it when they are finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Canvas, count_blocks
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.prediction import Prediction
from nap_decode.model.rows import Rows, append, host_tensor, join, narrow, select, to_device, to_rows
from nap_decode.parts.committer import Committer
from nap_decode.parts.scheduler import BlockScheduler, Plan
from nap_decode.parts.slots import Slots
from nap_decode.run.state import RowState
from nap_decode.speed.graphs import StepGraphs
from nap_decode.speed.reuse import Kept


@dataclass(frozen=True, eq=False)
class Layout:
    """What stays as it is, on the device: ``(B, W)``, but for the seeds."""

    block: Tensor  # of the scheduler, -1 for what is not decoded
    canvas_block: Tensor
    offsets: Tensor  # from the first slot of the scheduler's block
    prompt: Tensor
    present: Tensor
    seeds: Tensor  # (B,)

    @cached_property
    def by_block(self) -> tuple[Tensor, Tensor]:
        """Columns sorted by the canvas's block, and these blocks."""
        order = self.canvas_block.argsort(dim=1, stable=True)
        return order, self.canvas_block.gather(1, order)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a step starts from, on the device."""

    state: RowState
    layout: Layout
    is_open: Tensor  # (B, M) bool, blocks that may commit
    quota: Tensor  # (B, M) tokens that each block shall commit
    step: Tensor  # (B,) index of the step in each row's schedule


@dataclass(frozen=True, eq=False)
class _Progress:
    """What the host knows of each row."""

    number: Tensor  # (B,) the caller's number of the row; -1 once it was handed out
    length: Tensor  # (B,) tokens
    step: Tensor  # (B,) first step that may be taken next
    steps: Tensor  # (B,) steps that the row took
    passes: Tensor  # (B,) forward passes that it took part in
    remaining: Tensor  # (B, M) slots of each block that are masked
    unsettled: Tensor  # (B, M) 1 for blocks that stay open even so
    closed: Tensor  # (B, M) slots that were filled
    fewest: Tensor  # (B,) slots that were left at the best step so far
    stalled: Tensor  # (B,) steps since then


@dataclass(frozen=True, eq=False)
class _Timetable:
    """Steps to come; those of a row stand one after the other at the beginning."""

    slots: Tensor  # (B, S) slots of open blocks, on the host
    index: Tensor  # (B, S) index of the step in the row's schedule, on the host
    step: Tensor  # (B, S) the same on the device
    is_open: Tensor  # (B, S, M) bool, blocks that may commit
    quota: Tensor  # (B, S, M) tokens that each block shall commit


@dataclass(frozen=True, eq=False)
class _Batch:
    """The rows that are there."""

    state: RowState
    layout: Layout
    plan: Plan
    progress: _Progress
    timetable: _Timetable
    memory: dict[str, Tensor]
    kept: dict[str, Kept]  # of the forward passes, if they reuse

    def rows(self, where: Tensor) -> _Batch:
        """Some of them, ``(B,)`` bool on the host."""
        index = where.nonzero()[:, 0]
        return select(self, index, to_device(index, self.state.tokens.device))


@dataclass(frozen=True, eq=False)
class Finished:
    """Rows that left: their numbers, what became of them, and on the host the passes and steps that they took."""

    numbers: list[int]
    state: RowState
    passes: Tensor
    steps_saved: Tensor
    computed: Tensor  # (B, S) positions that each forward pass computed, 0 behind the last; S is 0 if it was all

    @classmethod
    def sorted(cls, groups: Sequence[Finished]) -> Finished:
        """All rows of the groups, by their numbers."""
        whole = groups[0]
        for group in groups[1:]:
            whole = cls(
                numbers=whole.numbers + group.numbers,
                state=join(whole.state, group.state, {}),
                passes=torch.cat([whole.passes, group.passes]),
                steps_saved=torch.cat([whole.steps_saved, group.steps_saved]),
                computed=append(whole.computed, group.computed),
            )
        order = torch.tensor(whole.numbers, device="cpu").argsort()
        return whole if len(groups) == 1 else whole.rows(order)

    def rows(self, index: Tensor) -> Finished:
        """Some of the rows, ``(n,)`` int64 indices on the host."""
        numbers = [self.numbers[i] for i in index.tolist()]
        return replace(select(self, index, to_device(index, self.state.tokens.device)), numbers=numbers)


class Decoding:
    """A batch of rows on their way.

    Args:
        denoiser: the model.
        scheduler: plans the steps of each row.
        committer: takes them.
        close_on: ids that end a block: what is behind them in the block is filled up instead of being decoded.
        is_watched: whether a callback looks at the rows after every step, and may change them.
        graphs: takes the steps, if they are captured; rows that are finished then stay in the batch until others
            take their places or only half of it is busy, so that there are few shapes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: BlockScheduler,
        committer: Committer,
        *,
        close_on: Sequence[int] = (),
        is_watched: bool = False,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.denoiser, self.scheduler, self.committer = denoiser, scheduler, committer
        self.is_watched = is_watched
        self.graphs = graphs
        self.ends = host_tensor(close_on, denoiser.device) if close_on else None
        pad = denoiser.pad_token_id  # the mask, if there is no other
        self.fill = close_on[0] if close_on and pad == denoiser.mask_token_id else pad
        # All steps are known in advance, unless the model or a callback has a say.
        self.is_fixed = not (committer.is_adaptive or is_watched or close_on)
        self.forward_passes = 0
        self._furthest = 0  # steps of the row that has taken most
        self.vocab_size = denoiser.num_embeddings  # what the logits say is surer
        self._batch: _Batch | None = None
        self._memory: dict[str, Tensor] = {}  # of the parts; they change it themselves
        self._kept: dict[str, Kept] = {}  # the same of the forward passes

    @property
    def width(self) -> int:
        """W, columns of the batch."""
        return 0 if self._batch is None else self._rows.width

    @property
    def size(self) -> int:
        """Rows that are not finished."""
        return 0 if self._batch is None else self._num_busy

    # ---------------------------------------------------------------------------------------- rows come and go

    def add(self, canvas: Canvas, numbers: Sequence[int], seeds: Tensor | None) -> Plan:
        """Let rows join the batch.

        Args:
            canvas: the rows.
            numbers: what the caller calls them.
            seeds: ``(n,)`` int64 on the host; None if nothing is drawn.

        Returns:
            What the scheduler plans for them.
        """
        partition, device = self.scheduler.partition(canvas), canvas.tokens.device
        plan = self.scheduler.plan(partition.lengths, partition.held, adaptive=self.committer.is_adaptive, seeds=seeds)
        nothing = torch.zeros(len(numbers), dtype=torch.int64, device="cpu")
        remaining = partition.lengths
        progress = _Progress(
            number=torch.tensor(list(numbers), device="cpu"),
            length=canvas.attention_mask.sum(1).cpu(),
            step=nothing,
            steps=nothing,
            passes=nothing,
            remaining=remaining,
            unsettled=torch.zeros_like(remaining),
            closed=torch.zeros_like(remaining),
            fewest=remaining.sum(1),
            stalled=nothing,
        )
        layout = Layout(
            block=to_rows(canvas, partition.block, -1),
            canvas_block=to_rows(canvas, canvas.block, -1),
            offsets=to_rows(canvas, partition.offsets, 0),
            prompt=to_rows(canvas, canvas.prompt, False),
            present=to_rows(canvas, canvas.attention_mask.bool(), False),
            seeds=to_device(nothing if seeds is None else seeds, device),
        )
        pad = self.denoiser.pad_token_id
        state = RowState.start(to_rows(canvas, canvas.tokens, pad), layout.block >= 0)
        coming = _Batch(state, layout, plan, progress, self._timetable(plan, progress, device), {}, {})
        if self._batch is not None:
            batch = self._without_idle(self._settled(self._batch), room=len(numbers))
            # Zero stands for nothing.
            memory = {
                name: torch.cat([kept, kept.new_zeros(len(numbers), *kept.shape[1:])])
                for name, kept in batch.memory.items()
            }
            fills = {"block": -1, "canvas_block": -1, "tokens": pad}
            width = coming.layout.block.shape[1]
            kept = {name: known.with_rows(len(numbers), width) for name, known in batch.kept.items()}
            coming = replace(join(batch, coming, fills), memory=memory, kept=kept)
        self._set(coming)
        return plan

    def leave(self) -> list[Finished]:
        """Let the rows go that are finished; none while a callback watches and another is not."""
        if self._batch is None or self._taken < self._next_leave:
            return []
        batch = self._settled(self._batch)
        return [self._let_go(batch, batch.timetable.slots.sum(1) > 0)]

    def stop(self) -> list[Finished]:
        """Let all rows go as they are."""
        if self._batch is None:
            return []
        batch = self._settled(self._batch)
        return [self._let_go(batch, torch.zeros_like(batch.progress.number, dtype=torch.bool))]

    def _let_go(self, batch: _Batch, busy: Tensor) -> Finished:
        """All rows but the busy ones, ``(B,)`` bool, which stay."""
        gone = batch.rows(~busy & (batch.progress.number >= 0))
        number = torch.where(busy, batch.progress.number, -1)
        batch = replace(batch, progress=replace(batch.progress, number=number))
        if bool(busy.any()):
            self._set(self._without_idle(batch))
        else:
            self._batch = None
        return Finished(
            numbers=gone.progress.number.tolist(),
            state=gone.state,
            passes=gone.progress.passes,
            steps_saved=gone.plan.busy_steps - gone.progress.steps,
            computed=_computed(gone.kept, gone.progress.passes),
        )

    def _without_idle(self, batch: _Batch, room: int = 0) -> _Batch:
        """Without the rows that were handed out already; ``room`` others are about to come.

        Captured steps want few shapes: as many stay as make up the size that there was, or a half of it, a quarter ...
        """
        busy = batch.progress.number >= 0
        keep = number = int(busy.sum())
        if self.graphs is not None:
            keep = max(number, len(busy) - room)
            while not room and number <= -(-keep // 2) < keep:
                keep = -(-keep // 2)
        if keep == len(busy):
            return batch
        idle = ~busy
        batch = batch.rows(busy | (idle & (idle.cumsum(0) <= keep - number)))
        width = int(batch.progress.length.max())
        return replace(
            batch,
            layout=narrow(batch.layout, width),
            state=narrow(batch.state, width),
            kept={name: known.narrowed(width) for name, known in batch.kept.items()},
        )

    def _set(self, batch: _Batch) -> None:
        """Go on with these rows."""
        layout, timetable = batch.layout, batch.timetable
        if self._batch is None or self._batch.layout is not layout:
            self._rows = Rows(tuple(batch.progress.length.tolist()), layout.prompt, layout.present)
        self._batch, self._memory, self._kept = batch, batch.memory, batch.kept
        # Plain numbers, so that a step asks no tensor, not even one of the host.
        self._taken, self._calls = 0, list[int]()
        self._widths, self._totals = timetable.slots.amax(0).tolist(), timetable.slots.sum(0).tolist()
        self._numbers = torch.where(timetable.slots > 0, timetable.index + 1, 0).amax(0).tolist()
        ends = (timetable.slots > 0).sum(1)[batch.progress.number >= 0].tolist()
        self._num_busy = len(ends)
        self._most = int(batch.plan.lengths.sum(1).max())
        self._next_leave = max(ends) if self.is_watched else min(ends)

    def _settled(self, batch: _Batch) -> _Batch:
        """The batch after the steps that were taken since it was set: what they mean for its rows is noted down."""
        taken, timetable, progress = self._taken, batch.timetable, batch.progress
        active = timetable.slots[:, :taken] > 0
        steps = torch.where(active, timetable.index[:, :taken] + 1, 0)
        self._taken = 0
        return replace(
            batch,
            progress=replace(
                progress,
                steps=progress.steps + active.sum(1),
                passes=progress.passes + active.long() @ torch.tensor(self._calls, dtype=torch.int64, device="cpu"),
                step=torch.cat([progress.step[:, None], steps], dim=1).amax(1),
            ),
            timetable=replace(timetable, **{f.name: getattr(timetable, f.name)[:, taken:] for f in fields(timetable)}),
        )

    # ---------------------------------------------------------------------------------------- steps

    def _timetable(self, plan: Plan, progress: _Progress, device: torch.device) -> _Timetable:
        """The next step, or all if they are fixed: computed on the host, and brought to the device together."""
        adaptive = self.committer.is_adaptive
        step, remaining = progress.step, progress.remaining
        # A block that is not settled stays open, as if one of its slots were masked; but it is owed nothing.
        occupied = torch.maximum(remaining, progress.unsettled)
        none = torch.zeros_like(remaining)
        steps, quotas, slots = list[Tensor](), list[Tensor](), list[Tensor]()
        while not steps or (self.is_fixed and bool((occupied > 0).any())):
            if adaptive:
                quota, is_open = plan.least(remaining), plan.open(occupied)
            else:
                quota, step = plan.next(remaining, step, progress.closed)
                is_open = quota > 0
            # A committer that revises looks at all slots of an open block, the others at masked ones.
            seen = plan.lengths - progress.closed if self.committer.revises else remaining
            steps.append(step)
            quotas.append(quota)
            slots.append(torch.where(is_open, seen, none))
            step = step + 1
            remaining = occupied = remaining - quota
        counts, index = torch.stack(slots, dim=1), torch.stack(steps, dim=1)  # (B, S, M), (B, S)
        return _Timetable(
            slots=counts.sum(2),
            index=index,
            step=to_device(index, device),
            is_open=to_device(counts > 0, device),
            quota=to_device(torch.stack(quotas, dim=1), device),
        )

    def step(self, edit: Callable[[RowState, int], RowState] | None = None) -> None:
        """One step of every row that is not finished.

        Args:
            edit: called with the state and the number of steps that the furthest row has taken; returns the state
                to go on from.
        """
        batch, taken = self._batch, self._taken
        assert batch is not None
        timetable = batch.timetable
        take_step = self.take_step if self.graphs is None else partial(self.graphs, self.take_step, self._most)
        state, unsettled, passes = take_step(
            StepInputs(
                state=batch.state,
                layout=batch.layout,
                is_open=timetable.is_open[:, taken],
                quota=timetable.quota[:, taken],
                step=timetable.step[:, taken],
            ),
            self._rows,
            self._widths[taken],
            self._totals[taken],
        )
        self.forward_passes += passes
        self._calls.append(passes)
        self._taken += 1
        if edit is not None:
            self._furthest = max(self._furthest, self._numbers[taken])
            state = edit(state, self._furthest)
        self._batch = replace(batch, state=state)
        if not self.is_fixed:
            self._look(self._batch, unsettled)

    def take_step(self, inputs: StepInputs, rows: Rows, width: int, total: int) -> tuple[RowState, Tensor | None, int]:
        """Everything that a step does on the device, without waiting for it.

        Args:
            inputs: what it starts from.
            rows: the rows.
            width: K, slots of open blocks in the row that has most, or more.
            total: T, slots of open blocks, or more.

        Returns:
            The new state, blocks that stay open ``(B, M)``, and the number of forward passes.
        """
        state, layout, revises = inputs.state, inputs.layout, self.committer.revises
        wanted = state.decodable & ~state.closed if revises else state.masked
        slots = Slots.pack(
            wanted & inputs.is_open.gather(1, layout.block.clamp(min=0)),
            layout.block,
            inputs.quota,
            width=width,
            total=total,
            committed=~state.masked if revises else None,
            seeds=layout.seeds,
            step=inputs.step,
            row_tokens=state.tokens,
            row_offsets=layout.offsets,
            memory=self._memory,
        )
        predict = _Predict(self.denoiser, rows, state.tokens, slots, self._kept)
        commit = self.committer(slots, predict)
        if self.graphs is not None and (self._memory or commit.unsettled is not None):
            raise NapDecodeError(
                f"{type(self.committer).__name__} or a part of it keeps things from step to step, which captured steps "
                'cannot; use compile="kernels"'
            )
        state = state.after(commit, slots, self.denoiser.mask_token_id)
        if self.ends is not None:
            state = state.close(self.ends, self.fill, *layout.by_block, inputs.step)
        self.vocab_size = predict.vocab_size or self.vocab_size
        return state, commit.unsettled, predict.calls

    def _look(self, batch: _Batch, unsettled: Tensor | None) -> None:
        """Find out what is left, and plan the next step: the one place that waits for the device.

        Args:
            batch: the rows.
            unsettled: ``(B, M)`` bool, blocks that shall stay open.

        Raises:
            NapDecodeError: nothing has changed for long; a callback masked slots when no step was left.
        """
        active = batch.timetable.slots[:, 0] > 0
        batch = self._settled(batch)
        progress, state, block = batch.progress, batch.state, batch.layout.block
        num_blocks = progress.remaining.shape[1]
        counts = [count_blocks(block, num_blocks, where) for where in (state.masked, state.closed)]
        counts.append(torch.zeros_like(counts[0]) if unsettled is None else unsettled.long())
        remaining, closed, occupied = torch.stack(counts).cpu()
        left = torch.maximum(remaining, occupied).sum(1)
        stalled = torch.where((left < progress.fewest) | ~active, 0, progress.stalled + 1)
        if int(stalled.max()) > self.committer.patience:
            raise NapDecodeError(
                f"{int(stalled.max())} steps in a row came no further; {type(self.committer).__name__}, its parts or "
                "the callback must leave fewer slots masked, and blocks settled, some time"
            )
        is_over = (progress.step >= batch.plan.steps) & (closed.sum(1) == 0) & (remaining.sum(1) > 0)
        if not self.committer.is_adaptive and bool(is_over.any()):
            raise NapDecodeError(
                f"a callback masked slots after step {int(progress.step.max())}, the last one; mask them earlier, or "
                "decode with an adaptive selection, which has no last step"
            )
        progress = replace(
            progress,
            remaining=remaining,
            unsettled=occupied,
            closed=closed,
            fewest=torch.minimum(progress.fewest, left),
            stalled=stalled,
        )
        timetable = self._timetable(batch.plan, progress, block.device)
        self._set(replace(batch, progress=progress, timetable=timetable))


def _computed(kept: dict[str, Kept], passes: Tensor) -> Tensor:
    """``(B, S)``: positions that were computed in each of the passes ``(B,)`` of a row, 0 behind the last."""
    if not kept or not len(passes):
        return torch.zeros(len(passes), 0, dtype=torch.int64, device="cpu")
    counts = torch.stack([known.counts for known in kept.values()]).sum(0).cpu()
    number = torch.arange(int(passes.max()), device="cpu")
    index = next(iter(kept.values())).start.cpu()[:, None] + number
    own = counts.gather(1, index.clamp(max=counts.shape[1] - 1))
    return torch.where(number < passes[:, None], own, 0)


class _Predict:
    """What a committer asks the model at one step; see :class:`~nap_decode.parts.committer.Predict`."""

    def __init__(self, denoiser: Denoiser, rows: Rows, tokens: Tensor, slots: Slots, kept: dict[str, Kept]) -> None:
        self.denoiser, self.rows, self.tokens, self.slots, self.kept = denoiser, rows, tokens, slots, kept
        self.calls = 0
        self.vocab_size: int | None = None

    def __call__(self, tokens: Tensor | None = None, *, leave_one_out: bool = False) -> Prediction:
        slots, whole, index = self.slots, self.tokens, self.slots.index
        if tokens is not None and leave_one_out:
            raise NapDecodeError("alternatives cannot be predicted with slots left out; ask for one of the two")
        if tokens is not None:
            spread = torch.stack([slots.spread(alternative) for alternative in tokens])  # (J, B, W)
            whole = torch.where(slots.rank >= 0, spread, whole).flatten(0, 1)
            index = index.repeat(len(tokens), 1)
        hidden = slots.committed if leave_one_out else None
        if leave_one_out:  # what only fills a row up has no part in it
            index = index.where(slots.block < slots.quota.shape[1], -1)
        prediction = self.denoiser.predict(
            self.rows,
            whole,
            index,
            slots.places,
            hidden=hidden,
            alternatives=None if tokens is None else len(tokens),
            kept=self.kept,
        )
        self.calls += 1
        self.vocab_size = prediction.vocab_size
        return prediction
