"""Calling a model: what its code takes, and how to ask it for a few positions only."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.attention import additive, visibility
from nap_decode.errors import NapDecodeError
from nap_decode.families import ModelFamily, find_family

Model: TypeAlias = "nn.Module | Callable[[Tensor, Tensor], Any]"
"""A transformers model, or anything called as ``model(input_ids, attention_mask)`` that returns logits
``(B, L, V)`` or an object with them as ``.logits``.  Rows are padded on the right."""


class ModelCall:
    """Calls a model with rows of tokens and returns its logits at some of their positions, as it gives them.

    Args:
        model: see :data:`Model`.
        family: how it behaves, if that is not to be found from its config.

    Raises:
        NapDecodeError: the model is of a kind that cannot be decoded by unmasking.
    """

    def __init__(self, model: Model, family: ModelFamily | None) -> None:
        self.model = model
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
    def takes_indices(self) -> bool:
        """Whether ``logits_to_keep`` may be ``(B, K)`` positions: in the models of newer transformers.

        Elsewhere the argument, if there is one, is a number of last positions or 1-D positions for all
        rows.  Which it is shows in the module that defines the model.
        """
        defined_in = sys.modules[type(self.module).__module__]
        return "logits_to_keep" in self.arguments and hasattr(defined_in, "slice_logits_to_keep")

    @cached_property
    def input_embeddings(self) -> nn.Module | None:
        """The input embeddings, if the model says which they are."""
        return self._part("get_input_embeddings")

    @cached_property
    def head(self) -> nn.Module | None:
        """The output layer, if the model says which it is."""
        return self._part("get_output_embeddings")

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

    # ---------------------------------------------------------------------------------------- the call

    def __call__(
        self,
        tokens: Tensor,
        present: Tensor | None,
        wanted: Tensor,
        *,
        hidden: Tensor | None = None,
        mask_token_id: int = 0,
    ) -> Tensor:
        """One call of the model.

        Args:
            tokens: ``(N, W)`` int64, rows that begin in column 0.
            present: ``(N, W)`` bool, false for padding behind a row; None if there is none.
            wanted: ``(N, K)`` int64, rows of the output to return; negative for any.
            hidden: ``(N, K)`` bool, those to take from a shadow of the slot; see :func:`visibility`.
            mask_token_id: what stands in shadows.

        Returns:
            ``(N, K, V)``; not shifted.
        """
        kept = wanted.clamp(min=0)
        if self.config is None:
            everything = torch.ones_like(tokens) if present is None else present.long()
            return _take(_logits(self.model(tokens, everything)), kept)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.arguments else {}
        if "timesteps" in self.arguments:
            # MDLM wants them, and does not look at them unless it is conditioned on time, which families refuse.
            options["timesteps"] = torch.zeros(len(tokens), device=tokens.device)
        if "block_size" in self.arguments and self.family.block_size is not None:
            options["block_size"] = self.family.block_size
        (num_rows, width), num_shadows = tokens.shape, 0
        positions = torch.arange(width, device=tokens.device)[None]  # (1, W); (N, W + K) with shadows
        if hidden is not None:
            num_shadows = wanted.shape[1]
            is_there = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
            positions = torch.cat([positions.expand(num_rows, -1), kept], dim=1)
            present = torch.cat([is_there, wanted >= 0], dim=1)
            tokens = torch.cat([tokens, torch.full_like(kept, mask_token_id)], dim=1)
            kept = torch.where(hidden, width + torch.arange(num_shadows, device=tokens.device), kept)
            options["position_ids"] = positions + self.first_position
        mask = self._mask(positions, present, num_rows, num_shadows)
        if mask is not None:
            options["attention_mask"] = mask
        if self.takes_indices:
            return _logits(self.model(input_ids=tokens, logits_to_keep=kept, **options))  # type: ignore[call-arg]
        with _rows_kept(self.head, kept, tokens.shape) as was_kept:
            logits = _logits(self.model(input_ids=tokens, **options))  # type: ignore[call-arg]
        return logits if was_kept else _take(logits, kept)

    def _mask(self, positions: Tensor, present: Tensor | None, num_rows: int, num_shadows: int) -> Tensor | None:
        """The attention mask as the family wants it; None if all see all, which is faster without one."""
        block_size = self.family.block_size if self.takes_mask else None
        if present is None and block_size is None:
            return None
        if present is None:
            present = torch.ones_like(positions, dtype=torch.bool)
        if block_size is None and not num_shadows:
            if self.family.attention == "2d":
                return present.long()
            seen = present[:, None].expand(-1, present.shape[1], -1)
        else:
            positions = positions.expand_as(present)
            seen = visibility(positions, present, block_size=block_size, num_shadows=num_shadows)
        mask = seen if self.family.attention == "4d" else additive(seen, self.dtype)
        return mask.expand(num_rows, -1, -1)[:, None]


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
