from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import transformers
from models import MASK, PAD, TRANSFORMERS_5, tiny_model

from nap_decode import Block, CanvasTemplate, Denoiser, NapDecodeError, SamplerOutput, presets

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    pytest.skip("generate takes a custom_generate since transformers 4.57", allow_module_level=True)

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5], [0, 7, 7, 3]])
PRESENT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def model(tiny):
    if TRANSFORMERS_5:
        return tiny
    bert = transformers.BertLMHeadModel(tiny.config)  # the same, and may generate
    bert.load_state_dict(tiny.state_dict())
    return bert.to(torch.float64).eval()


@pytest.fixture
def sampler(model):
    return presets.llada_low_confidence(model, mask_token_id=MASK, tokens_per_step=2, block_length=3)


@pytest.fixture
def generate(model, sampler):
    options = {"attention_mask": PRESENT, "pad_token_id": PAD, "eos_token_id": None, "max_new_tokens": 6}
    return lambda ids=PROMPTS, **more: model.generate(ids, custom_generate=sampler.custom_generate, **(options | more))


def test_it_is_the_sampler(generate, sampler):
    want = sampler.generate(PROMPTS, PRESENT, max_new_tokens=6)
    assert torch.equal(generate(), want)
    assert torch.equal(generate(max_new_tokens=None, max_length=10), want)
    out = generate(return_dict_in_generate=True)
    assert isinstance(out, SamplerOutput)
    assert torch.equal(out.sequences, want)


def test_the_prompt_comes_back_as_it_was_given(generate):
    ids = torch.where(PRESENT.bool(), PROMPTS, 19)
    assert torch.equal(generate(ids)[:, :4], ids)


def test_what_follows_an_end_token_is_padding(generate):
    plain = generate()
    end = int(plain[0, 6])
    got = generate(eos_token_id=[end, 99], pad_token_id=17)
    for row, cut in zip(plain[:, 4:].tolist(), got[:, 4:].tolist(), strict=True):
        keep = row.index(end) + 1 if end in row else 6
        assert cut == row[:keep] + [17] * (6 - keep)
    assert generate(eos_token_id=end, return_dict_in_generate=True).finish_reason[0] == "end"


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # transformers does not know the template
def test_a_template_is_cut_block_by_block(model):
    template = CanvasTemplate(((11,), Block("a", 4), (12,), Block("b", 4)))
    sampler = presets.parallel_forced(model, template=template, tokens_per_step=2, mask_token_id=MASK)
    run = partial(model.generate, PROMPTS, attention_mask=PRESENT, custom_generate=sampler.custom_generate)
    plain = run(eos_token_id=None)
    assert torch.equal(plain, sampler.generate(PROMPTS, PRESENT))
    end = int(plain[0, 5])
    got = run(eos_token_id=end, pad_token_id=17)
    assert got[0, 4:10].tolist() == [11, end, 17, 17, 17, 12]
    assert run(eos_token_id=None, max_new_tokens=3).shape == (3, 7)
    assert run(eos_token_id=None, max_length=14).shape == (3, 14)
    longer = presets.parallel_forced(model, template=CanvasTemplate.plain(25), mask_token_id=MASK)
    got = model.generate(PROMPTS, custom_generate=longer.custom_generate, eos_token_id=None)
    assert got.shape == (3, 29)  # transformers' default length, 20, is not meant
    with pytest.raises(NapDecodeError, match="template take 14 tokens, more than max_length=13"):
        run(eos_token_id=None, max_length=13)


def test_logits_processors(model, generate):
    plain = generate()
    unwanted = sorted(set(plain[:, 4:].flatten().tolist()))[:4]
    want = presets.llada_low_confidence(
        Denoiser(
            model,
            mask_token_id=MASK,
            logits_processor=[lambda ids, scores: scores.index_fill(1, torch.tensor(unwanted), -torch.inf)],
        ),
        tokens_per_step=2,
        block_length=3,
    ).generate(PROMPTS, PRESENT, max_new_tokens=6)
    assert not torch.equal(want, plain)
    assert torch.equal(generate(suppress_tokens=unwanted), want)
    assert torch.equal(generate(bad_words_ids=[[i] for i in unwanted]), want)
    own = [lambda ids, scores: scores.index_fill(1, torch.tensor(unwanted), -torch.inf)]
    assert torch.equal(generate(logits_processor=transformers.LogitsProcessorList(own)), want)
    assert torch.equal(generate(), plain)  # the sampler itself is as it was


def test_sampling(model):
    sampler = presets.llada_low_confidence(model, mask_token_id=MASK, tokens_per_step=2, temperature=0.8)
    run = partial(
        model.generate, PROMPTS[:1], custom_generate=sampler.custom_generate, max_new_tokens=6, eos_token_id=None
    )
    got = run(do_sample=True, num_return_sequences=3, seed=4)
    want = sampler.generate(PROMPTS[:1].repeat(3, 1), max_new_tokens=6, seed=4)
    assert torch.equal(got, want)
    assert len(set(map(tuple, got.tolist()))) > 1
    assert torch.equal(run(row_seeds=[9]), sampler.generate(PROMPTS[:1], max_new_tokens=6, row_seeds=[9]))
    with pytest.raises(NapDecodeError, match=r"temperature=0.5 would have no effect: the sampler draws as it was made"):
        run(do_sample=True, temperature=0.5)


class Recorder:
    def __init__(self, drafts=False):
        self.calls = []
        if drafts:
            self.put_draft = lambda tokens: self.calls.append(("draft", tokens.tolist()))

    def put(self, tokens):
        self.calls.append(("put", tokens.flatten().tolist()))

    def end(self):
        self.calls.append(("end", None))


class TestStream:
    IDS = PROMPTS[:1]

    @pytest.mark.parametrize("drafts", [False, True])
    def test_it_shows_what_is_final(self, generate, drafts):
        streamer = Recorder(drafts)
        got = generate(self.IDS, attention_mask=PRESENT[:1], stream_to=streamer)[0].tolist()
        assert streamer.calls[0] == ("put", got[:4])
        assert streamer.calls[-1] == ("end", None)
        puts = [tokens for kind, tokens in streamer.calls if kind == "put"]
        assert list(itertools.chain(*puts)) == got
        assert len(puts) > 2  # block after block
        shown = 0
        for kind, tokens in streamer.calls:
            if kind == "put":
                shown += len(tokens)
            elif kind == "draft":
                assert len(tokens) == len(got) - shown
                assert all(t in (MASK, g) for t, g in zip(tokens, got[shown:], strict=True))
        assert drafts is ("draft" in dict(streamer.calls))

    def test_nothing_behind_the_end(self, generate):
        plain = generate(self.IDS, attention_mask=PRESENT[:1])[0].tolist()
        streamer = Recorder()
        got = generate(self.IDS, attention_mask=PRESENT[:1], eos_token_id=plain[6], stream_to=streamer)[0].tolist()
        shown = list(itertools.chain(*(tokens for kind, tokens in streamer.calls if kind == "put")))
        assert shown == got[: 4 + got[4:].index(plain[6]) + 1]

    def test_revisers_have_the_last_word(self, model):
        sampler = presets.llada21_editing(model, mask_token_id=MASK, threshold=0.2, edit_threshold=0.2, block_length=4)
        streamer = Recorder(drafts=True)
        options = {"max_new_tokens": 6, "eos_token_id": None, "stream_to": streamer}
        got = model.generate(self.IDS, custom_generate=sampler.custom_generate, **options)[0].tolist()
        assert [call for call in streamer.calls if call[0] == "put"] == [("put", got[:4]), ("put", got[4:])]

    def test_transformers_own(self, generate, capsys):
        class Tokenizer:
            def decode(self, ids, **options):
                return " ".join(map(str, ids if isinstance(ids, list) else ids.tolist()))

        streamer = transformers.TextStreamer(Tokenizer(), skip_prompt=True)
        got = generate(self.IDS, attention_mask=PRESENT[:1], stream_to=streamer)[0].tolist()
        assert capsys.readouterr().out.split() == [str(t) for t in got[4:]]
        if hasattr(transformers, "TextDiffusionStreamer"):
            streamer = transformers.TextDiffusionStreamer(Tokenizer(), skip_prompt=True)
            generate(self.IDS, attention_mask=PRESENT[:1], stream_to=streamer)
            assert f"{MASK} {MASK}" in capsys.readouterr().out

    def test_one_for_every_row(self, generate):
        streamers = [Recorder(), None, Recorder()]
        got = generate(stream_to=streamers)
        for row in (0, 2):
            puts = [tokens for kind, tokens in streamers[row].calls if kind == "put"]
            assert list(itertools.chain(*puts)) == got[row].tolist()
            assert streamers[row].calls[-1] == ("end", None)

    def test_refusals(self, generate):
        with pytest.raises(NapDecodeError, match=r"one streamer for every row, .* there are 1 for 3 rows"):
            generate(stream_to=Recorder())
        streamer = Recorder(drafts=True)
        streamer._takes_logits = True
        with pytest.raises(NapDecodeError, match="Recorder wants logits"):
            generate(self.IDS, attention_mask=PRESENT[:1], stream_to=streamer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 would have no effect: Sampler does not implement it"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 would have no effect"),
        ({"max_time": 1.0}, "max_time=1.0 would have no effect"),
        ({"output_scores": True}, "output_scores=True would have no effect"),
        ({"do_sample": True}, "do_sample=True, but the sampler draws nothing"),
        ({"bad_words_ids": [[5, 6]]}, "NoBadWordsLogitsProcessor for sequences of several tokens reads its input"),
        ({"logits_processor": [transformers.TopKLogitsWarper(3)]}, "TopKLogitsWarper reads its input as a prefix, or"),
        (
            {"stopping_criteria": [transformers.MaxTimeCriteria(1.0)]},
            "MaxTimeCriteria cannot stop a decoder",
        ),
        ({"token_type_ids": torch.ones(3, 4).long()}, "token_type_ids other than 0|not used by the model"),
        ({"position_ids": torch.ones(3, 4).long()}, "position_ids other than those that follow from attention_mask"),
        (
            {"inputs_embeds": torch.zeros(3, 4, 16)},
            "inputs_embeds",
        ),
    ],
)
def test_refusals(generate, options, message):
    with pytest.raises(ValueError, match=message):  # transformers' own checks come first
        generate(**options)


def test_another_model(generate, sampler):
    if not TRANSFORMERS_5:
        pytest.skip("the other tiny model cannot generate")
    with pytest.raises(NapDecodeError, match="the sampler is for another model"):
        tiny_model().generate(PROMPTS, custom_generate=sampler.custom_generate, max_new_tokens=2)


def test_a_filled_cache(model, sampler):
    if not TRANSFORMERS_5:
        pytest.skip("an encoder has no cache")
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(NapDecodeError, match="past_key_values cannot be used"):
        model.generate(PROMPTS[:1], custom_generate=sampler.custom_generate, max_new_tokens=2, past_key_values=cache)
