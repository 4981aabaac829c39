"""Calling a model: what its code takes, and in what form."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.attention import additive, visibility
from nap_decode.compiling import CompiledBody
from nap_decode.cost import Cost
from nap_decode.errors import NapDecodeError
from nap_decode.families import ModelFamily, find_family
from nap_decode.heads import Head, Output, take
from nap_decode.keeping import Store, attention_through, with_cache

Model: TypeAlias = "nn.Module | Callable[[Tensor, Tensor], Any]"
"""A transformers model, or anything called as ``model(input_ids, attention_mask)`` that returns logits
``(B, L, V)`` or an object with them as ``.logits``.  Rows are padded on the right."""


# transformers' own, which do nothing with a 2-D attention mask but make a 4-D one of it.
# fmt: off
_EXPANDS_MASKS = frozenset({
    "bert", "camembert", "distilbert", "electra", "eurobert", "roberta", "xlm-roberta",
    "gemma", "granite", "llama", "olmo2", "qwen2", "qwen3",
})
# fmt: on


class ModelCall:
    """Calls a model with rows of tokens and returns its logits at some of their positions, as it gives them.

    Args:
        model: see :data:`Model`.
        family: how it behaves, if that is not to be found from its config.

    Raises:
        NapDecodeError: the model is of a kind that cannot be decoded by unmasking.
    """

    def __init__(self, model: Model, family: ModelFamily | None) -> None:
        self.model: Any = model
        self.name = type(getattr(model, "_orig_mod", model)).__name__
        # The module itself, behind torch.compile's wrapper; None for a function.
        self.module: Any = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else None
        # A research module may have a config of its own; what takes input_ids is called as transformers models are.
        config = getattr(model, "config", None) if "input_ids" in self.arguments else None
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        self.config: Any = config
        if getattr(config, "is_encoder_decoder", False):
            raise NapDecodeError(f"{self.name} is an encoder-decoder; only models of one stack fill in masks")
        self.family = family or find_family(config)
        if self.family.refusal is not None:
            raise NapDecodeError(f"{self.family.name} cannot be decoded here: {self.family.refusal}")
        self._body: CompiledBody | None = None

    # ---------------------------------------------------------------------------------------- facts

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names that a module's forward takes."""
        return frozenset() if self.module is None else frozenset(inspect.signature(self.module.forward).parameters)

    @cached_property
    def takes_mask(self) -> bool:
        """Whether there is an attention mask to pass; functions and modules called with ids and mask have one."""
        return self.family.attention != "none" and (self.config is None or "attention_mask" in self.arguments)

    @cached_property
    def input_embeddings(self) -> nn.Module | None:
        """The input embeddings, if the model says which they are."""
        return self._part("get_input_embeddings")

    @cached_property
    def head(self) -> Head:
        """The output layer."""
        # The code of a model compiled as a whole may not run the hooks of a call, or keep them.
        is_compiled = self.module is not self.model or self.module._compiled_call_impl is not None
        return Head(None if is_compiled else self._part("get_output_embeddings"))

    def _part(self, getter: str) -> nn.Module | None:
        try:
            part = getattr(self.model, getter, lambda: None)()
        except NotImplementedError:  # so transformers' own say that they do not know
            return None
        return part if isinstance(part, nn.Module) else None

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those of the input embeddings, which quantisation leaves alone; all, if those are not known."""
        module = self.module if self.input_embeddings is None else self.input_embeddings
        return iter(()) if module is None else module.parameters()

    @property
    def device(self) -> torch.device:
        """Where a module takes its input; the CPU for a function."""
        return next((tensor.device for tensor in self._parameters()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's precision."""
        floating = (tensor.dtype for tensor in self._parameters() if tensor.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @cached_property
    def num_embeddings(self) -> int | None:
        """Ids that the model has, if that is known."""
        return getattr(self.input_embeddings, "num_embeddings", None) or getattr(self.config, "vocab_size", None)

    @cached_property
    def max_positions(self) -> int | None:
        """Positions that the model has, if that is known."""
        for name in ("max_position_embeddings", "max_sequence_length", "model_length"):
            limit = getattr(self.config, name, None)
            if isinstance(limit, int) and limit > 0:
                return limit - self.first_position
        return None

    @cached_property
    def cost(self) -> Cost | None:
        """What a pass costs, see :class:`Cost`."""
        return (
            None if self.module is None else Cost.of(self.module, self.config, [self.input_embeddings, self.head.layer])
        )

    @cached_property
    def first_position(self) -> int:
        """Where the model starts to count: RoBERTa-like ones, which derive positions from the ids, not at 0."""
        for name, module in self.module.named_modules() if self.module is not None else ():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.padding_idx + 1 if module.padding_idx is not None else 0
        return 0

    @cached_property
    def attends_locally(self) -> bool:
        """Whether the config says that some layers see a window only."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None:
            return any(kind != "full_attention" for kind in kinds)
        every = getattr(self.config, "global_attn_every_n_layers", None)  # ModernBERT before transformers 5
        return (every or 1) > 1

    @property
    def _takes_expanded(self) -> bool:
        """Whether to pass the 4-D mask that transformers itself would make of a 2-D one for this model.

        It would first wait for the device, to see whether the mask hides anything.
        """
        defined_in = vars(sys.modules[type(self.module).__module__])
        return (
            getattr(self.config, "model_type", None) in _EXPANDS_MASKS
            and type(self.module).__module__.startswith("transformers.")
            and ("create_bidirectional_mask" in defined_in or "create_causal_mask" in defined_in)
            and self.config._attn_implementation == "sdpa"  # it may be exchanged at any time
            and not self.attends_locally
        )

    # ---------------------------------------------------------------------------------------- the call

    def frame(self, shape: tuple[int, int] | torch.Size, present: Tensor | None, device: torch.device) -> Frame:
        """What calls with rows of one shape have in common.

        Args:
            shape: ``(N, W)``.
            present: ``(N, W)`` bool, false for padding behind a row; None if there is none.
            device: where the rows are.
        """
        options: dict[str, Any] = {}
        if self.config is None:
            options["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=device)
            if present is not None:
                options["attention_mask"] = present.long()
            return Frame(present, options)
        if "use_cache" in self.arguments:
            options["use_cache"] = False
        if "timesteps" in self.arguments:
            # MDLM wants them, and does not look at them unless it is conditioned on time, which families refuse.
            options["timesteps"] = torch.zeros(shape[0], device=device)
        if "block_size" in self.arguments and self.family.block_size is not None:
            options["block_size"] = self.family.block_size
        mask = self._mask(shape, present, device)
        if mask is not None:
            options["attention_mask"] = mask
        return Frame(present, options)

    def __call__(
        self,
        tokens: Tensor,
        frame: Frame,
        wanted: Tensor,
        shadows: tuple[Tensor, Tensor] | None = None,
        *,
        mask_token_id: int = 0,
    ) -> Output:
        """One call of the model.

        Args:
            tokens: ``(N, W)`` int64, rows that begin in column 0.
            frame: that of N rows of W columns.
            wanted: ``(N, K)`` int64, rows of the output to return; negative for any.
            shadows: ``(N, K)`` bool, which of them to take from a shadow of the slot, see :func:`visibility`; and
                ``(N, K)`` bool, which have a shadow that others see.
            mask_token_id: what stands in shadows.
        """
        kept, options = wanted.clamp(min=0), frame.options
        if self.config is None:
            return Head(None).run(lambda: self.model(tokens, options["attention_mask"]), tokens.shape, kept)
        if shadows is not None:
            hidden, is_seen = shadows
            width = tokens.shape[1]
            columns = torch.arange(width + wanted.shape[1], device=tokens.device)
            positions = torch.cat([columns[:width].expand_as(tokens), kept], dim=1)
            present = torch.ones_like(tokens, dtype=torch.bool) if frame.present is None else frame.present
            seen = visibility(
                positions,
                torch.cat([present, is_seen], dim=1),
                block_size=self._block_size,
                num_shadows=wanted.shape[1],
            )
            options = self._seeing(options, positions, seen)
            tokens = torch.cat([tokens, torch.full_like(kept, mask_token_id)], dim=1)
            kept = torch.where(hidden, columns[width:], kept)
        return self._output(tokens, options, kept)

    def storing(self, tokens: Tensor, options: dict[str, Any], wanted: Tensor, store: Store) -> Output:
        """One call of the model for some positions of rows; it attends to what is in the store, too.

        Args:
            tokens: ``(N, P)`` int64.
            options: arguments of the call besides.
            wanted: ``(N, K)`` int64, which of them to return.
            store: keys and values; gets those of this call.
        """
        if "past_key_values" in self.arguments:
            return self._output(tokens, with_cache(options, store), wanted)

        def run() -> Any:
            with attention_through(self.module, store):
                return self._run(tokens, options)

        return self.head.run(run, tokens.shape, wanted)

    def some_positions(self, positions: Tensor, present: Tensor) -> dict[str, Any]:
        """Arguments of :meth:`storing` besides the tokens, for positions of rows.

        Args:
            positions: ``(N, P)`` int64.
            present: ``(N, W)`` bool, false for padding.
        """
        columns = torch.arange(present.shape[1], device=positions.device).expand_as(present)
        seen = visibility(columns, present, queries=positions, block_size=self._block_size)
        return self._seeing(self.frame((1, 1), None, positions.device).options, positions, seen)

    def learn(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Find out what there is to know about the output layer, see :meth:`Head.learn`.

        Args:
            tokens: ``(N, W)`` int64, rows to try it with.
            wanted: ``(N, K)`` int64, positions to try it at.

        Returns:
            ``(N, K, V)``: the logits.
        """
        frame = self.frame(tokens.shape, None, tokens.device)
        return self.head.learn(partial(self._run, tokens, frame.options), tokens.shape, wanted)

    def compiled(self, tokens: Tensor, **options: Any) -> ModelCall:
        """The same with everything before the output layer compiled.

        Args:
            tokens: ``(N, W)`` int64, rows to try it with.
            options: those of ``torch.compile``.

        Raises:
            NapDecodeError: the output layer cannot be told from the rest.
        """
        other = copy.copy(self)
        if self.head.is_late and isinstance(self.head.layer, nn.Linear):
            other._body = CompiledBody(self.module, self.head.layer, **options)
            frame, wanted = self.frame(tokens.shape, None, tokens.device), torch.zeros_like(tokens[:, :1])
            hidden = other._body.plain(tokens, frame.options)
            if torch.equal(take(hidden, wanted), self(tokens, frame, wanted).rows):
                return other
        raise NapDecodeError(
            f"{self.name} cannot be compiled here, because its output layer cannot be told from the rest: it must be a "
            "torch.nn.Linear that get_output_embeddings() names, whose output is returned as it is, in a model that is "
            "neither compiled nor split over devices already. Use it as it is"
        )

    def _output(self, tokens: Tensor, options: dict[str, Any], wanted: Tensor) -> Output:
        """Of one call, compiled if this is."""
        if self._body is not None:
            return Output(take(self._body(tokens, options), wanted), True)
        return self.head.run(partial(self._run, tokens, options), tokens.shape, wanted)

    def _seeing(self, options: dict[str, Any], positions: Tensor, seen: Tensor) -> dict[str, Any]:
        """Arguments for tokens that stand at ``(N, Q)`` positions and see ``(N, Q, W)`` others."""
        # A 2-D mask has one row for all; models that take one take an additive one besides.
        mask = seen if self.family.attention == "4d" else additive(seen, self.dtype)
        return {**options, "attention_mask": mask[:, None], "position_ids": positions + self.first_position}

    def _run(self, tokens: Tensor, options: dict[str, Any]) -> Any:
        return self.model(input_ids=tokens, **options)

    @property
    def _block_size(self) -> int | None:
        """Blocks that the attention mask tells of."""
        return self.family.block_size if self.takes_mask else None

    def _mask(self, shape: tuple[int, int] | torch.Size, present: Tensor | None, device: torch.device) -> Tensor | None:
        """The attention mask as the family wants it; None if all see all, which is faster without one."""
        attention, block_size = self.family.attention, self._block_size
        if (present is None and block_size is None) or not self.takes_mask:
            return None
        if present is None:
            present = torch.ones(1, shape[1], dtype=torch.bool, device=device)
        if attention == "2d" and not self._takes_expanded:
            return present.long()
        if block_size is None:
            seen = present[:, None].expand(-1, shape[1], -1)
        else:
            positions = torch.arange(shape[1], device=device).expand_as(present)
            seen = visibility(positions, present, block_size=block_size)
        mask = additive(seen, self.dtype) if attention == "additive" else seen
        return mask.expand(shape[0], -1, -1)[:, None]


@dataclass(frozen=True, eq=False)
class Frame:
    """What calls of a model with rows of one shape have in common; made once for many steps.

    Args:
        present: ``(N, W)`` bool, false for padding behind a row; None if there is none.
        options: arguments of the call besides the tokens, the attention mask among them.
    """

    present: Tensor | None
    options: dict[str, Any]
