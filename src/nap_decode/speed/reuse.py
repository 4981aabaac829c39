"""Which positions a forward pass computes anew; for all others, keys and values of earlier passes are reused.

A masked-diffusion model attends both ways: a token that is committed anywhere changes the keys and values of every
position.  A pass that computes only some of them is an approximation, which is off unless asked for
(``Denoiser(reuse=)``); :class:`~nap_decode.SamplerOutput` says what it saved, and the trace which passes computed
everything.

Whatever the policy, a pass computes every position whose token has changed since it was last computed, and with all
policies but :class:`DriftReuse` every position where a prediction is wanted.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from nap_decode.base.batching import host_tensor, join, narrow, select
from nap_decode.base.errors import NapDecodeError, check_between, check_flag, check_integer
from nap_decode.base.rows import Rows
from nap_decode.model.call import ModelCall, visibility
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.foreign import attention_window
from nap_decode.model.head import Output, take
from nap_decode.model.probe import Probing, differ
from nap_decode.speed.kv import Store, Way, knows_positions, ways

__all__ = ["BlockReuse", "CommittedReuse", "DriftReuse", "Glance", "Kept", "PromptReuse", "Reuse"]

_BRANCHES = ("given", "free")
"""What is kept apart: the rows, and under guidance those without their prompt."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What earlier passes found out about B rows of W columns."""

    tokens: Tensor  # (B, W) int64, what stood there when the position was last computed; -1 if it never was
    repeats: Tensor  # (B, W) int64, passes that computed the position with this token
    age: Tensor  # (B, W) int64, passes since it was last computed
    pending: Tensor  # (B, W) float32, what has happened since then that concerns it, see DriftReuse
    wanted: Tensor  # (B, W) bool, where predictions were wanted when the whole row was last computed
    opened: Tensor  # (B, W) bool, where predictions were wanted in any pass
    passes: Tensor  # (B,) int64, passes since the whole row was last computed
    counts: Tensor  # (B, S) int64, positions that each pass of the batch computed; 0 before the row came
    states: dict[str, Tensor] = field(default_factory=dict)
    """``(B, heads, W, D)`` each: keys and values of the model's layers; and of one head, what it put out, for policies
    that leave out wanted positions."""

    @classmethod
    def nothing(cls, like: Tensor) -> Kept:
        """Of rows ``(B, W)`` that no pass has seen."""
        zeros, no = torch.zeros_like(like, dtype=torch.int64), torch.zeros_like(like, dtype=torch.bool)
        return cls(zeros - 1, zeros, zeros, zeros.float(), no, no, zeros[:, 0], zeros[:, :0])

    def with_rows(self, number: int, width: int) -> Kept:
        """These rows, and others that no pass has seen; all with at least ``width`` columns."""
        both = join(self, Kept.nothing(self.tokens.new_zeros(number, width)), {"tokens": -1})
        more = (0, 0, 0, max(0, width - self.tokens.shape[1]), 0, 0, 0, number)  # columns and rows
        return replace(both, states={name: pad(kept, more) for name, kept in self.states.items()})

    def narrowed(self, width: int) -> Kept:
        """The first columns."""
        states = {name: kept[:, :, :width] for name, kept in self.states.items()}
        return replace(narrow(self, width), counts=self.counts, states=states)

    def first(self, number: int, width: int) -> Kept:
        """The first rows, in their first columns."""
        index = torch.arange(number, device=self.tokens.device)
        return select(self, index, index).narrowed(width)

    def counted(self, computed: Tensor) -> Kept:
        """With one pass more, of ``(B,)`` positions."""
        return replace(self, counts=torch.cat([self.counts, computed[:, None]], dim=1))


Memory: TypeAlias = dict[str, Kept]
"""By branch; empty at first."""


@dataclass(frozen=True, eq=False)
class Glance:
    """What a policy sees before a pass; all ``(B, W)``."""

    kept: Kept  # of earlier passes
    tokens: Tensor  # int64, the rows as they stand
    wanted: Tensor  # bool, where predictions are wanted
    prompt: Tensor  # bool
    present: Tensor  # bool, false for padding
    changed: Tensor  # bool, where another token stands than when the position was last computed
    pending: Tensor  # float32, what concerns a position and was not computed yet, this pass's changes included


@dataclass(frozen=True, kw_only=True)
class Reuse(abc.ABC):
    """Decides which positions a pass computes; make your own by saying :meth:`select`.

    Args:
        refresh_every: every so many passes of a row all of it is computed; 1 is exact decoding, None only when the
            policy itself says so, and the first time.

    Raises:
        NapDecodeError: options out of range.

    Example:
        >>> from nap_decode import Denoiser, ParallelForcedSampler, demo
        >>> class Neighbours(Reuse):
        ...     def select(self, glance: Glance) -> Tensor:  # what is next to what has changed
        ...         return glance.changed.roll(1, dims=1) | glance.changed.roll(-1, dims=1)
        >>> denoiser = Denoiser(*demo.load(), reuse=Neighbours(refresh_every=4))
        >>> sampler = ParallelForcedSampler(denoiser, path_length=11, summary_length=2, tokens_per_step=4)
        >>> sampler("6 0 6 4 6 2 1 2 4 7 0 6 =").trace.forwarded.tolist()
        [[53, 35, 31, 29, 53, 21, 15, 13, 53]]
    """

    refresh_every: int | None = None
    leaves_out_wanted: ClassVar[bool] = False
    """Whether a pass may leave out positions where predictions are wanted, and give their last ones instead."""

    def __post_init__(self) -> None:
        if self.refresh_every is not None:
            check_integer("refresh_every", self.refresh_every, 1)

    @abc.abstractmethod
    def select(self, glance: Glance) -> Tensor:
        """``(B, W)`` bool: what to compute of rows that are not computed as a whole.

        What has changed is computed besides; so is what is wanted, unless :attr:`leaves_out_wanted` says otherwise.
        """

    def refreshes(self, glance: Glance) -> Tensor:
        """``(B,)`` bool: which rows to compute as a whole, besides those that are due."""
        return torch.zeros_like(glance.kept.passes, dtype=torch.bool)

    def concerns(self, changed: Tensor) -> Tensor:
        """``(B, W)`` float32: how much changes, ``(B, W)`` bool, concern each position."""
        return changed.float()

    def plan(
        self, kept: Kept, rows: Rows, tokens: Tensor, wanted: Tensor, block_size: int | None
    ) -> tuple[Tensor, Tensor, Kept]:
        """What the next pass computes of rows whose tokens and wanted predictions are ``(B, W)``.

        Returns:
            ``(B, W)`` bool, positions to compute; ``(B,)`` bool, rows that are computed as a whole; and what is
            known after the pass, but for what the model says.
        """
        changed = (tokens != kept.tokens) & rows.present
        pending = kept.pending + self.concerns(changed)
        glance = Glance(kept, tokens, wanted, rows.prompt, rows.present, changed, pending)
        whole = (kept.tokens[:, 0] < 0) | self.refreshes(glance)
        if self.refresh_every is not None:
            whole |= kept.passes + 1 >= self.refresh_every
        computed = whole[:, None] | changed | self.select(glance)
        if not self.leaves_out_wanted:
            computed |= wanted
        computed &= rows.present
        known = replace(
            kept,
            tokens=torch.where(computed, tokens, kept.tokens),
            repeats=torch.where(computed, torch.where(changed, 0, kept.repeats) + 1, kept.repeats),
            age=torch.where(computed, 0, kept.age + 1),
            pending=torch.where(computed, 0, pending),
            wanted=torch.where(whole[:, None], wanted, kept.wanted),
            opened=kept.opened | wanted,
            passes=torch.where(whole, 0, kept.passes + 1),
        )
        return computed, whole, known.counted(computed.sum(1))

    # ---------------------------------------------------------------------------------------- what a Denoiser asks

    def check(self, denoiser: Denoiser) -> None:
        """Raise unless the model can be called for some of the positions; a few small forward passes, made once."""
        name, probing = denoiser.call.name, denoiser.probing
        if self.leaves_out_wanted and not denoiser.call.head.is_late:
            raise NapDecodeError(
                f"{type(self).__name__} keeps what goes into the output layer, which cannot be told from the rest of "
                f"{name}; use CommittedReuse()"
            )
        reasons = []
        for way in ways(denoiser.call):
            reason = probing.why_not(f"compute some positions, {way.__name__}", partial(_why_not, probing, way))
            if reason is None:
                denoiser.call.learned.update({"way": way, "hides padding": probing.hides_padding})
                return
            reasons.append(reason)
        raise NapDecodeError(
            f"{name} ({denoiser.family.name}) cannot reuse keys and values: {reasons[-1]}. Decode it without reuse="
        )

    def forward(
        self, call: ModelCall, rows: Rows, branches: Sequence[Tensor], wanted: Tensor, is_slot: Tensor, kept: Memory
    ) -> Output:
        """One forward pass, see :class:`nap_decode.model.denoiser.Reuse`.

        It is one call for rows that are computed as a whole, and one for the others, of as many positions as it takes.
        """
        # Added up, as a position may stand there twice: as a slot, and to fill up.
        where = torch.zeros_like(branches[0]).scatter_add_(1, wanted, is_slot.long()) > 0
        parts, number = [], len(branches[0])
        for branch, tokens in enumerate(branches):
            before = kept.get(_BRANCHES[branch]) or Kept.nothing(tokens)
            computed, is_whole, known = self.plan(before, rows, tokens, where, call.family.block_size)
            kept[_BRANCHES[branch]] = known
            if rows.is_padded and not call.learned["hides padding"]:
                is_whole = torch.zeros_like(is_whole)  # called for all positions as for some, it is told what is there
            facts = computed.sum(1), is_whole.long(), _ends(computed, call.family.block_size)
            counts, flags, ends = torch.stack(facts).tolist()  # the one place that waits
            for flag in (1, 0):
                some = [row for row in range(number) if flags[row] == flag]
                if some:
                    index, is_all = host_tensor(some, tokens.device), len(some) == number
                    own, most = computed if is_all else computed[index], max(1, *(counts[row] for row in some))
                    # Where all is called, all is made anew: compiled code would look at what was there before.
                    states = {} if flag and is_all else known.states
                    width = rows.width if flag else max(ends[row] for row in some)
                    positions = None if flag else _packed(own, most)
                    sees_all = call.family.block_size is None and not rows.is_padded
                    store = Store(states, tokens.shape, None if is_all else index, positions, width, sees_all)
                    parts.append((index + branch * number, self._call(call, rows, tokens, wanted, store)))
                    known.states.update(states)
        return parts[0][1] if len(parts) == 1 else Output.joined(parts)

    def _call(self, call: ModelCall, rows: Rows, tokens: Tensor, wanted: Tensor, store: Store) -> Output:
        """One call of the model for the rows and positions that a store is to get."""
        way: Way = call.learned["way"]
        present, positions = rows.present, store.positions
        if store.rows is not None:
            tokens, wanted, present = (values[store.rows] for values in (tokens, wanted, present))
        places = wanted
        if positions is None:
            whole = store.rows is None
            options = call.options(rows, tokens) if whole else call.whole(tokens, present if rows.is_padded else None)
        else:
            columns = torch.arange(rows.width, device=tokens.device).expand_as(tokens)
            keys, known = columns[:, : store.width], present[:, : store.width]
            seen = visibility(keys, known, queries=positions, block_size=call.family.block_size)
            options = call.some(positions, seen)
            # Where each position stands among those that are called, 0 if it does not.
            places = torch.zeros_like(tokens).scatter_(1, positions, columns[:, : positions.shape[1]]).gather(1, wanted)
            tokens = tokens.gather(1, positions)
        if not self.leaves_out_wanted:
            return way(call, tokens, options, places, store)
        every = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output, everywhere = way(call, tokens, options, every, store), replace(store, width=None)
        return output._replace(rows=take(everywhere.put("outputs", output.rows[:, None])[:, 0], wanted))

    def count(self, rows: Rows, branches: int, kept: Memory) -> None:
        """Note down a pass that computed everything."""
        lengths = host_tensor(rows.lengths, rows.prompt.device)
        for name in _BRANCHES[:branches]:
            kept[name] = (kept.get(name) or Kept.nothing(rows.prompt)).counted(lengths)

    @staticmethod
    def computed(kept: Memory, passes: Tensor) -> Tensor:
        """``(B, S)``: positions that were computed in each of the passes ``(B,)`` of a row, 0 behind the last."""
        if not kept or not len(passes):
            return torch.zeros(len(passes), 0, dtype=torch.int64, device="cpu")
        counts = torch.stack([known.counts for known in kept.values()]).sum(0).cpu()
        number = torch.arange(int(passes.max()), device="cpu")
        first = (counts > 0).int().argmax(1, keepdim=True)  # which computes all of the row
        own = counts.gather(1, (first + number).clamp(max=counts.shape[1] - 1))
        return torch.where(number < passes[:, None], own, 0)


def _packed(computed: Tensor, most: int) -> Tensor:
    """``(n, most)`` int64: the positions that are true; rows with fewer bring one of theirs more than once."""
    positions = computed.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(computed.gather(1, positions), positions, positions[:, :1])


def _ends(computed: Tensor, block_size: int | None) -> Tensor:
    """``(B,)`` int64: columns that what is computed can look at, from the first."""
    width = computed.shape[1]
    last = torch.where(computed, torch.arange(width, device=computed.device), 0).amax(1)
    size = width if block_size is None else block_size
    return ((last // size + 1) * size).clamp(max=width)


@dataclass(frozen=True, kw_only=True)
class ExactReuse(Reuse):
    """Computes what changes of block-causal models, and nothing behind what is wanted: exact, and used by itself.

    What a model makes of a block depends on the blocks before it and on the block itself.  So a pass computes the
    blocks from the first with a change to the last with something wanted: the open block, and one that was closed once
    more.  Where all see all, every change concerns everything.
    """

    def select(self, glance: Glance) -> Tensor:
        """What is wanted; the rest is said by :meth:`plan`."""
        return glance.wanted

    def plan(
        self, kept: Kept, rows: Rows, tokens: Tensor, wanted: Tensor, block_size: int | None
    ) -> tuple[Tensor, Tensor, Kept]:
        """See :meth:`Reuse.plan`."""
        width = rows.width
        block = torch.arange(width, device=tokens.device) // (block_size or width)
        changed = (tokens != kept.tokens) & rows.present
        first = torch.where(changed, block, width).amin(1, keepdim=True)
        last = torch.where(wanted, block, -1).amax(1, keepdim=True)
        computed = (wanted | (block >= first)) & (block <= last) & rows.present
        known = replace(kept, tokens=torch.where(computed, tokens, kept.tokens))
        return computed, (computed == rows.present).all(1), known.counted(computed.sum(1))


@dataclass(frozen=True, kw_only=True)
class PromptReuse(Reuse):
    """Computes all but the prompt (the prompt interval of dLLM-Cache, arXiv 2506.06295).

    Example:
        >>> PromptReuse(refresh_every=16)
        PromptReuse(refresh_every=16)
    """

    def select(self, glance: Glance) -> Tensor:
        """All but the prompt."""
        return ~glance.prompt


@dataclass(frozen=True, kw_only=True)
class CommittedReuse(Reuse):
    """Computes what is wanted, and committed tokens for some passes more (dKV-Cache, arXiv 2505.15781).

    Args:
        delay: passes that compute a token after its commit; then its keys and values are kept.  They change most
            when the mask becomes a token, so 1 is right for most models.

    Example:
        >>> from nap_decode import Denoiser, ParallelForcedSampler, demo
        >>> denoiser = Denoiser(*demo.load(), reuse=CommittedReuse())
        >>> sampler = ParallelForcedSampler(denoiser, path_length=11, summary_length=2, tokens_per_step=4)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> out.summary, out.positions_forwarded, out.positions_exact
        ('6', [200], [477])
    """

    delay: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("delay", self.delay, 1)

    def select(self, glance: Glance) -> Tensor:
        """What is young."""
        return glance.kept.repeats < self.delay


@dataclass(frozen=True, kw_only=True)
class BlockReuse(Reuse):
    """Computes the open blocks only, and everything whenever another one opens (Fast-dLLM, arXiv 2505.22618).

    For blocks that are decoded in turn.  If all are open at once, as the paths of NAP, what is left to reuse is what
    is not decoded; see :class:`DriftReuse`.

    Args:
        with_suffix: compute what stands behind the block, too: Fast-dLLM's prefix cache.  Without, it is its dual
            cache.

    Example:
        >>> BlockReuse(with_suffix=True)
        BlockReuse(refresh_every=None, with_suffix=True)
    """

    with_suffix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("with_suffix", self.with_suffix)

    def refreshes(self, glance: Glance) -> Tensor:
        """Rows with something wanted that was not, when they were last computed as a whole."""
        return (glance.wanted & ~glance.kept.wanted).any(1)

    def select(self, glance: Glance) -> Tensor:
        """The open blocks, as they were then."""
        inside = glance.kept.wanted
        return inside.long().cummax(1).values.bool() if self.with_suffix else inside


@dataclass(frozen=True, kw_only=True)
class DriftReuse(Reuse):
    """Computes what has changed, and of what is wanted the share that the changes since then concern most.

    A change concerns what is near: ``exp(-distance / reach)`` for every token that was committed since a position
    was last computed, summed up.  Where nothing has happened, the last prediction stands.  So the passes follow the
    decode wherever it is, in one block or in many at once.  Where one is wanted for the first time, it is made.

    Args:
        share: of the wanted positions, rounded up.
        reach: positions.
        max_age: passes after which a wanted position is computed in any case.
        max_age_committed: the same of all others, committed tokens and the prompt; None lets them get as old as they
            may.

    Example:
        >>> from nap_decode import Denoiser, ParallelForcedSampler, demo
        >>> denoiser = Denoiser(*demo.load(), reuse=DriftReuse())
        >>> sampler = ParallelForcedSampler(denoiser, path_length=11, summary_length=2, tokens_per_step=4)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> out.summary, out.positions_forwarded, out.positions_exact
        ('6', [162], [477])
    """

    share: float = 0.6
    reach: float = 4.0
    max_age: int = 2
    max_age_committed: int | None = 16
    leaves_out_wanted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("share", self.share, 0.0, 1.0)
        check_between("reach", self.reach, 0.1, 1000.0)
        check_integer("max_age", self.max_age, 1)
        if self.max_age_committed is not None:
            check_integer("max_age_committed", self.max_age_committed, 1)

    def concerns(self, changed: Tensor) -> Tensor:
        """Near ones most."""
        # Further away than this it is less than a thousandth.
        far = min(int(7 * self.reach) + 1, changed.shape[1] - 1)
        distance = torch.arange(-far, far + 1, device=changed.device).abs()
        weights = torch.exp(-distance / self.reach)
        return conv1d(changed[:, None].float(), weights[None, None], padding=far)[:, 0]

    def select(self, glance: Glance) -> Tensor:
        """The first of the wanted, by concern and then by age; the new, and whatever is old."""
        wanted, age = glance.wanted, glance.kept.age
        urgency = torch.where(wanted, glance.pending + 1e-4 * age, -torch.inf)
        rank = urgency.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        most = (self.share * wanted.sum(1, keepdim=True)).ceil()
        oldest = torch.where(wanted, self.max_age, self.max_age_committed or 2**31)  # None is never
        return (age + 1 >= oldest) | (wanted & ((rank < most) | ~glance.kept.opened))


def _why_not(probing: Probing, way: Way) -> str | None:
    """What is wrong with calls for some positions, if anything: they must agree with calls for all positions."""
    call, head = probing.call, probing.call.head
    if probing.tokens is None or not knows_positions(call):
        return "it takes no position_ids"
    if attention_window(call.config) is not None:
        return "some of its layers attend to a window only"
    if call.is_split:
        return "it is split over devices"
    rows, tokens, wanted = probing.padded()
    wanted = torch.cat([wanted, wanted + 1], dim=1)  # two, as a mask for one query would be right for more
    other = tokens.clone()
    other[:, 1] = probing.tokens[2, 1]
    is_grouped = not probing.hides_padding
    before, after = (head.logits(call.with_rows(rows, one, wanted, is_grouped=is_grouped)) for one in (other, tokens))
    call.learned["way"], call.learned["hides padding"] = way, not is_grouped
    call.learned.pop("attention calls", None)
    # The whole of other rows; then all positions of these, called for as some; then two, though nothing is new.
    # And the whole of a row without padding, then two of it: some code goes another way if a mask hides nothing.
    alone, kept, kept_alone = Rows((rows.width,), rows.prompt[1:]), Memory(), Memory()
    steps = (
        (rows, PromptReuse(refresh_every=1), other, before, kept),
        (rows, CommittedReuse(delay=9), tokens, after, kept),
        (rows, CommittedReuse(), tokens, after, kept),
        (alone, CommittedReuse(), tokens[1:], after[1:], kept_alone),
        (alone, CommittedReuse(), tokens[1:], after[1:], kept_alone),
    )
    try:
        for some, policy, one, expected, known in steps:
            found = head.logits(policy.forward(call, some, [one], wanted[: len(one)], wanted[: len(one)] >= 0, known))
            if not known[_BRANCHES[0]].states:
                return (
                    "it takes no cache, and its attention is not torch's scaled_dot_product_attention; "
                    "attn_implementation='sdpa' may"
                )
            if differ(found, expected, effect=(before - after).abs().max()):
                return "asked for some positions, it does not say what it says when it is asked for all"
    except Exception as error:
        return f"asked for some positions, it fails ({type(error).__name__}: {error})"
    return None


def exact(denoiser: Denoiser) -> Denoiser:
    """The same model, computing nothing anew that would come out the same; as it is, if it reuses already or cannot."""
    if denoiser.reuse is not None or denoiser.family.block_size is None:
        return denoiser
    try:
        return denoiser.replace(reuse=ExactReuse())
    except NapDecodeError:
        return denoiser


REUSES: dict[str, type[Reuse]] = {
    "prompt": PromptReuse,
    "committed": CommittedReuse,
    "block": BlockReuse,
    "drift": DriftReuse,
}
"""Policies by their names on the command line."""
