"""Calling a model: what its code takes, and in what form."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError
from nap_decode.model import foreign
from nap_decode.model.attention import additive, visibility
from nap_decode.model.cost import Cost
from nap_decode.model.families import ModelFamily, find_family
from nap_decode.model.head import Head, Output, take
from nap_decode.speed.compile import CompiledBody
from nap_decode.speed.kv import Store

Model: TypeAlias = "nn.Module | Callable[..., Any]"
"""A transformers model, also in a wrapper (DataParallel, DDP, FSDP, PEFT, torch.compile), or anything called as
``model(input_ids, attention_mask)``, or ``model(input_ids)``, that returns logits ``(B, L, V)`` or an object with them
as ``.logits``.  Rows are padded on the right."""


class ModelCall:
    """Calls a model with rows of tokens and returns its logits at some of their positions, as it gives them.

    Facts come from the innermost module whose signature counts, see :func:`.foreign.unwrapped`; calls go
    through the model as it was given.

    Args:
        model: see :data:`Model`.
        family: how it behaves, if that is not to be found from its config.

    Raises:
        NapDecodeError: the model is of a kind that cannot be decoded by unmasking, or its forward cannot be read.
    """

    def __init__(self, model: Model, family: ModelFamily | None) -> None:
        self.model: Any = model
        self._chain = foreign.unwrapped(model)
        # The module itself, behind its wrappers; None for a function.
        self.module: Any = self._chain[-1] if isinstance(self._chain[-1], nn.Module) else None
        self.name = type(self._chain[-1]).__name__
        # A research module may have a config of its own; what takes input_ids is called as transformers models are.
        self.config: Any = foreign.text_config(self.module)
        is_known = self.module is None or self.config is not None or family is not None
        if not is_known and not foreign.is_readable(self.module):
            raise NapDecodeError(
                f"the forward of {self.name} names no arguments, and what it wraps is not to be found, so that nothing "
                "is known of it. Give its forward an argument input_ids, pass a function (input_ids, attention_mask) "
                "-> logits that calls it, or say with family= how it behaves"
            )
        if getattr(self.config, "is_encoder_decoder", False):
            raise NapDecodeError(f"{self.name} is an encoder-decoder; only models of one stack fill in masks")
        self.family = family or find_family(self.config, self.name)
        if self.family.refusal is not None:
            raise NapDecodeError(f"{self.family.name} cannot be decoded here: {self.family.refusal}")
        if self.family.block_size is not None and self.family.attention != "none" and not self.takes_mask:
            raise NapDecodeError(
                f"{self.family.name} models are told their blocks by an attention_mask, but the forward of {self.name} "
                "takes none; give it that argument, or pass family= with another attention="
            )
        if self.config is None and family is None:
            self._warn_of_what_is_inside()
        self.must_be_told = False
        """Whether the model looks ahead only if a mask of its own for every query says so."""
        self._body: CompiledBody | None = None

    # ---------------------------------------------------------------------------------------- facts

    @property
    def parts(self) -> Sequence[nn.Module]:
        """All modules, those of wrappers included; none of a function."""
        whole = self.model if isinstance(self.model, nn.Module) else self.module
        return [] if whole is None else list(whole.modules())

    def fingerprint(self) -> tuple[object, ...]:
        """Changes whenever the module is not what it was found to be: other parts, precision, device or attention."""
        layers = [foreign.part_of(self.module, f"get_{which}_embeddings") for which in ("input", "output")]
        weights = [next(layer.parameters(), None) for layer in layers if layer is not None]
        return (
            foreign.state_of(self.model if isinstance(self.model, nn.Module) else self.module, layers[1]),
            *((type(w), tuple(w.shape), w.dtype, w.device) for w in weights if w is not None),
            foreign.attention_kind(self.config),
            foreign.virtual_tokens(self._chain),
            repr(vars(self.config)) if hasattr(self.config, "__dict__") else None,
        )

    @property
    def wrappers(self) -> tuple[object, ...]:
        """Tells ways of wrapping the module from each other."""
        return tuple(map(weakref.ref, self._chain[:-1]))

    def _warn_of_what_is_inside(self) -> None:
        """A module or function without a config is taken as it is, whatever stands in it."""
        for part in self.module.modules() if self.module is not None else ():
            inside = find_family(getattr(part, "config", None), type(part).__name__)
            if inside.shift or inside.block_size is not None or inside.refusal is not None:
                warnings.warn(
                    f"there is a {inside.name} model in {self.name}, which has no config and is taken to predict in "
                    "place from the whole row; if it passes on what is inside, say so with family=",
                    UserWarning,
                    stacklevel=4,
                )
                return

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names that a module's forward takes."""
        return frozenset(() if self.module is None else foreign.parameters_of(self.module) or ())

    @cached_property
    def cache_argument(self) -> str | None:
        """The argument for keys and values, if there is one."""
        return None if self.config is None else foreign.cache_argument(foreign.parameters_of(self.module) or {})

    @cached_property
    def takes_mask(self) -> bool:
        """Whether there is an attention mask to pass; functions and modules called with ids and mask have one."""
        if self.family.attention == "none":
            return False
        if self.config is None:
            return self._mask_argument is not None
        return "attention_mask" in self.arguments

    @cached_property
    def _mask_argument(self) -> str | int | None:
        """See :func:`~nap_decode.model.foreign.mask_argument`."""
        return foreign.mask_argument(self.model)

    @property
    def attention(self) -> str:
        """How the model is told who may look at whom, see :class:`ModelFamily`."""
        return "additive" if self.must_be_told and self.family.attention == "2d" else self.family.attention

    @cached_property
    def input_embeddings(self) -> nn.Module | None:
        """The input embeddings, if the model says which they are."""
        return foreign.part_of(self.module, "get_input_embeddings")

    @cached_property
    def head(self) -> Head:
        """The output layer."""
        is_in_reach = self.config is not None and not foreign.is_compiled(self._chain)
        layer = foreign.part_of(self.module, "get_output_embeddings") if is_in_reach else None
        return Head(layer, num_virtual=foreign.virtual_tokens(self._chain))

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those of the input embeddings, which quantisation leaves alone; all, if those are not known."""
        module = self.module if self.input_embeddings is None else self.input_embeddings
        return iter(()) if module is None else module.parameters()

    @property
    def device(self) -> torch.device:
        """Where a module takes its input; the CPU for a function.

        Raises:
            NapDecodeError: its weights are loaded when they are needed, by something that is not known.
        """
        device = next((tensor.device for tensor in self._parameters()), torch.device("cpu"))
        if device.type != "meta":
            return device
        found = foreign.execution_device(self.input_embeddings or self.module) or foreign.execution_device(self.model)
        if found is None:
            raise NapDecodeError(
                f"the weights of {self.name} are on no device (meta); load them, or pass device= to say where whatever "
                "loads them takes its input"
            )
        return found

    @property
    def is_split(self) -> bool:
        """Whether the model's parameters are on several devices."""
        return self.module is not None and len({parameter.device for parameter in self.module.parameters()}) > 1

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
    def position_limit(self) -> tuple[int | None, bool]:
        """See :func:`~nap_decode.model.foreign.position_limit`."""
        return foreign.position_limit(self.module, self.config, self.input_embeddings)

    @cached_property
    def cost(self) -> Cost | None:
        """What a pass costs, see :class:`Cost`."""
        return (
            None if self.module is None else Cost.of(self.module, self.config, [self.input_embeddings, self.head.layer])
        )

    @cached_property
    def first_position(self) -> int:
        """See :func:`~nap_decode.model.foreign.first_position`."""
        return foreign.first_position(self.module)

    @property
    def attention_window(self) -> int | None:
        """See :func:`~nap_decode.model.foreign.attention_window`."""
        return foreign.attention_window(self.config)

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
            whole = torch.ones(shape, dtype=torch.int64, device=device)
            return Frame(present, {"attention_mask": whole if present is None else present.long()})
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
        if self.cache_argument is not None:
            return self._output(
                tokens, {**options, self.cache_argument: foreign.as_cache(store.update, store.width)}, wanted
            )

        def run() -> Any:
            with foreign.through_attention(store.update):
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

    def learn(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
        """Find out what there is to know about the output layer, see :meth:`Head.learn`.

        Args:
            tokens: ``(N, W)`` int64, rows to try it with.
            wanted: ``(N, K)`` int64, positions to try it at.
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
        mask = seen if self.attention == "4d" else additive(seen, self.dtype)
        return {**options, "attention_mask": mask[:, None], "position_ids": positions + self.first_position}

    def _run(self, tokens: Tensor, options: dict[str, Any]) -> Any:
        tokens = tokens.clone()  # the model's own, whatever it does to them
        mask = options.get("attention_mask")
        if mask is not None and mask.is_inference():  # nobody could tell whether it was written into
            mask = mask.clone()
            options = {**options, "attention_mask": mask}
        written = None if mask is None or mask.is_inference() else mask._version
        if self.config is not None:
            output = self.model(input_ids=tokens, **options)
        elif not self.takes_mask:
            output = self.model(tokens)
        elif self._mask_argument == "attention_mask":
            output = self.model(tokens, attention_mask=mask)
        else:
            output = self.model(tokens, mask)
        if mask is not None and written is not None and mask._version != written:
            raise NapDecodeError(f"{self.name} writes into its attention mask, which the next call needs as it was")
        return output

    @property
    def _block_size(self) -> int | None:
        """Blocks that the attention mask tells of."""
        return self.family.block_size if self.takes_mask else None

    def _mask(self, shape: tuple[int, int] | torch.Size, present: Tensor | None, device: torch.device) -> Tensor | None:
        """The attention mask as the family wants it; None if all see all, which is faster without one."""
        attention, block_size = self.attention, self._block_size
        if not self.takes_mask or (present is None and block_size is None and not self.must_be_told):
            return None
        if present is None and block_size is None:
            return torch.zeros(1, dtype=self.dtype, device=device).expand(shape[0], 1, shape[1], shape[1])
        if present is None:
            present = torch.ones(1, shape[1], dtype=torch.bool, device=device)
        # PEFT puts a part for its virtual tokens in front of a flat one.
        if attention == "2d" and (self.head.num_virtual or not foreign.takes_expanded_mask(self.module, self.config)):
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
