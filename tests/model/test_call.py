from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import MASK, PAD, VOCABULARY, DreamLike, LLaDALike, Remote, needs_is_causal, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from nap_decode import AnyOrderScheduler, Canvas, CanvasTemplate, Decoder, Denoiser, NapDecodeError, Sampler
from nap_decode.base.rows import Rows
from nap_decode.model import foreign
from nap_decode.speed.compile import compiled_model


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def ask(denoiser, num_rows, length, num_slots=2):
    """Logits of rows of one length, or, negative, with one row that is one shorter."""
    prompts = [[5] * (abs(length) - 2 - (length < 0 and row == 0)) for row in range(num_rows)]
    canvas = Canvas.from_prompts(prompts, CanvasTemplate.plain(2), mask_token_id=MASK, pad_token_id=PAD)
    rows = canvas.rows
    tokens = torch.where(rows.present, torch.arange(abs(length)) % 9 + 5, PAD)
    wanted = torch.arange(num_slots).expand(num_rows, -1)
    return denoiser.predict(rows, tokens, wanted, torch.arange(num_rows * num_slots)).logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_shapes_cost_two_compilations(name):
    options = {"vocab_size": VOCABULARY, "pad_token_id": PAD}
    if name == "Llama":
        model = tiny_model(num_hidden_layers=1)
    else:
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(**options, **small)
        model = transformers.BertForMaskedLM(config).double().eval()
    counter = CompileCounter()
    plain = Denoiser(model, mask_token_id=MASK)
    denoiser = compiled_model(plain, backend=counter, fullgraph=True)
    assert counter.frame_count == 0
    for num_slots in (4, 3, 2, 1):
        ask(denoiser, 3, -9, num_slots)
    assert counter.frame_count == 1
    for num_rows, length in ((5, -9), (3, -12), (2, -20), (3, -9), (4, -13)):
        torch.testing.assert_close(ask(denoiser, num_rows, length), ask(plain, num_rows, length), rtol=0, atol=1e-9)
    assert counter.frame_count == 2


@torch.no_grad()
def test_remote_code_is_compiled_too():
    counter = CompileCounter()
    for model in (DreamLike("Dream"), LLaDALike("llada")):
        plain = Denoiser(model, mask_token_id=MASK)
        torch.testing.assert_close(
            ask(compiled_model(plain, backend=counter), 3, 9), ask(plain, 3, 9), rtol=0, atol=1e-9
        )
    assert counter.frame_count == 2


@torch.no_grad()
def test_a_decode_with_the_default_compiler(tiny):
    """A callback that calls the model itself gets what it always gets, and the model is as it was."""
    denoiser = Denoiser(tiny, mask_token_id=MASK)
    before, parts = copy.copy(vars(tiny)), [*tiny.modules()]
    hooks = [(*part._forward_hooks, *part._forward_pre_hooks) for part in parts]
    ids = torch.tensor([[5, 6, MASK]])
    full, seen = tiny(input_ids=ids).logits, []

    def callback(state):
        seen.append(torch.equal(tiny(input_ids=ids).logits, full))

    plain = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    compiled = Sampler(compiled_model(denoiser), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    expected = plain([[5, 6, 7], [7, 8, 9]], max_new_tokens=6)
    found = compiled([[5, 6, 7], [7, 8, 9]], max_new_tokens=6, callback=callback)
    assert torch.equal(found.sequences, expected.sequences)
    assert seen
    assert all(seen)
    assert vars(tiny) == before
    assert all(now is then for now, then in zip(tiny.modules(), parts, strict=True))
    assert [(*part._forward_hooks, *part._forward_pre_hooks) for part in parts] == hooks


def test_weights_of_the_copy_are_the_models_own():
    model = tiny_model()
    counter, plain, rows = CompileCounter(), Denoiser(model, mask_token_id=MASK), Rows((3,), torch.zeros(1, 3).bool())
    with torch.no_grad():
        plain.predict(rows, torch.full((1, 3), 5), torch.tensor([[0]]), torch.tensor([0]))
        denoiser = compiled_model(plain, backend=counter)
        denoiser.predict(rows, torch.full((1, 3), 5), torch.tensor([[0]]), torch.tensor([0]))
        assert counter.frame_count == 1  # the same rows, but not the same call
        before = ask(denoiser, 2, 5)
        model.get_input_embeddings().weight.mul_(2)
        model.get_output_embeddings().weight.mul_(2)
        after = ask(denoiser, 2, 5)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, ask(Denoiser(model, mask_token_id=MASK), 2, 5), rtol=0, atol=1e-9)
    assert denoiser.replace(cfg_scale=1.0)._decoding is denoiser._decoding


class TestNotCompiled:
    def test_what_torch_does_not_compile(self):
        def broken(graph, inputs):
            raise ValueError("out of registers")

        denoiser = compiled_model(Denoiser(DreamLike("Dream"), mask_token_id=MASK), backend=broken)
        with pytest.raises(NapDecodeError, match=r"torch .* does not compile this \(.* Leave compile= out"):
            ask(denoiser, 2, 5)

    def test_capped_logits(self):
        class Capped(Remote):
            def forward(self, input_ids, attention_mask=None):
                output = self.run(input_ids, None, None)
                output.logits = output.logits.tanh()
                return output

        with pytest.raises(NapDecodeError, match="Capped cannot be compiled here, because its output layer cannot be"):
            compiled_model(Denoiser(Capped("capped"), mask_token_id=MASK))

    def test_functions(self):
        with pytest.raises(NapDecodeError, match=r"function cannot be compiled here; .* with torch.compile"):
            compiled_model(Denoiser(lambda ids, mask: None, mask_token_id=MASK))

    def test_a_forward_that_is_bound_to_the_model(self):
        """As accelerate does it to models on several devices."""
        model = tiny_model()
        model.forward = type(model).forward.__get__(model)
        assert Denoiser(model, mask_token_id=MASK).call.head.is_late
        with pytest.raises(NapDecodeError, match="neither compiled nor split over devices already"):
            compiled_model(Denoiser(model, mask_token_id=MASK))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_models_compiled_already(self, in_place):
        """They are called as they are: no hook gets into their code, or is left there."""
        model, plain = DreamLike("Dream", layers=1), Denoiser(DreamLike("Dream", layers=1), mask_token_id=MASK)
        given = model if in_place else torch.compile(model, backend="eager")
        if in_place:
            model.compile(backend="eager")
        with torch.no_grad():
            denoiser = Denoiser(given, mask_token_id=MASK)
            torch.testing.assert_close(ask(denoiser, 2, 5), ask(plain, 2, 5), rtol=0, atol=1e-9)
            assert given(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, VOCABULARY)
        with pytest.raises(NapDecodeError, match="neither compiled nor"):
            compiled_model(denoiser)


@torch.no_grad()
def test_hooks_of_others_on_the_output_layer():
    model, seen = tiny_model(), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 2,))
    head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    denoiser = Denoiser(model, mask_token_id=MASK)
    assert denoiser.call.head.is_late
    seen.clear()
    logits = ask(denoiser, 2, 5)
    assert seen == [(2, 0, VOCABULARY), (1, 4, VOCABULARY)]
    torch.testing.assert_close(logits, 2 * ask(Denoiser(tiny_model(), mask_token_id=MASK), 2, 5), rtol=0, atol=1e-9)


@torch.no_grad()
@needs_is_causal
def test_native_models_are_handed_the_mask_that_they_would_make():
    model = tiny_model()
    denoiser, masks = Denoiser(model, mask_token_id=MASK), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, named: masks.append(named["attention_mask"]), with_kwargs=True)
    given = []
    model.register_forward_pre_hook(lambda _, __, named: given.append(named["attention_mask"]), with_kwargs=True)
    expected = ask(denoiser, 3, -9)
    assert given[-1].shape == (3, 1, 9, 9)
    assert given[-1].stride(2) == 0  # a view of (N, 1, 1, W)
    model(input_ids=torch.full((3, 9), 5), attention_mask=given[-1][:, 0, 0].long())
    assert torch.equal(masks[-2], masks[-1])
    model.set_attn_implementation("eager")  # which would take a bool mask for numbers
    torch.testing.assert_close(ask(denoiser, 3, -9), expected, rtol=0, atol=1e-5)
    assert given[-1].dtype == torch.int64


@needs_is_causal
def test_who_is_not_handed_a_mask_like_that(monkeypatch):
    class Mine(transformers.LlamaForCausalLM):
        """May do something else with its mask."""

    monkeypatch.setitem(globals(), "create_causal_mask", None)
    model = tiny_model()
    assert foreign.takes_expanded_mask(model, model.config)
    model.__class__ = Mine
    assert not foreign.takes_expanded_mask(model, model.config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    for options in ({}, windows):
        config = transformers.Qwen2Config(
            vocab_size=VOCABULARY, num_key_value_heads=2, is_causal=False, **sizes, **options
        )
        assert foreign.takes_expanded_mask(transformers.Qwen2ForCausalLM(config), config) == (not options)


class Quantised(nn.Linear):
    def forward(self, hidden):
        assert hidden.numel()
        return super().forward(hidden)


class QuantisedWeight(torch.Tensor):
    """As torchao's: the layer is a plain one, but its weight is not, and takes no empty input."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            assert args[0].numel()
        return super().__torch_function__(function, types, args, kwargs)


@torch.no_grad()
@pytest.mark.parametrize("part", ["layer", "weight"])
def test_other_output_layers_are_never_called_with_nothing(part):
    model = tiny_model()
    expected = ask(Denoiser(model, mask_token_id=MASK), 2, 5)
    layer = model.get_output_embeddings()
    if part == "layer":
        layer.__class__ = Quantised
    else:
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(QuantisedWeight), requires_grad=False)
    denoiser = Denoiser(model, mask_token_id=MASK)
    assert not denoiser.call.head.is_late
    torch.testing.assert_close(ask(denoiser, 2, 5), expected, rtol=0, atol=1e-9)
