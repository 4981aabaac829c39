"""What the model says about masked positions: the only place that knows model families."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError, check_between, check_ids, check_integer, check_tokenizer
from nap_decode.canvas import Canvas
from nap_decode.model import foreign
from nap_decode.model.call import Model, ModelCall
from nap_decode.model.cost import Cost
from nap_decode.model.families import ModelFamily, find_mask
from nap_decode.model.head import Output, Passing
from nap_decode.model.passes import ForwardPass, ReusingPass
from nap_decode.model.prediction import Prediction
from nap_decode.model.probe import Probe, Probing
from nap_decode.model.rows import Rows, host_tensor
from nap_decode.speed.reuse import Kept, Reuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Denoiser", "LogitsProcessor", "Model"]

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""As in transformers: ``(input_ids (R, W), scores (R, V)) -> scores (R, V)``."""


class Denoiser:
    """Wraps a model into: canvas and wanted positions ``(B, K)`` -> logits ``(B, K, V)``.

    Entry k of a row is the model's prediction of the token at the k-th wanted position, whatever the
    family's conventions.  Only wanted positions pass the output layer, and that when their logits are looked
    at, a chunk at a time (:meth:`predict`): a hook on ``get_output_embeddings()`` takes the hidden states
    during the call.  If the model does more with them than its output layer does (it caps logits, say), the
    layer is called at once; if the model does not tell its output layer, the logits are sliced.

    The model sees ragged rows padded on the right, behind the canvas, so that a row's positions are the
    same as on its own, whether the model takes them from an argument, from the ids or from the index.

    Args:
        model: see :data:`Model`.
        tokenizer: gives the mask, padding and end ids, and the ids that may be emitted.
        mask_token_id: the mask id, if neither tokenizer nor config nor family tells.
        family: how the model behaves, if that is not to be found from its config.
        end_token_ids: ids that end a text, if not those of the generation config, config or tokenizer.
        cfg_scale: strength w of classifier-free guidance, ``l = l_uncond + (w + 1) (l_cond - l_uncond)``
            (LLaDA, arXiv 2502.09992, appendix A.2); the unconditional branch has the prompt masked.  0 is
            off; any other value doubles the work of a forward pass.
        logits_processor: transformers logits processors, called with one row per wanted position, a part of
            them at a time: ``input_ids (R, W)`` is the slot's whole row, masks included, and more of them
            behind a row that is shorter.
        device: where the model takes its input; found from a module's embeddings or parameters, the CPU
            for a function.
        reuse: which positions a pass computes anew, see :mod:`nap_decode.speed.reuse`; all by default.

    Raises:
        NapDecodeError: no mask token is known; the model is of a kind that cannot be decoded by
            unmasking, ignores the future, predicts nan, does not do what its attention mask says of
            blocks, is in training mode with dropout, or gives no access to its keys and values, which ``reuse`` needs.

    Warns:
        UserWarning: the model seems to be shifted though its family is not, or the other way round; with
            the first ragged batch, if padding cannot be hidden from the model, so that rows of different
            length are decoded in groups of equal length.

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
        check_between("cfg_scale", cfg_scale, 0.0, float("inf"))
        self.model = model
        self._call = ModelCall(model, family)
        self._compiled: ModelCall | None = None  # for decoding; what is found out is found out without
        self._compile_options: dict[str, Any] = {}
        self.tokenizer = tokenizer
        check_tokenizer(tokenizer, self.num_embeddings)
        self.mask_token_id = self._find_mask(mask_token_id)
        self.end_token_ids = self._find_ends() if end_token_ids is None else _ends(end_token_ids)
        self.cfg_scale = cfg_scale
        self.logits_processor = _as_tuple(logits_processor)
        self._device = torch.device(device) if device is not None else None
        self._banned: dict[tuple[int, torch.device], Tensor] = {}
        # What is made once for rows that are looked at again and again; of the last ones.
        self._last_canvas: tuple[Canvas, Rows] | None = None
        self._pass: ForwardPass | None = None
        self._reusing_pass: ReusingPass | None = None
        self._warned_of_groups = False
        self._ask()
        self._set_reuse(reuse)

    def replace(
        self,
        *,
        end_token_ids: Sequence[int] | None = None,
        cfg_scale: float | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        reuse: Reuse | None = None,
    ) -> Denoiser:
        """The same model with some options exchanged; it is not probed again.

        Args:
            end_token_ids: see :class:`Denoiser`.
            cfg_scale: see :class:`Denoiser`.
            logits_processor: see :class:`Denoiser`.
            reuse: see :class:`Denoiser`.

        Example:
            >>> from nap_decode import demo
            >>> Denoiser(*demo.load()).replace(cfg_scale=1.5).cfg_scale
            1.5
        """
        other = copy.copy(self)
        if end_token_ids is not None:
            other.end_token_ids = _ends(end_token_ids)
        if cfg_scale is not None:
            check_between("cfg_scale", cfg_scale, 0.0, float("inf"))
            other.cfg_scale = cfg_scale
        if logits_processor is not None:
            other.logits_processor = _as_tuple(logits_processor)
        if reuse is not None:
            other._set_reuse(reuse)
        return other

    def compiled(self, **options: Any) -> Denoiser:
        """The same model with everything before its output layer compiled by ``torch.compile``.

        It is compiled when it is called: for the first shape ``(N, W)`` that it is called with, and at the
        first other one once for all.  Rows with padding and without are compiled apart, and so is a single
        row.  The result is that of the model as it is: weights that are trained are seen, and if modules are
        exchanged, such as for adapters, the next :meth:`check` compiles anew.

        Args:
            options: those of ``torch.compile``, such as ``mode="max-autotune"`` or ``fullgraph=True``.

        Raises:
            NapDecodeError: the output layer cannot be told from the rest of the model.

        Example:
            >>> from nap_decode import demo
            >>> denoiser = Denoiser(*demo.load()).compiled(fullgraph=True)
        """
        other = copy.copy(self)
        other._compile_options = options
        other._compile()
        return other

    def _compile(self) -> None:
        if self._probing.rows is None:
            raise NapDecodeError(f"{self._call.name} cannot be compiled here; compile it before, with torch.compile")
        with torch.no_grad():
            self._compiled = self._call.compiled(self._probing.rows.tokens, **self._compile_options)
        self._pass = self._reusing_pass = None

    # ---------------------------------------------------------------------------------------- facts

    @property
    def config(self) -> Any:
        """The model's config, behind wrappers; None if it has none, or is not called with ``input_ids``."""
        return self._call.config

    @property
    def family(self) -> ModelFamily:
        """How the model behaves."""
        return self._call.family

    def _find_mask(self, given: int | None) -> int:
        if given is None:
            known = {
                "tokenizer.mask_token_id": getattr(self.tokenizer, "mask_token_id", None),
                "config.mask_token_id": find_mask(self.config),
            }
            ids = {value for value in known.values() if value is not None} or {self.family.mask_token_id}
            if len(ids) > 1:
                raise NapDecodeError(f"two mask tokens are known: {known}; pass mask_token_id= to say which is meant")
            given = ids.pop()
        if given is None:
            raise NapDecodeError(
                "no mask token is known: the tokenizer has no mask_token, the config no mask_token_id, and the "
                f"family of {self.family.name!r} models names none for this vocabulary; pass mask_token_id="
            )
        check_integer("mask_token_id", given, 0)
        size = self._call.num_embeddings
        if not 0 <= given < (size or given + 1):
            raise NapDecodeError(f"mask_token_id {given} is not one of the model's {size} token ids")
        return int(given)

    def _find_ends(self) -> tuple[int, ...]:
        generation_config = getattr(self._call.module, "generation_config", None)
        for owner, name in (
            (generation_config, "eos_token_id"),
            (self.config, "eos_token_id"),
            (self.tokenizer, "eos_token_id"),
            (self.tokenizer, "sep_token_id"),
        ):
            found = getattr(owner, name, None)
            if found is not None:
                return (found,) if isinstance(found, int) else tuple(found)
        return ()

    @property
    def num_embeddings(self) -> int | None:
        """Ids that the model has, if that is known."""
        return self._call.num_embeddings

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up; the mask id (which attention hides there) if none is known that the model has."""
        size = self._call.num_embeddings
        for owner in (self.tokenizer, self.config):
            found = getattr(owner, "pad_token_id", None)
            if found is not None and 0 <= found < (size or found + 1):
                return int(found)
        return self.mask_token_id

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self._call.device if self._device is None else self._device

    def banned(self, vocab_size: int, device: torch.device) -> Tensor:
        """``(N,)`` int64: the mask id, and ids below ``vocab_size`` that the tokenizer does not have."""
        if (vocab_size, device) not in self._banned:
            ids = {self.mask_token_id} & set(range(vocab_size))  # some models have a mask that they do not score
            if self.tokenizer is not None:
                ids |= set(range(vocab_size)).difference(self.tokenizer.get_vocab().values())
            self._banned[vocab_size, device] = torch.tensor(sorted(ids), dtype=torch.int64, device=device)
        return self._banned[vocab_size, device]

    # ---------------------------------------------------------------------------------------- checks

    def check(self, canvas: Canvas) -> None:
        """Raise unless the model can be called with this canvas.

        A model that has changed since it was looked at (adapters, resized embeddings, another precision) is looked at
        again.

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
        lowest, highest, size = int(canvas.tokens.min()), int(canvas.tokens.max()), self._call.num_embeddings
        if lowest < 0 or highest >= (size or highest + 1):
            wrong = lowest if lowest < 0 else highest
            ids = f"from 0 to {size - 1}" if size else "from 0"
            raise NapDecodeError(f"token id {wrong} is out of range: the model has ids {ids}. Wrong tokenizer?")
        if bool((canvas.tokens[canvas.decodable] != self.mask_token_id).any()):
            raise NapDecodeError(f"every slot to decode must hold the mask id {self.mask_token_id} at the start")
        self._check_length(canvas.tokens.shape[1])
        self._check_dropout(canvas.tokens)
        if canvas.is_padded:
            self._warn_of_groups()

    def _check_length(self, longest: int) -> None:
        takes = f"the longest row takes {longest} positions (prompt and canvas)"
        limit, is_strict = self._call.position_limit
        if limit is not None and longest > limit:
            if is_strict:
                raise NapDecodeError(f"{takes}, but the model has {limit}; shorten the prompt or the canvas")
            warnings.warn(
                f"{takes}, more than the {limit} that the model's config names; it can be called so, but may not have "
                "been trained so",
                UserWarning,
                stacklevel=4,
            )
        window = self._call.attention_window
        if self._call.must_be_told and window is not None and longest > window:
            raise NapDecodeError(
                f"{takes}, but {self._call.name} attends to a window of {window}, which the 4-D attention mask would "
                "override by which it is told to attend both ways; use a release of transformers that reads "
                "config.is_causal, or shorten the prompt or the canvas"
            )

    def refresh(self) -> bool:
        """Look at the model again if it has changed; whether it has."""
        if self._call.fingerprint() == self._probing.fingerprint:
            return False
        other = copy.copy(self)  # until all is known, threads that decode go on with what was
        other._call = ModelCall(self.model, self._call.family)
        other._banned, other._last_canvas, other._pass = {}, None, None
        other._ask()
        other._set_reuse(self.reuse)
        if self._compiled is not None:
            other._compile()
        vars(self).update(vars(other))
        return True

    def _ask(self) -> None:
        """Find out what the model does; raises if it cannot be decoded."""
        self._probing = Probing(
            self._call,
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            avoid=self.end_token_ids,
            device=self.device,
        )
        self._probing.recall()
        self._check_dropout()  # which would make chance of the answers
        self._probing.ask()
        self._check_probe()

    def _check_dropout(self, tokens: Tensor | None = None) -> None:
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in self._call.parts):
            raise NapDecodeError(
                f"{self._call.name} is in training mode and normalises over the batch, so that rows would depend on "
                "each other; call model.eval()"
            )
        if self._probing.is_random(tokens):
            raise NapDecodeError(
                f"{self._call.name} is in training mode and drops activations at random; call model.eval()"
            )

    # ---------------------------------------------------------------------------------------- probing

    def probe(self) -> Probe:
        """What the model does, as far as two forward passes of a few short rows tell; they are made once.

        Functions and modules that are called with ids and mask are not probed: all answers are None.
        """
        is_probed = self._probing.rows is not None
        return Probe(
            sees_future=self._probing.sees_future,
            hides_padding=self._probing.hides_padding if is_probed else None,
            shift=self._probing.shift,
        )

    @property
    def cost(self) -> Cost | None:
        """What its passes cost; None if the model does not tell its parts."""
        cost = self._call.cost
        return cost if cost is None or self.cfg_scale == 0 else dataclasses.replace(cost, branches=2)

    @property
    def must_be_told(self) -> bool:
        """Whether the model looks ahead only if a 4-D mask says so, since its release does not read ``is_causal``."""
        return self._call.must_be_told

    @property
    def is_split(self) -> bool:
        """Whether the model's parameters are on several devices."""
        return self._call.is_split

    @property
    def hides_padding(self) -> bool:
        """Whether rows of different length go through the model together; else it is one length after the other."""
        return self._probing.hides_padding

    def _warn_of_groups(self) -> None:
        """Once, if rows of different length must be."""
        if self.hides_padding or self._warned_of_groups:
            return
        self._warned_of_groups = True
        does = "does not hide what its attention mask says is padding" if self._call.takes_mask else "takes no mask"
        warnings.warn(
            f"{self._call.name} ({self.family.name}) {does}, so rows of different length are decoded in groups of "
            "equal length, one forward pass after the other: correct, but slower. Batches of prompts of one length "
            "avoid it",
            UserWarning,
            stacklevel=3,
        )

    def _check_probe(self) -> None:
        """Raise if the model cannot be decoded, warn if it is not what its family is said to be."""
        probing, name = self._probing, self._call.name
        if probing.answers is None:
            return
        alone = probing.answers.alone
        self.banned(alone.shape[-1], self.device)  # copied to the device now, not inside a decode
        if bool(alone.isnan().any()):
            raise NapDecodeError(
                f"{name} predicts nan for rows of ordinary tokens; try another precision, or "
                "attn_implementation='sdpa': not every implementation understands the attention mask of "
                f"{self.family.name} models ({self.family.attention!r})"
            )
        if not probing.sees_future:
            said = "A decoder attends both ways after model.config.is_causal = False"
            if foreign.claims_both_ways(self.config):
                why = "does not help" if probing.error is None else f"fails: {probing.error}"
                said = f"It does so although its config has is_causal = False; a 4-D attention mask of zeros {why}"
            raise NapDecodeError(
                f"{name} ignores the future: tokens to the right of a position do not change what it predicts there, "
                f"so it cannot fill in masks. {said}; its weights must have been trained so"
            )
        if self.family.block_size is not None and self._call.takes_mask and not self.hides_padding:
            raise NapDecodeError(
                f"{name} does not do what a {self.family.attention} attention mask says, by which "
                f"{self.family.name} models are told their blocks; load it with attn_implementation='sdpa', or pass "
                "family= with another attention="
            )
        shift = probing.shift
        if shift not in (None, self.family.shift):
            does, said = ("at p - 1", "in place") if shift else ("in place", "at p - 1")
            warnings.warn(
                f"{name} seems to predict position p {does}, but the family "
                f"{self.family.name!r} says {said}; to override it, pass family=ModelFamily(name=..., shift={shift})",
                UserWarning,
                stacklevel=4,
            )

    def check_leave_one_out(self) -> None:
        """Raise unless the model can be called with ``hidden=``; two small forward passes, made once.

        Raises:
            NapDecodeError: the family is shifted; the model takes no positions or no mask of its own for
                every query, or does not do what they say.
        """
        reason = self._probing.why_not_leave_one_out()
        if reason is not None:
            raise NapDecodeError(f"{reason}; use an algorithm without leave-one-out predictions")

    def _set_reuse(self, reuse: Reuse | None) -> None:
        """Raise unless the model can be called for some of the positions; a few small forward passes, made once.

        Raises:
            NapDecodeError: no policy; a model that takes no positions, hides no padding, attends to a window, keeps
                its keys and values to itself, or needs its output layer at once where the policy needs it later.
        """
        self.reuse, self._reusing_pass = reuse, None
        if reuse is None:
            return
        if not isinstance(reuse, Reuse):
            raise NapDecodeError(f"reuse must be a Reuse, such as CommittedReuse(), but is {reuse!r}")
        if self.model is no_model:  # the one that it stands in for will be asked
            return
        name = self._call.name
        if reuse.leaves_out_wanted and not self._call.head.is_late:
            raise NapDecodeError(
                f"{type(reuse).__name__} keeps what goes into the output layer, which cannot be told from the rest of "
                f"{name}; use CommittedReuse()"
            )
        reason = self._probing.why_not_reuse()
        if reason is not None:
            raise NapDecodeError(
                f"{name} ({self.family.name}) cannot reuse keys and values: {reason}. Decode it without reuse="
            )

    # ---------------------------------------------------------------------------------------- forward

    def __call__(self, tokens: Tensor, wanted: Tensor, canvas: Canvas, *, hidden: Tensor | None = None) -> Tensor:
        """Logits at the wanted positions, after guidance and logits processors; one forward pass.

        Args:
            tokens: ``(B, L)`` int64, the canvas as it stands; or ``(J * B, L)``, J alternative canvases one
                after the other (rows j * B to j * B + B - 1 are alternative j).
            wanted: ``(B, K)`` int64, or ``(J * B, K)``: columns.  Logits of a negative one mean nothing.
            canvas: the canvas that decoding started from, of B rows.
            hidden: ``(B, K)`` bool, or ``(J * B, K)``: where the prediction shall leave out what stands in
                the slot itself.  The model then gets K more tokens in each row: behind the canvas, a masked
                *shadow* of every wanted slot, which sees all but the slot itself, and is seen by the other
                shadows alone (WINO, arXiv 2507.18578).  Shadows of negative ``wanted`` are seen by none.
                It is not quite as if the slot were masked: from the second layer on, the other slots have
                seen what stands in it.  See :meth:`check_leave_one_out`.

        Returns:
            ``(B, K, V)`` or ``(J * B, K, V)``, in the model's precision.

        Raises:
            NapDecodeError: shapes that do not fit; ``hidden`` with a model that cannot leave one out.
        """
        num_rows, same_rows = len(canvas.tokens), tokens.shape[:1] == wanted.shape[:1]
        if tokens.shape[1:] != canvas.tokens.shape[1:] or len(tokens) % num_rows or not same_rows:
            raise NapDecodeError(
                f"tokens must be (B, L) or (J * B, L), and wanted must have as many rows, for a canvas "
                f"{tuple(canvas.tokens.shape)}, but they are {tuple(tokens.shape)} and {tuple(wanted.shape)}"
            )
        self.refresh()
        last = self._last_canvas
        if last is None or last[0] is not canvas:
            self._last_canvas = last = canvas, Rows.of(canvas)
        every = torch.arange(wanted.numel(), device=wanted.device)
        return self.predict(last[1], tokens, wanted, every, hidden=hidden).logits

    def predict(
        self,
        rows: Rows,
        tokens: Tensor,
        wanted: Tensor,
        places: Tensor,
        *,
        hidden: Tensor | None = None,
        kept: dict[str, Kept] | None = None,
    ) -> Prediction:
        """The same for rows that begin in column 0, and for some of the slots; one forward pass.

        Args:
            rows: what is decoded, B rows.
            tokens: ``(B, W)`` int64, the rows as they stand, with :attr:`pad_token_id` behind; or
                ``(J * B, W)``, J alternatives one after the other.
            wanted: ``(B, K)`` int64, or ``(J * B, K)``: positions.  What is not in ``places`` means nothing.
            places: ``(T,)`` int64, the slots to predict: indices into ``wanted.flatten()``.
            hidden: bool in the shape of ``wanted``, see :meth:`__call__`.  Shadows of slots that are not in
                ``places``, or negative, are seen by none.
            kept: what earlier passes found out about the rows, empty at first; brought up to date here.  Without it,
                with ``hidden`` or with alternatives, everything is computed.

        Returns:
            That of shape ``(B, K)``, or ``(J, B, K)``.

        Raises:
            NapDecodeError: shapes that do not fit; ``hidden`` with a model that cannot leave one out.
        """
        num_rows, width = len(rows.lengths), wanted.shape[1]
        times = len(tokens) // num_rows
        if tokens.shape != (times * num_rows, rows.width) or len(wanted) != len(tokens):
            raise NapDecodeError(
                f"tokens must be ({times} * {num_rows}, {rows.width}), and wanted must have as many rows, but they are "
                f"{tuple(tokens.shape)} and {tuple(wanted.shape)}"
            )
        if hidden is not None:
            if hidden.shape != wanted.shape or hidden.dtype != torch.bool:
                raise NapDecodeError(
                    f"hidden must be bool of wanted's shape {tuple(wanted.shape)}, but is {hidden.dtype} "
                    f"{tuple(hidden.shape)}"
                )
            self.check_leave_one_out()
        shadows = None
        if hidden is not None:
            shadows = hidden, _are_slots(wanted, places)
        if self.reuse is None or kept is None or shadows is not None or times > 1:
            source, is_hidden = self._forward(rows, tokens, wanted, shadows)
            self._count(rows, kept)
        else:
            source, is_hidden = self._reused(rows, tokens, wanted, _are_slots(wanted, places), kept)
        ids = tokens
        if self.logits_processor and rows.is_padded:  # one that counts tokens must not see what belongs to no row
            ids = tokens.masked_fill(~rows.present.repeat(times, 1), self.mask_token_id)
        head = self._call.head if is_hidden else None
        vocab_size = source.shape[2] if head is None else head.vocab_size
        return Prediction(
            shape=(len(tokens), width),
            places=places,
            vocab_size=vocab_size,
            banned=self.banned(vocab_size, places.device),
            dtype=source.dtype if head is None else head.dtype,
            source=source.flatten(0, 1),
            head=None if head is None else Passing(head),
            cfg_scale=self.cfg_scale,
            process=partial(self._process, ids, wanted, hidden) if self.logits_processor else None,
        )

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

    def _forward(self, rows: Rows, tokens: Tensor, wanted: Tensor, shadows: tuple[Tensor, Tensor] | None) -> Output:
        """Of N rows, B times the number of alternatives; of 2 * N under guidance."""
        again = self._pass
        if again is None or again.rows is not rows:
            if rows.is_padded:
                self._warn_of_groups()
            is_grouped = rows.is_padded and not self.hides_padding
            self._pass = again = ForwardPass(self._compiled or self._call, rows, is_grouped, self.mask_token_id)
        wanted = self._shifted(wanted)
        if self.cfg_scale != 0:
            tokens = torch.cat([tokens, self._without_prompt(rows, tokens)])
            wanted = wanted.repeat(2, 1)
            shadows = None if shadows is None else (shadows[0].repeat(2, 1), shadows[1].repeat(2, 1))
        return again(tokens, wanted, shadows)

    def _reused(self, rows: Rows, tokens: Tensor, wanted: Tensor, is_wanted: Tensor, kept: dict[str, Kept]) -> Output:
        """Of B rows, or 2 * B, as above; what earlier passes found out is used and brought up to date."""
        assert self.reuse is not None
        again = self._reusing_pass
        if again is None or again.rows is not rows:
            self._reusing_pass = again = ReusingPass(self._compiled or self._call, rows, self.reuse)
        branches = {"given": tokens}
        if self.cfg_scale != 0:
            branches["free"] = self._without_prompt(rows, tokens)
        outputs = []
        for name, ids in branches.items():
            before = kept[name] if name in kept else Kept.nothing(len(ids), rows.width, ids.device)
            output, kept[name] = again(ids, self._shifted(wanted), is_wanted, before)
            outputs.append(output)
        return outputs[0]._replace(rows=torch.cat([output.rows for output in outputs]))

    def _count(self, rows: Rows, kept: dict[str, Kept] | None) -> None:
        """Note down a pass that computed everything."""
        if self.reuse is None or kept is None:
            return
        lengths = host_tensor(rows.lengths, rows.prompt.device)
        branches = 1 if self.cfg_scale == 0 else 2
        before = kept.get("given") or Kept.nothing(len(lengths), rows.width, lengths.device)
        kept["given"] = before.counted(lengths * branches)
        if "free" in kept:
            kept["free"] = kept["free"].counted(0 * lengths)

    def _shifted(self, wanted: Tensor) -> Tensor:
        """Where the model predicts what is wanted."""
        # Dream predicts the first position from itself, as there is nothing before it.
        return (wanted - 1).clamp(min=0) if self.family.shift else wanted

    def _without_prompt(self, rows: Rows, tokens: Tensor) -> Tensor:
        """What the unconditional branch of guidance sees."""
        prompt = rows.prompt.repeat(len(tokens) // len(rows.prompt), 1)
        return torch.where(prompt, self.mask_token_id, tokens)


def _are_slots(wanted: Tensor, places: Tensor) -> Tensor:
    """Bool in the shape of ``wanted``: which of its entries are slots, and not there to fill up."""
    is_slot = torch.zeros_like(wanted, dtype=torch.bool).flatten().index_fill_(0, places, True).view_as(wanted)
    return is_slot & (wanted >= 0)


def _ends(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(check_ids("end_token_ids", ids))


def _as_tuple(processors: LogitsProcessor | Sequence[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    # A LogitsProcessorList is a list that can be called.
    return tuple(processors) if isinstance(processors, Sequence) else (processors,)


def no_model(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Stands in for a model that is not loaded yet, so that options are checked before that takes minutes."""
    raise NotImplementedError
