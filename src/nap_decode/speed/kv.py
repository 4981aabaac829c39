"""Keys and values that calls of a model keep for the next ones."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from nap_decode.base.errors import NapDecodeError
from nap_decode.model.call import ModelCall, Options
from nap_decode.model.foreign import parameters_of
from nap_decode.model.head import HOOKING, Output


@dataclass(frozen=True, eq=False)
class Store:
    """What a model made of the rows of a batch, and which positions of them a call of it brings."""

    states: dict[str, Tensor]  # (B, heads, W, D) each; made by the first call, overwritten in place by the others
    shape: Size  # B, W
    rows: Tensor | None = None  # (n,) int64, the rows that are called; None if all are
    positions: Tensor | None = None  # (n, P) int64, the positions that are called; None if all are
    width: int | None = None  # columns that are looked at, from the first; None if all are
    sees_all: bool = False  # whether each position that is called sees all columns that are looked at

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; see :meth:`put`."""
        return self.put(f"keys {layer}", keys), self.put(f"values {layer}", values)

    def put(self, name: str, new: Tensor) -> Tensor:
        """``(n, heads, P, D)`` of what is called ``-> (n, heads, width, D)`` of all that these rows look at."""
        if self.rows is None and self.positions is None:
            self.states[name] = new.contiguous()
            return new  # as it came, so that the pass is what it is without a store
        if name not in self.states:
            self.states[name] = new.new_zeros(self.shape[0], new.shape[1], self.shape[1], new.shape[3])
        kept = self.states[name]
        some = kept if self.rows is None else kept.index_select(0, self.rows)
        if self.positions is None:
            some = new
        else:
            self.write(some, new)
        if self.rows is not None:
            kept.index_copy_(0, self.rows, some)
        return some[:, :, : self.width]

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """The positions that are called, of ``(n, W, ...)``."""
        assert self.positions is not None
        return torch.arange(len(self.positions), device=self.positions.device)[:, None], self.positions

    def write(self, into: Tensor, new: Tensor) -> None:
        """``(n, heads, P, D)`` of what is called to its places in ``(n, heads, W, D)``; faster than scatter."""
        into.transpose(1, 2)[self.index] = new.transpose(1, 2)

    def read(self, states: Tensor) -> Tensor:
        """What is called, ``(n, heads, P, D)``, of ``(n, heads, W, D)``."""
        return states.transpose(1, 2)[self.index].transpose(1, 2)


_ORDER = "store_kv"  # what the attention of SDAR's code must be told

Way: TypeAlias = Callable[[ModelCall, Tensor, Options, Tensor, Store], Output]
"""One call of a model that attends to what is in the store, too, and puts there what it makes; see ModelCall."""


def by_cache(call: ModelCall, tokens: Tensor, options: Options, wanted: Tensor, store: Store) -> Output:
    """Of decoders that take a ``Cache``."""
    name = cache_argument(parameters_of(call.module) or {})
    if name is None:
        raise LookupError("it takes no cache")
    return call(tokens, options | {name: _cache_class()(store)}, wanted)


def by_attention(call: ModelCall, tokens: Tensor, options: Options, wanted: Tensor, store: Store) -> Output:
    """Of models that take positions and a mask, and call torch's attention, such as encoders."""
    return _through(call, ThroughAttention(store), tokens, options, wanted)


def by_mask(call: ModelCall, tokens: Tensor, options: Options, wanted: Tensor, store: Store) -> Output:
    """Of models that call torch's attention, but make their mask, or their positions, of the index alone.

    Torch's attention gets the mask that they do not take.  Rotary embeddings that take queries and keys and no
    positions, as LLaDA's, get both in rows as long as the canvas, where the index is the position.
    """
    mask = None
    if store.positions is not None:
        mask = options["attention_mask"]
        options = {name: v for name, v in options.items() if name in call.arguments and name != "attention_mask"}
    with _in_place(call, store):
        return _through(call, ThroughAttention(store, mask), tokens, options, wanted)


def _through(call: ModelCall, attention: ThroughAttention, tokens: Tensor, options: Options, wanted: Tensor) -> Output:
    with attention:
        output = _as_written(call)(tokens, options, wanted)
    # Code may attend by other means where a mask hides nothing, and would see nothing of what is kept.
    if attention.calls != call.learned.setdefault("attention calls", attention.calls):
        raise NapDecodeError(
            f"{call.name} called torch's scaled_dot_product_attention {attention.calls} times in a pass, and "
            f"{call.learned['attention calls']} times before, so that what it attends to is not known. Decode it with "
            "reuse=PromptReuse(refresh_every=1), which forwards everything"
        )
    return output


def by_order(call: ModelCall, tokens: Tensor, options: Options, wanted: Tensor, store: Store) -> Output:
    """Of decoders that hand their ``Cache`` nothing unless they are told to store it (SDAR)."""
    return by_cache(call, tokens, options | {_ORDER: True}, wanted, store)


def ways(call: ModelCall) -> Iterator[Way]:
    """In the order in which a model is asked which of them it goes."""
    yield from (by_cache, by_attention, by_mask)
    if any(_ORDER in (parameters_of(part) or ()) for part in call.parts):
        yield by_order


def _as_written(call: ModelCall) -> ModelCall:
    """Not compiled: compiled attention does not pass where it could be caught."""
    call = copy.copy(call)
    call.body = None
    return call


def knows_positions(call: ModelCall) -> bool:
    """Whether a model can be told at which positions its tokens stand."""
    return "position_ids" in call.arguments or bool(_rotations(call))


def _rotations(call: ModelCall) -> list[nn.Module]:
    """Rotary embeddings that take queries and keys ``(N, heads, Q, D)``, and nothing that they must be told."""
    if "rotations" not in call.learned:  # to look for them in every pass takes milliseconds
        call.learned["rotations"] = [m for m in call.module.modules() if _takes_states(parameters_of(m) or {})]
    found: list[nn.Module] = call.learned["rotations"]
    return found


def _takes_states(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether queries and keys come first, and the rest may be left out, as in Fast-dLLM's copy of LLaDA."""
    rest = list(parameters.values())[2:]
    return [*parameters][:2] == ["q", "k"] and all(one.default is not one.empty for one in rest)


@contextmanager
def _in_place(call: ModelCall, store: Store) -> Iterator[None]:
    """While open, the calls of this thread find queries and keys turned as at the store's positions."""
    own_thread = threading.get_ident()
    if store.positions is None:
        yield
        return

    def spread(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != own_thread:  # a call of somebody else's
            return None
        states, rest = given[:2], given[2:]
        whole = [state.new_zeros(*state.shape[:2], store.shape[1], state.shape[3]) for state in states]
        for row, state in zip(whole, states, strict=True):
            store.write(row, state)
        return *whole, *rest

    def gather(_: nn.Module, __: tuple[Any, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != own_thread:
            return None
        return tuple(store.read(state) for state in states)

    with HOOKING:
        parts = _rotations(call)
        handles = [part.register_forward_pre_hook(spread) for part in parts]
        handles += [part.register_forward_hook(gather) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def cache_argument(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The argument by which a decoder takes a ``Cache``; None if there is none.

    It is the one that is annotated so, since its name changes: ``cache`` from transformers 5.24 on,
    ``past_key_values`` before, and in code without annotations.
    """
    for name, parameter in parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


@functools.cache
def _cache_class() -> type[Any]:
    from transformers import Cache

    class StoringCache(Cache):  # type: ignore[misc]
        """What a decoder hands its keys and values to; knows of no past, so that positions are those passed."""

        def __init__(self, store: Store) -> None:
            if isinstance(self, nn.Module):  # in releases before 4.48; what it is made of does not matter
                nn.Module.__init__(self)
            self.store = store
            self.layers: list[Any] = []  # none that transformers knows of

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return self.store.update(layer_idx, key_states, value_states)

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return 0

        def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
            return 0

        def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            return self.store.width or self.store.shape[1], 0

    return StoringCache


class ThroughAttention(TorchFunctionMode):
    """While open, torch's attention, in this thread alone, attends to what ``store.update`` makes of keys and values.

    With a mask, it is that which counts, whatever the model makes of its own; none is needed where all see all, and
    attention is faster without one.
    That is for models without a cache, such as encoders.  Nothing of the model is exchanged; attention that is written
    out by hand does not pass here, and the store stays empty.
    """

    def __init__(self, store: Any, mask: Tensor | None = None) -> None:
        super().__init__()
        self.store, self.mask, self.calls = store, mask, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        named = dict(kwargs or {})
        named |= zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
        named["key"], named["value"] = self.store.update(self.calls, named["key"], named["value"])
        self.calls += 1
        if (mask := self.mask) is not None:
            if self.store.sees_all:
                mask = None
            elif mask.is_floating_point():
                mask = mask.to(named["query"].dtype)
            named["attn_mask"], named["is_causal"] = mask, False
        return function(**named)
