"""Which positions are committed, and with which tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from nap_decode.confidence import STATISTICS, Candidates, Confidence, find_confidence, random
from nap_decode.credit import Credit, Ledger
from nap_decode.errors import NapDecodeError, check_between, check_integer
from nap_decode.randomness import TOKEN_STREAM, uniform
from nap_decode.revisers import Reviser
from nap_decode.selections import QuotaSelection, Selection
from nap_decode.slots import Commit, Slots

CHUNK_ELEMENTS = 2**24
"""Logits that a committer converts to float32 at a time (64 MiB)."""


class Predict(Protocol):
    """Asks the model about the slots; every call is one forward pass."""

    def __call__(self, tokens: Tensor | None = None, *, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
        """Logits at the slots, and the ids that must not be proposed.

        Args:
            tokens: ``(J, B, K)`` int64, J alternatives for what the slots hold, all in one pass.
            leave_one_out: predict each committed slot with what it holds hidden, see :class:`Denoiser`; not for
                alternatives.

        Returns:
            ``(B, K, V)``, or ``(J, B, K, V)`` for alternatives; not to be changed.  And ``(N,)`` int64.
        """


class Committer(ABC):
    """Decides which of the open slots are committed, and with which tokens.  A subclass writes ``__call__``.

    Example:
        >>> class Eager(Committer):  # everything that is open, whatever the quota
        ...     is_adaptive = True
        ...     def __call__(self, slots, predict):
        ...         logits, banned = predict()
        ...         confidence, tokens = logits.index_fill(2, banned, -torch.inf).softmax(2).max(2)
        ...         return Commit(tokens, confidence, slots.open)
        >>> from nap_decode import MacroParallelScheduler, Sampler, demo
        >>> sampler = Sampler(*demo.load(), scheduler=MacroParallelScheduler(), committer=Eager())
        >>> sampler("1 2 3 4 5 6 7 0 1 2 3 4 =", max_new_tokens=5).forward_passes
        1
    """

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of tokens it commits depends on the model; if not, it is exactly the quota."""
        return False

    @property
    def is_random(self) -> bool:
        """Whether results depend on the seed."""
        return False

    @property
    def revises(self) -> bool:
        """Whether it wants to see the committed slots of the open blocks too."""
        return False

    @property
    def leaves_one_out(self) -> bool:
        """Whether it asks for leave-one-out predictions, which not every model can give."""
        return False

    @abstractmethod
    def __call__(self, slots: Slots, predict: Predict) -> Commit:
        """Decide one step.

        Args:
            slots: the slots of the open blocks.
            predict: asks the model about them.
        """


@dataclass(frozen=True, eq=False)
class Proposal:
    """``(B, K)`` tokens, their confidences, and the statistics of the selection, then those of the reviser."""

    tokens: Tensor
    confidence: Tensor
    statistics: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class MicroConfidenceCommitter(Committer):
    """Proposes a token for every open slot, scores it, and commits the best of each block.

    Args:
        temperature: 0 proposes the most likely token and draws nothing; otherwise (at least 1e-6) a token is
            drawn from softmax(logits / temperature), from the row's own stream.
        top_k: draw among this many most likely tokens only.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum.
        confidence: a function of :class:`~nap_decode.confidence.Candidates`, or the name of one:
            ``"probability"``, ``"margin"``, ``"negative_entropy"``, ``"random"``, ``"leftmost"``.
        selection: how many are committed; exactly the quota by default.
        reviser: may replace committed tokens or mask them again; nothing by default.
        credit: adds credit to the logits of tokens that a slot kept preferring; nothing by default.
        scores_proposal: whether confidences are those of the distribution that tokens are drawn from
            (after temperature, top_p and top_k, as in Dream) instead of the model's own.

    Confidences are by default those of the model's own distribution (temperature 1, nothing cut off),
    whatever the proposal is drawn from.  Softmax and draws are computed in float32 (float64 if the logits are).  A
    draw inverts the distribution function at one 24-bit uniform number.

    Raises:
        NapDecodeError: a value out of range, an unknown name, or a cut-off without a temperature.

    Example:
        >>> committer = MicroConfidenceCommitter(temperature=0.7, top_p=0.95, confidence="margin")
        >>> MicroConfidenceCommitter(top_k=5)
        Traceback (most recent call last):
        ...
        nap_decode.errors.NapDecodeError: top_k=5 has no effect at temperature 0; set a temperature or leave it out
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    confidence: str | Confidence = "probability"
    selection: Selection = QuotaSelection()
    reviser: Reviser | None = None
    credit: Credit | None = None
    scores_proposal: bool = False

    def __post_init__(self) -> None:
        check_between("temperature", self.temperature, 0.0, math.inf)
        if 0 < self.temperature < 1e-6:
            raise NapDecodeError(f"temperature must be 0 or at least 1e-6, but is {self.temperature!r}")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_between("top_p", self.top_p, 0.0, 1.0)
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0 and not self.scores_proposal:
                raise NapDecodeError(
                    f"{name}={getattr(self, name)} has no effect at temperature 0; set a temperature or leave it out"
                )
        find_confidence(self.confidence)
        for name, kind, example in (
            ("selection", Selection, "QuotaSelection()"),
            ("reviser", Reviser | None, "EditReviser()"),
            ("credit", Credit | None, "Credit()"),
        ):
            if not isinstance(getattr(self, name), kind):
                wanted = f"a {name.capitalize()}, such as {example}"
                raise NapDecodeError(f"{name} must be {wanted}, but is {getattr(self, name)!r}")
        if self.selection.compares_steps and self.credit is not None:
            raise NapDecodeError(
                f"{type(self.selection).__name__} compares the model's predictions from step to step, which credit "
                "changes by itself; leave one of them out"
            )

    @property
    @override
    def is_adaptive(self) -> bool:
        return self.selection.is_adaptive or self.revises

    @property
    @override
    def is_random(self) -> bool:
        parts_draw = self.selection.is_random or (self.reviser is not None and self.reviser.is_random)
        return self.temperature > 0 or parts_draw or any(map(_may_draw, self._asked))

    @property
    def _asked(self) -> tuple[Confidence, ...]:
        """The functions whose values are needed: the confidence, then the statistics of selection and reviser."""
        reviser = () if self.reviser is None else self.reviser.statistics
        return (find_confidence(self.confidence), *self.selection.statistics, *reviser)

    @property
    @override
    def revises(self) -> bool:
        return self.reviser is not None

    @property
    @override
    def leaves_one_out(self) -> bool:
        return self.reviser is not None and self.reviser.leaves_one_out

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Commit:
        logits, banned = predict(leave_one_out=self.leaves_one_out)
        return self.commit(self.propose(logits, slots, banned), slots)

    def commit(self, proposal: Proposal, slots: Slots) -> Commit:
        """Choose among proposals, and revise."""
        tokens, confidence = proposal.tokens, proposal.confidence
        number = len(self.selection.statistics)
        chosen = self.selection(confidence, slots, proposal.statistics[:number])
        if self.reviser is None:
            return Commit(tokens, confidence, chosen)
        revision = self.reviser(slots, tokens, chosen, proposal.statistics[number:])
        if revision.edited is not None:
            chosen = chosen | revision.edited
        return Commit(tokens, confidence, chosen, revision.remasked, revision.unsettled)

    def propose(self, logits: Tensor, slots: Slots, banned: Tensor) -> Proposal:
        """Score every slot; confidences are nan where no id is both possible and allowed.

        Args:
            logits: ``(B, K, V)``.
            slots: the slots they belong to.
            banned: ``(N,)`` int64, ids that must not be proposed.
        """
        num_rows, width, vocab_size = logits.shape
        flat = rearrange(logits, "b k v -> (b k) v")
        rows = torch.arange(num_rows, device=logits.device).repeat_interleave(width)
        fields = {
            "current": slots.tokens.flatten(),
            "positions": slots.positions.flatten(),
            "offsets": slots.offsets.flatten(),
            "block": slots.block.flatten(),
        }
        previous = _Previous(slots) if self.selection.compares_steps else None
        ledger = Ledger(self.credit, slots) if self.credit is not None else None
        asked = self._asked
        functions = {id(function): function for function in asked}  # each is computed once
        tokens: list[Tensor] = []
        scores: dict[int, list[Tensor]] = {key: [] for key in functions}
        # In chunks, so that the float32 copies do not grow with the canvas.
        size = max(1, CHUNK_ELEMENTS // vocab_size)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            own = flat[part].to(torch.promote_types(logits.dtype, torch.float32))  # (R, V)
            if ledger is not None:
                own = ledger.add(own, part)
            allowed = own.index_fill(1, banned, -torch.inf) if len(banned) else own
            best, chosen = allowed.max(1)
            possible = best > -torch.inf
            seeds = slots.seeds[rows[part]]
            if self.temperature > 0:
                draws = uniform(seeds, slots.step, TOKEN_STREAM, fields["positions"][part, None])  # (R, 1)
                chosen = _draw(self._warp(allowed - best[:, None]).softmax(1), draws)
            if self.scores_proposal:
                own = self._warp(own)
                best = own.index_fill(1, banned, -torch.inf).amax(1)
            candidates = Candidates(
                logits=own,
                best=best,
                tokens=chosen,
                rows=rows[part],
                seeds=seeds,
                step=slots.step,
                previous=None if previous is None else self._previous(previous, part, own.dtype),
                **{name: values[part] for name, values in fields.items()},
            )
            tokens.append(chosen)
            for key, function in functions.items():
                scores[key].append(function(candidates).where(possible, torch.nan))
        if previous is not None:
            previous.remember(logits)
        if ledger is not None:
            ledger.remember()
        shape = (num_rows, width)
        confidence, *statistics = (torch.cat(scores[id(function)]).view(shape) for function in asked)
        return Proposal(torch.cat(tokens).view(shape), confidence, tuple(statistics))

    def _previous(self, previous: _Previous, part: slice, dtype: torch.dtype) -> Tensor | None:
        logits = previous.logits(part, dtype)
        return self._warp(logits) if self.scores_proposal and logits is not None else logits

    def _warp(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, ``(R, V) -> (R, V)``."""
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        warpers: list[TopKLogitsWarper | TopPLogitsWarper] = []
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        scores = logits / self.temperature if self.temperature > 0 else logits
        unused = torch.empty(0, dtype=torch.long)  # the warpers look at the scores alone
        for warper in reversed(warpers) if self.scores_proposal else warpers:  # Dream cuts by top_p first
            scores = warper(unused, scores)
        return scores


class _Previous:
    """The logits of the step before, for the slots of this one."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.before: Tensor | None
        rank, self.before = slots.memory.get("logits", (None, None))
        if self.before is not None:
            place, self.known = (rearrange(t, "b k -> (b k)") for t in slots.recall(rank))
            self.place = place
            self.width = self.before.shape[1]
            self.row = torch.arange(len(slots.index), device=rank.device).repeat_interleave(slots.index.shape[1])

    def logits(self, part: slice, dtype: torch.dtype) -> Tensor | None:
        if self.before is None:
            return None
        flat = rearrange(self.before, "b k v -> (b k) v")
        rows = flat[self.row[part] * self.width + self.place[part]].to(dtype)
        return rows.where(self.known[part, None], torch.nan)

    def remember(self, logits: Tensor) -> None:
        self.slots.memory["logits"] = (self.slots.rank, logits)


def _may_draw(function: Confidence) -> bool:
    """A function of yours might, unless it says that it does not."""
    return bool(getattr(function, "is_random", function is random or function not in STATISTICS.values()))


def _draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """One token per row, ``(R, V), (R, 1) -> (R,)``: the first whose cumulative probability exceeds the draw."""
    cumulative = probabilities.cumsum(1)
    # Scaled by the sum, which rounding leaves near but not at 1, a draw below 1 stays below the end.
    tokens = torch.searchsorted(cumulative, draws.to(cumulative.dtype) * cumulative[:, -1:], right=True)
    return tokens[:, 0].clamp(max=probabilities.shape[1] - 1)
