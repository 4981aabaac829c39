from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import (
    DECODERS,
    KNOWN,
    MASK,
    MASKED,
    PAD,
    TRANSFORMERS_5,
    VOCABULARY,
    BlockLike,
    DreamLike,
    LLaDALike,
    MDLMLike,
    OwnBlocks,
    Remote,
    Repeater,
    TableModel,
    Words,
    blocks,
    build,
    needs_is_causal,
    needs_transformers_5,
    tiny_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nap_decode import (
    AnyOrderScheduler,
    Canvas,
    CanvasTemplate,
    Decoder,
    Denoiser,
    ModelFamily,
    NapDecodeError,
    Sampler,
)
from nap_decode.model.call import visibility
from nap_decode.model.head import Head
from nap_decode.model.probe import Probe


@pytest.fixture(scope="module", params=[*MASKED, *DECODERS])
def model(request):
    return build(request.param)


PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [5, 6, 7]]
WANTED = torch.tensor([[6, 9, 7], [4, 4, 2], [6, 4, 5]])


@pytest.fixture
def ragged():
    return Canvas.from_prompts(PROMPTS, CanvasTemplate.plain(4), mask_token_id=MASK, pad_token_id=PAD)


def full_rows(model, canvas, wanted):
    """Wanted logits of every row on its own, without padding, from the full output."""
    rows = []
    for row in range(len(canvas.tokens)):
        ids = canvas.tokens[row][canvas.attention_mask[row].bool()][None]
        options = {}
        if getattr(model.config, "is_causal", None) is False:  # which not every release reads
            length = ids.shape[1]
            options["attention_mask"] = torch.zeros(1, 1, length, length, dtype=model.dtype)
        with torch.no_grad():
            rows.append(model(input_ids=ids, **options).logits[0, wanted[row]])
    return torch.stack(rows)


@torch.no_grad()
def test_native_models_say_the_same_with_and_without_padding(model, ragged):
    denoiser = Denoiser(model, mask_token_id=MASK)
    logits = denoiser(ragged.tokens, WANTED, ragged)
    torch.testing.assert_close(logits, full_rows(model, ragged, WANTED), rtol=0, atol=1e-9)


@torch.no_grad()
def test_only_wanted_rows_pass_the_head(model, ragged):
    denoiser = Denoiser(model, mask_token_id=MASK)
    denoiser.check(ragged)
    rows = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1].numel()))
    try:
        logits = denoiser(ragged.tokens, WANTED, ragged)
    finally:
        handle.remove()
    is_late = model.config.model_type != "esm"  # whose bias is added behind the head
    assert rows == [0, WANTED.numel()] if is_late else [WANTED.numel()]
    torch.testing.assert_close(logits, full_rows(model, ragged, WANTED), rtol=0, atol=1e-9)


def test_the_hook_is_gone_after_the_call_and_after_an_error(ragged):
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    head = model.get_output_embeddings()
    full = model(input_ids=ragged.tokens).logits
    with torch.no_grad():
        prediction = denoiser.predict(ragged.rows, ragged.tokens, WANTED, torch.arange(9))
        assert not head._forward_pre_hooks
        assert not head._forward_hooks
        assert torch.equal(model(input_ids=ragged.tokens).logits, full)  # before the logits are looked at
        expected = prediction.logits
        mine = head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoiser(ragged.tokens, WANTED, ragged)
        assert [*head._forward_hooks] == [mine.id]
        mine.remove()
        assert torch.equal(denoiser.predict(ragged.rows, ragged.tokens, WANTED, torch.arange(9)).logits, expected)
    assert not head._forward_pre_hooks


@torch.no_grad()
def test_logits_are_sliced_if_the_head_is_not_a_module(ragged):
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    expected = denoiser(ragged.tokens, WANTED, ragged)
    denoiser.call.head = Head(None)
    torch.testing.assert_close(denoiser(ragged.tokens, WANTED, ragged), expected, rtol=0, atol=1e-12)
    model.get_output_embeddings = model.get_input_embeddings  # as tied models may say; it is called with ids
    tied = Denoiser(model, mask_token_id=MASK)
    assert isinstance(tied.call.head.layer, nn.Embedding)
    torch.testing.assert_close(tied(ragged.tokens, WANTED, ragged), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_shifted_family_predicts_from_the_position_before(tiny, ragged):
    shifted = Denoiser(tiny, mask_token_id=MASK, family=ModelFamily(name="shifted", shift=True))
    in_place = Denoiser(tiny, mask_token_id=MASK)
    assert torch.equal(shifted(ragged.tokens, WANTED, ragged), in_place(ragged.tokens, WANTED - 1, ragged))
    first = torch.zeros(3, 1, dtype=torch.int64)
    assert torch.equal(shifted(ragged.tokens, first, ragged), in_place(ragged.tokens, first, ragged))


class Wrapped(nn.Module):
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


@needs_is_causal
@torch.no_grad()
def test_dream_is_shifted_and_takes_a_4d_mask(ragged):
    model = Wrapped("Dream")
    denoiser = Denoiser(model, mask_token_id=MASK)
    logits = denoiser(ragged.tokens, WANTED, ragged)
    assert model.masks[-1].shape == (3, 1, 10, 10)
    assert model.masks[-1].dtype == torch.bool
    torch.testing.assert_close(logits, full_rows(model.tiny, ragged, WANTED - 1), rtol=0, atol=1e-9)


@torch.no_grad()
def test_models_without_an_attention_mask_are_called_with_rows_of_one_length(ragged):
    model = Wrapped("mdlm")
    denoiser = Denoiser(model, mask_token_id=MASK, family=ModelFamily(name="MDLM", attention="none"))
    with pytest.warns(UserWarning, match=r"Wrapped \(MDLM\) takes no mask, so .* groups of equal length"):
        denoiser.check(ragged)
    model.masks.clear()
    twice = Canvas.from_prompts([*PROMPTS, [9, 8]], CanvasTemplate.plain(4), mask_token_id=MASK)
    wanted = torch.cat([WANTED, WANTED[1:2]])
    logits = denoiser(twice.tokens, wanted, twice)
    assert model.masks == [None] * 3
    torch.testing.assert_close(logits, full_rows(model.tiny, twice, wanted), rtol=0, atol=1e-9)
    denoiser.check(Canvas.from_prompts([[5], [6]], CanvasTemplate.plain(2), mask_token_id=MASK))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_that_ignore_their_attention_mask_are_found_out(ragged, dtype):
    class Deaf(Wrapped):
        def forward(self, input_ids, attention_mask=None):
            self.masks.append(attention_mask)
            return self.tiny(input_ids=input_ids)

    equal = Canvas.from_prompts([[5], [6]], CanvasTemplate.plain(2), mask_token_id=MASK)
    model = Deaf("deaf").to(dtype)
    deaf = Denoiser(model, mask_token_id=MASK)
    deaf.check(equal)
    with pytest.warns(UserWarning, match=r"Deaf \(deaf\) does not hide what its attention mask says is padding"):
        deaf.check(ragged)
    deaf.check(ragged)  # warns once
    logits = deaf(ragged.tokens, WANTED, ragged)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(logits, full_rows(model.tiny, ragged, WANTED), rtol=0, atol=tolerance)
    Denoiser(Wrapped("hears").to(dtype), mask_token_id=MASK).check(ragged)


BLOCK_PROMPTS = [[5] * 6, [7, 8], [*range(2, 21), *range(2, 20)], [9] * 33]
CONVENTIONS = {
    # how a row alone is read: the mask that it wants, and whether position p is read at p - 1
    "Dream": (lambda: DreamLike("Dream"), None, True, False),
    "LLaDA": (lambda: LLaDALike("llada"), None, False, True),
    "LLaDA-MoE": (lambda: LLaDALike("llada", num_experts=4), None, False, True),
    "LLaDA2": (lambda: BlockLike("llada2_moe"), 32, False, False),
    "SDAR": (lambda: DreamLike("sdar"), 4, False, False),
    "SDAR, blocks of 8": (lambda: DreamLike("sdar", block_size=8), 8, False, False),
    "Fast-dLLM v2": (lambda: OwnBlocks("Fast_dLLM_Qwen", bd_size=16), 16, True, True),
    "MDLM": (lambda: MDLMLike("mdlm"), None, False, True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONVENTIONS)
def test_remote_code_says_the_same_with_and_without_padding(name):
    make, block_size, shift, is_grouped = CONVENTIONS[name]
    model = make()
    denoiser = Denoiser(model, mask_token_id=MASK)
    assert denoiser.family.name == name.partition(",")[0]
    canvas = Canvas.from_prompts(BLOCK_PROMPTS, CanvasTemplate.plain(6), mask_token_id=MASK)
    with pytest.warns(UserWarning, match="groups of equal length") if is_grouped else nullcontext():
        denoiser.check(canvas)
    columns = torch.tensor([[-6, -1, -3], [-2, -4, -5], [-6, -5, -1], [-1, -2, -3]])
    wanted = columns + canvas.row_lengths[:, None]
    tokens = canvas.tokens.scatter(1, wanted[:, :1], 11)
    logits = denoiser(tokens, wanted, canvas)
    for row, prompt in enumerate(BLOCK_PROMPTS):
        length = len(prompt) + 6
        seen = None if block_size is None else blocks(length, block_size)
        alone = model.run(tokens[row, :length][None], None, seen).logits[0]
        expected = alone[columns[row] + length - int(shift)]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", CONVENTIONS)
def test_remote_code_decodes(name):
    denoiser = Denoiser(CONVENTIONS[name][0](), mask_token_id=MASK)
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = sampler(BLOCK_PROMPTS, max_new_tokens=6)
    for row, prompt in enumerate(BLOCK_PROMPTS):
        alone = sampler([prompt], max_new_tokens=6).sequences[0, -6:]
        assert together.sequences[row, len(prompt) : len(prompt) + 6].tolist() == alone.tolist()


@torch.no_grad()
def test_grouped_rows_with_guidance_and_alternatives(ragged):
    model = LLaDALike("llada")
    denoiser = Denoiser(model, mask_token_id=MASK, cfg_scale=1.5)
    with pytest.warns(UserWarning, match="groups of equal length"):
        denoiser.check(ragged)
    other = ragged.tokens.masked_fill(ragged.decodable, 9)
    logits = denoiser(torch.cat([ragged.tokens, other]), torch.cat([WANTED, WANTED.flip(1)]), ragged)
    for alternative, (tokens, wanted) in enumerate([(ragged.tokens, WANTED), (other, WANTED.flip(1))]):
        canvas = replace(ragged, tokens=tokens)
        conditional = full_rows(model, canvas, wanted)
        free = full_rows(model, replace(canvas, tokens=tokens.masked_fill(ragged.prompt, MASK)), wanted)
        expected = free + 2.5 * (conditional - free)
        torch.testing.assert_close(logits[3 * alternative :][:3], expected, rtol=0, atol=1e-9)


WAITING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "lift_fresh"}


class Recorder(TorchDispatchMode):
    """Names of operators, and the most numbers that any of them made."""

    def __init__(self):
        super().__init__()
        self.seen, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple) else (result,):
            if isinstance(output, torch.Tensor):
                self.largest = max(self.largest, output.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaDA", "LLaDA2", "leave one out", "Bert", "Roberta", "Llama", "Qwen3"])
def test_a_step_never_waits_for_the_device(ragged, name):
    """Nor copies anything to it: what does happens before decoding, or at the first step."""
    if name in CONVENTIONS:
        model = CONVENTIONS[name][0]()
    elif name == "leave one out":
        model = BlockLike("llada2_moe")
    elif TRANSFORMERS_5:
        model = build(name)
    else:
        pytest.skip("models of transformers 4 wait")
    hidden = torch.ones(6, 3, dtype=torch.bool) if name == "leave one out" else None
    processor = None if name == "leave one out" else lambda ids, scores: scores + ids[:, -1:]
    denoiser = Denoiser(model, mask_token_id=MASK, cfg_scale=1.0, logits_processor=processor or ())
    rows, places = ragged.rows, torch.tensor([0, 2, 3, 8, 9, 11, 12, 17])
    tokens = ragged.tokens.repeat(2, 1)
    wanted = WANTED.repeat(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoiser.predict(rows, tokens, wanted, places, hidden=hidden)
    with Recorder() as recorder:
        prediction = denoiser.predict(rows, tokens, wanted, places, hidden=hidden)
        chunks = list(prediction.chunks())
    assert len(chunks[0][1]) == 8
    assert {"embedding", "index_select"} <= recorder.seen
    assert not WAITING & recorder.seen


@torch.no_grad()
def test_what_rows_have_in_common_is_made_once(ragged):
    model = Wrapped("BERT")
    denoiser, rows = Denoiser(model, mask_token_id=MASK), ragged.rows
    for times in (1, 2):
        for _ in range(2):
            denoiser.predict(rows, ragged.tokens.repeat(times, 1), WANTED.repeat(times, 1), torch.tensor([0]))
    first, again, twice, twice_again = model.masks[-4:]
    assert first is again
    assert twice is twice_again
    assert len(twice) == 6
    other = Canvas.from_prompts([[5], [6] * 7, [7]], CanvasTemplate.plain(3), mask_token_id=MASK)
    denoiser(other.tokens, WANTED, other)
    assert model.masks[-1].sum(1).tolist() == [4, 10, 4]


class TestProbe:
    @pytest.mark.parametrize("shift", [False, True])
    def test_two_calls_tell_everything(self, shift):
        model = Repeater("some_model", shift)
        denoiser = Denoiser(model, mask_token_id=MASK, family=ModelFamily(name="some", shift=shift))
        assert denoiser.probe() == Probe(sees_future=True, hides_padding=True, shift=shift)
        assert denoiser.probe().shift is shift
        assert model.calls == 2

    @pytest.mark.parametrize("shift", [False, True])
    def test_a_family_that_says_otherwise(self, shift):
        family = ModelFamily(name="some", shift=not shift)
        does, said = ("at p - 1", "in place") if shift else ("in place", "at p - 1")
        with pytest.warns(UserWarning, match=f"predict position p {does}, .* 'some' says {said}; .*shift={shift}"):
            Denoiser(Repeater("some_model", shift), mask_token_id=MASK, family=family)

    def test_what_cannot_be_told_is_not_guessed(self, tiny):
        assert Denoiser(tiny, mask_token_id=MASK).probe() == Probe(sees_future=True, hides_padding=True, shift=None)
        few = Denoiser(Repeater("some_model", False, vocabulary=12), mask_token_id=MASK)
        assert few.probe().shift is None
        fewer = Denoiser(Repeater("some_model", False, vocabulary=2), mask_token_id=MASK)
        assert fewer.probe() == Probe(sees_future=None, hides_padding=None, shift=None)
        short = Denoiser(Repeater("some_model", False, max_position_embeddings=8), mask_token_id=MASK)
        assert short.probe() == Probe(sees_future=True, hides_padding=True, shift=None)
        function = Denoiser(TableModel(4, 2), mask_token_id=3)
        assert function.probe() == Probe(sees_future=None, hides_padding=None, shift=None)

    def test_a_model_that_answers_in_both_places_tells_nothing(self):
        class Both(Repeater):
            def forward(self, input_ids, attention_mask=None):
                logits = super().forward(input_ids, attention_mask).logits
                early = 999.0 * nn.functional.one_hot(input_ids.roll(2, 1), VOCABULARY)
                return SimpleNamespace(logits=torch.where((input_ids == MASK)[:, :, None], logits, early + logits))

        family = ModelFamily(name="some", attention="none")
        assert Denoiser(Both("some_model", False), mask_token_id=MASK, family=family).probe().shift is None

    def test_blocks_that_a_model_does_not_see(self):
        class Deaf(BlockLike):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                return self.run(input_ids, position_ids, None)

        with pytest.raises(
            NapDecodeError, match="Deaf does not do what a additive attention mask says, by which LLaDA2"
        ):
            Denoiser(Deaf("llada2_moe"), mask_token_id=MASK)

    def test_nan(self):
        model = LLaDALike("llada")
        model.head.bias.data[3] = torch.nan
        with pytest.raises(NapDecodeError, match="LLaDALike predicts nan for rows of ordinary tokens; try another"):
            Denoiser(model, mask_token_id=MASK)


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
    sampler = Sampler(
        Denoiser(tiny, mask_token_id=MASK, cfg_scale=2.0), decoder=Decoder(AnyOrderScheduler(tokens_per_step=2))
    )
    out = sampler([[5, 6], [7]], max_new_tokens=6)
    assert out.sequences[1, :7].tolist() == sampler([[7]], max_new_tokens=6).sequences[0].tolist()
    assert out.forward_passes == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"cfg_scale": 1.5}, {"logits_processor": lambda ids, scores: scores + ids[:, -1:]}]
)
def test_alternatives_of_a_canvas_in_one_call(tiny, ragged, options):
    denoiser = Denoiser(tiny, mask_token_id=MASK, **options)
    tokens = [
        ragged.tokens,
        ragged.tokens.masked_fill(ragged.decodable, 9),
        ragged.tokens.masked_fill(ragged.block == 0, 5),
    ]
    tokens[1][:, -1], tokens[2][:, -2] = MASK, 7
    wanted = [WANTED, WANTED.flip(1), WANTED - 1]
    together = denoiser(torch.cat(tokens), torch.cat(wanted), ragged)
    apart = torch.cat([denoiser(t, w, ragged) for t, w in zip(tokens, wanted, strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)
    assert together.shape == (9, 3, VOCABULARY)


PRECISION = {"sdpa": 1e-12, "eager": 1e-4}  # eager attention takes its softmax in float32


def visible_by_hand(positions, num_slots):
    """What a query may see, entry by entry."""
    seen = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for q, p in enumerate(positions):
        for k, r in enumerate(positions):
            if q < num_slots:
                seen[q, k] = k < num_slots
            elif k < num_slots:
                seen[q, k] = r != p
            else:
                seen[q, k] = True
    return seen


@torch.no_grad()
def test_leave_one_out_in_groups(ragged):
    class Half(Remote):
        """Looks at 4-D masks only."""

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            flat = attention_mask is None or attention_mask.ndim == 2
            return self.run(input_ids, position_ids, None if flat else attention_mask)

    denoiser = Denoiser(Half("half"), mask_token_id=MASK)
    with pytest.warns(UserWarning, match="groups of equal length"):
        denoiser.check(ragged)
    tokens = ragged.tokens.masked_fill(ragged.decodable, 9)
    hidden = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    logits = denoiser(tokens, WANTED, ragged, hidden=hidden)
    for row, prompt in enumerate(PROMPTS):
        alone = Canvas.from_prompts([prompt], CanvasTemplate.plain(4), mask_token_id=MASK)
        ids, wanted = tokens[row, : len(prompt) + 4][None], WANTED[row][None]
        expected = denoiser(ids, wanted, alone, hidden=hidden[row][None])
        torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-9)


class TestNoLeaveOneOut:
    @staticmethod
    def refuses(model, match, **options):
        canvas = Canvas.from_prompts([[5, 6]], CanvasTemplate.plain(2), mask_token_id=MASK)
        denoiser = Denoiser(model, mask_token_id=MASK, **options)
        with pytest.raises(NapDecodeError, match=match):
            denoiser.check_leave_one_out()
        with pytest.raises(NapDecodeError, match=match):
            denoiser(canvas.tokens, torch.tensor([[2]]), canvas, hidden=torch.tensor([[True]]))

    def test_shifted(self):
        self.refuses(DreamLike("Dream"), r"DreamLike \(Dream\) predicts position p at p - 1, where no slot can be left")

    def test_without_positions_or_mask(self):
        self.refuses(
            LLaDALike("llada"), "need a model that takes position_ids and a 4-D attention_mask; LLaDALike does"
        )
        self.refuses(MDLMLike("mdlm"), "need a model that takes position_ids and a 4-D attention_mask; MDLMLike does")
        self.refuses(lambda ids, mask: None, "need a model that takes position_ids and a 4-D attention_mask; function")

    def test_masks_of_other_shape(self):
        class Flat(Remote):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                seen = None if attention_mask is None else attention_mask.view(input_ids.shape)[:, None, None].bool()
                return self.run(input_ids, position_ids, seen)

        self.refuses(Flat("flat"), "need a 4-D attention mask, which Flat does not take: shape")

    @pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
    def test_ignored(self, ignored):
        class Deaf(Remote):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                given = {"attention_mask": attention_mask, "position_ids": position_ids} | {ignored: None}
                return self.run(input_ids, given["position_ids"], given["attention_mask"])

        self.refuses(Deaf("deaf"), "Deaf does not do what a 4-D attention mask and position_ids say")

    def test_windows(self):
        if hasattr(transformers, "ModernBertConfig"):
            self.refuses(build("ModernBert"), "some layers of ModernBertForMaskedLM attend to a window only")

    @needs_transformers_5
    def test_models_whose_mask_must_be_flat(self):
        self.refuses(build("Esm"), "(EsmForMaskedLM does not do what a|need a) 4-D attention mask")

    def test_masked_lms_of_transformers_4(self):
        if not TRANSFORMERS_5:
            self.refuses(build("Bert"), "need a 4-D attention mask, which BertForMaskedLM does not take: Wrong shape")

    def test_other_shapes(self, tiny, ragged):
        denoiser = Denoiser(tiny, mask_token_id=MASK)
        with pytest.raises(
            NapDecodeError, match=r"hidden must be bool of wanted's shape \(3, 3\), but is .*bool \(3, 1\)"
        ):
            denoiser(ragged.tokens, WANTED, ragged, hidden=torch.ones(3, 1, dtype=torch.bool))
        with pytest.raises(NapDecodeError, match=r"tokens must be \(J \* 3, 10\), .* are \(4, 10\) and \(3, 3\)"):
            denoiser(ragged.tokens[[0, 0, 1, 2]], WANTED, ragged)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaDA2", "SDAR"])
def test_leave_one_out_of_a_block_causal_model(name):
    """A shadow sees the blocks that its slot sees; the other shadows of these too."""
    make, block_size, _, _ = CONVENTIONS[name]
    model = make()
    denoiser = Denoiser(model, mask_token_id=MASK)
    canvas = Canvas.from_prompts([[*range(2, 20)] * 2, [7, 8]], CanvasTemplate.plain(6), mask_token_id=MASK)
    wanted = torch.tensor([[-6, -4, -2], [-5, -3, -2]]) + canvas.row_lengths[:, None]
    tokens = canvas.tokens.masked_scatter(canvas.decodable, torch.tensor([11, 1, 12, 13, 14, 1] * 2))
    hidden = torch.tensor([[True, False, True], [True, True, True]])
    logits = denoiser(tokens, wanted, canvas, hidden=hidden)
    for row, length in enumerate([42, 8]):
        slots = wanted[row].tolist()
        positions = [*range(length), *slots]
        seen = visible_by_hand(positions, length)
        seen &= torch.tensor([[r // block_size <= p // block_size for r in positions] for p in positions])
        ids = torch.cat([tokens[row, :length], torch.full((3,), MASK)])[None]
        full = model.run(ids, torch.tensor([positions]), seen).logits[0]
        expected = [full[length + k if hidden[row, k] else slots[k]] for k in range(3)]
        torch.testing.assert_close(logits[row], torch.stack(expected), rtol=0, atol=1e-9)


def test_visibility():
    positions, present = torch.tensor([[0, 1, 2, 3, 1, 3]]), torch.ones(1, 6, dtype=torch.bool)
    seen = visibility(positions, present, num_shadows=2)
    assert torch.equal(seen[0], visible_by_hand(positions[0].tolist(), 4))
    present[0, 5] = False  # no slot
    assert visibility(positions, present, num_shadows=2)[0, 4].tolist() == [True, False, True, True, True, False]
    alone = visibility(torch.zeros(1, 2), torch.tensor([[True, False]]), num_shadows=1)
    assert alone.any(2).all()  # what sees nothing is nan
    blocked = visibility(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool), block_size=2)
    assert torch.equal(blocked[0], blocks(5, 2))
    some = visibility(
        torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool), queries=torch.tensor([[4, 1]]), block_size=2
    )
    assert torch.equal(some[0], blocks(5, 2)[[4, 1]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
class TestLeaveOneOut:
    TOKENS = torch.tensor(
        [[5, 6, 7, 8, 9, 10, 1, 12, 13, 1], [7, 8, 14, 1, 12, 1, 0, 0, 0, 0], [5, 6, 7, 8, 9, 1, 1, 0, 0, 0]]
    )

    @torch.no_grad()
    def test_one_slot(self, ragged, attention):
        """In one layer it is as if the slot were masked; deeper, the other slots have seen what stands there."""
        model = tiny_model(attn_implementation=attention, num_hidden_layers=1)
        denoiser = Denoiser(model, mask_token_id=MASK)
        assert model.config._attn_implementation == attention
        for wanted in (torch.tensor([[7], [2], [3]]), torch.tensor([[8], [4], [4]])):
            left_out = self.TOKENS.scatter(1, wanted, MASK)
            for hidden in (torch.tensor([[True], [True], [True]]), torch.tensor([[True], [False], [True]])):
                expected = full_rows(model, replace(ragged, tokens=torch.where(hidden, left_out, self.TOKENS)), wanted)
                logits = denoiser(self.TOKENS, wanted, ragged, hidden=hidden)
                torch.testing.assert_close(logits, expected, rtol=0, atol=PRECISION[attention])
        plain = denoiser(self.TOKENS, wanted, ragged)
        assert (plain - logits).abs().amax(2).gt(1e-3).squeeze(1).tolist() == [True, False, True]

    @torch.no_grad()
    def test_the_shadow_of_a_masked_slot_says_what_the_slot_says(self, ragged, attention):
        denoiser = Denoiser(tiny_model(attn_implementation=attention), mask_token_id=MASK)
        wanted = torch.tensor([[6], [3], [6]])
        logits = denoiser(self.TOKENS, wanted, ragged, hidden=torch.ones(3, 1, dtype=torch.bool))
        torch.testing.assert_close(logits, denoiser(self.TOKENS, wanted, ragged), rtol=0, atol=PRECISION[attention])

    @torch.no_grad()
    @pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=needs_transformers_5) for n in ("Bert", "Roberta", "Electra", "EuroBert")] + ["Qwen3"],
    )
    def test_native_models(self, ragged, attention, name):
        model = build(name, attn_implementation=attention)
        denoiser = Denoiser(model, mask_token_id=MASK)
        wanted = torch.tensor([[6], [3], [6]])
        logits = denoiser(self.TOKENS, wanted, ragged, hidden=torch.ones(3, 1, dtype=torch.bool))
        expected = denoiser(self.TOKENS, wanted, ragged)
        torch.testing.assert_close(logits, expected, rtol=0, atol=PRECISION[attention])

    @torch.no_grad()
    def test_many_slots(self, ragged, attention):
        """Row by row, with a mask written out by hand; a row does not depend on how many slots others have."""
        model = tiny_model(attn_implementation=attention)
        denoiser = Denoiser(model, mask_token_id=MASK)
        wanted = torch.tensor([[6, 7, 8], [4, 2, -1], [6, -1, -1]])
        hidden = torch.tensor([[False, True, True], [True, True, False], [True, False, False]])
        logits = denoiser(self.TOKENS, wanted, ragged, hidden=hidden)
        for row, count in enumerate([3, 2, 1]):
            length = int(ragged.row_lengths[row])
            ids = torch.cat([self.TOKENS[row, :length], torch.full((count,), MASK)])[None]
            positions = [*range(length), *wanted[row, :count].tolist()]
            seen = visible_by_hand(positions, length)
            bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
            full = model(input_ids=ids, attention_mask=bias, position_ids=torch.tensor([positions])).logits[0]
            for k in range(count):
                expected = full[length + k] if hidden[row, k] else full[wanted[row, k]]
                torch.testing.assert_close(logits[row, k], expected, rtol=0, atol=PRECISION[attention])

    @torch.no_grad()
    def test_with_guidance_processors_and_alternatives(self, ragged, attention):
        seen = []

        def watch(ids, scores):
            seen.append(ids)
            return scores

        model = tiny_model(attn_implementation=attention, num_hidden_layers=1)
        denoiser = Denoiser(model, mask_token_id=MASK, cfg_scale=0.5, logits_processor=watch)
        wanted, hidden = torch.tensor([[7], [2], [3]]), torch.ones(3, 1, dtype=torch.bool)
        left_out = self.TOKENS.scatter(1, wanted, MASK)
        other = self.TOKENS.masked_fill(ragged.decodable, 5)
        args = torch.cat([self.TOKENS, other]), wanted.repeat(2, 1), ragged
        logits = denoiser(*args, hidden=hidden.repeat(2, 1))
        assert torch.equal(torch.cat(seen)[:3], left_out.where(ragged.attention_mask > 0, MASK))
        expected = [denoiser(tokens, wanted, ragged) for tokens in (left_out, other.scatter(1, wanted, MASK))]
        torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=PRECISION[attention])


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
    seen = ragged.tokens.where(ragged.attention_mask > 0, MASK)  # behind a row there is nothing but masks
    for row in range(3):
        for k in range(3):
            once = RepetitionPenaltyLogitsProcessor(1.3)(seen[row][None], plain[row, k][None].clone())[0]
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
        models.append(tiny_model(is_causal=True))
        for causal in models:
            with pytest.raises(NapDecodeError, match=r"ignores the future: .* model.config.is_causal = False"):
                Denoiser(causal, mask_token_id=MASK, family=family)

    def test_uniform_diffusion(self):
        with pytest.raises(NapDecodeError, match="DiffusionGemma cannot be decoded here: it is a uniform-diffusion"):
            Denoiser(Wrapped("diffusion_gemma"), mask_token_id=MASK)

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
        with pytest.raises(
            NapDecodeError, match=r"there is no attention convention '2D'. Known: 2d, 4d, additive, none"
        ):
            ModelFamily(name="x", attention="2D")


def test_replacing_options_probes_nothing_and_leaves_the_first_alone(tiny):
    first = Denoiser(tiny, Words())
    calls = []
    handle = tiny.register_forward_hook(lambda *_: calls.append(1))
    try:
        other = first.replace(end_token_ids=[7], cfg_scale=0.5, logits_processor=lambda ids, scores: scores)
    finally:
        handle.remove()
    assert not calls
    assert (other.end_token_ids, other.cfg_scale, len(other.logits_processor)) == ((7,), 0.5, 1)
    assert (first.end_token_ids, first.cfg_scale, first.logits_processor) == ((2,), 0.0, ())
    assert other.replace().end_token_ids == (7,)
    with pytest.raises(NapDecodeError, match="cfg_scale must be"):
        first.replace(cfg_scale=-1)
