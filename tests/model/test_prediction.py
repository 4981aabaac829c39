from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import MASK, PAD, VOCABULARY, BlockLike, DreamLike, LLaDALike, MDLMLike, Remote, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nap_decode import Canvas, CanvasTemplate, Denoiser, ModelFamily, NapDecodeError
from nap_decode.base.rows import Rows
from nap_decode.model import prediction
from nap_decode.model.prediction import Prediction

PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [5, 6, 7]]
PLACES = torch.tensor([0, 2, 3, 4, 7, 8, 8])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three rows at a time through the output layer, two at a time to look at."""
    monkeypatch.setattr(prediction, "_HEAD_ROWS", 1)
    monkeypatch.setattr(prediction, "_HEAD_NUMBERS", 3 * VOCABULARY)
    monkeypatch.setattr(prediction, "_CACHED_NUMBERS", 2 * VOCABULARY)


@pytest.fixture
def ragged():
    return Canvas.from_prompts(PROMPTS, CanvasTemplate.plain(4), mask_token_id=MASK, pad_token_id=PAD)


class Capped(Remote):
    """Does more with its logits than its output layer does, and tells of that layer."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        return SimpleNamespace(logits=5 * (self.run(input_ids, position_ids, seen).logits / 5).tanh())


class Untrained(Capped):
    """A bias behind its output layer, 0 for now."""

    def forward(self, input_ids, attention_mask=None):
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        return SimpleNamespace(logits=self.run(input_ids, None, seen).logits + self.config.bias)


class Scaled(Capped):
    """Changes what its output layer puts out."""

    def forward(self, input_ids, attention_mask=None):
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        return SimpleNamespace(logits=self.run(input_ids, None, seen).logits.mul_(0.5))


class Upcast(Capped):
    """Half precision inside, float32 outside."""

    def forward(self, input_ids, attention_mask=None):
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        return SimpleNamespace(logits=self.run(input_ids, None, seen).logits.float())


class Packed(Remote):
    """Puts its rows into one before its output layer, as models without padding inside do."""

    def forward(self, input_ids, attention_mask=None):
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        x = x + (x * there[:, :, None]).sum(1, keepdim=True) / there.sum(1)[:, None, None]
        return SimpleNamespace(logits=self.head(x.flatten(0, 1)[None]).view(*input_ids.shape, -1))


class Halved(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) / 2


def with_other_head():
    model = Capped("capped")
    model.forward = lambda input_ids: model.run(input_ids, None, None)
    model.head.__class__ = Halved
    return model


def as_function():
    model = tiny_model()
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


MODELS = {
    # how it is made, and whether its output layer is applied later
    "transformers": (tiny_model, True),
    "Dream": (lambda: DreamLike("Dream"), True),
    "LLaDA2": (lambda: BlockLike("llada2_moe"), True),
    "LLaDA, in groups": (lambda: LLaDALike("llada"), True),
    "MDLM, in groups": (lambda: MDLMLike("mdlm"), False),
    "capped": (lambda: Capped("capped"), False),
    "untrained": (lambda: Untrained("untrained", bias=0.0), False),
    "scaled": (lambda: Scaled("scaled"), False),
    "packed": (lambda: Packed("packed"), False),
    "another output layer": (with_other_head, False),
    "function": (as_function, False),
}


def by_hand(model, tokens, canvas, wanted, shift):
    """Wanted logits of every row of ``tokens`` (B, L) on its own, from all that the model returns."""
    rows = []
    for row in range(len(tokens)):
        ids = tokens[row, : canvas.row_lengths[row]][None]
        if not isinstance(model, nn.Module):
            full = model(ids, torch.ones_like(ids))
        elif isinstance(model, BlockLike):
            block = torch.arange(ids.shape[1]) // 32
            full = model.run(ids, None, block[None] <= block[:, None]).logits
        else:
            full = model(input_ids=ids, **({"timesteps": torch.zeros(1)} if isinstance(model, MDLMLike) else {}))
            full = full if isinstance(full, torch.Tensor) else full.logits
        rows.append(full[0, (wanted[row] - shift).clamp(min=0)])
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*groups of equal length")
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("is_processed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_what_the_model_says(ragged, name, is_processed, cfg_scale):
    make, is_late = MODELS[name]
    model, seen = make(), []

    def processor(input_ids, scores):
        seen.append(input_ids)
        scores[:, 3] += input_ids[:, 2]  # in place
        return scores * 2

    options = {"logits_processor": processor} if is_processed else {}
    denoiser = Denoiser(model, mask_token_id=MASK, cfg_scale=cfg_scale, **options)
    other = ragged.tokens.masked_fill(ragged.decodable, 9)
    wanted = torch.tensor([[6, 9, 7], [2, 4, 5], [6, 4, 0]])  # positions in a row
    expected = []
    for tokens in (ragged.tokens, other):
        logits = by_hand(model, tokens, ragged, wanted, int(denoiser.family.shift))
        if cfg_scale:
            hidden = tokens.masked_fill(ragged.prompt, MASK)
            free = by_hand(model, hidden, ragged, wanted, int(denoiser.family.shift))
            logits = free + (cfg_scale + 1) * (logits - free)
        if is_processed:
            logits[:, :, 3] += tokens[:, 2, None]
            logits = logits * 2
        expected.append(logits)
    both = torch.cat([ragged.tokens, other])
    for number in (1, 2):
        tokens, again = both[: 3 * number], wanted.repeat(number, 1)
        places = torch.cat([PLACES + 9 * j for j in range(number)])
        found = denoiser.predict(ragged.rows, tokens, again, places)
        assert (found.head is not None) == is_late
        assert found.shape == (3 * number, 3)
        assert found.vocab_size == VOCABULARY
        assert found.banned.tolist() == [MASK]
        whole = torch.cat(expected[:number]).flatten(0, -2)
        parts = []
        for part, logits in found.chunks():
            torch.testing.assert_close(logits, whole[found.places[part]], rtol=0, atol=1e-9)
            assert len(logits) <= 2
            assert logits.dtype == found.dtype
            logits.fill_(7)  # they are the caller's
            parts += range(part.start, part.stop)
        assert parts == list(range(7 * number))
        is_asked = torch.zeros(len(whole), dtype=torch.bool).index_fill(0, found.places, True)[:, None]
        torch.testing.assert_close(found.logits.flatten(0, -2), whole.where(is_asked, 0), rtol=0, atol=1e-9)
        assert found.logits.shape == (*found.shape, VOCABULARY)
        for part, logits in found.chunks():  # of what there is now
            assert torch.equal(logits, found.logits.flatten(0, -2)[found.places[part]])
            logits.fill_(7)
    if is_processed:
        assert torch.equal(seen[0][0], both[0])


@torch.no_grad()
@pytest.mark.parametrize("model", [lambda: tiny_model().bfloat16(), lambda: Upcast("upcast").bfloat16()])
def test_half_precision(ragged, model):
    model = model()
    denoiser = Denoiser(model, mask_token_id=MASK)
    found = denoiser.predict(ragged.rows, ragged.tokens, torch.zeros(3, 1).long(), PLACES[:2])
    expected = by_hand(model, ragged.tokens, ragged, torch.zeros(3, 1).long(), 0)
    assert found.head is not None
    assert found.dtype == expected.dtype == (torch.float32 if isinstance(model, Upcast) else torch.bfloat16)
    torch.testing.assert_close(found.logits[[0, 2]], expected[[0, 2]], rtol=0, atol=0.1)


@torch.no_grad()
def test_a_bias_that_is_trained_later(ragged):
    model = Untrained("untrained", bias=0.0)
    denoiser = Denoiser(model, mask_token_id=MASK)
    rows, tokens = ragged.rows, ragged.tokens
    before = denoiser.predict(rows, tokens, torch.ones(3, 1).long(), torch.arange(3)).logits
    model.config.bias = 1.0
    after = denoiser.predict(rows, tokens, torch.ones(3, 1).long(), torch.arange(3)).logits
    torch.testing.assert_close(after, before + 1)


@torch.no_grad()
def test_shadows_of_what_is_not_asked_for_are_seen_by_none(ragged):
    denoiser = Denoiser(tiny_model(), mask_token_id=MASK)
    rows = ragged.rows
    tokens = ragged.tokens.masked_fill(ragged.decodable, 9)
    wanted = torch.tensor([[6, 7, 8], [2, 0, 0], [3, 4, 0]])  # 0 fills up
    hidden, places = torch.ones(3, 3, dtype=torch.bool), torch.tensor([0, 1, 2, 3, 6, 7])
    logits = denoiser.predict(rows, tokens, wanted, places, hidden=hidden).logits
    for row, number in enumerate([3, 1, 2]):
        alone = Rows(rows.lengths[row : row + 1], rows.prompt[row : row + 1])
        some = wanted[row : row + 1, :number]
        expected = denoiser.predict(
            alone, tokens[row : row + 1], some, torch.arange(number), hidden=torch.ones_like(some, dtype=torch.bool)
        )
        torch.testing.assert_close(logits[row : row + 1, :number], expected.logits, rtol=0, atol=1e-9)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple) else (result,):
            if isinstance(output, torch.Tensor):
                self.numbers = max(self.numbers, output.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.5}, {"logits_processor": lambda ids, scores: scores * 2}])
def test_logits_never_exist_all_at_once(monkeypatch, options):
    vocabulary = 4000
    monkeypatch.setattr(prediction, "_HEAD_NUMBERS", 20 * vocabulary)  # the weights are 16 rows
    canvas = Canvas.from_prompts([[5] * 6, [6]], CanvasTemplate.plain(30), mask_token_id=MASK, pad_token_id=PAD)
    denoiser = Denoiser(tiny_model(vocab_size=vocabulary), mask_token_id=MASK, **options)
    rows, tokens = canvas.rows, canvas.tokens
    wanted = torch.stack([torch.arange(6, 36), torch.arange(1, 31)])
    with Largest() as largest:
        for _, chunk in denoiser.predict(rows, tokens, wanted, torch.arange(60)).chunks():
            chunk.exp_()
    assert largest.numbers == 20 * vocabulary
    with Largest() as largest:
        assert len(denoiser.predict(rows, tokens, wanted, torch.arange(60)).logits) == 2
    assert largest.numbers == 60 * vocabulary


def test_chunks_have_about_one_size(monkeypatch):
    monkeypatch.setattr(prediction, "_CACHED_NUMBERS", 4 * 2)
    sizes = {}
    for number in range(11):
        found = Prediction.of(torch.zeros(1, number, 2), banned=torch.tensor([0]))
        sizes[number] = [len(chunk) for _, chunk in found.chunks()]
    assert sizes[0] == []
    assert [sizes[n] for n in (1, 4, 5, 9, 10)] == [[1], [4], [3, 2], [3, 3, 3], [4, 4, 2]]


def test_gradients(ragged):
    model = tiny_model()
    denoiser = Denoiser(model, mask_token_id=MASK, cfg_scale=0.5)
    logits = denoiser.predict(ragged.rows, ragged.tokens, torch.ones(3, 2).long(), PLACES[:3])
    logits.logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_shapes_that_do_not_fit(tiny, ragged):
    denoiser, rows = Denoiser(tiny, mask_token_id=MASK), ragged.rows
    tokens, wanted = ragged.tokens, torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(NapDecodeError, match=r"tokens must be \(J \* 3, 10\), .* are \(4, 10\) and \(3, 1\)"):
        denoiser.predict(rows, tokens[[0, 0, 1, 2]], wanted, torch.arange(3))
    with pytest.raises(NapDecodeError, match=r"tokens must be \(J \* 3, 10\), .* are \(3, 9\) and \(3, 1\)"):
        denoiser.predict(rows, tokens[:, :9], wanted, torch.arange(3))
    with pytest.raises(NapDecodeError, match=r"hidden must be bool of wanted's shape \(3, 1\)"):
        denoiser.predict(rows, tokens, wanted, torch.arange(3), hidden=wanted)


@torch.no_grad()
def test_a_shifted_family_predicts_the_first_position_in_place(tiny, ragged):
    rows, tokens = ragged.rows, ragged.tokens
    wanted, places = torch.tensor([[0, 1, 6]] * 3), torch.arange(9)
    shifted = Denoiser(tiny, mask_token_id=MASK, family=ModelFamily(name="shifted", shift=True))
    plain = Denoiser(tiny, mask_token_id=MASK).predict(rows, tokens, torch.tensor([[0, 0, 5]] * 3), places)
    assert torch.equal(shifted.predict(rows, tokens, wanted, places).logits, plain.logits)
