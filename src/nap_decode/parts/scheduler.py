"""How many tokens each block may commit at each step.

A scheduler is a partition of the slots into blocks and a list of phases.  A phase says how many tokens
of each block it decodes; phases follow each other, and inside a phase every block gets its fair share of
every step's budget, which a :class:`~nap_decode.parts.schedule.Schedule` sets (even steps by default).

What the three schedulers do with a canvas of two paths and a summary, two tokens per step (digits: the
step that commits a slot; inside a block the committer decides which)::

                             R_1      R_2      S
    MacroParallel            0 1 2 3  0 1 2 3  4 4     paths together, then the summary
    SemiAutoregressive       0 0 1 1  2 2 3 3  4 4     one block after the other
    AnyOrder                 ? ? ? ?  ? ? ? ?  ? ?     no blocks: the committer decides alone

Quotas are exact: int64 arithmetic on tensors of shape (rows, blocks), without a branch that depends on their
values.  It would run on any device; the sampler runs it on the host, where a fixed schedule is known in
advance, so that the device is neither asked nor given work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError, check_between, check_flag, check_integer
from nap_decode.base.random import SCHEDULE_STREAM, uniform
from nap_decode.canvas import Canvas, count_blocks
from nap_decode.parts.schedule import EvenSchedule, Schedule

_NEVER = 2**62


@dataclass(frozen=True, eq=False)
class Partition:
    """The blocks that a scheduler distributes its budget over.

    Args:
        block: ``(B, L)`` block of every slot to decode, -1 elsewhere.
        lengths: ``(B, M)`` on the CPU, slots of each block.
        held: for each block whether it is held back until the others are done.
    """

    block: Tensor
    lengths: Tensor
    held: tuple[bool, ...]

    @cached_property
    def offsets(self) -> Tensor:
        """``(B, L)`` columns from the first slot of a slot's block to the slot."""
        inside, blocks = self.block >= 0, self.block.clamp(min=0)
        columns = torch.arange(self.block.shape[1], device=self.block.device).expand_as(blocks)
        first = torch.full((len(blocks), self.lengths.shape[1]), self.block.shape[1], device=self.block.device)
        first = first.scatter_reduce(1, blocks, columns.where(inside, self.block.shape[1]), "amin")
        return columns - first.gather(1, blocks)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a scheduler decided for one batch.  Made by :meth:`BlockScheduler.plan`.

    Args:
        phase_tokens: ``(B, P, M)`` tokens of each block that each phase decodes.
        targets: ``(B, S)`` tokens that each row has committed after each step.
        step_ends: ``(B, Q)`` steps taken when each stretch ends that has steps of its own: the phases, or
            all of them together.
        tokens_per_step: tokens that a step of an adaptive decoder commits at least.
    """

    phase_tokens: Tensor
    targets: Tensor
    step_ends: Tensor
    tokens_per_step: int

    @property
    def steps(self) -> Tensor:
        """``(B,)`` steps of each row in a fixed schedule."""
        return self.step_ends.amax(1)  # plans that were joined have zeros at the end

    @cached_property
    def lengths(self) -> Tensor:
        """``(B, M)`` slots of each block."""
        return self.phase_tokens.sum(1)

    @cached_property
    def _phase_ends(self) -> Tensor:
        return self.phase_tokens.sum(2).cumsum(1)  # (B, P) tokens

    @cached_property
    def _through(self) -> Tensor:
        return self.phase_tokens.cumsum(1)  # (B, P, M) tokens of each block when a phase ends

    def _phase(self, committed: Tensor) -> Tensor:
        """``(B, 1, M)`` index, for gathering, of the phase that decodes the next token after ``committed (B,)``."""
        ends = self._phase_ends
        phase = (ends <= committed[:, None]).sum(1).clamp(max=ends.shape[1] - 1)
        return phase[:, None, None].expand(-1, 1, self.phase_tokens.shape[2])

    def _due(self, remaining: Tensor) -> Tensor:
        """``(B, M)`` tokens that each block has when the phase ends that decodes the next token."""
        return self._through.gather(1, self._phase((self.lengths - remaining).sum(1)))[:, 0]

    def quota(self, remaining: Tensor, step: Tensor | int) -> Tensor:
        """Tokens that each block commits at a step of a fixed schedule.

        If fewer or more tokens than planned were committed (a callback edited the canvas), the quota
        returns to the plan as fast as it can; at the last step it is whatever remains.

        Args:
            remaining: ``(B, M)`` slots of each block that are still masked.
            step: index of the step, or ``(B,)`` of each row's.

        Returns:
            ``(B, M)`` int64.
        """
        committed = self.lengths - remaining  # (B, M)
        target = self._at(self.targets, step)  # (B,)
        phase = self._phase(target)
        weights = self.phase_tokens.gather(1, phase)[:, 0]
        before = self._through.gather(1, phase)[:, 0] - weights
        inside = (committed - before).clamp(min=0)
        shares = before + fair_share(weights, inside, target - before.sum(1))
        return (shares - committed).clamp(min=0)

    def next(self, remaining: Tensor, step: Tensor, closed: Tensor) -> tuple[Tensor, Tensor]:
        """The next step of a fixed schedule at which a row has anything to do.

        Where slots were filled without being decoded, because their block came to its end, a row is ahead of the
        plan.  It keeps the pace of the plan, and each phase begins as soon as the one before is done: a step's budget
        is shared by what the blocks of the phase still have.

        Args:
            remaining: see :meth:`quota`.
            step: ``(B,)`` int64, the first step that may be taken.
            closed: ``(B, M)`` int64, slots of each block that were filled.

        Returns:
            ``(B, M)`` int64 quota, and ``(B,)`` int64 step, of each row.
        """
        ahead, busy = closed.sum(1) > 0, remaining.sum(1) > 0
        while True:
            quota = self.quota(remaining, step)
            if bool(ahead.any()):
                phase = self._phase((self.lengths - remaining).sum(1))[:, 0, 0]
                is_shared = self.step_ends.shape[1] != self.phase_tokens.shape[1]
                if not is_shared:  # each phase has steps of its own
                    first = torch.nn.functional.pad(self.step_ends, (1, 0)).gather(1, phase[:, None])[:, 0]
                    step = torch.where(ahead, torch.maximum(step, first), step)
                budget, shares = self._at(self._budgets, step), torch.zeros_like(remaining)
                for _ in range(self.phase_tokens.shape[1] if is_shared else 1):
                    left = self._left(remaining - shares)
                    spent = torch.minimum(budget - shares.sum(1), left.sum(1))
                    shares = shares + fair_share(left, torch.zeros_like(left), spent)
                quota = torch.where(ahead[:, None], shares, quota)
            idle = busy & (quota.sum(1) == 0) & (step < self.steps)
            if not bool(idle.any()):
                return quota, step
            step = step + idle

    @cached_property
    def _budgets(self) -> Tensor:
        """``(B, S)`` tokens of each step."""
        return self.targets.diff(dim=1, prepend=torch.zeros_like(self.targets[:, :1])).clamp(min=0)

    def _at(self, values: Tensor, step: Tensor | int) -> Tensor:
        """``(B, S) -> (B,)``: at a step; at the last one, if that is past."""
        if isinstance(step, int):
            return values[:, step]
        return values.gather(1, torch.minimum(step, self.steps - 1).clamp(min=0)[:, None])[:, 0]

    def _left(self, remaining: Tensor) -> Tensor:
        """``(B, M)`` tokens that each block still has in the phase that decodes the next token."""
        return (self._due(remaining) - (self.lengths - remaining)).clamp(min=0)

    @property
    def busy_steps(self) -> Tensor:
        """``(B,)`` steps of a fixed schedule at which any token is committed."""
        return (self._budgets > 0).sum(1)

    def open(self, remaining: Tensor) -> Tensor:
        """``(B, M)`` bool: blocks that may commit at a step of an adaptive decoder."""
        # A block that ran ahead of its part of the phase may go on; one whose phase is to come may not.
        return (self._due(remaining) > 0) & (remaining > 0)

    def least(self, remaining: Tensor) -> Tensor:
        """Tokens that each block commits at least at a step of an adaptive decoder, ``(B, M)`` int64.

        ``tokens_per_step`` for each row, or what its phase still has; shared by what each block still has.
        """
        left = self._left(remaining)
        target = left.sum(1).clamp(max=self.tokens_per_step)
        return fair_share(left, torch.zeros_like(left), target)


@dataclass(frozen=True, kw_only=True)
class BlockScheduler(ABC):
    """Decides how many tokens each block may commit at each step.

    A subclass names the phases; everything else follows.  This one decodes the blocks from the last to
    the first:

    Example:
        >>> class Backwards(BlockScheduler):
        ...     def phases(self, lengths, held):
        ...         return torch.diag_embed(lengths).flip(1)  # phase p decodes block M - 1 - p
        >>> plan = Backwards(tokens_per_step=2).plan(torch.tensor([[4, 2]]))
        >>> remaining = torch.tensor([[4, 2]])
        >>> plan.quota(remaining, step=0).tolist()
        [[0, 2]]

    Args:
        steps: steps of every row.
        tokens_per_step: instead of ``steps``: each row takes its tokens divided by this, rounded up, in
            steps.  With an adaptive selection it is the least number of tokens per step.
        schedule: how the tokens of a phase are spread over its steps.

    Raises:
        NapDecodeError: both, or a number below 1.
    """

    steps: int | None = None
    tokens_per_step: int | None = None
    schedule: Schedule = EvenSchedule()

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        if self.tokens_per_step is not None:
            check_integer("tokens_per_step", self.tokens_per_step, 1)
        if self.steps is not None and self.tokens_per_step is not None:
            raise NapDecodeError(f"give steps ({self.steps}) or tokens_per_step ({self.tokens_per_step}), not both")
        if not isinstance(self.schedule, Schedule):
            raise NapDecodeError(f"schedule must be a Schedule, such as EvenSchedule(), but is {self.schedule!r}")

    @property
    def is_fixed(self) -> bool:
        """Whether the number of steps is given."""
        return self.steps is not None or self.tokens_per_step is not None

    @property
    def is_random(self) -> bool:
        """Whether the number of tokens of a step is drawn."""
        return self.schedule.is_random

    def partition(self, canvas: Canvas) -> Partition:
        """The blocks to distribute over; by default those of the canvas."""
        return Partition(canvas.block, canvas.lengths, canvas.held)

    @abstractmethod
    def phases(self, lengths: Tensor, held: tuple[bool, ...]) -> Tensor:
        """Tokens of each block in each phase, ``(B, M) -> (B, P, M)``; over the phases they add up to ``lengths``."""

    def shares_steps(self) -> bool:
        """Whether a step that completes a phase gives what is left of its budget to the next one."""
        return False

    def plan(
        self,
        lengths: Tensor,
        held: tuple[bool, ...] | None = None,
        *,
        adaptive: bool = False,
        seeds: Tensor | None = None,
    ) -> Plan:
        """Fix the phases and steps of every row.

        Args:
            lengths: ``(B, M)`` int64, slots of each block.
            held: for each block whether it is held back; none by default.
            adaptive: the number of steps will depend on the model; only ``open`` and ``least`` of the plan
                will be asked.
            seeds: ``(B,)`` int64, seeds of the rows; needed if the schedule is random.

        Raises:
            NapDecodeError: more steps than tokens, or fewer steps than phases.
        """
        phase_tokens = self.phases(lengths, held or (False,) * lengths.shape[1])
        if not torch.equal(phase_tokens.sum(1), lengths):
            raise NapDecodeError(
                f"the phases of {type(self).__name__} must add up to the block lengths {lengths.tolist()}, but make "
                f"{phase_tokens.sum(1).tolist()}"
            )
        tokens_per_step = 1 if self.tokens_per_step is None else int(self.tokens_per_step)
        tokens = phase_tokens.sum(2)  # (B, P)
        total = tokens.sum(1)
        if adaptive:
            nothing = torch.zeros_like(tokens)
            return Plan(phase_tokens, nothing[:, :0], nothing, tokens_per_step)
        steps = -(-total // tokens_per_step) if self.steps is None else torch.where(total > 0, int(self.steps), 0)
        stretches = total[:, None] if self.shares_steps() else tokens  # (B, Q)
        self._check_steps(total, steps, (stretches > 0).sum(1))
        step_ends = divide_steps(stretches, steps)
        return Plan(phase_tokens, self._targets(stretches, step_ends, seeds), step_ends, tokens_per_step)

    def _targets(self, stretches: Tensor, step_ends: Tensor, seeds: Tensor | None) -> Tensor:
        """``(B, S)`` tokens committed after each step, for stretches ``(B, Q)`` of tokens that end at ``step_ends``."""
        begin = stretches.cumsum(1) - stretches  # (B, Q) tokens before each stretch
        first = torch.nn.functional.pad(step_ends, (1, 0))[:, :-1]  # (B, Q) steps before each stretch
        draws = torch.empty(stretches.numel(), 0, device=stretches.device)
        if self.schedule.is_random:
            if seeds is None:
                raise NapDecodeError(f"{type(self.schedule).__name__} draws; pass the seeds of the rows")
            token = begin.flatten()[:, None] + torch.arange(int(stretches.max()), device=stretches.device)
            draws = uniform(seeds.repeat_interleave(stretches.shape[1]), 0, SCHEDULE_STREAM, token)
        spread = self.schedule(stretches.flatten(), (step_ends - first).flatten(), draws)
        spread = spread.view(*stretches.shape, -1)  # (B, Q, steps inside the stretch)
        step = torch.arange(int(step_ends[:, -1].max()), device=stretches.device).expand(len(stretches), -1)
        stretch = (step_ends[:, None] <= step[:, :, None]).sum(2).clamp(max=stretches.shape[1] - 1)  # (B, S)
        inside = (step - first.gather(1, stretch)).clamp(max=spread.shape[2] - 1)
        row = torch.arange(len(stretches), device=stretches.device)[:, None]
        return begin.gather(1, stretch) + spread[row, stretch, inside]

    def _check_steps(self, total: Tensor, steps: Tensor, num_phases: Tensor) -> None:
        asked = f"steps={self.steps}" if self.steps is not None else f"tokens_per_step={self.tokens_per_step}"
        too_many = (steps > total) & (not self.schedule.may_skip)
        for row in too_many.nonzero()[:1, 0].tolist():
            raise NapDecodeError(
                f"{asked} is more than the {int(total[row])} tokens to decode in row {row}, and every step must "
                f"commit at least one; ask for at most {int(total[row])} steps, or use tokens_per_step"
            )
        for row in (steps < num_phases).nonzero()[:1, 0].tolist():
            raise NapDecodeError(
                f"{asked} makes {int(steps[row])} steps for the {int(total[row])} tokens of row {row}, but "
                f"{type(self).__name__} decodes them in {int(num_phases[row])} phases of at least one step each; "
                f"{self._fewer_phases_hint()} (fewer tokens per step)"
            )

    def _fewer_phases_hint(self) -> str:
        return "ask for more steps"


@dataclass(frozen=True, kw_only=True)
class MacroParallelScheduler(BlockScheduler):
    """NAP's rule: every step's budget is spread over all paths; the summary is held back.

    "The unmasking budget is distributed across all m reasoning blocks at every step" (arXiv 2602.23225,
    section 4.2); what the paper leaves open is decided here:

    * cumulative fair share: after every step each block has received its ideal share, rounded down or up,
      and the shares of a step make its budget exactly (:func:`fair_share`).  With fewer tokens per step
      than blocks, the blocks take turns;
    * blocks marked ``held`` (the summary) open when ``hold_until`` of the other tokens are committed.
      The steps are divided between the two phases in proportion to their tokens, at least one each.

    Args:
        steps: see :class:`BlockScheduler`.
        tokens_per_step: see :class:`BlockScheduler`.
        schedule: see :class:`BlockScheduler`.
        hold_until: share of the path tokens, 0 to 1, that are committed before the summary opens.
            1 decodes it last, 0 along with the paths.
        share_last_step: let the summary use what is left of the step that completes the first phase,
            instead of having steps of its own.

    Example:
        >>> scheduler = MacroParallelScheduler(tokens_per_step=2)
        >>> plan = scheduler.plan(torch.tensor([[3, 3, 2]]), held=(False, False, True))
        >>> remaining, rows = torch.tensor([[3, 3, 2]]), []
        >>> for step in range(int(plan.steps[0])):
        ...     quota = plan.quota(remaining, step)
        ...     remaining = remaining - quota
        ...     rows += quota.tolist()
        >>> rows
        [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 2]]
    """

    hold_until: float = 1.0
    share_last_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("hold_until", self.hold_until, 0.0, 1.0)
        check_flag("share_last_step", self.share_last_step)

    @override
    def phases(self, lengths: Tensor, held: tuple[bool, ...]) -> Tensor:
        if not any(held):
            return lengths[:, None]
        is_held = torch.tensor(held, device=lengths.device)
        free = torch.where(is_held, 0, lengths)
        # ceil, but not of a product that is whole up to rounding: 0.7 * 10 = 7.000000000000001
        first_tokens = (free.sum(1).double() * self.hold_until - 1e-9).ceil().clamp(min=0).long()
        first = fair_share(free, torch.zeros_like(free), first_tokens)
        return torch.stack([first, lengths - first], dim=1)

    @override
    def shares_steps(self) -> bool:
        return self.share_last_step

    @override
    def _fewer_phases_hint(self) -> str:
        return "set share_last_step=True or hold_until=0.0, or ask for more steps"


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressiveScheduler(BlockScheduler):
    """One block after the other, each with steps in proportion to its tokens (LLaDA, arXiv 2502.09992).

    Args:
        steps: see :class:`BlockScheduler`.
        tokens_per_step: see :class:`BlockScheduler`.
        schedule: see :class:`BlockScheduler`.
        block_length: cut each row's slots into blocks of this length, whatever the blocks of the canvas
            (the last one may be shorter); None to decode the blocks of the canvas in order.  For strict
            left to right use :class:`AnyOrderScheduler` with the confidence ``"leftmost"``, which costs
            less than blocks of one slot.
        on_grid: count the blocks from the start of the row instead of from its first slot, as models
            with block-causal attention do (LLaDA2, SDAR); the first block is then what the prompt left of it.

    Example:
        >>> plan = SemiAutoregressiveScheduler(steps=3).plan(torch.tensor([[4, 2]]))
        >>> plan.quota(torch.tensor([[4, 2]]), step=0).tolist()
        [[2, 0]]
        >>> plan.quota(torch.tensor([[0, 2]]), step=2).tolist()
        [[0, 2]]
    """

    block_length: int | None = None
    on_grid: bool = False

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
        index = canvas.position_ids if self.on_grid else canvas.decodable.cumsum(1) - 1
        # On the grid a row's blocks are numbered from its first that has a slot, so that none before is empty.
        index = index // self.block_length
        index = index - index.where(canvas.decodable, index.shape[1]).amin(1, keepdim=True)
        block = torch.where(canvas.decodable, index, -1)
        num_blocks = int(block.max()) + 1
        return Partition(block, count_blocks(block, num_blocks).cpu(), (False,) * num_blocks)

    @override
    def phases(self, lengths: Tensor, held: tuple[bool, ...]) -> Tensor:
        return torch.diag_embed(lengths)

    @override
    def _fewer_phases_hint(self) -> str:
        return "cut longer blocks, or ask for more steps"


@dataclass(frozen=True, kw_only=True)
class AnyOrderScheduler(BlockScheduler):
    """No blocks: the budget of a step goes to any slots of the canvas ("AO" in the paper).

    Args:
        steps: see :class:`BlockScheduler`.
        tokens_per_step: see :class:`BlockScheduler`.
        schedule: see :class:`BlockScheduler`.

    Example:
        >>> plan = AnyOrderScheduler(tokens_per_step=4).plan(torch.tensor([[10]]))
        >>> [int(plan.quota(torch.tensor([[left]]), step)) for step, left in enumerate([10, 6, 3])]
        [4, 3, 3]
    """

    @override
    def partition(self, canvas: Canvas) -> Partition:
        block = torch.where(canvas.decodable, 0, -1)
        return Partition(block, canvas.lengths.sum(1, keepdim=True), (False,))

    @override
    def phases(self, lengths: Tensor, held: tuple[bool, ...]) -> Tensor:
        return lengths[:, None]


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
        >>> weights = committed = torch.tensor([[2, 2, 2]])
        >>> committed = torch.zeros_like(weights)
        >>> for target in range(1, 7):
        ...     committed = fair_share(weights, committed, torch.tensor([target]))
        ...     print(committed.tolist()[0])
        [1, 0, 0]
        [1, 1, 0]
        [1, 1, 1]
        [2, 1, 1]
        [2, 2, 1]
        [2, 2, 2]
    """
    total = weights.sum(1, keepdim=True).clamp(min=1)
    ideal = target[:, None] * weights  # times total
    lower = ideal // total
    share = torch.maximum(lower, committed)
    released = (ideal % total > 0) & (share == lower)
    due = -(-(lower + 1) * total // weights.clamp(min=1))
    order = torch.where(released, due, _NEVER).argsort(dim=1, stable=True)
    spare = target[:, None] - share.sum(1, keepdim=True)
    return share + (released & (order.argsort(1) < spare)).long()


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
