"""Keys and values that calls of a model keep for the next ones."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from nap_decode.model.call import ModelCall, Options
from nap_decode.model.foreign import parameters_of
from nap_decode.model.head import Output


@dataclass(frozen=True, eq=False)
class Store:
    """What a model made of the rows of a batch, and which positions of them a call of it brings."""

    states: dict[str, Tensor]  # (B, heads, W, D) each; made by the first call, overwritten in place by the others
    shape: Size  # B, W
    rows: Tensor | None = None  # (n,) int64, the rows that are called; None if all are
    positions: Tensor | None = None  # (n, P) int64, the positions that are called; None if all are

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; see :meth:`put`."""
        return self.put(f"keys {layer}", keys), self.put(f"values {layer}", values)

    def put(self, name: str, new: Tensor) -> Tensor:
        """``(n, heads, P, D)`` of what is called ``-> (n, heads, W, D)`` of all positions of these rows."""
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
            some.scatter_(2, self.positions[:, None, :, None].expand_as(new), new)
        if self.rows is not None:
            kept.index_copy_(0, self.rows, some)
        return some


def call_storing(call: ModelCall, tokens: Tensor, options: Options, wanted: Tensor, store: Store) -> Output:
    """One call of a model that attends to what is in the store, too, and puts there what it makes; see ModelCall."""
    name = cache_argument(parameters_of(call.module) or {})
    if name is not None:
        return call(tokens, options | {name: _cache_class()(store)}, wanted)
    if call.body is not None:  # compiled attention does not pass where it could be caught
        call = copy.copy(call)
        call.body = None
    with ThroughAttention(store):
        return call(tokens, options, wanted)


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
            return self.store.shape[1], 0

    return StoringCache


class ThroughAttention(TorchFunctionMode):
    """While open, torch's attention, in this thread alone, attends to what ``store.update`` makes of keys and values.

    That is for models without a cache, such as encoders.  Nothing of the model is exchanged; attention that is written
    out by hand does not pass here, and the store stays empty.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store, self.calls = store, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is scaled_dot_product_attention:
            named |= zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
            named["key"], named["value"] = self.store.update(self.calls, named["key"], named["value"])
            args = ()
            self.calls += 1
        return function(*args, **named)
