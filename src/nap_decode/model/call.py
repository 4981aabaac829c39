"""Calling a model: what its code takes, in what form, and what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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

    Facts come from the innermost module whose signature counts, see :func:`.foreign.unwrapped`; calls go through the
    model as it was given.
    """

    def __init__(self, model: Model, family: ModelFamily | None) -> None:
        self.model: Any = model
        self.chain = foreign.unwrapped(model)
        inner = self.chain[-1]
        self.module: Any = inner if isinstance(inner, nn.Module) else None
        self.outermost: nn.Module | None = model if isinstance(model, nn.Module) else self.module
        self.name = type(inner).__name__
        # A research module may have a config of its own; what takes input_ids is called as transformers models are.
        self.config: Any = foreign.text_config(self.module)
        self.family = family or find_family(self.config, self.name)
        self.arguments = frozenset(() if self.module is None else foreign.parameters_of(self.module) or ())
        self._mask_argument = foreign.mask_argument(model)
        self.takes_mask = self.family.attention != "none" and (
            self._mask_argument is not None if self.config is None else "attention_mask" in self.arguments
        )
        self._check(is_family_given=family is not None)
        self.block_size = self.family.block_size if self.takes_mask else None  # that the mask tells of
        self.input_embeddings = foreign.part_of(self.module, "get_input_embeddings")
        embedded = getattr(self.input_embeddings, "num_embeddings", None)
        self.num_embeddings: int | None = embedded or getattr(self.config, "vocab_size", None)
        self.position_limit = foreign.position_limit(self.module, self.config, self.input_embeddings)
        self.first_position = foreign.first_position(self.module)
        floating = (tensor.dtype for tensor in self._parameters() if tensor.is_floating_point())
        self.dtype = next(floating, torch.get_default_dtype())
        is_in_reach = self.config is not None and not foreign.is_compiled(self.chain)
        layer = foreign.part_of(self.module, "get_output_embeddings") if is_in_reach else None
        self.head = Head(layer, num_virtual=foreign.virtual_tokens(self.chain))
        self.must_be_told = False  # whether it looks ahead only if a mask of its own for every query says so
        self.body: Callable[[Tensor, Options], Tensor] | None = None  # makes hidden states in its place, if compiled

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
        # A module without a config is taken as it is, whatever stands in it.
        for part in () if is_known else self.module.modules():
            inside = find_family(getattr(part, "config", None), type(part).__name__)
            if inside.shift or inside.block_size is not None or inside.refusal is not None:
                warnings.warn(
                    f"there is a {inside.name} model in {name}, which has no config and is taken to predict in place "
                    "from the whole row; if it passes on what is inside, say so with family=",
                    stacklevel=5,
                )
                return

    # ---------------------------------------------------------------------------------------- facts

    @property
    def parts(self) -> Sequence[nn.Module]:
        """All modules, those of wrappers included; none of a function."""
        return [] if self.outermost is None else list(self.outermost.modules())

    def fingerprint(self) -> tuple[object, ...]:
        """Changes with the module's parts, precision, device, config or attention."""
        layers = [foreign.part_of(self.module, f"get_{which}_embeddings") for which in ("input", "output")]
        weights = [next(layer.parameters(), None) for layer in layers if layer is not None]
        return (
            foreign.state_of(self.outermost, layers[1]),
            *((type(w), tuple(w.shape), w.dtype, w.device) for w in weights if w is not None),
            foreign.virtual_tokens(self.chain),
            repr(getattr(self.config, "__dict__", None)),  # the kind of attention, too
        )

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

    # ---------------------------------------------------------------------------------------- arguments

    def whole(self, like: Tensor, present: Tensor | None = None) -> Options:
        """For whole rows, as many as ``like`` ``(N, W)`` has; ``present`` ``(N, W)`` is false for padding, if any."""
        if self.config is None:
            return {"attention_mask": torch.ones_like(like, dtype=torch.int64) if present is None else present.long()}
        mask = self._mask(like, present)
        return self._always(like) | ({} if mask is None else {"attention_mask": mask})

    def options(self, rows: Rows, tokens: Tensor) -> Options:
        """The same for tokens ``(N, W)`` of the rows of a batch, once or several times over; made once."""
        times = len(tokens) // len(rows.lengths)
        if (self, times) not in rows.made:
            rows.made[self, times] = self.whole(tokens, rows.present.repeat(times, 1) if rows.is_padded else None)
        made: Options = rows.made[self, times]
        return made

    def some(self, positions: Tensor, seen: Tensor) -> Options:
        """For tokens that stand at ``(N, Q)`` positions and see ``(N, Q, W)`` others, see :func:`visibility`."""
        # A 2-D mask has one row for all; models that take one take an additive one besides.
        mask = seen if self._convention == "4d" else additive(seen, self.dtype)
        return self._always(positions) | {
            "attention_mask": mask[:, None],
            "position_ids": positions + self.first_position,
        }

    def _always(self, like: Tensor) -> Options:
        options: Options = {}
        if "use_cache" in self.arguments:
            options["use_cache"] = False
        if "timesteps" in self.arguments:
            # MDLM wants them, and does not look at them unless it is conditioned on time, which families refuse.
            options["timesteps"] = torch.zeros(len(like), device=like.device)
        if "block_size" in self.arguments and self.family.block_size is not None:
            options["block_size"] = self.family.block_size
        return options

    @property
    def _convention(self) -> str:
        """How the model is told who may look at whom, see :class:`ModelFamily`."""
        return "additive" if self.must_be_told and self.family.attention == "2d" else self.family.attention

    def _mask(self, like: Tensor, present: Tensor | None) -> Tensor | None:
        """The attention mask as the family wants it; None if all see all, which is faster without one."""
        if not self.takes_mask or (present is None and self.block_size is None and not self.must_be_told):
            return None
        if present is None:
            present = torch.ones_like(like[:1], dtype=torch.bool)
        # PEFT puts a part for its virtual tokens in front of a flat one.
        is_flat = self._convention == "2d"
        if is_flat and (self.head.num_virtual or not foreign.takes_expanded_mask(self.module, self.config)):
            return present.long()
        seen = present[:, None]
        if self.block_size is not None:
            positions = torch.arange(like.shape[1], device=like.device).expand_as(present)
            seen = visibility(positions, present, block_size=self.block_size)
        mask = additive(seen, self.dtype) if self._convention == "additive" else seen
        return mask.expand(*like.shape, -1)[:, None]

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
            is_grouped: call rows one length after the other, because padding cannot be hidden.
        """
        if not is_grouped:
            return self(tokens, self.options(rows, tokens), wanted)
        key = self, len(tokens), "groups"
        if key not in rows.made:
            # The first row of each copy of the batch.
            first = torch.arange(0, len(tokens), len(rows.lengths), device=tokens.device)[:, None]
            groups = [((first + some).flatten(), width) for some, width in rows.groups]
            rows.made[key] = [(i, width, self.whole(tokens[i, :width])) for i, width in groups]
        outputs = [(i, self(tokens[i, :width], options, wanted[i])) for i, width, options in rows.made[key]]
        return Output.joined(outputs)

    def with_shadows(
        self, rows: Rows, tokens: Tensor, wanted: Tensor, hidden: Tensor, is_seen: Tensor, *, mask_token_id: int
    ) -> Output:
        """One forward pass of whole rows and, behind them, a masked shadow of every wanted slot.

        Args are those of :meth:`with_rows`, and ``(N, K)`` bool: which slots to take from the shadow (``hidden``),
        and which shadows others see.
        """
        width, shadows = tokens.shape[1], wanted.shape[1]
        columns = torch.arange(width + shadows, device=tokens.device)
        positions = torch.cat([columns[:width].expand_as(tokens), wanted], dim=1)
        present = torch.cat([rows.present.repeat(len(tokens) // len(rows.lengths), 1), is_seen], dim=1)
        seen = visibility(positions, present, block_size=self.block_size, num_shadows=shadows)
        tokens = torch.cat([tokens, torch.full_like(wanted, mask_token_id)], dim=1)
        return self(tokens, self.some(positions, seen), torch.where(hidden, columns[width:], wanted))

    def learn(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
        """See :meth:`Head.learn`."""
        return self.head.learn(partial(self._run, tokens, self.whole(tokens)), tokens.shape, wanted)

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

    With a block size attention is block-causal, see :class:`ModelFamily`.  The last ``num_shadows`` columns are
    shadows: second versions of slots, behind the row.  Nothing in the row sees a shadow; a shadow sees the row but
    for its own slot::

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
    def of(cls, call: ModelCall, branches: int = 1) -> Cost | None:
        """That of a transformers model; None if its config does not say enough."""
        sizes = foreign.sizes_of(call.config)
        if call.module is None or sizes is None:
            return None
        width, active = sizes
        uncounted: list[nn.Module] = [part for part in call.module.modules() if isinstance(part, nn.Embedding)]
        uncounted += [layer for layer in (call.input_embeddings, call.head.layer) if layer is not None]
        left_out = {id(weight) for layer in uncounted for weight in layer.parameters()}
        weights = 0.0
        for name, weight in call.module.named_parameters():
            if weight.ndim >= 2 and id(weight) not in left_out:
                weights += weight.numel() * (active if ".experts." in name else 1.0)
        # A product with a matrix of n numbers is 2 n operations; scores and weighted values are two for each layer.
        return cls(per_position=2 * weights, per_pair=4.0 * width, branches=branches)
