"""Making a model keep its keys and values, and use those that were kept, through transformers' own interfaces.

Two are there.  A decoder takes a ``Cache``, whose ``update`` gets the keys and values of the tokens that the model is
called with and returns those to attend to.  For an encoder an attention function does the same: it is registered and
named in the config while the model runs, and neither is left behind.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nap_decode.errors import NapDecodeError

_ATTENTION = "nap_decode_reuse"


@dataclass(frozen=True, eq=False)
class Store:
    """What a model made of the rows of a batch, and which positions of them a call of it brings.

    Args:
        states: ``(B, heads, W, D)`` each; made by the first call, overwritten in place by the others.
        number: B, rows of the batch.
        width: W, columns.
        rows: ``(n,)`` int64, the rows that are called; None if all are.
        positions: ``(n, P)`` int64, the positions that are called; None if all are.
    """

    states: dict[str, Tensor]
    number: int
    width: int
    rows: Tensor | None = None
    positions: Tensor | None = None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; see :meth:`put`."""
        return self.put(f"keys {layer}", keys), self.put(f"values {layer}", values)

    def put(self, name: str, new: Tensor) -> Tensor:
        """``(n, heads, P, D)`` of what is called ``-> (n, heads, W, D)`` of all positions of these rows."""
        if self.rows is None and self.positions is None:
            self.states[name] = new.contiguous()
            return new  # as it came, so that the pass is what it is without a store
        if name not in self.states:
            self.states[name] = new.new_zeros(self.number, new.shape[1], self.width, new.shape[3])
        kept = self.states[name]
        some = kept if self.rows is None else kept.index_select(0, self.rows)
        if self.positions is None:
            some = new
        else:
            index = self.positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            some = some.scatter_(2, index, new)
        if self.rows is not None:
            kept.index_copy_(0, self.rows, some)
        return some


@functools.cache
def _cache_class() -> type[Any]:
    from transformers import Cache

    class StoreCache(Cache):  # type: ignore[misc]
        """A store, as transformers' decoders take it."""

        def __init__(self, store: Store) -> None:
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
            return self.store.width, 0

    return StoreCache


def with_cache(options: dict[str, Any], store: Store) -> dict[str, Any]:
    """Arguments of a call that uses a store."""
    return {**options, "past_key_values": _cache_class()(store)}


@contextmanager
def attention_through(module: nn.Module, store: Store) -> Iterator[None]:
    """While open, the attention layers of a transformers model use a store.

    Raises:
        NapDecodeError: the installed transformers has no registry of attention functions.
    """
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        raise NapDecodeError("reuse needs transformers 5; run pip install 'transformers>=5'") from None
    configs: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    names = {key: config._attn_implementation for key, config in configs.items()}
    layers: dict[int, int] = {}  # numbers of attention layers, in the order in which they come

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        keys, values = store.update(layers.setdefault(id(layer), len(layers)), key, value)
        original = names[id(layer.config)]
        eager = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get(original, eager)
        return attention(layer, query, keys, values, mask, **options)

    name = f"{_ATTENTION}_{id(store)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
