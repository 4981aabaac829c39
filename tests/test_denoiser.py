from __future__ import annotations

import pytest
import torch
import transformers
from models import (
    KNOWN,
    MASK,
    PAD,
    TRANSFORMERS_5,
    VOCABULARY,
    TableModel,
    Words,
    needs_transformers_5,
    tiny_model,
)
from torch import nn

from nap_decode import (
    AnyOrderScheduler,
    Canvas,
    CanvasTemplate,
    Denoiser,
    ModelFamily,
    NapDecodeError,
    Sampler,
)

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "initializer_range": 0.6,
}
MASKED = {
    "Bert": {},
    "Roberta": {},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4,
                   "bos_token_id": 3, "eos_token_id": 4},
    "EuroBert": {"num_key_value_heads": 2, "bos_token_id": 3, "eos_token_id": 4, "mask_token_id": MASK},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": MASK},
    "Electra": {"embedding_size": 16},
}  # fmt: skip
DECODERS = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}}


def build(name):
    kind = "ForMaskedLM" if name in MASKED else "ForCausalLM"
    options = SMALL | (MASKED.get(name) or DECODERS.get(name, {}))
    if name in DECODERS:
        options |= {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2, "is_causal": False}
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name + kind)(config).double().eval()


@pytest.fixture(scope="module", params=[*MASKED, *DECODERS])
def model(request):
    if not hasattr(transformers, f"{request.param}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    if request.param in DECODERS and not TRANSFORMERS_5:
        pytest.skip("decoders attend both ways since transformers 5")
    return build(request.param)


PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [5, 6, 7]]
WANTED = torch.tensor([[6, 9, 7], [8, 8, 6], [9, 7, 8]])


@pytest.fixture
def ragged():
    return Canvas.from_prompts(PROMPTS, CanvasTemplate.plain(4), mask_token_id=MASK, pad_token_id=PAD)


def full_rows(model, canvas, wanted):
    """Wanted logits of every row on its own, without padding, from the full output."""
    rows = []
    for row in range(len(canvas.tokens)):
        ids = canvas.tokens[row][canvas.attention_mask[row].bool()][None]
        padding = canvas.tokens.shape[1] - ids.shape[1]
        with torch.no_grad():
            rows.append(model(input_ids=ids).logits[0, wanted[row] - padding])
    return torch.stack(rows)


@torch.no_grad()
def test_native_models_say_the_same_with_and_without_padding(model, ragged):
    denoiser = Denoiser(model, mask_token_id=MASK)
    logits = denoiser(ragged.tokens, WANTED, ragged)
    torch.testing.assert_close(logits, full_rows(model, ragged, WANTED), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("by", ["what the model takes", "hook"])
def test_only_wanted_rows_pass_the_head(model, ragged, by):
    denoiser = Denoiser(model, mask_token_id=MASK)
    if by == "hook":
        denoiser._takes_indices = False
    rows = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1].numel()))
    try:
        logits = denoiser(ragged.tokens, WANTED, ragged)
    finally:
        handle.remove()
    assert rows == [WANTED.numel()]
    torch.testing.assert_close(logits, full_rows(model, ragged, WANTED), rtol=0, atol=1e-9)


def test_the_hook_is_gone_after_the_call_and_after_an_error(ragged):
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    denoiser._takes_indices = False
    head = model.get_output_embeddings()
    with torch.no_grad():
        denoiser(ragged.tokens, WANTED, ragged)
        assert not head._forward_pre_hooks
        head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoiser(ragged.tokens, WANTED, ragged)
    assert not head._forward_pre_hooks


@torch.no_grad()
def test_logits_are_sliced_if_the_head_is_not_a_module(ragged):
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    expected = denoiser(ragged.tokens, WANTED, ragged)
    denoiser._takes_indices, denoiser._head = False, None
    assert torch.equal(denoiser(ragged.tokens, WANTED, ragged), expected)
    denoiser._head = model.get_input_embeddings()  # what models with a tied head may return; it is called with ids
    assert torch.equal(denoiser(ragged.tokens, WANTED, ragged), expected)


@torch.no_grad()
def test_a_shifted_family_predicts_from_the_position_before(tiny, ragged):
    shifted = Denoiser(tiny, mask_token_id=MASK, family=ModelFamily(name="shifted", shift=True))
    in_place = Denoiser(tiny, mask_token_id=MASK)
    assert torch.equal(shifted(ragged.tokens, WANTED, ragged), in_place(ragged.tokens, WANTED - 1, ragged))
    first = torch.zeros(3, 1, dtype=torch.int64)
    assert torch.equal(shifted(ragged.tokens, first, ragged), in_place(ragged.tokens, first, ragged))


class Remote(nn.Module):
    """Like remote code: a config, an attention mask of its own convention, no logits_to_keep."""

    def __init__(self, model_type):
        super().__init__()
        self.tiny = tiny_model()
        self.config = transformers.PretrainedConfig(vocab_size=VOCABULARY)
        self.config.model_type = model_type
        self.masks = []

    def get_input_embeddings(self):
        return self.tiny.get_input_embeddings()

    def get_output_embeddings(self):
        return self.tiny.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None):
        self.masks.append(attention_mask)
        return self.tiny(input_ids=input_ids, attention_mask=attention_mask)


@needs_transformers_5  # before, BERT takes no 4-D mask
@torch.no_grad()
def test_dream_is_shifted_and_takes_a_4d_mask(ragged):
    model = Remote("Dream")
    denoiser = Denoiser(model, mask_token_id=MASK)
    logits = denoiser(ragged.tokens, WANTED, ragged)
    assert model.masks[-1].shape == (3, 1, 10, 10)
    assert model.masks[-1].dtype == torch.bool
    torch.testing.assert_close(logits, full_rows(model.tiny, ragged, WANTED - 1), rtol=0, atol=1e-9)


@torch.no_grad()
def test_models_without_an_attention_mask_take_no_padding(ragged):
    family = ModelFamily(name="MDLM", attention="none")
    denoiser = Denoiser(Remote("mdlm"), mask_token_id=MASK, family=family)
    with pytest.raises(NapDecodeError, match="padding changes what MDLM models predict"):
        denoiser.check(ragged)
    denoiser.check(Canvas.from_prompts([[5], [6]], CanvasTemplate.plain(2), mask_token_id=MASK))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_that_ignore_their_attention_mask_take_no_padding(ragged, dtype):
    class Deaf(Remote):
        def forward(self, input_ids, attention_mask=None):
            return self.tiny(input_ids=input_ids)

    equal = Canvas.from_prompts([[5], [6]], CanvasTemplate.plain(2), mask_token_id=MASK)
    deaf = Denoiser(Deaf("deaf").to(dtype), mask_token_id=MASK)
    deaf.check(equal)
    with pytest.raises(NapDecodeError, match=r"padding changes what deaf models predict: .* in different batches"):
        deaf.check(ragged)
    Denoiser(Remote("hears").to(dtype), mask_token_id=MASK).check(ragged)


@torch.no_grad()
def test_rows_may_be_padded_wider_than_the_model(tiny):
    denoiser = Denoiser(build("Bert"), mask_token_id=MASK)
    wide = Canvas.from_prompts([[5], [6, 7]], CanvasTemplate.plain(4), mask_token_id=MASK, prompt_width=50)
    narrow = Canvas.from_prompts([[5], [6, 7]], CanvasTemplate.plain(4), mask_token_id=MASK)
    denoiser.check(wide)
    logits = denoiser(wide.tokens, torch.full((2, 1), 53), wide)
    assert torch.equal(logits, denoiser(narrow.tokens, torch.full((2, 1), 5), narrow))


@torch.no_grad()
def test_the_padding_id_does_not_matter(ragged):
    denoiser = Denoiser(build("Roberta"), Words())
    expected = denoiser(ragged.tokens, WANTED, ragged)
    denoiser.tokenizer.pad_token_id = 9
    assert denoiser.pad_token_id == 9
    torch.testing.assert_close(denoiser(ragged.tokens, WANTED, ragged), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_functions_and_modules_are_called_with_ids_and_mask(ragged):
    calls = []

    def function(input_ids, attention_mask):
        calls.append(attention_mask)
        return torch.nn.functional.one_hot(input_ids, VOCABULARY).float()

    logits = Denoiser(function, mask_token_id=MASK)(ragged.tokens, WANTED, ragged)
    assert torch.equal(logits.argmax(2), ragged.tokens.gather(1, WANTED))
    assert calls[0].tolist() == [[1] * 10, [1] * 6 + [0] * 4, [1] * 7 + [0] * 3]

    class Module(nn.Module):
        def forward(self, input_ids, attention_mask):
            return (function(input_ids, attention_mask),)

    assert torch.equal(Denoiser(Module(), mask_token_id=MASK)(ragged.tokens, WANTED, ragged), logits)


def test_a_research_module_with_a_config_of_its_own_is_called_with_ids_and_mask(ragged):
    class Mine(nn.Module):
        config = {"width": 3}  # noqa: RUF012

        def forward(self, x, mask):
            assert x.shape == mask.shape
            return torch.zeros(*x.shape, VOCABULARY)

    assert Denoiser(Mine(), mask_token_id=MASK)(ragged.tokens, WANTED, ragged).shape == (3, 3, VOCABULARY)


def test_devices(tiny):
    function = TableModel(4, 2)
    assert Denoiser(function, mask_token_id=3).device == torch.device("cpu")
    assert Denoiser(function, mask_token_id=3, device="meta").device == torch.device("meta")
    denoiser = Denoiser(tiny, mask_token_id=MASK)
    assert denoiser.banned(VOCABULARY, torch.device("meta")).device == torch.device("meta")
    assert denoiser.banned(VOCABULARY, torch.device("cpu")).device == torch.device("cpu")


@torch.no_grad()
def test_guidance(tiny, ragged):
    plain = Denoiser(tiny, mask_token_id=MASK)
    guided = Denoiser(tiny, mask_token_id=MASK, cfg_scale=1.5)
    conditional = plain(ragged.tokens, WANTED, ragged)
    hidden = torch.where(ragged.prompt, MASK, ragged.tokens)
    unconditional = plain(hidden, WANTED, ragged)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guided(ragged.tokens, WANTED, ragged), expected)
    assert not torch.allclose(expected, conditional)


@torch.no_grad()
def test_guidance_without_padding_and_as_a_sampler(tiny):
    sampler = Sampler(Denoiser(tiny, mask_token_id=MASK, cfg_scale=2.0), scheduler=AnyOrderScheduler(tokens_per_step=2))
    out = sampler([[5, 6], [7]], max_new_tokens=6)
    assert out.sequences[1, 1:].tolist() == sampler([[7]], max_new_tokens=6).sequences[0].tolist()
    assert out.forward_passes == 3


@torch.no_grad()
def test_logits_processors_see_the_canvas_and_change_the_scores(tiny, ragged):
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    shapes = []

    def forbid_nine(input_ids, scores):
        shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        scores = scores.clone()
        scores[:, 9] = -torch.inf
        return scores

    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), forbid_nine])
    denoiser = Denoiser(tiny, mask_token_id=MASK, logits_processor=processors)
    logits = denoiser(ragged.tokens, WANTED, ragged)
    assert shapes == [((9, 10), (9, VOCABULARY))]
    assert (logits[:, :, 9] == -torch.inf).all()
    assert Denoiser(tiny, mask_token_id=MASK, logits_processor=forbid_nine).logits_processor == (forbid_nine,)
    plain = Denoiser(tiny, mask_token_id=MASK)(ragged.tokens, WANTED, ragged)
    for row in range(3):
        for k in range(3):
            once = RepetitionPenaltyLogitsProcessor(1.3)(ragged.tokens[row][None], plain[row, k][None].clone())[0]
            once[9] = -torch.inf
            torch.testing.assert_close(logits[row, k], once)


def test_banned_ids(tiny):
    denoiser = Denoiser(tiny, Words())
    assert denoiser.banned(VOCABULARY, torch.device("cpu")).tolist() == [MASK, *range(KNOWN, VOCABULARY)]
    assert Denoiser(tiny, mask_token_id=5).banned(VOCABULARY, torch.device("cpu")).tolist() == [5]


def test_special_ids_are_found():
    model = tiny_model(mask_token_id=7, eos_token_id=[2, 9])
    denoiser = Denoiser(model)
    assert denoiser.mask_token_id == 7
    assert denoiser.end_token_ids == (2, 9)
    assert denoiser.pad_token_id == PAD
    assert Denoiser(model, end_token_ids=[4]).end_token_ids == (4,)
    assert Denoiser(TableModel(4, 2), Words()).end_token_ids == (2,)
    assert Denoiser(TableModel(4, 2), mask_token_id=3).end_token_ids == ()
    assert Denoiser(tiny_model(), family=ModelFamily(name="x", mask_token_id=6)).mask_token_id == 6


class TestBadInput:
    def test_no_mask_token(self, tiny):
        with pytest.raises(NapDecodeError, match=r"no mask token is known: .* pass mask_token_id="):
            Denoiser(tiny)

    def test_two_mask_tokens(self):
        with pytest.raises(NapDecodeError, match="two mask tokens are known"):
            Denoiser(tiny_model(mask_token_id=7), Words())
        assert Denoiser(tiny_model(mask_token_id=7), Words(), mask_token_id=7).mask_token_id == 7

    def test_a_mask_token_that_the_model_does_not_have(self, tiny):
        with pytest.raises(NapDecodeError, match="mask_token_id 24 is not one of the model's 24 token ids"):
            Denoiser(tiny, mask_token_id=24)

    @pytest.mark.parametrize("shift", [False, True])
    def test_models_that_ignore_the_future(self, shift):
        family = ModelFamily(name="x", shift=shift)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2
        )
        models = [transformers.GPT2LMHeadModel(config).eval()]
        if TRANSFORMERS_5:
            models.append(tiny_model(is_causal=True))
        for causal in models:
            with pytest.raises(NapDecodeError, match=r"ignores the future: .* model.config.is_causal = False"):
                Denoiser(causal, mask_token_id=MASK, family=family)

    def test_uniform_diffusion(self):
        with pytest.raises(NapDecodeError, match="DiffusionGemma cannot be decoded here: it is a uniform-diffusion"):
            Denoiser(Remote("diffusion_gemma"), mask_token_id=MASK)

    def test_a_canvas_on_another_device(self, ragged):
        denoiser = Denoiser(TableModel(4, 2), mask_token_id=MASK, device="meta")
        with pytest.raises(NapDecodeError, match="the canvas is on cpu, but the model takes its input on meta"):
            denoiser.check(ragged)

    def test_encoder_decoders(self):
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ).eval()
        with pytest.raises(NapDecodeError, match="T5ForConditionalGeneration is an encoder-decoder"):
            Denoiser(model, mask_token_id=MASK)

    def test_dropout(self, ragged):
        model = build("Bert").train()
        with pytest.raises(NapDecodeError, match=r"training mode .* call model.eval\(\)"):
            Denoiser(model, mask_token_id=MASK)
        denoiser = Denoiser(model.eval(), mask_token_id=MASK)
        model.train()
        with pytest.raises(NapDecodeError, match=r"training mode .* call model.eval\(\)"):
            denoiser.check(ragged)

    def test_too_many_positions(self):
        template = CanvasTemplate.plain(4)
        for name, limit in (("Bert", 40), ("Roberta", 39)):
            denoiser = Denoiser(build(name), mask_token_id=MASK)
            denoiser.check(Canvas.from_prompts([[5] * (limit - 4)], template, mask_token_id=MASK))
            with pytest.raises(NapDecodeError, match=f"takes {limit + 1} positions .* but the model has {limit}"):
                denoiser.check(Canvas.from_prompts([[5] * (limit - 3)], template, mask_token_id=MASK))

    def test_outputs_that_are_no_logits(self, ragged):
        with pytest.raises(NapDecodeError, match=r"must return logits \(B, L, V\) .* not a tensor of shape \(3, 10\)"):
            Denoiser(lambda ids, mask: ids, mask_token_id=MASK)(ragged.tokens, WANTED, ragged)
        with pytest.raises(NapDecodeError, match="not dict"):
            Denoiser(lambda ids, mask: {}, mask_token_id=MASK)(ragged.tokens, WANTED, ragged)

    def test_other_options(self, tiny):
        with pytest.raises(NapDecodeError, match="cfg_scale must be a finite number of at least 0, but is -1"):
            Denoiser(tiny, mask_token_id=MASK, cfg_scale=-1)
        with pytest.raises(NapDecodeError, match="model must be a torch module or a function"):
            Denoiser("bert-base-uncased", mask_token_id=MASK)
        with pytest.raises(NapDecodeError, match=r"there is no attention convention '2D'. Known: 2d, 4d, none"):
            ModelFamily(name="x", attention="2D")
