"""Calling a model: what its code takes, in what form, and what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError
from nap_decode.base.rows import Rows
from nap_decode.model import foreign
from nap_decode.model.families import ModelFamily, find_family
from nap_decode.model.head import Head, Output, take

Model: TypeAlias = "nn.Module | Callable[..., Any]"
"""A transformers model, also in a wrapper (DataParallel, DDP, FSDP, PEFT, torch.compile), or anything called as
``model(input_ids, attention_mask)``, or ``model(input_ids)``, that returns logits ``(B, L, V)`` or an object with them
as ``.logits``.  Rows are padded on the right."""
Options: TypeAlias = dict[str, Any]
"""Arguments of a call besides the ids, the attention mask among them."""


class ModelCall:
    """Calls a model with tokens and returns its output at some of them, as it gives it.

    Facts come from the innermost module whose signature counts, see :func:`.foreign.unwrapped`; calls go
    through the model as it was given.  Raises if it cannot be decoded by unmasking, or its forward cannot be read.
    """

    def __init__(self, model: Model, family: ModelFamily | None) -> None:
        self.model: Any = model
        self.chain = foreign.unwrapped(model)
        inner = self.chain[-1]
        self.module: Any = inner if isinstance(inner, nn.Module) else None
        self.name = type(inner).__name__
        # A research module may have a config of its own; what takes input_ids is called as transformers models are.
        self.config: Any = foreign.text_config(self.module)
        self.family = family or find_family(self.config, self.name)
        self.arguments = frozenset(() if self.module is None else foreign.parameters_of(self.module) or ())
        self._mask_argument = foreign.mask_argument(model)
        self.takes_mask = self.family.attention != "none" and (
            self._mask_argument is not None if self.config is None else "attention_mask" in self.arguments
        )
        self.must_be_told = False
        """Whether the model looks ahead only if a mask of its own for every query says so."""
        self.body: Callable[[Tensor, Options], Tensor] | None = None
        """Makes hidden states of ids in the model's place, if it is compiled."""
        self.learned: dict[str, Any] = {}
        """What callers found out about it; copies share it."""
        self._check(is_family_given=family is not None)

    def _check(self, is_family_given: bool) -> None:
        family, name = self.family, self.name
        is_known = self.module is None or self.config is not None or is_family_given
        if not is_known and not foreign.is_readable(self.module):
            raise NapDecodeError(
                f"the forward of {name} names no arguments, and what it wraps is not to be found, so that nothing is "
                "known of it. Give its forward an argument input_ids, pass a function (input_ids, attention_mask) -> "
                "logits that calls it, or say with family= how it behaves"
            )
        if getattr(self.config, "is_encoder_decoder", False):
            raise NapDecodeError(f"{name} is an encoder-decoder; only models of one stack fill in masks")
        if family.refusal is not None:
            raise NapDecodeError(f"{family.name} cannot be decoded here: {family.refusal}")
        if family.block_size is not None and family.attention != "none" and not self.takes_mask:
            raise NapDecodeError(
                f"{family.name} models are told their blocks by an attention_mask, but the forward of {name} takes "
                "none; give it that argument, or pass family= with another attention="
            )
        if self.config is not None or is_family_given or self.module is None:
            return
        # A module without a config is taken as it is, whatever stands in it.
        for part in self.module.modules():
            inside = find_family(getattr(part, "config", None), type(part).__name__)
            if inside.shift or inside.block_size is not None or inside.refusal is not None:
                warnings.warn(
                    f"there is a {inside.name} model in {name}, which has no config and is taken to predict in place "
                    "from the whole row; if it passes on what is inside, say so with family=",
                    UserWarning,
                    stacklevel=5,
                )
                return

    # ---------------------------------------------------------------------------------------- facts

    @property
    def parts(self) -> Sequence[nn.Module]:
        """All modules, those of wrappers included; none of a function."""
        whole = self.model if isinstance(self.model, nn.Module) else self.module
        return [] if whole is None else list(whole.modules())

    def fingerprint(self) -> tuple[object, ...]:
        """Changes with the module's parts, precision, device, config or attention."""
        layers = [foreign.part_of(self.module, f"get_{which}_embeddings") for which in ("input", "output")]
        weights = [next(layer.parameters(), None) for layer in layers if layer is not None]
        return (
            foreign.state_of(self.model if isinstance(self.model, nn.Module) else self.module, layers[1]),
            *((type(w), tuple(w.shape), w.dtype, w.device) for w in weights if w is not None),
            foreign.attention_kind(self.config),
            foreign.virtual_tokens(self.chain),
            repr(vars(self.config)) if hasattr(self.config, "__dict__") else None,
        )

    @cached_property
    def input_embeddings(self) -> nn.Module | None:
        """The input embeddings, if the model says which they are."""
        return foreign.part_of(self.module, "get_input_embeddings")

    @cached_property
    def head(self) -> Head:
        """The output layer."""
        is_in_reach = self.config is not None and not foreign.is_compiled(self.chain)
        layer = foreign.part_of(self.module, "get_output_embeddings") if is_in_reach else None
        return Head(layer, num_virtual=foreign.virtual_tokens(self.chain))

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those of the input embeddings, which quantisation leaves alone; all, if those are not known."""
        module = self.module if self.input_embeddings is None else self.input_embeddings
        return iter(()) if module is None else module.parameters()

    @property
    def device(self) -> torch.device:
        """Where a module takes its input; the CPU for a function."""
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
        """Positions that it has, and whether they end there, see :func:`.foreign.position_limit`."""
        return foreign.position_limit(self.module, self.config, self.input_embeddings)

    @cached_property
    def cost(self) -> Cost | None:
        """What a pass costs, see :class:`Cost`."""
        return Cost.of(self)

    @cached_property
    def first_position(self) -> int:
        """Where it starts to count, see :func:`.foreign.first_position`."""
        return foreign.first_position(self.module)

    @property
    def block_size(self) -> int | None:
        """Blocks that the attention mask tells of."""
        return self.family.block_size if self.takes_mask else None

    # ---------------------------------------------------------------------------------------- arguments

    def whole(self, shape: tuple[int, int] | torch.Size, present: Tensor | None, device: torch.device) -> Options:
        """For whole rows ``(N, W)``; ``present`` ``(N, W)`` is false for padding, None if there is none."""
        if self.config is None:
            ones = torch.ones(shape, dtype=torch.int64, device=device)
            return {"attention_mask": ones if present is None else present.long()}
        mask = self._mask(shape, present, device)
        return self._always(shape[0], device) | ({} if mask is None else {"attention_mask": mask})

    def options(self, rows: Rows, times: int = 1) -> Options:
        """The same for the rows of a batch, that many times one after the other; made once."""
        key = self, times
        if key not in rows.made:
            present = rows.present.repeat(times, 1) if rows.is_padded else None
            rows.made[key] = self.whole((times * len(rows.lengths), rows.width), present, rows.prompt.device)
        made: Options = rows.made[key]
        return made

    def some(self, positions: Tensor, seen: Tensor) -> Options:
        """For tokens that stand at ``(N, Q)`` positions and see ``(N, Q, W)`` others, see :func:`visibility`."""
        # A 2-D mask has one row for all; models that take one take an additive one besides.
        mask = seen if self._convention == "4d" else additive(seen, self.dtype)
        always = self._always(len(positions), positions.device)
        return always | {"attention_mask": mask[:, None], "position_ids": positions + self.first_position}

    def _always(self, number: int, device: torch.device) -> Options:
        options: Options = {}
        if "use_cache" in self.arguments:
            options["use_cache"] = False
        if "timesteps" in self.arguments:
            # MDLM wants them, and does not look at them unless it is conditioned on time, which families refuse.
            options["timesteps"] = torch.zeros(number, device=device)
        if "block_size" in self.arguments and self.family.block_size is not None:
            options["block_size"] = self.family.block_size
        return options

    @property
    def _convention(self) -> str:
        """How the model is told who may look at whom, see :class:`ModelFamily`."""
        return "additive" if self.must_be_told and self.family.attention == "2d" else self.family.attention

    def _mask(self, shape: tuple[int, int] | torch.Size, present: Tensor | None, device: torch.device) -> Tensor | None:
        """The attention mask as the family wants it; None if all see all, which is faster without one."""
        block_size = self.block_size
        if not self.takes_mask or (present is None and block_size is None and not self.must_be_told):
            return None
        if present is None and block_size is None:
            return torch.zeros(1, dtype=self.dtype, device=device).expand(shape[0], 1, shape[1], shape[1])
        if present is None:
            present = torch.ones(1, shape[1], dtype=torch.bool, device=device)
        # PEFT puts a part for its virtual tokens in front of a flat one.
        is_flat = self._convention == "2d"
        if is_flat and (self.head.num_virtual or not foreign.takes_expanded_mask(self.module, self.config)):
            return present.long()
        if block_size is None:
            seen = present[:, None].expand(-1, shape[1], -1)
        else:
            seen = visibility(torch.arange(shape[1], device=device).expand_as(present), present, block_size=block_size)
        mask = additive(seen, self.dtype) if self._convention == "additive" else seen
        return mask.expand(shape[0], -1, -1)[:, None]

    # ---------------------------------------------------------------------------------------- calls

    def __call__(self, tokens: Tensor, options: Options, wanted: Tensor) -> Output:
        """One call of the model with tokens ``(N, Q)``; its output at wanted columns ``(N, K)``."""
        if self.body is not None:
            return Output(take(self.body(tokens, options), wanted), True)
        return self.head.run(partial(self._run, tokens, options), tokens.shape, wanted)

    def with_rows(self, rows: Rows, tokens: Tensor, wanted: Tensor, *, is_grouped: bool = False) -> Output:
        """One forward pass of whole rows; what depends on nothing but the rows is made once.

        Args:
            rows: B rows.
            tokens: ``(N, W)`` int64; N is a multiple of B.
            wanted: ``(N, K)`` int64, positions.
            is_grouped: call padded rows one length after the other, because padding cannot be hidden.
        """
        times, device = len(tokens) // len(rows.lengths), tokens.device
        if not is_grouped:
            return self(tokens, self.options(rows, times), wanted)
        key = self, times, "groups"
        if key not in rows.made:
            first = torch.arange(0, len(tokens), len(rows.lengths), device=device)[:, None]  # of each copy of the batch
            groups = [((first + some).flatten(), width) for some, width in rows.groups]
            rows.made[key] = [(i, width, self.whole((len(i), width), None, device)) for i, width in groups]
        outputs = [(i, self(tokens[i, :width], options, wanted[i])) for i, width, options in rows.made[key]]
        return Output.joined(outputs)

    def with_shadows(
        self, rows: Rows, tokens: Tensor, wanted: Tensor, hidden: Tensor, is_seen: Tensor, *, mask_token_id: int
    ) -> Output:
        """One forward pass of whole rows and, behind them, a masked shadow of every wanted slot.

        Args:
            rows: B rows.
            tokens: ``(N, W)`` int64; N is a multiple of B.
            wanted: ``(N, K)`` int64, positions.
            hidden: ``(N, K)`` bool, which of them to take from the shadow.
            is_seen: ``(N, K)`` bool, which shadows others see.
            mask_token_id: what stands in shadows.
        """
        width = tokens.shape[1]
        columns = torch.arange(width + wanted.shape[1], device=tokens.device)
        positions = torch.cat([columns[:width].expand_as(tokens), wanted], dim=1)
        times = len(tokens) // len(rows.lengths)
        present = rows.present if times == 1 else rows.present.repeat(times, 1)
        shadows = wanted.shape[1]
        seen = visibility(positions, torch.cat([present, is_seen], 1), block_size=self.block_size, num_shadows=shadows)
        tokens = torch.cat([tokens, torch.full_like(wanted, mask_token_id)], dim=1)
        return self(tokens, self.some(positions, seen), torch.where(hidden, columns[width:], wanted))

    def learn(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
        """Find out what there is to know about the output layer, see :meth:`Head.learn`, with rows ``(N, W)``."""
        options = self.whole(tokens.shape, None, tokens.device)
        return self.head.learn(partial(self._run, tokens, options), tokens.shape, wanted)

    def _run(self, tokens: Tensor, options: Options) -> Any:
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


def visibility(
    positions: Tensor,
    present: Tensor,
    *,
    queries: Tensor | None = None,
    block_size: int | None = None,
    num_shadows: int = 0,
) -> Tensor:
    """Where each query may look, ``(N, Q, W)`` bool: rows are queries, columns are keys.

    With a block size attention is block-causal: both ways inside a block and back to earlier blocks, blocks
    being counted from position 0.  The last ``num_shadows`` columns are shadows: second versions of slots,
    behind the row.  Nothing in the row sees a shadow; a shadow sees the row but for its own slot::

             a  b  c  d | b' d'
        a    x  x  x  x | .  .
        b    x  x  x  x | .  .      b' and d' are the shadows of b and d
        c    x  x  x  x | .  .
        d    x  x  x  x | .  .
        b'   x  .  x  x | x  x
        d'   x  x  x  . | x  x

    Args:
        positions: ``(N, W)`` int64, those of the slots that shadows stand for included.
        present: ``(N, W)`` bool, false for padding, which nothing sees.
        queries: ``(N, Q)`` int64, positions that look; all by default, and with shadows.
        block_size: positions of a block; None if all see all.
        num_shadows: columns at the end that are shadows.
    """
    queries = positions if queries is None else queries
    seen = present[:, None, :].expand(-1, queries.shape[1], -1)
    if block_size is not None:
        seen = seen & (positions[:, None, :] // block_size <= queries[:, :, None] // block_size)
    if num_shadows:
        width = positions.shape[1]
        columns = torch.arange(width, device=positions.device)
        is_shadow = columns >= width - num_shadows
        own = positions[:, :, None] == positions[:, None, :]
        seen = seen & torch.where(is_shadow[:, None], is_shadow | ~own, ~is_shadow)
        # Whatever sees nothing at all becomes nan, and spreads.
        seen = seen | (columns[:, None] == columns)
    return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as what is added to attention scores: 0 where a query may look, else the lowest number there is."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a model's body: everything but the embeddings and the output layer."""

    per_position: float
    """Of a position, in all linear layers; of experts, those that a token goes through."""
    per_pair: float
    """Of a position that attends to another one."""
    branches: int = 1
    """Rows that the model sees for each row, 2 under guidance."""

    def flops(self, positions: int, length: int) -> float:
        """Of so many positions of a row of this length, in all passes together."""
        return positions * (self.per_position + length * self.per_pair)

    @classmethod
    def of(cls, call: ModelCall) -> Cost | None:
        """That of a transformers model; None if its config does not say enough."""
        sizes = foreign.sizes_of(call.config)
        if call.module is None or sizes is None:
            return None
        uncounted: list[nn.Module] = [part for part in call.module.modules() if isinstance(part, nn.Embedding)]
        uncounted += [layer for layer in (call.input_embeddings, call.head.layer) if layer is not None]
        left_out = {id(weight) for layer in uncounted for weight in layer.parameters()}
        weights = 0.0
        for name, weight in call.module.named_parameters():
            if weight.ndim >= 2 and id(weight) not in left_out:
                weights += weight.numel() * (sizes.active_experts if ".experts." in name else 1.0)
        # A product with a matrix of n numbers is 2 n operations; scores and weighted values are two for each layer.
        return cls(per_position=2 * weights, per_pair=4.0 * sizes.width * sizes.layers)
