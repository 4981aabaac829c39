"""What the model says about masked positions: the only place that knows model families."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.calling import Model, ModelCall
from nap_decode.canvas import Canvas
from nap_decode.errors import NapDecodeError, check_between
from nap_decode.families import ModelFamily
from nap_decode.probing import Probe, ProbeRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Denoiser", "LogitsProcessor", "Model"]

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""As in transformers: ``(input_ids (N, L), scores (N, V)) -> scores (N, V)``."""


class Denoiser:
    """Wraps a model into: canvas and wanted positions ``(B, K)`` -> logits ``(B, K, V)``.

    Entry k of a row is the model's prediction of the token at the k-th wanted position, whatever the
    family's conventions.  Only wanted positions pass the output layer: native transformers models are
    told by ``logits_to_keep``; for others a hook on ``get_output_embeddings()`` drops the other rows
    during the call; failing both, the logits are sliced.

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
        logits_processor: transformers logits processors, called with one row per wanted position:
            ``input_ids (B * K, L)`` is the whole canvas, masks and padding included.
        device: where the model takes its input; found from a module's embeddings or parameters, the CPU
            for a function.

    Raises:
        NapDecodeError: no mask token is known; the model is of a kind that cannot be decoded by
            unmasking, ignores the future, predicts nan, does not do what its attention mask says of
            blocks, or is in training mode with dropout.

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
    ) -> None:
        if not callable(model):
            raise NapDecodeError(f"model must be a torch module or a function, but is {model!r:.80}")
        check_between("cfg_scale", cfg_scale, 0.0, float("inf"))
        self.model = model
        self._call = ModelCall(model, family)
        self.config: Any = self._call.config
        self.family = self._call.family
        self.tokenizer = tokenizer
        self.mask_token_id = self._find_mask(mask_token_id)
        self.end_token_ids = tuple(end_token_ids) if end_token_ids is not None else self._find_ends()
        self.cfg_scale = cfg_scale
        self.logits_processor = _as_tuple(logits_processor)
        self._device = torch.device(device) if device is not None else None
        self._banned: dict[tuple[int, torch.device], Tensor] = {}
        # Of the last canvas, for models that do not hide padding.
        self._grouped: tuple[Canvas | None, list[tuple[Tensor, int]]] = (None, [])
        self._leaves_one_out = False  # not tried yet
        self._check_dropout()
        self._check_probe()

    def replace(
        self,
        *,
        end_token_ids: Sequence[int] | None = None,
        cfg_scale: float | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    ) -> Denoiser:
        """The same model with some options exchanged; it is not probed again.

        Args:
            end_token_ids: see :class:`Denoiser`.
            cfg_scale: see :class:`Denoiser`.
            logits_processor: see :class:`Denoiser`.

        Example:
            >>> from nap_decode import demo
            >>> Denoiser(*demo.load()).replace(cfg_scale=1.5).cfg_scale
            1.5
        """
        other = copy.copy(self)
        if end_token_ids is not None:
            other.end_token_ids = tuple(end_token_ids)
        if cfg_scale is not None:
            check_between("cfg_scale", cfg_scale, 0.0, float("inf"))
            other.cfg_scale = cfg_scale
        if logits_processor is not None:
            other.logits_processor = _as_tuple(logits_processor)
        return other

    # ---------------------------------------------------------------------------------------- facts

    def _find_mask(self, given: int | None) -> int:
        if given is None:
            known = {
                "tokenizer.mask_token_id": getattr(self.tokenizer, "mask_token_id", None),
                "config.mask_token_id": getattr(self.config, "mask_token_id", None),
            }
            ids = {value for value in known.values() if value is not None} or {self.family.mask_token_id}
            if len(ids) > 1:
                raise NapDecodeError(f"two mask tokens are known: {known}; pass mask_token_id= to say which is meant")
            given = ids.pop()
        if given is None:
            raise NapDecodeError(
                "no mask token is known: the tokenizer has no mask_token, the config no mask_token_id, and the "
                f"family of {self.family.name!r} models names none; pass mask_token_id="
            )
        size = self._call.num_embeddings
        if not 0 <= given < (size or given + 1):
            raise NapDecodeError(f"mask_token_id {given} is not one of the model's {size} token ids")
        return given

    def _find_ends(self) -> tuple[int, ...]:
        generation_config = getattr(self.model, "generation_config", None)
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
        """The id that fills rows up on the left; the mask id (which attention hides there) if none is known."""
        for owner in (self.tokenizer, self.config):
            found = getattr(owner, "pad_token_id", None)
            if found is not None:
                return int(found)
        return self.mask_token_id

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self._call.device if self._device is None else self._device

    def banned(self, vocab_size: int, device: torch.device) -> Tensor:
        """``(N,)`` int64: the mask id, and ids below ``vocab_size`` that the tokenizer does not have."""
        if (vocab_size, device) not in self._banned:
            ids = {self.mask_token_id}
            if self.tokenizer is not None:
                ids |= set(range(vocab_size)).difference(self.tokenizer.get_vocab().values())
            self._banned[vocab_size, device] = torch.tensor(sorted(ids), device=device)
        return self._banned[vocab_size, device]

    # ---------------------------------------------------------------------------------------- checks

    def check(self, canvas: Canvas) -> None:
        """Raise unless the model can be called with this canvas.

        Raises:
            NapDecodeError: another device, ids out of range, too many positions, a slot to decode without a
                mask in it, or active dropout.
        """
        self._check_dropout()
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
        limit = self._call.max_positions
        if limit is not None and canvas.longest > limit:
            raise NapDecodeError(
                f"the longest row takes {canvas.longest} positions (prompt and canvas), but the model has {limit}; "
                "shorten the prompt or the canvas"
            )
        if canvas.is_padded and not self._hides_padding:
            self._groups(canvas)

    def _check_dropout(self) -> None:
        for name, module in self._call.module.named_modules() if self._call.module is not None else ():
            if isinstance(module, nn.Dropout) and module.training and module.p > 0:
                raise NapDecodeError(
                    f"the model is in training mode and {name} would drop activations at random; call model.eval()"
                )

    # ---------------------------------------------------------------------------------------- probing

    def probe(self) -> Probe:
        """What the model does, as far as two forward passes of a few short rows tell; they are made once.

        Functions and modules that are called with ids and mask are not probed: all answers are None.
        """
        return Probe(
            sees_future=None if self._rows is None else self._rows.sees_future(self._alone),
            hides_padding=None if self._rows is None else self._is_masked_well,
            shift=None if self._rows is None else self._rows.shift(self._alone, self.mask_token_id),
        )

    @cached_property
    def _rows(self) -> ProbeRows | None:
        """What the model is probed with; None if it cannot be."""
        if self.config is None:
            return None
        return ProbeRows.make(
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            avoid=self.end_token_ids,
            num_ids=self._call.num_embeddings or 0,
            max_positions=self._call.max_positions,
            device=self.device,
        )

    @cached_property
    def _alone(self) -> Tensor:
        """``(N, 2, V)``: what the model says to rows without padding."""
        assert self._rows is not None
        with torch.no_grad():
            return self._call(self._rows.tokens, None, self._rows.wanted)

    @cached_property
    def _is_masked_well(self) -> bool:
        """Whether what the attention mask hides behind a row leaves the row's predictions alone."""
        if not self._call.takes_mask or self._rows is None:
            return self._call.takes_mask
        with torch.no_grad():
            padded = self._call(self._rows.padded, self._rows.present, self._rows.wanted[:2, :1])
        return self._rows.hides_padding(self._alone, padded)

    @cached_property
    def _hides_padding(self) -> bool:
        """The same; warns, once, if not."""
        if not self._is_masked_well:
            does = "does not hide what its attention mask says is padding" if self._call.takes_mask else "takes no mask"
            warnings.warn(
                f"{self._call.name} ({self.family.name}) {does}, so rows of different length "
                "are decoded in groups of equal length, one forward pass after the other: correct, but slower. "
                "Batches of prompts of one length avoid it",
                UserWarning,
                stacklevel=2,
            )
        return self._is_masked_well

    def _check_probe(self) -> None:
        """Raise if the model cannot be decoded, warn if it is not what its family is said to be."""
        if self._rows is None:
            return
        self.banned(self._alone.shape[-1], self.device)  # copied to the device now, not inside a decode
        if bool(self._alone.isnan().any()):
            raise NapDecodeError(
                f"{self._call.name} predicts nan for rows of ordinary tokens; try another precision, or "
                "attn_implementation='sdpa': not every implementation understands the attention mask of "
                f"{self.family.name} models ({self.family.attention!r})"
            )
        if not self._rows.sees_future(self._alone):
            import transformers

            raise NapDecodeError(
                f"{self._call.name} ignores the future: tokens to the right of a position do not change "
                "what it predicts there, so it cannot fill in masks. Decoders of transformers 5 (installed: "
                f"{transformers.__version__}) attend both ways after model.config.is_causal = False; their weights "
                "must have been trained so"
            )
        if self.family.block_size is not None and self._call.takes_mask and not self._is_masked_well:
            raise NapDecodeError(
                f"{self._call.name} does not do what a {self.family.attention} attention mask says, by which "
                f"{self.family.name} models are told their blocks; load it with attn_implementation='sdpa', or pass "
                "family= with another attention="
            )
        shift = self._rows.shift(self._alone, self.mask_token_id)
        if shift not in (None, self.family.shift):
            does, said = ("at p - 1", "in place") if shift else ("in place", "at p - 1")
            warnings.warn(
                f"{self._call.name} seems to predict position p {does}, but the family "
                f"{self.family.name!r} says {said}; to override it, pass family=ModelFamily(name=..., shift={shift})",
                UserWarning,
                stacklevel=3,
            )

    def check_leave_one_out(self) -> None:
        """Raise unless the model can be called with ``hidden=``; two small forward passes, made once.

        Raises:
            NapDecodeError: the family is shifted; the model takes no positions or no mask of its own for
                every query, or does not do what they say.
        """
        if self._leaves_one_out:
            return
        name = self._call.name
        remedy = "; use an algorithm without leave-one-out predictions"
        if self.family.shift:
            raise NapDecodeError(
                f"{name} ({self.family.name}) predicts position p at p - 1, where no slot can be left out alone{remedy}"
            )
        if self.config is None or "position_ids" not in self._call.arguments or not self._call.takes_mask:
            raise NapDecodeError(
                f"leave-one-out predictions need a model that takes position_ids and a 4-D attention_mask; {name} does "
                f"not{remedy}"
            )
        if self._call.attends_locally:
            raise NapDecodeError(
                f"some layers of {name} attend to a window only, which a 4-D attention mask would override{remedy}"
            )
        # The shadow of a masked slot says what the slot itself says, and the canvas what it says without shadows.
        same, other = (0, self.mask_token_id) if self._rows is None else self._rows.tokens[1:3, 1].tolist()
        rows = torch.tensor([[same, self.mask_token_id, other, same], [other, self.mask_token_id, same, other]] * 2)
        rows, wanted = rows.to(self.device), torch.ones(4, 1, dtype=torch.int64, device=self.device)
        hidden = torch.arange(4, device=self.device)[:, None] >= 2
        with torch.no_grad():
            plain = self._call(rows, None, wanted)
            try:
                shadow = self._call(rows, None, wanted, hidden=hidden, mask_token_id=self.mask_token_id)
            except Exception as error:
                raise NapDecodeError(
                    f"leave-one-out predictions need a 4-D attention mask, which {name} does not take: {error}{remedy}"
                ) from error
        effect = (plain[0] - plain[1]).abs().max()
        rounding = 16 * torch.finfo(plain.dtype).eps * plain.abs().max()
        if bool((shadow - plain).abs().max() > 1e-3 * effect + rounding):
            raise NapDecodeError(
                f"{name} does not do what a 4-D attention mask and position_ids say, which leave-one-out predictions "
                f"need{remedy}, or load it with attn_implementation='sdpa'"
            )
        self._leaves_one_out = True

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
        if hidden is not None:
            if hidden.shape != wanted.shape or hidden.dtype != torch.bool:
                raise NapDecodeError(
                    f"hidden must be bool of wanted's shape {tuple(wanted.shape)}, but is {hidden.dtype} "
                    f"{tuple(hidden.shape)}"
                )
            self.check_leave_one_out()
        if self.cfg_scale == 0:
            logits = self._forward(tokens, wanted, canvas, hidden)
        else:
            prompt = canvas.prompt.repeat(len(tokens) // num_rows, 1)
            both = torch.cat([tokens, torch.where(prompt, self.mask_token_id, tokens)])
            twice = None if hidden is None else hidden.repeat(2, 1)
            conditional, free = self._forward(both, wanted.repeat(2, 1), canvas, twice).chunk(2)
            logits = free + (self.cfg_scale + 1) * (conditional - free)
        if self.logits_processor:
            width, vocab_size = logits.shape[1:]
            input_ids = tokens.repeat_interleave(width, dim=0)  # (N * K, L)
            if hidden is not None:
                column = wanted.clamp(min=0).reshape(-1, 1)
                here = input_ids.gather(1, column)
                input_ids.scatter_(1, column, here.masked_fill(hidden.reshape(-1, 1), self.mask_token_id))
            scores = logits.reshape(-1, vocab_size)
            for processor in self.logits_processor:
                scores = processor(input_ids, scores)
            logits = scores.view(len(tokens), width, vocab_size)
        return logits

    def _forward(self, tokens: Tensor, wanted: Tensor, canvas: Canvas, hidden: Tensor | None) -> Tensor:
        """``(N, K, V)``; N is B times the number of alternatives, twice that under guidance."""
        present = None
        if canvas.is_padded:
            #  pad pad  a   b   c        a   b   c  pad
            #  pad  d   e   f   g   ->   d   e   f   g
            padding = canvas.padding.repeat(len(tokens) // len(canvas.tokens), 1)
            columns = torch.arange(canvas.longest, device=tokens.device) + padding
            present = columns < tokens.shape[1]
            tokens = tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1)).where(present, self.pad_token_id)
            wanted = wanted - padding  # negative for what is no slot
        if self.family.shift:
            # Dream predicts the first position from itself, as there is nothing before it.
            wanted = (wanted - 1).clamp(min=0)
        options: dict[str, Any] = {"mask_token_id": self.mask_token_id}
        if present is None or self._hides_padding:
            return self._call(tokens, present, wanted, hidden=hidden, **options)
        parts, order = [], []
        first = torch.arange(0, len(tokens), len(canvas.tokens), device=tokens.device)[:, None]  # of each alternative
        for some, length in self._groups(canvas):
            rows = (first + some).flatten()
            mine = None if hidden is None else hidden[rows]
            parts.append(self._call(tokens[rows, :length], None, wanted[rows], hidden=mine, **options))
            order.append(rows)
        logits = torch.cat(parts)
        return torch.empty_like(logits).index_copy_(0, torch.cat(order).to(logits.device), logits)

    def _groups(self, canvas: Canvas) -> list[tuple[Tensor, int]]:
        """Rows of one length, and that length, for every length; found on the host, once for a canvas."""
        if self._grouped[0] is not canvas:
            by_length: dict[int, list[int]] = {}
            for row, length in enumerate(canvas.attention_mask.sum(1).tolist()):
                by_length.setdefault(length, []).append(row)
            device = canvas.tokens.device
            self._grouped = canvas, [(torch.tensor(rows, device=device), n) for n, rows in by_length.items()]
        return self._grouped[1]


def _as_tuple(processors: LogitsProcessor | Sequence[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    # A LogitsProcessorList is a list that can be called.
    return tuple(processors) if isinstance(processors, Sequence) else (processors,)
