"""What the model says about masked positions: the only place that knows model families."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.canvas import Canvas
from nap_decode.errors import NapDecodeError, check_between
from nap_decode.families import ModelFamily, find_family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model: TypeAlias = "nn.Module | Callable[[Tensor, Tensor], Any]"
"""A transformers model, or anything called as ``model(input_ids, attention_mask)`` that returns logits
``(B, L, V)`` or an object with them as ``.logits``.  Rows are padded on the right."""
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
            unmasking, ignores the future, or is in training mode with dropout.

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
        # The module itself, behind torch.compile's wrapper; None for a function.
        self._module: Any = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else None
        self.tokenizer = tokenizer
        # A research module may have a config of its own; what takes input_ids is called as transformers models are.
        config = getattr(model, "config", None) if "input_ids" in self._arguments else None
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        self.config: Any = config
        if getattr(config, "is_encoder_decoder", False):
            raise NapDecodeError(
                f"{type(model).__name__} is an encoder-decoder; only models of one stack fill in masks"
            )
        self.family = family or find_family(config)
        if self.family.refusal is not None:
            raise NapDecodeError(f"{self.family.name} cannot be decoded here: {self.family.refusal}")
        self.mask_token_id = self._find_mask(mask_token_id)
        self.end_token_ids = tuple(end_token_ids) if end_token_ids is not None else self._find_ends()
        self.cfg_scale = cfg_scale
        # A LogitsProcessorList is a list that can be called.
        self.logits_processor: tuple[LogitsProcessor, ...] = (
            tuple(logits_processor) if isinstance(logits_processor, Sequence) else (logits_processor,)
        )
        self._device = torch.device(device) if device is not None else None
        self._banned: dict[tuple[int, torch.device], Tensor] = {}
        self._check_dropout()
        if self.config is not None:
            self._check_sees_future()

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
        size = self._num_embeddings
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
        if self._device is not None:
            return self._device
        if self._module is None:
            return torch.device("cpu")
        tensors = (self._module if self._input_embeddings is None else self._input_embeddings).parameters()
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @cached_property
    def _input_embeddings(self) -> nn.Module | None:
        getter = getattr(self.model, "get_input_embeddings", None)
        return getter() if getter is not None else None

    @cached_property
    def _num_embeddings(self) -> int | None:
        return getattr(self._input_embeddings, "num_embeddings", None) or getattr(self.config, "vocab_size", None)

    @cached_property
    def _head(self) -> nn.Module | None:
        getter = getattr(self.model, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        return head if isinstance(head, nn.Module) else None

    @cached_property
    def _arguments(self) -> frozenset[str]:
        """Names that a module's forward takes."""
        return frozenset() if self._module is None else frozenset(inspect.signature(self._module.forward).parameters)

    @cached_property
    def _takes_indices(self) -> bool:
        """Whether ``logits_to_keep`` may be ``(B, K)`` positions: in the models of newer transformers.

        Elsewhere the argument, if there is one, is a number of last positions or 1-D positions for all
        rows.  Which it is shows in the module that defines the model.
        """
        defined_in = sys.modules[type(self._module).__module__]
        return "logits_to_keep" in self._arguments and hasattr(defined_in, "slice_logits_to_keep")

    @cached_property
    def _position_offset(self) -> int | None:
        """Where RoBERTa-like models start to count, which derive positions from the ids; None for others."""
        for name, module in self._module.named_modules() if self._module is not None else ():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.padding_idx + 1 if module.padding_idx is not None else None
        return None

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
            NapDecodeError: another device, ids out of range, too many positions, rows of different length
                for a model that does not tell padding from text, a slot to decode without a mask in it,
                or active dropout.
        """
        self._check_dropout()
        if canvas.tokens.device.type != self.device.type:
            raise NapDecodeError(
                f"the canvas is on {canvas.tokens.device}, but the model takes its input on {self.device}; make the "
                "canvas with device="
            )
        lowest, highest = int(canvas.tokens.min()), int(canvas.tokens.max())
        if lowest < 0 or highest >= (self._num_embeddings or highest + 1):
            wrong = lowest if lowest < 0 else highest
            limit = f"from 0 to {self._num_embeddings - 1}" if self._num_embeddings else "from 0"
            raise NapDecodeError(f"token id {wrong} is out of range: the model has ids {limit}. Wrong tokenizer?")
        if bool((canvas.tokens[canvas.decodable] != self.mask_token_id).any()):
            raise NapDecodeError(f"every slot to decode must hold the mask id {self.mask_token_id} at the start")
        if self._max_positions is not None and canvas.longest > self._max_positions:
            raise NapDecodeError(
                f"the longest row takes {canvas.longest} positions (prompt and canvas), but the model has "
                f"{self._max_positions}; shorten the prompt or the canvas"
            )
        if canvas.is_padded and not self._hides_padding:
            raise NapDecodeError(
                f"padding changes what {self.family.name} models predict: they take no attention mask, or do not hide "
                "everything behind it. Decode rows of different length in different batches"
            )

    def _check_dropout(self) -> None:
        for name, module in self._module.named_modules() if self._module is not None else ():
            if isinstance(module, nn.Dropout) and module.training and module.p > 0:
                raise NapDecodeError(
                    f"the model is in training mode and {name} would drop activations at random; call model.eval()"
                )

    @cached_property
    def _max_positions(self) -> int | None:
        for name in ("max_position_embeddings", "max_sequence_length"):
            limit = getattr(self.config, name, None)
            if isinstance(limit, int) and limit > 0:
                return limit - (self._position_offset or 0)
        return None

    def _probe(self, *rows: Sequence[int]) -> Tensor:
        """``(B, V)``: what the model predicts from the first position of each row."""
        canvas = Canvas.from_infill(
            # Decoding needs a mask somewhere; the last token is as good a place as any.
            [[*row, self.mask_token_id] for row in rows],
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            device=self.device,
        )
        # A shifted model predicts position 1 from position 0.
        wanted = canvas.padding + (1 if self.family.shift else 0)
        with torch.no_grad():
            return self._forward(canvas.tokens, wanted, canvas)[:, 0]

    def _probe_ids(self) -> tuple[int, int, int] | None:
        """The mask id and two others; None if the vocabulary is too small to have them."""
        others = [i for i in range(5) if i not in (self.mask_token_id, self.pad_token_id)]
        return None if (self._num_embeddings or 5) < 5 else (self.mask_token_id, others[0], others[1])

    def _check_sees_future(self) -> None:
        """Change all tokens but the first, and see whether the prediction at the first one notices."""
        ids = self._probe_ids()
        if ids is None:
            return
        first, same, other = ids
        logits = self._probe([first] + [same] * 4, [first] + [same] * 4, [first] + [other] * 4)
        self.banned(logits.shape[-1], self.device)  # copied to the device now, not inside a decode
        noise, effect = (logits[0] - logits[1]).abs().max(), (logits[0] - logits[2]).abs().max()
        if bool(effect <= 2 * noise):
            import transformers

            raise NapDecodeError(
                f"{type(self.model).__name__} ignores the future: tokens to the right of a position do not change "
                "what it predicts there, so it cannot fill in masks. Decoders of transformers 5 (installed: "
                f"{transformers.__version__}) attend both ways after model.config.is_causal = False; their weights "
                "must have been trained so"
            )

    @cached_property
    def _hides_padding(self) -> bool:
        """Whether padding leaves a row's predictions alone: pad a short row, and see whether they change."""
        ids = self._probe_ids()
        if self.family.attention == "none":
            return False
        if self.config is None or ids is None:
            return True
        first, same, other = ids
        short, pads = [first, same, same], min(12, (self._max_positions or 16) - 4)
        alone = self._probe(short, [first, other, other])
        padded = self._probe(short, [same] * (len(short) + pads))
        effect = (alone[0] - alone[1]).abs().max()  # of other tokens; that of so many pads would be like it
        rounding = 16 * torch.finfo(alone.dtype).eps * alone[0].abs().max()  # another batch shape rounds otherwise
        return bool((padded[0] - alone[0]).abs().max() <= 1e-3 * effect + rounding)

    # ---------------------------------------------------------------------------------------- forward

    def __call__(self, tokens: Tensor, wanted: Tensor, canvas: Canvas) -> Tensor:
        """Logits at the wanted positions, after guidance and logits processors; one forward pass.

        Args:
            tokens: ``(B, L)`` int64, the canvas as it stands.
            wanted: ``(B, K)`` int64, columns.
            canvas: the canvas that decoding started from.

        Returns:
            ``(B, K, V)``, in the model's precision.
        """
        if self.cfg_scale == 0:
            logits = self._forward(tokens, wanted, canvas)
        else:
            unconditional = torch.where(canvas.prompt, self.mask_token_id, tokens)
            both = self._forward(torch.cat([tokens, unconditional]), wanted.repeat(2, 1), canvas)
            conditional, free = both.chunk(2)
            logits = free + (self.cfg_scale + 1) * (conditional - free)
        if self.logits_processor:
            num_rows, width, vocab_size = logits.shape
            scores = logits.reshape(num_rows * width, vocab_size)
            input_ids = tokens.repeat_interleave(width, dim=0)
            for processor in self.logits_processor:
                scores = processor(input_ids, scores)
            logits = scores.view(num_rows, width, vocab_size)
        return logits

    def _forward(self, tokens: Tensor, wanted: Tensor, canvas: Canvas) -> Tensor:
        copies = len(tokens) // len(canvas.tokens)  # two under guidance
        mask = canvas.attention_mask.repeat(copies, 1)
        if canvas.is_padded:
            #  pad pad  a   b   c        a   b   c  pad
            #  pad  d   e   f   g   ->   d   e   f   g
            padding = canvas.padding.repeat(copies, 1)
            columns = torch.arange(canvas.longest, device=tokens.device) + padding
            mask = (columns < tokens.shape[1]).long()
            tokens = tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1)).where(mask.bool(), self.pad_token_id)
            wanted = (wanted - padding).clamp(min=0)
        if self.family.shift:
            # Dream predicts the first position from itself, as there is nothing before it.
            wanted = (wanted - 1).clamp(min=0)
        if self.config is None:
            return _take(_logits(self.model(tokens, mask)), wanted)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._arguments else {}
        if canvas.is_padded:  # without padding every model does the same, and faster, without a mask
            whole = (-1, 1, tokens.shape[1], tokens.shape[1])
            options["attention_mask"] = (
                mask.bool()[:, None, None].expand(whole) if self.family.attention == "4d" else mask
            )
        if self._takes_indices:
            return _logits(self.model(input_ids=tokens, logits_to_keep=wanted, **options))  # type: ignore[call-arg]
        with _rows_kept(self._head, wanted, tokens.shape) as kept:
            logits = _logits(self.model(input_ids=tokens, **options))  # type: ignore[call-arg]
        return logits if kept else _take(logits, wanted)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise NapDecodeError(f"the model must return logits (B, L, V) or an object with such .logits, not {got}")
    return logits


def _take(rows: Tensor, wanted: Tensor) -> Tensor:
    """``(B, L, H), (B, K) -> (B, K, H)``."""
    return rows.take_along_dim(wanted.to(rows.device)[:, :, None], dim=1)


@contextmanager
def _rows_kept(head: nn.Module | None, wanted: Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """While open, the output layer sees only the wanted rows; yields a list that is non-empty once it did."""
    kept: list[bool] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0] if arguments else None
        # A tied output layer may be the input embedding itself, which is called with ids.
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != shape:
            return None
        kept.append(True)
        return (_take(hidden, wanted), *arguments[1:])

    handle = head.register_forward_pre_hook(keep) if head is not None else None
    try:
        yield kept
    finally:
        if handle is not None:
            handle.remove()
