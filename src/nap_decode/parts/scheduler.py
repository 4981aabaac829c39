"""Which blocks a step may decode, and how many tokens each of them commits.

A scheduler is a partition of the slots into blocks, and one function: which of the slots that are left are decoded
now (:meth:`Scheduler.open`).  Everything else follows by playing it: the phases of a fixed schedule, the shares of a
step's budget, and the blocks that an adaptive decoder may commit in.

What three schedulers do with a canvas of two paths and a summary, two tokens per step (digits: the step that commits a
slot; inside a block the committer decides which)::

                             R_1      R_2      S
    MacroParallel            0 1 2 3  0 1 2 3  4 4     paths together, then the summary
    SemiAutoregressive       0 0 1 1  2 2 3 3  4 4     one block after the other
    AnyOrder                 ? ? ? ?  ? ? ? ?  ? ?     no blocks: the committer decides alone

All of it is exact int64 arithmetic on the host: the device is neither asked nor given work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.batching import to_device
from nap_decode.base.errors import NapDecodeError, check_between, check_flag, check_integer, check_part
from nap_decode.base.random import SCHEDULE_STREAM, uniform
from nap_decode.canvas import Canvas, count_blocks
from nap_decode.parts.needs import Needs
from nap_decode.parts.schedule import EvenSchedule, Schedule

_NEVER = 2**62


class Partition(NamedTuple):
    """The blocks that a scheduler distributes its budget over.

    Args:
        block: ``(B, W)`` int64, block of every slot to decode, -1 elsewhere.
        lengths: ``(B, M)`` int64 on the host, slots of each block.
        held: for each block whether the template marks it as held back.
    """

    block: Tensor
    lengths: Tensor
    held: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Left:
    """What a batch has left to do, on the host.

    Args:
        masked: ``(B, M)`` int64, slots that are masked.
        closed: ``(B, M)`` int64, slots that were filled because their block came to its end.
        step: ``(B,)`` int64, first step that may be taken next.
        weights: ``(B, M)`` int64, what was open when the stretch began in which nothing else opened or closed;
        given: ``(B, M)`` int64, and what each block has been given of it.
    """

    masked: Tensor
    closed: Tensor
    step: Tensor
    weights: Tensor
    given: Tensor

    @classmethod
    def all(cls, lengths: Tensor) -> Left:
        """Everything, before the first step."""
        nothing = torch.zeros_like(lengths)
        return cls(lengths, nothing, nothing.sum(1), nothing, nothing)


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule of B rows.  Made by :meth:`Scheduler.plan`.

    Args:
        lengths: ``(B, M)`` int64, slots of each block.
        held: ``(B, M)`` bool, blocks that are held back.
        targets: ``(B, S)`` int64, tokens that each row has committed after each step; S is 0 if that depends on the
            model.
        steps: ``(B,)`` int64, steps of each row.
    """

    lengths: Tensor
    held: Tensor
    targets: Tensor
    steps: Tensor

    @property
    def busy_steps(self) -> Tensor:
        """``(B,)`` steps at which any token is committed."""
        return (self.targets.diff(dim=1, prepend=torch.zeros_like(self.targets[:, :1])) > 0).sum(1)

    def due(self, step: Tensor) -> Tensor:
        """``(B,)`` tokens that each row has committed after a step ``(B,)``; after the last one, if that is past."""
        return self.targets.gather(1, torch.minimum(step, self._last)[:, None])[:, 0]

    @cached_property
    def _last(self) -> Tensor:
        return (self.steps - 1).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Scheduler(ABC):
    """Decides which blocks are decoded now.  A subclass writes :meth:`open`.

    Example:
        >>> class Backwards(Scheduler):  # from the last block to the first
        ...     def open(self, left, lengths, held):
        ...         behind = left.flip(1).cumsum(1).flip(1) - left  # slots left in the blocks behind
        ...         return left * (behind == 0)
        >>> scheduler = Backwards(tokens_per_step=2)
        >>> plan = scheduler.plan(torch.tensor([[4, 2]]))
        >>> scheduler.next(plan, Left.all(plan.lengths))[0].tolist()
        [[0, 2]]

    Args:
        steps: steps of every row.
        tokens_per_step: instead of ``steps``: each row takes its tokens divided by this, rounded up, in steps; 1 if
            neither is given.  With an adaptive selection it is the least number of tokens per step.
        schedule: how the tokens of a phase are spread over its steps.
    """

    steps: int | None = None
    tokens_per_step: int | None = None
    schedule: Schedule = EvenSchedule()

    either: ClassVar[tuple[str, ...]] = ("steps", "tokens_per_step")
    """Options of which one at most is given."""
    more_steps: ClassVar[str] = "ask for more steps"
    """How to mend it that there are fewer steps than phases."""

    def __post_init__(self) -> None:
        for name in self.either:
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.steps is not None and self.tokens_per_step is not None:
            raise NapDecodeError(f"give steps ({self.steps}) or tokens_per_step ({self.tokens_per_step}), not both")
        check_part("schedule", self.schedule, Schedule, "EvenSchedule()")

    @property
    def needs(self) -> Needs:
        """See :class:`Needs`; random if the number of tokens of a step is drawn."""
        return self.schedule.needs

    def partition(self, canvas: Canvas) -> Partition:
        """The blocks to distribute over; by default those of the canvas."""
        return Partition(canvas.block, canvas.lengths, canvas.held)

    @abstractmethod
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        """``(B, M)`` int64, slots of each block that are decoded now: at most ``left``, but some where any are left.

        Args:
            left: ``(B, M)`` int64, slots that are masked.
            lengths: ``(B, M)`` int64, all slots of each block.
            held: ``(B, M)`` bool, blocks that the template marks as held back.
        """

    def shares_steps(self) -> bool:
        """Whether a step that completes a phase gives what is left of its budget to the next one."""
        return False

    # ---------------------------------------------------------------------------------------- by playing it

    @property
    def _per_step(self) -> int:
        return 1 if self.tokens_per_step is None else int(self.tokens_per_step)

    def plan(
        self,
        lengths: Tensor,
        held: tuple[bool, ...] | None = None,
        *,
        adaptive: bool = False,
        seeds: Tensor | None = None,
    ) -> Plan:
        """Fix the steps of every row; refused are more steps than tokens, and fewer than phases.

        Args:
            lengths: ``(B, M)`` int64, slots of each block.
            held: for each block whether it is held back; none by default.
            adaptive: whether the number of steps depends on the model.
            seeds: ``(B,)`` int64, seeds of the rows; needed if the schedule is random.
        """
        is_held = torch.tensor(held or (False,) * lengths.shape[1], device=lengths.device).expand_as(lengths)
        total, phases = lengths.sum(1), self._phases(lengths, is_held)  # (B,), (B, P) tokens
        if adaptive:
            return Plan(lengths, is_held, total.new_zeros(len(total), 0), torch.zeros_like(total))
        steps = -(-total // self._per_step) if self.steps is None else torch.where(total > 0, int(self.steps), 0)
        phases = total[:, None] if self.shares_steps() else phases
        self._check_steps(total, steps, (phases > 0).sum(1))
        return Plan(lengths, is_held, self._targets(phases, divide_steps(phases, steps), seeds), steps)

    def _phases(self, lengths: Tensor, held: Tensor) -> Tensor:
        """``(B, P)`` tokens of each phase: what is open, if whatever is open is decoded at once."""
        left, phases = lengths, list[Tensor]()
        while not phases or bool((left > 0).any()):
            opened = self._opened(left, lengths, held)
            phases.append(opened.sum(1))
            left = left - opened
        return torch.stack(phases, dim=1)

    def _opened(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        """What :meth:`open` says, which may be somebody else's."""
        opened = self.open(left.clone(), lengths, held)
        if not isinstance(opened, Tensor) or opened.shape != left.shape or opened.dtype != left.dtype:
            got = f"{opened.dtype} {tuple(opened.shape)}" if isinstance(opened, Tensor) else f"{opened!r:.80}"
            raise NapDecodeError(
                f"{type(self).__name__}.open must return {left.dtype} {tuple(left.shape)}, as left is, not {got}"
            )
        in_range = torch.equal(opened, opened.clamp(min=0).minimum(left))
        if not (in_range and torch.equal(opened.any(1), left.any(1))):
            raise NapDecodeError(
                f"of {left.tolist()} slots left, {type(self).__name__}.open must open at least one in each row, "
                f"and no more than there are in a block, but opens {opened.tolist()}"
            )
        return opened

    def next(self, plan: Plan, left: Left) -> tuple[Tensor, Left]:
        """Tokens that each block commits at the next step of a fixed schedule at which its row has anything to do.

        A step's budget is what the row is behind its plan, not counting slots that were filled without being decoded.
        It is shared by what is open: the ideal shares since the last block opened or closed, rounded so that they make
        the budget exactly (:func:`fair_share`).

        Returns:
            ``(B, M)`` int64 quota; and what is left after it, with the step that is taken now.
        """
        decoded, step = (plan.lengths - left.masked - left.closed).sum(1), left.step
        while True:
            budget = (plan.due(step) - decoded).clamp(min=0)
            is_idle = (budget == 0) & (step < plan.steps) & left.masked.any(1)
            if not bool(is_idle.any()):
                break
            step = step + is_idle
        quota = torch.zeros_like(left.masked)
        while True:
            opened = self._opened(left.masked, plan.lengths, plan.held)
            is_new = (opened != left.weights - left.given).any(1, keepdim=True)
            weights, given = torch.where(is_new, opened, left.weights), left.given.masked_fill(is_new, 0)
            share = fair_share(weights, given, given.sum(1) + torch.minimum(budget, opened.sum(1))) - given
            quota, budget = quota + share, budget - share.sum(1)
            left = Left(left.masked - share, left.closed, step, weights, given + share)
            if not bool(budget.any()):
                return quota, left
            # The rest goes on to what opens next, unless nothing is left, or a block that closed early left it.
            budget = budget.where(left.masked.any(1) & (self.shares_steps() | ~left.closed.any(1)), 0)

    def least(self, plan: Plan, left: Tensor) -> Tensor:
        """``(B, M)`` int64: the fewest tokens that each block commits at a step of an adaptive decoder.

        ``tokens_per_step`` for each row, or what is open, shared by what each block still has.
        """
        opened = self._opened(left, plan.lengths, plan.held)
        return fair_share(opened, torch.zeros_like(opened), opened.sum(1).clamp(max=self._per_step))

    def may_commit(self, plan: Plan, left: Tensor) -> Tensor:
        """``(B, M)`` bool: blocks in which an adaptive decoder may commit; one that has begun may go on."""
        return ((self._opened(left, plan.lengths, plan.held) > 0) | (left < plan.lengths)) & (left > 0)

    def _targets(self, phases: Tensor, step_ends: Tensor, seeds: Tensor | None) -> Tensor:
        """``(B, S)`` tokens committed after each step, for phases ``(B, P)`` of tokens that end at ``step_ends``."""
        begin = phases.cumsum(1) - phases  # (B, P) tokens before each phase
        first = pad(step_ends, (1, 0))[:, :-1]  # (B, P) steps before each phase
        draws = torch.empty(phases.numel(), 0, device=phases.device)
        if self.schedule.needs.random:
            if seeds is None:
                raise NapDecodeError(f"{type(self.schedule).__name__} draws; pass the seeds of the rows")
            token = begin.flatten()[:, None] + torch.arange(int(phases.max()), device=phases.device)
            draws = uniform(seeds.repeat_interleave(phases.shape[1]), 0, SCHEDULE_STREAM, token)
        spread = self.schedule(phases.flatten(), (step_ends - first).flatten(), draws)
        spread = spread.view(*phases.shape, -1)  # (B, P, steps inside the phase)
        step = torch.arange(int(step_ends[:, -1].max()), device=phases.device).expand(len(phases), -1)
        phase = (step_ends[:, None] <= step[:, :, None]).sum(2).clamp(max=phases.shape[1] - 1)  # (B, S)
        inside = (step - first.gather(1, phase)).clamp(max=spread.shape[2] - 1)
        row = torch.arange(len(phases), device=phases.device)[:, None]
        return begin.gather(1, phase) + spread[row, phase, inside]

    def _check_steps(self, total: Tensor, steps: Tensor, num_phases: Tensor) -> None:
        asked = f"steps={self.steps}" if self.steps is not None else f"tokens_per_step={self.tokens_per_step}"
        for row in ((steps > total) & (not self.schedule.may_skip)).nonzero()[:1, 0].tolist():
            raise NapDecodeError(
                f"{asked} is more than the {int(total[row])} tokens to decode in row {row}, and every step must "
                f"commit at least one; ask for at most {int(total[row])} steps, or use tokens_per_step"
            )
        for row in (steps < num_phases).nonzero()[:1, 0].tolist():
            raise NapDecodeError(
                f"{asked} makes {int(steps[row])} steps for the {int(total[row])} tokens of row {row}, but "
                f"{type(self).__name__} decodes them in {int(num_phases[row])} phases of at least one step each; "
                f"{self.more_steps} (fewer tokens per step)"
            )


@dataclass(frozen=True, kw_only=True)
class MacroParallelScheduler(Scheduler):
    """NAP's rule: every step's budget is spread over all paths; the summary is held back.

    "The unmasking budget is distributed across all m reasoning blocks at every step" (arXiv 2602.23225, section 4.2);
    what the paper leaves open is decided here.  After every step each block has received its ideal share, rounded down
    or up (:func:`fair_share`); with fewer tokens per step than blocks, the blocks take turns.  The steps are divided
    between paths and summary in proportion to their tokens, at least one each.

    Args:
        hold_until: share of the other tokens, 0 to 1, that are committed before blocks that are held back open.  1
            decodes them last, 0 along with the others.
        share_last_step: let the summary use what is left of the step that completes the paths, instead of having steps
            of its own.

    Example:
        >>> scheduler = MacroParallelScheduler(tokens_per_step=2)
        >>> plan = scheduler.plan(torch.tensor([[3, 3, 2]]), held=(False, False, True))
        >>> left, rows = Left.all(plan.lengths), []
        >>> for step in range(int(plan.steps[0])):
        ...     quota, left = scheduler.next(plan, left)
        ...     rows += quota.tolist()
        >>> rows
        [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 2]]
    """

    hold_until: float = 1.0
    share_last_step: bool = False

    more_steps = "set share_last_step=True or hold_until=0.0, or ask for more steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("hold_until", self.hold_until, 0.0, 1.0)
        check_flag("share_last_step", self.share_last_step)

    @override
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        if self.hold_until == 1:
            first = left.masked_fill(held, 0)
            return torch.where(first.any(1, keepdim=True), first, left)
        free = lengths.masked_fill(held, 0)
        # ceil, but not of a product that is whole up to rounding: 0.7 * 10 = 7.000000000000001
        first_tokens = (free.sum(1).double() * self.hold_until - 1e-9).ceil().clamp(min=0).long()
        first = fair_share(free, torch.zeros_like(free), first_tokens)
        done = lengths - left
        is_first = held.any(1) & (done.sum(1) < first_tokens)
        return torch.where(is_first[:, None], (first - done).clamp(min=0), left)

    @override
    def shares_steps(self) -> bool:
        return self.share_last_step


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressiveScheduler(Scheduler):
    """One block after the other, each with steps in proportion to its tokens (LLaDA, arXiv 2502.09992).

    A block that the template marks as held back is one like the others.

    Args:
        block_length: cut each row's slots into blocks of this length, whatever the blocks of the canvas (the last one
            may be shorter); None to decode the blocks of the canvas in order.  For strict left to right use
            :class:`AnyOrderScheduler` with the confidence ``"leftmost"``, which costs less than blocks of one slot.
        on_grid: count the blocks from the start of the row instead of from its first slot, as models with block-causal
            attention do (LLaDA2, SDAR); the first block is then what the prompt left of it.

    Example:
        >>> SemiAutoregressiveScheduler().open(torch.tensor([[0, 3, 4]]), torch.tensor([[4, 4, 4]]), None).tolist()
        [[0, 3, 0]]
    """

    block_length: int | None = None
    on_grid: bool = False

    more_steps = "cut longer blocks, or ask for more steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("on_grid", self.on_grid)
        if self.block_length is not None:
            check_integer("block_length", self.block_length, 1)
        elif self.on_grid:
            raise NapDecodeError("on_grid needs block_length, the distance of the lines of the grid")

    @override
    def partition(self, canvas: Canvas) -> Partition:
        if self.block_length is None:
            return super().partition(canvas)
        decodable = canvas.host[1] >= 0
        index = torch.arange(decodable.shape[1], device="cpu").expand_as(decodable)
        index = (index if self.on_grid else decodable.cumsum(1) - 1) // self.block_length
        # On the grid a row's blocks are numbered from its first that has a slot, so that none before is empty.
        index = index - index.where(decodable, index.shape[1]).amin(1, keepdim=True)
        block = torch.where(decodable, index, -1)
        num_blocks = int(block.max()) + 1
        lengths = count_blocks(block, num_blocks)
        return Partition(to_device(block, canvas.block.device), lengths, (False,) * num_blocks)

    @override
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        return left * (left.cumsum(1) == left)  # nothing is left in the blocks in front


@dataclass(frozen=True, kw_only=True)
class AnyOrderScheduler(Scheduler):
    """No blocks: the budget of a step goes to any slots of the canvas ("AO" in the paper).

    Example:
        >>> AnyOrderScheduler(tokens_per_step=4).plan(torch.tensor([[10]])).targets.tolist()
        [[4, 7, 10]]
    """

    @override
    def partition(self, canvas: Canvas) -> Partition:
        block = torch.where(canvas.decodable, 0, -1)
        return Partition(block, canvas.lengths.sum(1, keepdim=True), (False,))

    @override
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        return left


def in_blocks(block_length: int | None, *, on_grid: bool = False) -> Scheduler:
    """Semi-autoregressive blocks of this length; None decodes anywhere."""
    if block_length is None and not on_grid:
        return AnyOrderScheduler()
    check_integer("block_length", block_length, 1)
    return SemiAutoregressiveScheduler(block_length=block_length, on_grid=on_grid)


def fair_share(weights: Tensor, committed: Tensor, target: Tensor) -> Tensor:
    """Tokens that each block has when its row has ``target``: its ideal share, rounded down or up.

    The ideal share of block b is ``target * weights[b] / sum(weights)``.  Called with growing targets,
    and each time with what it returned before, the shares never shrink, always make ``target`` exactly,
    and are always the ideal rounded down or up.  Each token is a unit job, released when the rounded-up
    ideal reaches it and due when the rounded-down ideal does; earliest deadline first meets all
    deadlines if that is possible at all, and the quota method of apportionment (Balinski and Young, 1975)
    shows that it is.

    Args:
        weights: ``(B, M)`` int64, tokens of each block.
        committed: ``(B, M)`` int64, tokens that each block has already.
        target: ``(B,)`` int64, tokens of each row.

    Returns:
        ``(B, M)`` int64.

    Example:
        >>> weights = torch.tensor([[2, 2, 2]])
        >>> committed = torch.zeros_like(weights)
        >>> for target in range(1, 4):
        ...     committed = fair_share(weights, committed, torch.tensor([target]))
        ...     print(committed.tolist()[0])
        [1, 0, 0]
        [1, 1, 0]
        [1, 1, 1]
    """
    total = weights.sum(1, keepdim=True).clamp(min=1)
    ideal = target[:, None] * weights  # times total
    lower = ideal // total
    share = torch.maximum(lower, committed)
    released = (ideal % total > 0) & (share == lower)
    due = ((lower + 1) * total - 1) // weights.clamp(min=1)  # less 1, which the order does not mind
    order = torch.where(released, due, _NEVER).argsort(dim=1, stable=True)
    spare = target[:, None] - share.sum(1, keepdim=True)
    return share + (released & (order.argsort(1) < spare))


def divide_steps(tokens: Tensor, steps: Tensor) -> Tensor:
    """Divide each row's steps between its phases in proportion to their tokens, at least one each.

    Args:
        tokens: ``(B, P)`` int64, tokens of each phase; a phase without tokens gets no step.
        steps: ``(B,)`` int64, from the number of phases with tokens to the number of tokens.

    Returns:
        ``(B, P)`` int64: the steps taken when each phase ends.

    Example:
        >>> divide_steps(torch.tensor([[990, 32]]), torch.tensor([256])).tolist()
        [[248, 256]]
    """
    total = tokens.sum(1, keepdim=True).clamp(min=1)
    steps = steps[:, None]
    begun = (tokens > 0).long().cumsum(1)  # phases with tokens up to here
    ends = (2 * steps * tokens.cumsum(1) + total) // (2 * total)  # rounded to the nearest
    ends = (ends - begun).clamp(min=0).cummax(1).values + begun  # at least one more than the phase before
    return torch.minimum(ends, steps - (begun[:, -1:] - begun))  # leave one for each phase to come
