"""The store of keys and values, and how a model is made to use it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from models import Words, tiny_model
from torch import nn
from transformers import Cache

from nap_decode import AnyOrderScheduler, CommittedReuse, Decoder, Denoiser, Sampler
from nap_decode.model.foreign import parameters_of
from nap_decode.speed.kv import Store, ThroughAttention, cache_argument

ROWS, WIDTH = 3, 5


def numbered(rows, columns, start):
    """``(rows, 1 head, columns, 1)`` of different numbers."""
    return torch.arange(start, start + rows * columns).view(rows, 1, columns, 1).double()


@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("positions", [None, [[4, 1], [0, 0]]])
def test_what_is_called_is_overwritten_and_the_rest_stands(rows, positions):
    states = {}
    first = numbered(ROWS, WIDTH, 0)
    assert torch.equal(Store(states, (ROWS, WIDTH)).put("keys", first), first)
    called = list(range(ROWS)) if rows is None else rows
    positions = None if positions is None else [*positions, [2, 3]][: len(called)]
    columns = [list(range(WIDTH))] * len(called) if positions is None else positions
    new = numbered(len(called), len(columns[0]), 100)
    new[1:2] = new[1:2, :, :1]  # the position that stands there twice, brings the same
    expected = first.clone()
    for n, row in enumerate(called):
        for p, column in enumerate(columns[n]):
            expected[row, 0, column, 0] = new[n, 0, p, 0]
    store = Store(
        states,
        (ROWS, WIDTH),
        None if rows is None else torch.tensor(rows),
        None if positions is None else torch.tensor(positions),
    )
    assert torch.equal(store.put("keys", new), expected[called])
    assert torch.equal(states["keys"], expected)


def test_a_store_begins_empty():
    states = {}
    store = Store(states, (ROWS, WIDTH), torch.tensor([1]), torch.tensor([[3]]))
    keys, values = store.update(0, numbered(1, 1, 7), numbered(1, 1, 8))
    assert (keys.sum(), values.sum()) == (7, 8)
    assert sorted(states) == ["keys 0", "values 0"]
    assert states["keys 0"].shape == (ROWS, 1, WIDTH, 1)


def signature(function):
    return inspect.signature(function).parameters


class TestCacheArgument:
    """A release may call it what it likes."""

    def test_it_is_the_one_that_is_annotated_so(self):
        def forward(input_ids, past_key_values: list | None = None, memory_of_keys: Cache | None = None):
            """Named as nobody names it yet."""

        assert cache_argument(signature(forward)) == "memory_of_keys"

    def test_names_of_today_without_annotations(self):
        assert cache_argument(signature(lambda input_ids, past_key_values=None: 0)) == "past_key_values"
        assert cache_argument(signature(lambda input_ids, cache=None: 0)) == "cache"
        assert cache_argument(signature(lambda input_ids, use_cache=None: 0)) is None

    def test_the_installed_release(self):
        assert cache_argument(parameters_of(tiny_model())) in ("cache", "past_key_values")

    def test_a_renamed_one_is_used(self):
        model = tiny_model()
        name = cache_argument(parameters_of(model))

        class Renamed(type(model)):
            def forward(
                self, input_ids=None, attention_mask=None, position_ids=None, kv: Cache | None = None, **kwargs
            ):
                given = {} if kv is None else {name: kv}
                return super().forward(
                    input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **given, **kwargs
                )

        outputs = []
        for cls in (type(model), Renamed):
            model.__class__ = cls
            denoiser = Denoiser(model, Words(), reuse=CommittedReuse())
            assert cache_argument(parameters_of(model)) == ("kv" if cls is Renamed else name)
            sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
            outputs.append(sampler([[5, 6, 7]], max_new_tokens=5).sequences.tolist())
        assert outputs[0] == outputs[1]


def test_attention_of_other_threads_and_of_later_calls_is_left_alone():
    import threading

    seen, results = [], []
    q = torch.randn(1, 1, 2, 4)

    def update(layer, keys, values):
        seen.append(layer)
        return keys + 1, values + 1

    def attend():
        results.append(nn.functional.scaled_dot_product_attention(q, q, value=q))

    attend()
    with ThroughAttention(SimpleNamespace(update=update)):
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
        attend()
        attend()
    attend()
    assert seen == [0, 1]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[4])
    assert torch.equal(results[2], nn.functional.scaled_dot_product_attention(q, q + 1, q + 1))
