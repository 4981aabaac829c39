"""The loop: rows arrive, take turns together, and leave when they are finished.

Its index spaces, from the outside in::

    B rows x W columns     the canvas; a column is a position                 State, (B, W)
    B rows x M blocks      what a step may commit in each                     Agenda, (B, S, M) for S turns ahead
    B rows x K slots       those of the open blocks, packed to the left       Slots, Proposal, Decision, (B, K)
    T places               the slots there are, without what fills rows up    Prediction, (T,)
    R of the T             a chunk whose logits (R, V) exist at one time      Candidates, (R,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from nap_decode.base.batching import host_tensor, join, mapped, narrow, select, to_device
from nap_decode.base.errors import NapDecodeError, check_tensor
from nap_decode.base.rows import Rows
from nap_decode.canvas import Canvas, count_blocks
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.prediction import Prediction
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.scheduler import Left, Plan, Scheduler
from nap_decode.parts.slots import Decision, Slots
from nap_decode.run.state import State


@dataclass(frozen=True, eq=False)
class Given:
    """What stays as it is: ``(B, W)`` on the device, but for the last two."""

    block: Tensor  # of the scheduler, -1 for what is not decoded
    canvas_block: Tensor
    offsets: Tensor  # from the first slot of the scheduler's block
    prompt: Tensor
    present: Tensor
    seeds: Tensor  # (B,)
    lengths: Tensor  # (B,) on the host, tokens of each row

    @cached_property
    def rows(self) -> Rows:
        """The rows as the model sees them."""
        return Rows(tuple(self.lengths.tolist()), self.prompt, self.present)

    @cached_property
    def by_block(self) -> tuple[Tensor, Tensor]:
        """Columns sorted by the canvas's block, and these blocks."""
        order = self.canvas_block.argsort(dim=1, stable=True)
        return order, self.canvas_block.gather(1, order)


@dataclass(frozen=True, eq=False)
class Agenda:
    """Turns to come: all of a fixed schedule, or the next one."""

    slots: Tensor  # (B, S) host: slots to look at; 0 when the row has nothing to do any more
    index: Tensor  # (B, S) host: index of the step in the row's schedule
    step: Tensor  # (B, S) device: the same
    is_open: Tensor  # (B, S, M) device: blocks that may commit
    quota: Tensor  # (B, S, M) device: tokens that each block commits
    ahead: Tensor | None = None  # (B, S, 1 + M, M) device: see Slots

    @cached_property
    def turns(self) -> tuple[list[int], list[int], list[int]]:
        """Of each turn K, T, and the steps that the furthest row has taken then; plain numbers, asked at every turn."""
        furthest = torch.where(self.slots > 0, self.index + 1, 0).amax(0)
        return self.slots.amax(0).tolist(), self.slots.sum(0).tolist(), furthest.tolist()

    @cached_property
    def ends(self) -> list[int]:
        """Turns that each row takes."""
        counts: list[int] = (self.slots > 0).sum(1).tolist()
        return counts

    def rest(self, taken: int) -> Agenda:
        """What is left after some turns."""
        rest: Agenda = mapped(self, lambda tensor: tensor[:, taken:])
        return rest


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows on their way; every tensor has them as its first dimension."""

    number: Tensor  # (B,) host: what the caller calls them
    given: Given
    state: State
    plan: Plan
    agenda: Agenda
    left: Left  # as the host knows it; brought up to date where the model or a callback has a say
    reopened: Tensor  # (B, M) host: 1 for blocks that a reviser wants to see again
    fewest: Tensor  # (B,) host: slots that were left at the best step so far
    stalled: Tensor  # (B,) host: steps since then
    spent: Tensor  # (B, 2) host: turns, and the forward passes of these
    memory: dict[str, Tensor] = field(default_factory=dict)  # of the parts
    kept: dict[str, Any] = field(default_factory=dict)  # of the forward passes, if they reuse
    passes: tuple[int, ...] = ()  # of each turn taken since the agenda begins

    @property
    def is_busy(self) -> bool:
        """Whether any row has a turn left."""
        return len(self.passes) < max(self.agenda.ends)

    def settled(self) -> Batch:
        """The same with an agenda that begins at the next turn."""
        if not self.passes:
            return self
        taken = len(self.passes)
        active = self.agenda.slots[:, :taken] > 0
        step = torch.where(active, self.agenda.index[:, :taken] + 1, 0).amax(1)
        passes = active.long() @ torch.tensor(self.passes, dtype=torch.int64, device="cpu")
        left = replace(self.left, step=torch.maximum(self.left.step, step))
        spent = self.spent + torch.stack([active.sum(1), passes], dim=1)
        return replace(self, agenda=self.agenda.rest(taken), left=left, spent=spent, passes=())

    def some(self, where: Tensor) -> Batch:
        """Some of the rows, ``(B,)`` bool on the host, in no more columns than they need."""
        if bool(where.all()):
            return self
        index = where.nonzero()[:, 0]
        batch = select(self, index, to_device(index, self.state.tokens.device))
        width = max(batch.given.lengths.tolist(), default=0)
        kept = {name: known.narrowed(width) for name, known in batch.kept.items()}
        return replace(batch, given=narrow(batch.given, width), state=narrow(batch.state, width), kept=kept)

    def joined(self, new: Batch, pad_token_id: int) -> Batch:
        """These rows, then new ones; zero stands for nothing in what parts keep."""
        batch, count, width = self.settled(), len(new.number), new.state.tokens.shape[1]
        memory = {name: torch.cat([v, v.new_zeros(count, *v.shape[1:])]) for name, v in batch.memory.items()}
        kept = {name: known.with_rows(count, width) for name, known in batch.kept.items()}
        both = join(batch, new, {"block": -1, "canvas_block": -1, "tokens": pad_token_id})
        return replace(both, memory=memory, kept=kept)


@dataclass(frozen=True, eq=False)
class Turn:
    """What a turn reads on the device."""

    state: State
    given: Given
    is_open: Tensor  # (B, M) bool, blocks that may commit
    quota: Tensor  # (B, M) tokens that each block shall commit
    step: Tensor  # (B,) index of the step in each row's schedule
    ahead: Tensor | None  # (B, 1 + M, M), see Slots


Arrivals: TypeAlias = "Callable[[Batch | None], Batch | None]"
"""The rows that join a batch now, made by :meth:`Loop.start`; None for none.  Without a batch, None is the end."""
Captured: TypeAlias = "Callable[..., tuple[State, Tensor | None, int]]"
"""Takes turns from graphs, see :class:`~nap_decode.speed.graphs.Graphs`."""
Watch: TypeAlias = Callable[[State, int], State]
"""Sees the state after every turn, and the steps that the furthest row has taken; returns the state to go on from."""


class Loop:
    """Decodes batches of rows.

    Args:
        denoiser: the model.
        decoder: how to decode.
        ends: ids that end a block: what is behind them in the block is filled up instead of being decoded.
        graphs: takes the turns, if they are captured.
        watch: see :data:`Watch`; rows that are finished then wait for the others.

    Example:
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=12)
        >>> loop = sampler.loop()
        >>> batch = loop.start(sampler.canvas("6 0 6 4 6 2 1 2 4 7 0 6 ="))
        >>> while batch.is_busy:
        ...     batch = loop.step(batch)
        ...     print(int(batch.state.masked.sum()), "masked")
        18 masked
        2 masked
        0 masked
    """

    def __init__(
        self,
        denoiser: Denoiser,
        decoder: Decoder,
        *,
        ends: Sequence[int] = (),
        graphs: Captured | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.denoiser, self.scheduler, self.committer = denoiser, decoder.scheduler, decoder.committer
        self.needs, self.graphs, self.watch = decoder.needs, graphs, watch
        self.ends = host_tensor(ends, denoiser.device) if ends else None
        pad = denoiser.pad_token_id  # the mask, if there is no other
        self.fill = ends[0] if ends and pad == denoiser.mask_token_id else pad
        # All turns are known in advance, unless the model or somebody who watches has a say.
        self.is_fixed = not (self.needs.adaptive or watch or ends)
        self.turns = self.forward_passes = 0
        self.furthest = 0  # steps of the row that has taken most
        self.vocab_size = denoiser.call.num_embeddings  # what the logits say is surer

    def run(self, arrivals: Arrivals, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Decode whatever arrives; yields the rows that are finished, or all if it is stopped."""
        batch: Batch | None = None
        while True:
            # 1. Rows arrive; a fixed schedule is worked out to its end, on the host.
            if (new := arrivals(batch)) is not None:
                batch = new if batch is None else batch.joined(new, self.denoiser.pad_token_id)
            if batch is None:
                return
            # 2. Rows leave that have no turn left: each at once, or together while somebody watches.
            ends, taken, is_stopped = batch.agenda.ends, len(batch.passes), stop()
            if is_stopped or taken >= (min(ends) if self.watch is None else max(ends)):
                busy = torch.tensor([end > taken and not is_stopped for end in ends], device="cpu")
                batch = batch.settled()
                yield batch.some(~busy)
                batch = batch.some(busy) if bool(busy.any()) else None
                continue
            # 3. and 4. A turn, on the device; the next one stands in the agenda, or depends on what is left.
            batch = self.step(batch)

    def start(self, canvas: Canvas, numbers: Sequence[int] | None = None, seeds: Tensor | None = None) -> Batch:
        """A batch of rows that have taken no turn yet.

        Args:
            canvas: the rows.
            numbers: what the caller calls them.
            seeds: ``(B,)`` int64 on the host, the rows' seeds; None if nothing is drawn.

        Raises:
            NapDecodeError: see :meth:`Scheduler.plan`; not a seed for every row, though something is drawn.
        """
        if self.needs.random and (seeds is None or seeds.dtype != torch.int64 or len(seeds) != len(canvas.tokens)):
            raise NapDecodeError(
                f"the decoder draws; pass seeds=, int64 ({len(canvas.tokens)},), one for each row, not {seeds!r:.80}"
            )
        partition, device = self.scheduler.partition(canvas), canvas.tokens.device
        lengths, count = partition.lengths, len(canvas.tokens)
        plan = self.scheduler.plan(lengths, partition.held, adaptive=self.needs.adaptive, seeds=seeds)
        none, reopened = torch.zeros(count, dtype=torch.int64, device="cpu"), torch.zeros_like(lengths)
        agenda, left = self._agenda(plan, Left.all(lengths), reopened, device)
        given = Given(
            block=partition.block,
            canvas_block=canvas.block,
            offsets=_offsets(partition.block),
            prompt=canvas.prompt,
            present=canvas.attention_mask.bool(),
            seeds=to_device(none if seeds is None else seeds, device),
            lengths=canvas.row_lengths,
        )
        number = torch.tensor(range(count) if numbers is None else list(numbers), device="cpu")
        state, spent = State.start(canvas.tokens, partition.block >= 0), torch.stack([none, none], dim=1)
        return Batch(number, given, state, plan, agenda, left, reopened, lengths.sum(1), none, spent)

    @torch.no_grad()
    def step(self, batch: Batch) -> Batch:
        """One turn of every row that has any left, and a look at what is left then, if that is not known.

        The batch that is given stays as it is, so that one can go on from it again; only if keys and values are reused
        (``reuse=``), they are overwritten in place.

        Raises:
            NapDecodeError: no row has a turn left.
        """
        if not batch.is_busy:
            raise NapDecodeError("no row has a turn left; ask batch.is_busy before every step")
        agenda, number = batch.agenda, len(batch.passes)
        width, total, furthest = (values[number] for values in agenda.turns)
        is_open, quota, index = (t[:, number] for t in (agenda.is_open, agenda.quota, agenda.step))
        ahead = None if agenda.ahead is None else agenda.ahead[:, number]
        turn = Turn(batch.state, batch.given, is_open, quota, index, ahead)
        memory, kept, rows = {**batch.memory}, {**batch.kept}, batch.given.rows
        take = partial(self._take, memory=memory, kept=kept)
        if self.graphs is None:
            state, unsettled, passes = take(turn, rows, width, total)
        else:
            state, unsettled, passes = self.graphs(take, int(batch.plan.lengths.sum(1).max()), turn, rows, width)
        self.turns += 1
        self.forward_passes += passes
        if self.watch is not None:
            self.furthest = max(self.furthest, furthest)
            state = self.watch(state, self.furthest)
        batch = replace(batch, state=state, memory=memory, kept=kept, passes=(*batch.passes, passes))
        return batch if self.is_fixed else self._look(batch, unsettled)

    # ---------------------------------------------------------------------------------------- on the host

    def _agenda(self, plan: Plan, left: Left, reopened: Tensor, device: torch.device) -> tuple[Agenda, Left]:
        """The next turn, or all of them: computed on the host, and brought to the device together."""
        scheduler, ahead = self.scheduler, None
        turns = list[tuple[Tensor, Tensor, Tensor, Tensor]]()  # what is seen and open, quota, and index of the step
        while True:
            # A committer that revises looks at all slots of an open block, the others at masked ones.
            seen = plan.lengths - left.closed if self.needs.committed else left.masked
            if self.needs.adaptive:
                # A block that is to be seen again stays open, as if one of its slots were masked; it is owed nothing.
                is_open = scheduler.may_commit(plan, torch.maximum(left.masked, reopened))
                quota = scheduler.least(plan, left.masked)
                if self.needs.ahead:
                    ahead = _ahead(scheduler, plan, left.masked)
                    is_open = (ahead > 0).any(1)
            else:
                quota, left = scheduler.next(plan, left)
                is_open = quota > 0
            turns.append((seen, is_open, quota, left.step))
            if not self.is_fixed or not bool(left.masked.any()):
                break
            if len(turns) > plan.targets.shape[1]:
                raise NapDecodeError(
                    f"{type(scheduler.schedule).__name__} leaves {left.masked.sum(1).tolist()} tokens after the last "
                    "step; it must end with all of them"
                )
            left = replace(left, step=left.step + 1)
        seen, is_open, quota, index = (torch.stack(values, dim=1) for values in zip(*turns, strict=True))
        slots = torch.where(is_open, seen, 0)  # (B, S, M)
        step, may, quota = (to_device(tensor, device) for tensor in (index, slots > 0, quota))
        ahead = None if ahead is None else to_device(ahead[:, None], device)
        return Agenda(slots.sum(2), index, step, may, quota, ahead), left

    def _look(self, batch: Batch, unsettled: Tensor | None) -> Batch:
        """Find out what is left, and plan the next turn: the one place that waits for the device.

        ``unsettled``, ``(B, M)`` bool, are the blocks that shall stay open.
        """
        active = batch.agenda.slots[:, 0] > 0
        batch = batch.settled()
        plan, block, number = batch.plan, batch.given.block, batch.plan.lengths.shape[1]
        counts = [count_blocks(block, number, where) for where in (batch.state.masked, batch.state.closed)]
        counts.append(torch.zeros_like(counts[0]) if unsettled is None else unsettled.long())
        masked, closed, reopened = torch.stack(counts).cpu()
        now = torch.maximum(masked, reopened).sum(1)
        stalled = torch.where((now < batch.fewest) | ~active, 0, batch.stalled + 1)
        if int(stalled.max()) > self.committer.patience:
            raise NapDecodeError(
                f"{int(stalled.max())} steps in a row came no further; {type(self.committer).__name__}, its parts or "
                "the callback must leave fewer slots masked, and blocks settled, some time"
            )
        step = batch.left.step
        is_over = (step >= plan.steps) & (closed.sum(1) == 0) & (masked.sum(1) > 0)
        if not self.needs.adaptive and bool(is_over.any()):
            raise NapDecodeError(
                f"a callback masked slots after step {int(step.max())}, the last one; mask them earlier, or decode "
                "with an adaptive selection, which has no last step"
            )
        left = replace(batch.left, masked=masked, closed=closed)
        agenda, left = self._agenda(plan, left, reopened, block.device)
        fewest = torch.minimum(batch.fewest, now)
        return replace(batch, agenda=agenda, left=left, reopened=reopened, fewest=fewest, stalled=stalled)

    # ---------------------------------------------------------------------------------------- on the device

    def _take(
        self, turn: Turn, rows: Rows, width: int, total: int, *, memory: dict[str, Tensor], kept: dict[str, Any]
    ) -> tuple[State, Tensor | None, int]:
        """The state after a turn, blocks that stay open ``(B, M)``, and the number of forward passes.

        It is a function of tensors and of K and T alone, and does not wait, so that it can be captured.
        """
        state, given, revises = turn.state, turn.given, self.needs.committed
        wanted = (given.block >= 0) & ~state.closed if revises else state.masked
        slots = Slots.pack(
            wanted & turn.is_open.gather(1, given.block.clamp(min=0)),
            given.block,
            turn.quota,
            width=width,
            total=total,
            committed=~state.masked if revises else None,
            seeds=given.seeds,
            step=turn.step,
            row_tokens=state.tokens,
            row_offsets=given.offsets,
            memory=memory,
            ahead=turn.ahead,
        )
        predict = _Predict(self.denoiser, rows, slots, kept)
        decision = self.committer(slots, predict)
        self._check_decision(decision, slots)
        if self.graphs is not None and (memory or decision.unsettled is not None):
            raise NapDecodeError(
                f"{type(self.committer).__name__} or a part of it keeps things from step to step, which captured steps "
                'cannot; use compile="kernels"'
            )
        state = state.after(decision, slots, self.denoiser.mask_token_id)
        if self.ends is not None:
            state = state.close(self.ends, self.fill, *given.by_block, turn.step)
        self.vocab_size = predict.vocab_size or self.vocab_size
        return state, decision.unsettled, predict.calls

    def _check_decision(self, decision: Decision, slots: Slots) -> None:
        """Raise unless a committer, and parts of it that may be somebody else's, returned what they must."""
        name, shape = type(self.committer).__name__, slots.index.shape
        if not isinstance(decision, Decision):
            raise NapDecodeError(f"{name}, or its reviser, must return a Decision, not {decision!r:.80}")
        who = f"decided by {name} or a part of it,"
        check_tensor(f"tokens, {who}", decision.tokens, shape, torch.int64)
        check_tensor(f"confidence, {who}", decision.confidence, shape, None)
        check_tensor(f"chosen, {who}", decision.chosen, shape, torch.bool)
        if decision.remasked is not None:
            check_tensor(f"remasked, {who}", decision.remasked, shape, torch.bool)
        if decision.unsettled is not None:
            check_tensor(f"unsettled, {who}", decision.unsettled, slots.quota.shape, torch.bool)


def _ahead(scheduler: Scheduler, plan: Plan, masked: Tensor) -> Tensor:
    """``(B, 1 + M, M)`` of :class:`~nap_decode.parts.Slots`, for slots ``(B, M)`` that are masked."""
    number = masked.shape[1]
    one_more = pad(torch.eye(number, dtype=torch.int64, device="cpu"), (0, 0, 1, 0))  # (1 + M, M)
    left = (masked[:, None] - one_more).clamp(min=0).flatten(0, 1)
    plan = select(plan, rows := torch.arange(len(masked), device="cpu").repeat_interleave(1 + number), rows)
    least = scheduler.least(plan, left) + 1
    return least.where(scheduler.may_commit(plan, left), 0).view(-1, 1 + number, number)


def _offsets(block: Tensor) -> Tensor:
    """``(B, W)`` columns from the first slot of each slot's block, whatever stands between."""
    columns = torch.arange(block.shape[1], device=block.device).expand_as(block)
    own = block.clamp(min=0)
    first = torch.full_like(block, block.shape[1])  # there are no more blocks than columns
    first = first.scatter_reduce(1, own, columns.where(block >= 0, block.shape[1]), "amin")
    return columns - first.gather(1, own)


class _Predict:
    """What a committer asks the model at one step; see :class:`~nap_decode.parts.Predict`."""

    def __init__(self, denoiser: Denoiser, rows: Rows, slots: Slots, kept: dict[str, Any]) -> None:
        self.denoiser, self.rows, self.slots, self.kept = denoiser, rows, slots, kept
        self.calls = 0
        self.vocab_size: int | None = None

    def __call__(self, tokens: Tensor | None = None, *, leave_one_out: bool = False) -> Prediction:
        slots, whole, hidden = self.slots, self.slots.row_tokens, None
        if tokens is not None and leave_one_out:
            raise NapDecodeError("alternatives cannot be predicted with slots left out; ask for one of the two")
        if tokens is not None:
            spread = torch.stack([slots.spread(alternative) for alternative in tokens])  # (J, B, W)
            whole = torch.where(slots.rank >= 0, spread, whole).flatten(0, 1)
            slots = slots.repeat(len(tokens))
        index = slots.index
        if leave_one_out:  # what only fills a row up has no part in it
            hidden, index = slots.committed, index.where(slots.block < slots.quota.shape[1], -1)
        prediction = self.denoiser.predict(self.rows, whole, index, slots.places, hidden=hidden, kept=self.kept)
        self.calls += 1
        self.vocab_size = prediction.vocab_size
        return prediction
