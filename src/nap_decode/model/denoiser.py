"""What the model says about masked positions: the only place that knows model families."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError, check_between, check_ids, check_integer
from nap_decode.base.rows import Rows
from nap_decode.canvas import Canvas
from nap_decode.model import foreign
from nap_decode.model.call import Cost, Model, ModelCall
from nap_decode.model.families import ModelFamily, find_mask
from nap_decode.model.head import Output
from nap_decode.model.prediction import Prediction
from nap_decode.model.probe import Probe, Probing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Denoiser", "LogitsProcessor", "Model", "Reuse"]

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""As in transformers: ``(input_ids (R, W), scores (R, V)) -> scores (R, V)``."""


class Reuse(Protocol):
    """Forward passes that compute some positions only, see :mod:`nap_decode.speed.reuse`.

    ``kept`` is what earlier passes found out: a dict that is empty at first, and brought up to date by each pass.
    """

    def check(self, denoiser: Denoiser) -> None:
        """Raise unless the model can be called so."""

    def forward(
        self, call: ModelCall, rows: Rows, branches: Sequence[Tensor], wanted: Tensor, is_slot: Tensor, kept: Any
    ) -> Output:
        """One forward pass of ids ``(B, W)``, under guidance also of those without prompt, at positions ``(B, K)``."""

    def count(self, rows: Rows, branches: int, kept: Any) -> None:
        """Note down a pass that computed everything."""

    def computed(self, kept: Any, passes: Tensor) -> Tensor:
        """``(B, S)``: positions that each of the passes ``(B,)`` of a row computed, 0 behind the last."""


class Denoiser:
    """Wraps a model into: canvas and wanted positions ``(B, K)`` -> logits ``(B, K, V)``.

    Entry k of a row is the model's prediction of the token at the k-th wanted position, whatever the family's
    conventions.  If the model allows it, only wanted positions pass the output layer, a chunk at a time, when their
    logits are looked at (:meth:`predict`).

    Args:
        model: see :data:`Model`.
        tokenizer: gives the mask, padding and end ids, and the ids that may be emitted.
        mask_token_id: the mask id, if neither tokenizer nor config nor family tells.
        family: how the model behaves, if that is not to be found from its config.
        end_token_ids: ids that end a text, if not those of the generation config, config or tokenizer.
        cfg_scale: strength w of classifier-free guidance, ``l = l_uncond + (w + 1) (l_cond - l_uncond)`` (LLaDA, arXiv
            2502.09992, appendix A.2); the unconditional branch has the prompt masked.  Other than 0, it doubles the
            work of a forward pass.
        logits_processor: transformers logits processors, called with some of the wanted positions at a time:
            ``input_ids (R, W)`` are their whole rows, masks included, and more of them behind a shorter row.
        device: where the model takes its input; found from a module's embeddings or parameters, the CPU for a function.
        reuse: which positions a pass computes anew, see :mod:`nap_decode.speed.reuse`; all by default.

    Raises:
        NapDecodeError: no mask token is known; the model cannot be decoded by unmasking, or not with these options.

    Warns:
        UserWarning: the model seems to be shifted though its family is not, or the other way round; with the first
            ragged batch, if padding cannot be hidden from the model, so that rows of different length are decoded in
            groups of equal length.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = demo.load()
        >>> denoiser = Denoiser(model, tokenizer)
        >>> canvas = Canvas.from_infill([tokenizer("1 2 <mask> 3 =")["input_ids"]], mask_token_id=1)
        >>> denoiser(canvas.tokens, torch.tensor([[3]]), canvas).shape
        torch.Size([1, 1, 20])
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mask_token_id: int | None = None,
        family: ModelFamily | None = None,
        end_token_ids: Sequence[int] | None = None,
        cfg_scale: float = 0.0,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
        device: torch.device | str | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        if not callable(model):
            raise NapDecodeError(f"model must be a torch module or a function, but is {model!r:.80}")
        self.model = model
        self.call = ModelCall(model, family)
        self.tokenizer = tokenizer
        _check_tokenizer(tokenizer, self.call.num_embeddings)
        self.mask_token_id = self._find_mask(mask_token_id)
        self.end_token_ids = self._find_ends()
        self.cfg_scale = 0.0
        self.logits_processor: tuple[LogitsProcessor, ...] = ()
        self.reuse: Reuse | None = None
        self._device = torch.device(device) if device is not None else None
        self._through: Callable[[ModelCall, Tensor | None], ModelCall] | None = None
        self._banned: dict[tuple[int, torch.device], Tensor] = {}
        self._warned_of_groups = False
        self._set(end_token_ids, cfg_scale, logits_processor)
        self._ask()
        self._set(reuse=reuse)

    def replace(self, **options: Any) -> Denoiser:
        """The same model with ``end_token_ids``, ``cfg_scale``, ``logits_processor`` or ``reuse`` exchanged, unprobed.

        Or called for decoding ``through`` another call, made of its own and rows ``(N, W)`` to try it with (None for a
        model that is not probed), and made again when the model has changed.
        """
        other = copy.copy(self)
        other._set(**options)
        return other

    def _set(
        self,
        end_token_ids: Sequence[int] | None = None,
        cfg_scale: float | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        reuse: Reuse | None = None,
        through: Callable[[ModelCall, Tensor | None], ModelCall] | None = None,
    ) -> None:
        if end_token_ids is not None:
            self.end_token_ids = tuple(check_ids("end_token_ids", end_token_ids))
        if cfg_scale is not None:
            check_between("cfg_scale", cfg_scale, 0.0, float("inf"))
            self.cfg_scale = cfg_scale
        if logits_processor is not None:  # a LogitsProcessorList is a list that can be called
            one = not isinstance(logits_processor, Sequence)
            self.logits_processor = (logits_processor,) if one else tuple(logits_processor)  # type: ignore[assignment, arg-type]
        if reuse is not None:
            if isinstance(reuse, type) or not hasattr(reuse, "forward"):
                raise NapDecodeError(f"reuse must be a Reuse, such as CommittedReuse(), but is {reuse!r}")
            reuse.check(self)
            self.reuse = reuse
        if through is not None:
            self._through = through
            self._decoding = through(self.call, self.probing.tokens)

    # ---------------------------------------------------------------------------------------- facts

    @property
    def family(self) -> ModelFamily:
        """How the model behaves."""
        return self.call.family

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.call.device if self._device is None else self._device

    @property
    def cost(self) -> Cost | None:
        """What its passes cost; None if the model does not tell its parts."""
        return Cost.of(self.call, branches=1 if self.cfg_scale == 0 else 2)

    @property
    def hides_padding(self) -> bool:
        """Whether rows of different length go through the model together; else it is one length after the other."""
        return self.probing.hides_padding

    def probe(self) -> Probe:
        """What the model does, as far as two small forward passes tell; all None of what has no config."""
        _ = self.hides_padding  # which is asked last
        return copy.copy(self.probing.found)

    def _find_mask(self, given: int | None) -> int:
        if given is None:
            known = {
                "tokenizer.mask_token_id": getattr(self.tokenizer, "mask_token_id", None),
                "config.mask_token_id": find_mask(self.call.config),
            }
            ids = {value for value in known.values() if value is not None} or {self.family.mask_token_id}
            if len(ids) > 1:
                raise NapDecodeError(f"two mask tokens are known: {known}; pass mask_token_id= to say which is meant")
            given = ids.pop()
        if given is None:
            raise NapDecodeError(
                f"no mask token is known: tokenizer and config name none, nor does the family of {self.family.name!r} "
                "models for this vocabulary; pass mask_token_id="
            )
        check_integer("mask_token_id", given, 0)
        size = self.call.num_embeddings
        if given >= (size or given + 1):
            raise NapDecodeError(f"mask_token_id {given} is not one of the model's {size} token ids")
        return int(given)

    def _find_ends(self) -> tuple[int, ...]:
        said = getattr(self.call.module, "generation_config", None), self.call.config, self.tokenizer
        found = [getattr(owner, "eos_token_id", None) for owner in said] + [getattr(said[-1], "sep_token_id", None)]
        ends = next((ids for ids in found if ids is not None), ())
        return (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up; the mask id if none is known that the model has."""
        size = self.call.num_embeddings
        for owner in (self.tokenizer, self.call.config):
            found = getattr(owner, "pad_token_id", None)
            if found is not None and 0 <= found < (size or found + 1):
                return int(found)
        return self.mask_token_id

    def banned(self, vocab_size: int, device: torch.device) -> Tensor:
        """``(N,)`` int64: the mask id, and ids below ``vocab_size`` that the tokenizer does not have."""
        if (vocab_size, device) not in self._banned:
            ids = {self.mask_token_id} & set(range(vocab_size))  # some models have a mask that they do not score
            if self.tokenizer is not None:
                ids |= set(range(vocab_size)).difference(self.tokenizer.get_vocab().values())
            self._banned[vocab_size, device] = torch.tensor(sorted(ids), dtype=torch.int64, device=device)
        return self._banned[vocab_size, device]

    # ---------------------------------------------------------------------------------------- checks

    def refresh(self) -> None:
        """Look at the model again if it has changed."""
        if self.call.fingerprint() == self.probing.fingerprint:
            return
        other = copy.copy(self)  # until all is known, threads that decode go on with what was
        other.call = ModelCall(self.model, self.family)
        other._banned = {}
        other._ask()
        vars(self).update(vars(other))

    def _ask(self) -> None:
        """Find out what the model does; raise if it cannot be decoded, warn if it is not what its family says."""
        self.probing = Probing(self.call, self.mask_token_id, self.pad_token_id, self.end_token_ids, self.device)
        self._check_dropout()  # which would make chance of the answers
        self.probing.ask()
        if self.probing.found.alone is not None:
            self._check_answers(self.probing.found.alone)
        if self.reuse is not None:
            self.reuse.check(self)
        self._decoding = self.call if self._through is None else self._through(self.call, self.probing.tokens)

    def _check_answers(self, alone: Tensor) -> None:
        """See :meth:`_ask`; ``alone`` is what the model says to rows without padding."""
        probing, name, family = self.probing, self.call.name, self.family
        self.banned(alone.shape[-1], self.device)  # copied to the device now, not inside a decode
        if bool(alone.isnan().any()):
            raise NapDecodeError(
                f"{name} predicts nan for rows of ordinary tokens; try another precision, or "
                "attn_implementation='sdpa': not every implementation understands the attention mask of "
                f"{family.name} models ({family.attention!r})"
            )
        if not probing.found.sees_future:
            said = "A decoder attends both ways after model.config.is_causal = False"
            if getattr(self.call.config, "is_causal", None) is False:
                why = "does not help" if probing.error is None else f"fails: {probing.error}"
                said = f"It does so although its config has is_causal = False; a 4-D attention mask of zeros {why}"
            raise NapDecodeError(
                f"{name} ignores the future: tokens to the right of a position do not change what it predicts there, "
                f"so it cannot fill in masks. {said}; its weights must have been trained so"
            )
        if self.call.block_size is not None and not self.hides_padding:
            raise NapDecodeError(
                f"{name} does not do what a {family.attention} attention mask says, by which {family.name} models are "
                "told their blocks; load it with attn_implementation='sdpa', or pass family= with another attention="
            )
        shift = probing.found.shift
        if shift not in (None, family.shift):
            does, said = ("at p - 1", "in place") if shift else ("in place", "at p - 1")
            warnings.warn(
                f"{name} seems to predict position p {does}, but the family {family.name!r} says {said}; to override "
                f"it, pass family=ModelFamily(name=..., shift={shift})",
                stacklevel=4,
            )

    def check(self, canvas: Canvas) -> None:
        """Look at the model again if it has changed, and raise unless it can be called with this canvas.

        Raises:
            NapDecodeError: another device, ids out of range, too many positions, a slot to decode without a
                mask in it, or active dropout.

        Warns:
            UserWarning: more positions than the config names, which rotary models take, but may not have seen.
        """
        self.refresh()
        if canvas.tokens.device.type != self.device.type:
            raise NapDecodeError(
                f"the canvas is on {canvas.tokens.device}, but the model takes its input on {self.device}; make the "
                "canvas with device="
            )
        tokens, block, _ = canvas.host
        lowest, highest, size = int(tokens.min()), int(tokens.max()), self.call.num_embeddings
        if lowest < 0 or highest >= (size or highest + 1):
            wrong = lowest if lowest < 0 else highest
            ids = f"from 0 to {size - 1}" if size else "from 0"
            raise NapDecodeError(f"token id {wrong} is out of range: the model has ids {ids}. Wrong tokenizer?")
        if bool(((tokens != self.mask_token_id) & (block >= 0)).any()):
            raise NapDecodeError(f"every slot to decode must hold the mask id {self.mask_token_id} at the start")
        longest, (limit, is_strict) = tokens.shape[1], self.call.position_limit
        takes = f"the longest row takes {longest} positions (prompt and canvas)"
        if limit is not None and longest > limit:
            if is_strict:
                raise NapDecodeError(f"{takes}, but the model has {limit}; shorten the prompt or the canvas")
            warnings.warn(
                f"{takes}, more than the {limit} that the model's config names; it may not have been trained so",
                stacklevel=3,
            )
        window = foreign.attention_window(self.call.config)
        if self.call.must_be_told and window is not None and longest > window:
            raise NapDecodeError(
                f"{takes}, but {self.call.name} attends to a window of {window}, which the 4-D attention mask would "
                "override by which it is told to attend both ways; use a release of transformers that reads "
                "config.is_causal, or shorten the prompt or the canvas"
            )
        self._check_dropout(canvas.tokens)
        self._is_grouped(canvas.is_padded)

    def _check_dropout(self, tokens: Tensor | None = None) -> None:
        does = None
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in self.call.parts):
            does = "normalises over the batch, so that rows would depend on each other"
        elif self.probing.is_random(tokens):
            does = "drops activations at random"
        if does is not None:
            raise NapDecodeError(f"{self.call.name} is in training mode and {does}; call model.eval()")

    def _is_grouped(self, is_padded: bool) -> bool:
        """Whether rows are called one length after the other; says so once."""
        if not is_padded or self.hides_padding:
            return False
        if not self._warned_of_groups:
            self._warned_of_groups = True
            does = "does not hide what its attention mask says is padding" if self.call.takes_mask else "takes no mask"
            warnings.warn(
                f"{self.call.name} ({self.family.name}) {does}, so rows of different length are decoded in groups of "
                "equal length, one forward pass after the other: correct, but slower than prompts of one length",
                stacklevel=3,
            )
        return True

    def check_leave_one_out(self) -> None:
        """Raise unless the model can be called with ``hidden=``; two small forward passes, made once."""
        reason = self.probing.why_not("leave one out", self.probing.why_not_leave_one_out)
        if reason is not None:
            raise NapDecodeError(f"{reason}; use an algorithm without leave-one-out predictions")

    # ---------------------------------------------------------------------------------------- forward

    def __call__(self, tokens: Tensor, wanted: Tensor, canvas: Canvas, *, hidden: Tensor | None = None) -> Tensor:
        """Logits ``(N, K, V)`` at the wanted positions, after guidance and logits processors; one forward pass.

        Args:
            tokens: ``(N, L)`` int64, the canvas as it stands; N is B, or a multiple of it: alternative canvases one
                after the other.
            wanted: ``(N, K)`` int64: columns.  Logits of a negative one mean nothing.
            canvas: the canvas that decoding started from, of B rows.
            hidden: ``(N, K)`` bool: where the prediction shall leave out what stands in the slot itself.  Behind the
                canvas, the model then gets a masked *shadow* of every wanted slot, which sees all but the slot itself,
                and is seen by the other shadows alone (WINO, arXiv 2507.18578).  It is not quite as if the slot were
                masked: from the second layer on, the other slots have seen what stands in it.

        Raises:
            NapDecodeError: shapes that do not fit; ``hidden`` with a model that cannot leave one out.
        """
        self.refresh()
        every = torch.arange(wanted.numel(), device=wanted.device)
        return self.predict(canvas.rows, tokens, wanted, every, hidden=hidden).logits

    def predict(
        self,
        rows: Rows,
        tokens: Tensor,
        wanted: Tensor,
        places: Tensor,
        *,
        hidden: Tensor | None = None,
        kept: dict[str, Any] | None = None,
    ) -> Prediction:
        """The same for some of the slots, whose logits are made when they are looked at; one forward pass.

        Args:
            rows: what is decoded, B rows.
            tokens: ``(N, W)`` int64, see :meth:`__call__`.
            wanted: ``(N, K)`` int64: positions.  What is not in ``places`` means nothing.
            places: ``(T,)`` int64, the slots to predict: indices into ``wanted.flatten()``.
            hidden: see :meth:`__call__`.  Shadows of slots that are not in ``places``, or negative, are seen by none.
            kept: what earlier passes found out about the rows, empty at first; brought up to date here.  Without it,
                with ``hidden`` or with alternatives, everything is computed.
        """
        times = len(tokens) // len(rows.lengths)
        if tokens.shape != (times * len(rows.lengths), rows.width) or len(wanted) != len(tokens):
            raise NapDecodeError(
                f"tokens must be (J * {len(rows.lengths)}, {rows.width}), and wanted must have as many rows, but they "
                f"are {tuple(tokens.shape)} and {tuple(wanted.shape)}"
            )
        if hidden is not None:
            if hidden.shape != wanted.shape or hidden.dtype != torch.bool:
                found = f"{hidden.dtype} {tuple(hidden.shape)}"
                raise NapDecodeError(f"hidden must be bool of wanted's shape {tuple(wanted.shape)}, but is {found}")
            self.check_leave_one_out()
        output = self._forward(rows, tokens, wanted, places, hidden, kept)
        ids = tokens
        if self.logits_processor and rows.is_padded:  # one that counts tokens must not see what belongs to no row
            ids = tokens.masked_fill(~rows.present.repeat(times, 1), self.mask_token_id)
        head = self.call.head if output.is_hidden else None
        vocab_size = output.rows.shape[2] if head is None else head.vocab_size
        return Prediction(
            shape=(len(tokens), wanted.shape[1]),
            places=places,
            vocab_size=vocab_size,
            banned=self.banned(vocab_size, places.device),
            dtype=output.rows.dtype if head is None else head.dtype,
            source=output.rows.flatten(0, 1),
            head=head,
            cfg_scale=self.cfg_scale,
            process=partial(self._process, ids, wanted, hidden) if self.logits_processor else None,
        )

    def _forward(
        self, rows: Rows, tokens: Tensor, wanted: Tensor, places: Tensor, hidden: Tensor | None, kept: Any
    ) -> Output:
        """See :meth:`predict`; of N rows, or of 2 * N under guidance."""
        branches, times = [tokens], len(tokens) // len(rows.lengths)
        if self.cfg_scale != 0:
            branches.append(torch.where(rows.prompt.repeat(times, 1), self.mask_token_id, tokens))
        # Dream predicts the first position from itself, as there is nothing before it.
        shifted = (wanted - 1 if self.family.shift else wanted).clamp(min=0)
        if kept is not None and self.reuse is not None:
            if hidden is None and times == 1:
                return self.reuse.forward(self._decoding, rows, branches, shifted, _are_slots(wanted, places), kept)
            self.reuse.count(rows, len(branches), kept)
        if len(branches) > 1:
            tokens, shifted = torch.cat(branches), shifted.repeat(2, 1)
        if hidden is None:
            return self._decoding.with_rows(rows, tokens, shifted, is_grouped=self._is_grouped(rows.is_padded))
        hidden, is_seen = (flags.repeat(len(branches), 1) for flags in (hidden, _are_slots(wanted, places)))
        return self._decoding.with_shadows(rows, tokens, shifted, hidden, is_seen, mask_token_id=self.mask_token_id)

    def _process(self, tokens: Tensor, wanted: Tensor, hidden: Tensor | None, places: Tensor, scores: Tensor) -> Tensor:
        """What the logits processors make of scores ``(R, V)`` of the slots at ``places``."""
        input_ids = tokens.index_select(0, places // wanted.shape[1])  # (R, W)
        if hidden is not None:
            column = wanted.flatten()[places].clamp(min=0)[:, None]
            is_hidden = hidden.flatten()[places][:, None]
            input_ids.scatter_(1, column, input_ids.gather(1, column).masked_fill(is_hidden, self.mask_token_id))
        for processor in self.logits_processor:
            scores = processor(input_ids, scores)
        return scores


def _are_slots(wanted: Tensor, places: Tensor) -> Tensor:
    """Bool in the shape of ``wanted``: which of its entries are slots, and not there to fill up."""
    is_slot = torch.zeros_like(wanted, dtype=torch.bool).flatten().index_fill_(0, places, True).view_as(wanted)
    return is_slot & (wanted >= 0)


def _check_tokenizer(tokenizer: Any, num_embeddings: int | None) -> None:
    """Raise if a tokenizer's own ids go beyond the model's; warn if the model has far more.

    A model may have more of them, because its vocabulary was padded, and a tokenizer a few that were added to it and
    that no text has; everything else is a tokenizer of another model.
    """
    if tokenizer is None or num_embeddings is None:
        return
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    highest = max((number for token, number in vocabulary.items() if token not in added), default=0)
    if highest >= num_embeddings:
        raise NapDecodeError(
            f"the tokenizer has ids up to {highest}, but the model has {num_embeddings}, from 0 to "
            f"{num_embeddings - 1}; take the tokenizer that the model was trained with"
        )
    if num_embeddings > max(2 * len(vocabulary), len(vocabulary) + 512):
        warnings.warn(
            f"the tokenizer has {len(vocabulary)} ids, but the model {num_embeddings}; only those of the tokenizer can "
            "be emitted. Is it the one that the model was trained with?",
            stacklevel=3,
        )
