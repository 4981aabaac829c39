"""Which positions are committed, and with which tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self, override

from nap_decode.base.errors import NapDecodeError, check_between, check_flag, check_integer, check_part, refuse
from nap_decode.base.lazy import lazy
from nap_decode.base.random import TOKEN_STREAM
from nap_decode.model.prediction import Prediction
from nap_decode.model.statistics import Distribution, Reduce, RoundedDistribution, reduce
from nap_decode.parts.confidence import STATISTICS, Candidates, Confidence, find_confidence
from nap_decode.parts.needs import Needs
from nap_decode.parts.selection import QuotaSelection, Reviser, Selection
from nap_decode.parts.slots import Decision, Proposal, Slots


class Predict(Protocol):
    """Asks the model about the slots; every call is one forward pass."""

    def __call__(self, tokens: Tensor | None = None, *, leave_one_out: bool = False) -> Prediction:
        """What the model says, of shape ``(B, K)``, or ``(J * B, K)`` for alternatives.

        Args:
            tokens: ``(J, B, K)`` int64, J alternatives for what the slots hold, all in one pass.
            leave_one_out: predict each committed slot with what it holds hidden, see :class:`Denoiser`; not for
                alternatives.
        """


class Committer(ABC):
    """Decides which of the open slots are committed, and with which tokens.  A subclass writes ``__call__``.

    Example:
        >>> class Eager(Committer):  # everything that is open, whatever the quota
        ...     needs = Needs(adaptive=True)
        ...     def __call__(self, slots, predict):
        ...         prediction = predict()
        ...         logits = prediction.logits.index_fill(2, prediction.banned, -torch.inf)
        ...         confidence, tokens = logits.softmax(2).max(2)
        ...         return Decision(tokens, confidence, slots.open)
        >>> from nap_decode import Decoder, MacroParallelScheduler, Sampler, demo
        >>> sampler = Sampler(*demo.load(), Decoder(MacroParallelScheduler(), Eager()))
        >>> sampler("1 2 3 4 5 6 7 0 1 2 3 4 =", max_new_tokens=5).forward_passes
        1
    """

    @property
    def needs(self) -> Needs:
        """See :class:`Needs`.  Adaptive, if the number of tokens depends on the model; if not, it is the quota."""
        return Needs()

    @property
    def patience(self) -> int:
        """Steps in a row without progress after which decoding is given up."""
        return 1000

    def compiled(self, compile: Callable[[Any], Any]) -> Self:
        """The same with what it does to logits compiled; itself if there is nothing to compile."""
        return self

    @abstractmethod
    def __call__(self, slots: Slots, predict: Predict) -> Decision:
        """Decide one step, about the slots of the open blocks, of which ``predict`` asks the model."""


Chunk: TypeAlias = tuple[Tensor, Tensor]
"""Places ``(R,)`` of some slots among the ``B * K``, and their logits ``(R, V)``."""


class Adjustment(ABC):
    """Changes what the model says before anything is read off it.  A subclass writes ``__call__``, a generator."""

    needs: ClassVar[Needs] = Needs(memory=True)

    @abstractmethod
    def __call__(self, slots: Slots, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Adjust the logits of one step, which come some slots at a time, and note what the next step needs."""


@dataclass(frozen=True, kw_only=True)
class MicroConfidenceCommitter(Committer):
    """Proposes a token for every open slot, scores it, and commits the best of each block.

    Args:
        temperature: 0 proposes the most likely token and draws nothing; otherwise (at least 1e-6) a token is
            drawn from softmax(logits / temperature), from the row's own stream.
        top_k: draw among this many most likely tokens only.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum.
        confidence: a function of :class:`~nap_decode.parts.confidence.Candidates`, or the name of one:
            ``"probability"``, ``"margin"``, ``"negative_entropy"``, ``"random"``, ``"leftmost"``.
        selection: how many are committed; exactly the quota by default.
        reviser: may replace committed tokens or mask them again; nothing by default.
        adjustment: changes the logits first, such as :class:`~nap_decode.decoders.credit_decoding.Credit`.
        scores_proposal: whether confidences are those of the distribution that tokens are drawn from
            (after temperature, top_p and top_k, as in Dream) instead of the model's own.
        model_precision: compute probabilities, and what is cut off, in the precision of the model's logits, step by
            step as the published code of LLaDA and Dream does, instead of float32.  It is for ``"probability"``,
            ``"margin"``, ``"negative_entropy"`` and ``ProbabilityWithout``, and for those who must reproduce published
            scores: in bfloat16 unequal confidences become equal (which of them count, ``QuotaSelection(ties="topk")``
            decides as theirs).

    Confidences are by default those of the model's own distribution (temperature 1, nothing cut off),
    whatever the proposal is drawn from.  Softmax and draws are computed in float32 (float64 if the logits are).  A
    draw inverts the distribution function at one 24-bit uniform number.

    Example:
        >>> committer = MicroConfidenceCommitter(temperature=0.7, top_p=0.95, confidence="margin")
        >>> MicroConfidenceCommitter(top_k=5)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: top_k=5 would have no effect: nothing is drawn at ...
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    confidence: str | Confidence = "probability"
    selection: Selection = QuotaSelection()
    reviser: Reviser | None = None
    adjustment: Adjustment | None = None
    scores_proposal: bool = False
    model_precision: bool = False

    _reduce: ClassVar[Reduce | None] = None  # of a compiled one, in the instance

    def __post_init__(self) -> None:
        check_between("temperature", self.temperature, 0.0, math.inf)
        if 0 < self.temperature < 1e-6:
            raise NapDecodeError(f"temperature must be 0 or at least 1e-6, but is {self.temperature!r}")
        check_flag("scores_proposal", self.scores_proposal)
        check_flag("model_precision", self.model_precision)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_between("top_p", self.top_p, 0.0, 1.0)
        if self.temperature == 0 and not self.scores_proposal:
            refuse({"top_k": self.top_k, "top_p": self.top_p}, {}, "nothing is drawn at temperature 0")
        find_confidence(self.confidence)
        check_part("selection", self.selection, Selection, "QuotaSelection()")
        if self.reviser is not None:
            check_part("reviser", self.reviser, Reviser, "EditReviser()")
        if self.adjustment is not None:
            check_part("adjustment", self.adjustment, Adjustment, "Credit()")
        if self.needs.previous and self.adjustment is not None:
            parts = (self.selection, self.reviser, *self._asked, self.adjustment)
            compares = next(part for part in parts if getattr(part, "needs", Needs()).previous)
            raise NapDecodeError(
                f"{_name(compares)} compares the model's predictions from step to step, which "
                f"{_name(self.adjustment)} changes by itself; leave one of them out"
            )

    @lazy
    def needs(self) -> Needs:
        """See :class:`Needs`."""
        whole = Needs(random=self.temperature > 0, committed=self.reviser is not None)
        for part in (self.selection, self.reviser, self.adjustment):
            whole |= Needs() if part is None else part.needs
        for function in (self.confidence, *whole.statistics):
            # A function of somebody else may draw, unless it says that it does not.
            whole |= getattr(find_confidence(function, STATISTICS), "needs", Needs(random=True))
        return whole

    @lazy
    def _asked(self) -> tuple[Confidence, ...]:
        """The functions whose values are needed: the confidence, then the statistics."""
        return tuple(find_confidence(function, STATISTICS) for function in (self.confidence, *self.needs.statistics))

    @lazy
    def _reads(self) -> tuple[tuple[str, ...], bool]:
        """The properties of a distribution that are known to be read, and whether nothing else of it is."""
        known = [getattr(function, "reads", None) for function in self._asked]
        names = dict.fromkeys(name for names in known for name in names or ())
        return ("best", "mode", *names), None not in known

    @override
    def compiled(self, compile: Callable[[Any], Any]) -> MicroConfidenceCommitter:
        other = replace(self)
        # Whatever the number of rows, of which chunks have few.
        object.__setattr__(other, "_reduce", compile(reduce))
        return other

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Decision:
        return self.decide(self.propose(predict(leave_one_out=self.needs.left_out), slots))

    def decide(self, proposal: Proposal) -> Decision:
        """Choose among proposals, and revise."""
        decision = Decision(proposal.tokens, proposal.confidence, self.selection(proposal))
        return decision if self.reviser is None else self.reviser(proposal, decision)

    def propose(self, prediction: Prediction, slots: Slots) -> Proposal:
        """Score every slot by what the model says; confidences are nan where no id is both possible and allowed."""
        before = _logits_before(slots, prediction) if self.needs.previous else None
        draws = slots.uniform(TOKEN_STREAM).flatten() if self.temperature > 0 else None
        draws_as_is = self.temperature == 1 and self.top_k is None and self.top_p is None
        chunks: Iterator[Chunk] = ((prediction.places[part], logits) for part, logits in prediction.chunks())
        if self.adjustment is not None:
            chunks = self.adjustment(slots, ((places, logits.to(_precision(logits))) for places, logits in chunks))
        reads, is_all = self._reads
        # The most likely token, and what is known of it: then the logits of a chunk need not outlive it.
        is_plain = is_all and draws is None and not self.scores_proposal and not self.model_precision
        scored, spent = list[tuple[Tensor, ...]](), list[Distribution]()
        for places, logits in chunks:
            draw = None if draws is None else draws[places]
            own, tokens = self._read(logits, prediction.banned, reads, draw if draws_as_is else None)
            if is_plain:
                own.spend(reads)
                spent.append(own)
                continue
            possible = own.best > -torch.inf
            if tokens is None and draw is not None:
                _, tokens = self._read(self._warp(own.allowed.to(own.precision)), None, (), draw)
            tokens = own.mode if tokens is None else tokens
            previous = None if before is None else before(places, _precision(logits))
            if self.scores_proposal:
                own, _ = self._read(self._warp(own.logits.to(own.precision)), prediction.banned, reads, None)
                previous = None if previous is None else self._warp(previous)
            scored.append(self._score(Candidates(own, tokens, slots, places, previous), possible))
        if spent:
            own = Distribution.joined(spent)
            scored.append(self._score(Candidates(own, own.mode, slots, prediction.places), own.best > -torch.inf))
        tokens, confidence, *statistics = (slots.unpack(torch.cat(values)) for values in zip(*scored, strict=True))
        return Proposal(slots, tokens, confidence, dict(zip(self.needs.statistics, statistics, strict=True)))

    def _score(self, candidates: Candidates, possible: Tensor) -> tuple[Tensor, ...]:
        """The candidates' tokens, and what each asked function says of them; nan where no id is possible."""
        scores: dict[int, Tensor] = {}
        for function in self._asked:
            if id(function) not in scores:  # each is computed once
                score = function(candidates)
                if not isinstance(score, Tensor) or score.shape != possible.shape:
                    got = f"a tensor {tuple(score.shape)}" if isinstance(score, Tensor) else f"{score!r:.80}"
                    raise NapDecodeError(
                        f"{_name(function)} must return one number for each of the {len(possible)} candidates, but "
                        f"returned {got}"
                    )
                scores[id(function)] = score.where(possible, torch.nan)
        return candidates.tokens, *(scores[id(function)] for function in self._asked)

    def _read(
        self, logits: Tensor, banned: Tensor | None, names: tuple[str, ...], uniform: Tensor | None
    ) -> tuple[Distribution, Tensor | None]:
        """A distribution, whose named properties will be asked for, and a draw from it, if there is a uniform one."""
        distribution = (RoundedDistribution if self.model_precision else Distribution)(logits, banned)
        if self._reduce is None or self.model_precision:
            return distribution, None if uniform is None else distribution.draw(uniform)
        values, drawn = self._reduce(logits, banned, names, uniform)
        distribution.know(names, values)
        return distribution, drawn

    def _warp(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, ``(R, V) -> (R, V)``."""
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p is not None:
            top_p = float(self.top_p)
            warpers.append(partial(_published_top_p, top_p) if self.model_precision else TopPLogitsWarper(top_p))
        scores = logits / self.temperature if self.temperature > 0 else logits
        unused = torch.empty(0, dtype=torch.long, device="cpu")  # the warpers look at the scores alone
        for warper in reversed(warpers) if self.scores_proposal else warpers:  # Dream cuts by top_p first
            scores = warper(unused, scores)
        return scores


def _name(part: Any) -> str:
    return str(getattr(part, "__name__", type(part).__name__))


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _published_top_p(top_p: float, _: Tensor, scores: Tensor) -> Tensor:
    """Dream's ``top_p_logits``: rounded, a sum from the largest down is another than one from the smallest up."""
    ordered, ids = scores.sort(dim=1, descending=True)
    reached = ordered.softmax(1).cumsum(1) > top_p
    beyond = torch.nn.functional.pad(reached[:, :-1], (1, 0), value=False)  # the one that reaches it stays
    return scores.masked_fill(torch.zeros_like(beyond).scatter(1, ids, beyond), -torch.inf)


def _logits_before(slots: Slots, prediction: Prediction) -> Callable[[Tensor, torch.dtype], Tensor] | None:
    """The logits ``(R, V)`` of the slots at some places at the step before, if there was one; keeps those of this."""
    before = slots.memory.get("logits")
    row_place, known = slots.recall("logits_rank")
    slots.memory["logits"], slots.memory["logits_rank"] = prediction.logits, slots.rank + 1  # kept, so all at once
    if before is None:
        return None
    rows, width, _ = before.shape
    place = torch.arange(rows, device=before.device)[:, None] * width + row_place.clamp(max=width - 1)

    def of(places: Tensor, dtype: torch.dtype) -> Tensor:
        logits = before.flatten(0, 1)[place.flatten()[places]].to(dtype)
        return logits.where(known.flatten()[places, None], torch.nan)

    return of
