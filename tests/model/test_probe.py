"""How often a model is asked what it does, and when it is asked again."""

from __future__ import annotations

import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import MASK, BlockLike, Remote, Words, tiny_model
from torch import nn

from nap_decode import AnyOrderScheduler, Canvas, CommittedReuse, Decoder, Denoiser, NapDecodeError, Sampler, decoders
from nap_decode.measure import likelihood
from nap_decode.speed.compile import compiled_model


def watched(model):
    """Its calls from now on, in a list; a hook is a change of a model, which is then asked again."""
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_every_call_that_is_no_pass():
    """As docs/families.md says."""
    model = tiny_model()
    told = Denoiser(model, mask_token_id=MASK).call.must_be_told  # a release that does not read is_causal
    model = tiny_model()
    calls = watched(model)
    denoiser = Denoiser(model, mask_token_id=MASK)
    assert len(calls) == 1 + told
    denoiser.probe()
    assert len(calls) == 2 + told
    denoiser.check_leave_one_out()
    assert len(calls) == 4 + told
    reusing = Denoiser(model, mask_token_id=MASK, reuse=CommittedReuse())
    assert len(calls) == 11 + told
    denoiser.check_leave_one_out()
    reusing.replace(reuse=CommittedReuse(delay=3)).probe()
    Denoiser(model, mask_token_id=MASK, cfg_scale=1.0).probe()
    assert len(calls) == 11 + told
    other = Denoiser(model, mask_token_id=7)  # is asked with another mask
    assert len(calls) == 12 + 2 * told
    assert other.probe() == denoiser.probe()


def test_block_models_are_asked_twice():
    model = BlockLike("llada2_moe")
    calls = watched(model)
    Denoiser(model, mask_token_id=MASK)
    assert len(calls) == 2
    Denoiser(model, mask_token_id=MASK)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llada", "decoder", "sampler", "likelihood"])
def test_the_second_time_every_call_is_a_pass(name):
    model, prompt = tiny_model(), torch.tensor([[5, 6, 7]])

    def run():
        if name == "llada":
            from nap_decode.integrations import llada

            llada.generate(model, prompt, steps=4, gen_length=4, block_length=4, mask_id=MASK)
        elif name == "decoder":
            decoder = decoders.llada_low_confidence().set(steps=4)
            Sampler(model, mask_token_id=MASK, decoder=decoder)([[5, 6, 7]], max_new_tokens=4)
        elif name == "sampler":
            sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=4)))
            sampler([[5, 6, 7]], max_new_tokens=4)
        else:
            likelihood.chain_log_likelihood(Denoiser(model, mask_token_id=MASK), [[5]], [[6, 7, 8, 9]], batch_size=1)

    calls = watched(model)
    run()
    calls.clear()
    run()
    assert len(calls) == 4


def change_dtype(model):
    return model.bfloat16()


def resize(model):
    return model.resize_token_embeddings(30)


def exchange_head(model):
    model.lm_head = nn.Sequential(nn.Linear(16, 24, bias=False).double())


def exchange_attention(model):
    model.config._attn_implementation = "eager"


def add_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", [change_dtype, resize, exchange_head, exchange_attention, add_adapters])
@pytest.mark.parametrize("reuse", [None, CommittedReuse()])
def test_a_model_that_has_changed_is_asked_again(change, reuse):
    """What was made before decodes as what is made after."""
    model = tiny_model()
    before = Sampler(
        Denoiser(model, mask_token_id=MASK, reuse=reuse), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1))
    )
    before([[5, 6, 7]], max_new_tokens=2)
    with torch.random.fork_rng():
        change(model)
    after = Sampler(
        Denoiser(model, mask_token_id=MASK, reuse=reuse), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1))
    )
    prompts = [[5, 6, 7], [8, 28 if change is resize else 9]]
    ours, theirs = (one(prompts, max_new_tokens=6, progress=False) for one in (before, after))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.trace.confidence, theirs.trace.confidence, equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_model_that_has_changed_is_compiled_again():
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model = tiny_model()
    compiled = Sampler(
        compiled_model(Denoiser(model, mask_token_id=MASK), backend="eager"),
        decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)),
    )
    plain = Sampler(Denoiser(model, mask_token_id=MASK), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
    before = compiled([[5, 6, 7]], max_new_tokens=6)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64)
        peft.get_peft_model(model, config).eval()
    ours, theirs = (one([[5, 6, 7]], max_new_tokens=6) for one in (compiled, plain))
    assert ours.sequences.tolist() == theirs.sequences.tolist() != before.sequences.tolist()


def negate(module, args, output):
    output.logits = -output.logits
    return output


def hook(model):
    model.register_forward_hook(negate)


def patch_forward(model):
    original = model.forward
    model.forward = functools.wraps(original)(lambda *args, **kwargs: negate(None, None, original(*args, **kwargs)))


@pytest.mark.parametrize("change", [hook, patch_forward])
def test_what_runs_when_it_is_called_is_part_of_a_model(change):
    def decode(model):
        sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
        return sampler([[5, 6, 7]], max_new_tokens=4).sequences.tolist()

    model, fresh = tiny_model(), tiny_model()
    before = decode(model)
    change(model)
    change(fresh)
    assert decode(model) == decode(fresh) != before


def test_wrappers_that_come_and_go_are_told_apart():
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    class Negated(Plain):
        def forward(self, *args, **kwargs):
            return negate(None, None, super().forward(*args, **kwargs))

    def decode(model):
        sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
        return sampler([[5, 6, 7]], max_new_tokens=4).sequences.tolist()

    model = tiny_model()
    expected = {kind: decode(kind(tiny_model())) for kind in (Plain, Negated)}
    for _ in range(6):
        for kind in (Plain, Negated):
            wrapped = kind(model)
            assert decode(wrapped) == expected[kind]
            del wrapped
            gc.collect()


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_what_speaks_against_a_model_is_asked_again(bad):
    model = tiny_model()
    weight = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.fill_(bad)
    with pytest.raises(NapDecodeError, match=r"ignores the future|predicts nan"):
        Denoiser(model, mask_token_id=MASK)
    model.lm_head.weight.data.copy_(weight)  # it is loaded, or trained
    Denoiser(model, mask_token_id=MASK)


def test_autocast_is_part_of_what_a_model_is():
    model, other = (tiny_model().float() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        Denoiser(model, mask_token_id=MASK).probe()
    canvas, wanted = Canvas.from_infill([[5, 6, MASK, 7]], mask_token_id=MASK), torch.tensor([[2]])
    found, expected = (Denoiser(one, mask_token_id=MASK)(canvas.tokens, wanted, canvas) for one in (model, other))
    assert torch.equal(found, expected)
    assert Denoiser(model, mask_token_id=MASK).hides_padding


def test_a_head_that_is_called_twice_is_left_alone():
    class Refining(Remote):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            x = x + self.head(x).softmax(-1) @ self.embed.weight
            return SimpleNamespace(logits=self.head(x + x.sum(1, keepdim=True)))

    model = Refining("refining", mask_token_id=MASK)
    canvas, wanted = Canvas.from_infill([[5, 6, MASK, 7]], mask_token_id=MASK), torch.tensor([[2]])
    calls = watched(model)
    for number in (2, 0):  # asked, and remembered
        calls.clear()
        denoiser = Denoiser(model)
        denoiser.check(canvas)
        assert len(calls) == number
        logits = denoiser(canvas.tokens, wanted, canvas)
        torch.testing.assert_close(logits[0, 0], model(canvas.tokens).logits[0, 2])


@pytest.mark.parametrize("reuse", [None, CommittedReuse()])
def test_inference_mode(reuse):
    model = tiny_model()
    sampler = Sampler(
        Denoiser(model, mask_token_id=MASK, reuse=reuse), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1))
    )
    function = Sampler(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
        mask_token_id=MASK,
        decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)),
    )
    for one in (sampler, function):
        expected = one([[5, 6, 7], [8]], max_new_tokens=4).sequences.tolist()
        with torch.inference_mode():
            assert one([[5, 6, 7], [8]], max_new_tokens=4).sequences.tolist() == expected


def test_a_model_that_writes_into_its_mask():
    class Writing(Remote):
        def forward(self, input_ids, attention_mask=None):
            if attention_mask is not None:
                attention_mask.zero_()
            return self.run(input_ids, None, None)

    sampler = Sampler(Writing("writing", mask_token_id=MASK), decoder=Decoder(AnyOrderScheduler(steps=1)))
    with pytest.raises(NapDecodeError, match="Writing writes into its attention mask"):
        sampler([[5, 6], [7]], max_new_tokens=1)


def test_weights_that_are_trained_are_no_change():
    model = tiny_model()
    calls = watched(model)
    sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
    sampler([[5]], max_new_tokens=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    calls.clear()
    sampler([[5]], max_new_tokens=2)
    assert len(calls) == 2


def test_what_is_remembered_keeps_no_model():
    model = tiny_model()
    Denoiser(model, Words(), reuse=CommittedReuse()).check_leave_one_out()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class TestTrainingMode:
    def test_one_draw_for_the_whole_batch(self):
        class LayerDrop(Remote):
            def forward(self, input_ids, attention_mask=None):
                keeps = not self.training or bool(torch.rand(()) < 0.99)
                return self.run(input_ids if keeps else input_ids.flip(1), None, None)

        model = LayerDrop("layer drop", mask_token_id=MASK)
        Denoiser(model)
        with pytest.raises(NapDecodeError, match="is in training mode and drops activations at random"):
            Denoiser(model.train())

    def test_normalising_over_the_batch(self):
        model = tiny_model()
        model.add_module("normal", nn.BatchNorm1d(4).eval())
        Denoiser(model, mask_token_id=MASK)
        with pytest.raises(NapDecodeError, match="normalises over the batch"):
            Denoiser(model.train(), mask_token_id=MASK)

    def test_it_is_asked_once(self):
        model = tiny_model().train()
        calls = watched(model)
        told = Denoiser(model, mask_token_id=MASK).call.must_be_told
        Denoiser(model, mask_token_id=MASK)
        assert len(calls) == 2 + told
        calls.clear()
        sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
        sampler([[5]], max_new_tokens=2)
        assert len(calls) == 2

    def test_dropout_of_any_kind(self):
        class ByHand(nn.Module):
            def forward(self, ids, mask):
                return nn.functional.dropout(torch.ones(*ids.shape, 24), 0.1, training=self.training)

        for model in (tiny_model(attention_dropout=0.05), ByHand()):
            sampler = Sampler(model.eval(), mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=1)))
            sampler([[5]], max_new_tokens=1)
            model.train()
            with pytest.raises(NapDecodeError, match=r"is in training mode and drops .* call model.eval\(\)"):
                sampler([[5]], max_new_tokens=1)
        with pytest.raises(NapDecodeError, match=r"LlamaForCausalLM is in training mode and drops"):
            Denoiser(tiny_model(attention_dropout=0.05).train(), mask_token_id=MASK)

    def test_without_dropout_it_may_be(self):
        model = tiny_model().train()
        expected = Sampler(tiny_model(), mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
        found = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
        ours, theirs = (one([[5], [6, 7]], max_new_tokens=4).sequences.tolist() for one in (found, expected))
        assert ours == theirs
