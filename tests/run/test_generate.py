from __future__ import annotations

import copy
import inspect
import itertools
from functools import partial

import pytest
import torch
import transformers
from models import MASK, PAD, tiny_model

from nap_decode import Block, CanvasTemplate, Denoiser, NapDecodeError, Sampler, SamplerOutput, decoders

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    pytest.skip("generate takes a custom_generate since transformers 4.57", allow_module_level=True)

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5], [0, 7, 7, 3]])
PRESENT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])

IN_BLOCKS = decoders.llada_low_confidence(block_length=3).set(tokens_per_step=2)
DRAWING = decoders.llada_low_confidence().set(tokens_per_step=2, temperature=0.8)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny


@pytest.fixture
def sampler(model):
    return Sampler(model, decoder=IN_BLOCKS, mask_token_id=MASK)


@pytest.fixture
def generate(model, sampler):
    options = {"attention_mask": PRESENT, "pad_token_id": PAD, "eos_token_id": None, "max_new_tokens": 6}
    options["custom_generate"] = sampler.custom_generate
    return lambda ids=PROMPTS, **more: model.generate(ids, **(options | more))


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
    decoder = decoders.parallel_forced(tokens_per_step=2)
    sampler = Sampler(model, decoder=decoder, template=template, mask_token_id=MASK)
    run = partial(model.generate, PROMPTS, attention_mask=PRESENT, custom_generate=sampler.custom_generate)
    plain = run(eos_token_id=None)
    assert torch.equal(plain, sampler.generate(PROMPTS, PRESENT))
    end = int(plain[0, 5])
    got = run(eos_token_id=end, pad_token_id=17)
    assert got[0, 4:10].tolist() == [11, end, 17, 17, 17, 12]
    assert run(eos_token_id=None, max_new_tokens=3).shape == (3, 7)
    assert run(eos_token_id=None, max_length=14).shape == (3, 14)
    longer = Sampler(model, decoder=decoder, template=CanvasTemplate.plain(25), mask_token_id=MASK)
    got = model.generate(PROMPTS, custom_generate=longer.custom_generate, eos_token_id=None)
    assert got.shape == (3, 29)  # transformers' default length, 20, is not meant
    with pytest.raises(NapDecodeError, match="template take 14 tokens, more than max_length=13"):
        run(eos_token_id=None, max_length=13)


def test_logits_processors(model, generate):
    plain = generate()
    unwanted = sorted(set(plain[:, 4:].flatten().tolist()))[:4]
    denoiser = Denoiser(
        model,
        mask_token_id=MASK,
        logits_processor=[lambda ids, scores: scores.index_fill(1, torch.tensor(unwanted), -torch.inf)],
    )
    want = Sampler(denoiser, decoder=IN_BLOCKS).generate(PROMPTS, PRESENT, max_new_tokens=6)
    assert not torch.equal(want, plain)
    assert torch.equal(generate(suppress_tokens=unwanted), want)
    assert torch.equal(generate(bad_words_ids=[[i] for i in unwanted]), want)
    own = [lambda ids, scores: scores.index_fill(1, torch.tensor(unwanted), -torch.inf)]
    assert torch.equal(generate(logits_processor=transformers.LogitsProcessorList(own)), want)
    assert torch.equal(generate(), plain)  # the sampler itself is as it was


def test_sampling(model):
    sampler = Sampler(model, decoder=DRAWING, mask_token_id=MASK)
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
        decoder = decoders.llada21_editing(threshold=0.2, edit_threshold=0.2, block_length=4)
        sampler = Sampler(model, decoder=decoder, mask_token_id=MASK)
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
            assert list(itertools.chain(*puts)) == got[row][int(PRESENT[row].argmax()) :].tolist()  # without padding
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
    with pytest.raises(NapDecodeError, match="the sampler is for another model"):
        tiny_model().generate(PROMPTS, custom_generate=sampler.custom_generate, max_new_tokens=2)


def filled_cache():
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    return cache


@pytest.fixture
def takes_all(model, monkeypatch):
    """transformers lets everything pass that the model is given, as it does for remote code that takes keywords."""
    monkeypatch.setattr(model, "_validate_model_kwargs", lambda model_kwargs: None)


def test_a_filled_cache(model, generate):
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with pytest.raises(NapDecodeError, match=f"{name} cannot be used"):
        generate(PROMPTS[:1], attention_mask=PRESENT[:1], **{name: filled_cache()})


class TestGivenAndMade:
    """What the caller gave is told from what generate makes for its own loops, whatever a release calls it."""

    def test_what_generate_makes_has_any_name(self, model, sampler):
        made = set()

        def renamed(model, ids, **passed):
            own = {k: passed.pop(k) for k in ("generation_config", "logits_processor", "stopping_criteria")}
            mask = passed.pop("attention_mask")
            made.update(passed)
            renamed = {f"renamed_{name}": value for name, value in passed.items()}
            more = {"memory": transformers.DynamicCache(), "columns": torch.arange(9), "number": 1}
            return sampler.custom_generate(model, ids, attention_mask=mask, **own, **renamed, **more)

        got = model.generate(PROMPTS, attention_mask=PRESENT, custom_generate=renamed, max_new_tokens=6)
        assert torch.equal(got[:, :4], PROMPTS)
        assert "use_cache" in made
        assert len(made) > 1

    @pytest.mark.parametrize("value", [3, 0.5, "text", [1], {"a": 1}, len])
    def test_what_generate_would_not_make(self, sampler, generate, value):
        with pytest.raises(NapDecodeError, match=r"custom_generate\(...\) got seeed="):
            generate(custom_generate=partial(sampler.custom_generate, seeed=value))

    @pytest.mark.usefixtures("takes_all")
    @pytest.mark.parametrize("value", [True, 1, 3, "text", torch.zeros(3, 4), torch.ones(3, 4).long(), filled_cache()])
    def test_what_the_caller_gives_is_refused(self, generate, value):
        with pytest.raises(NapDecodeError, match=r"(got )?extra"):
            generate(extra=value)

    @pytest.mark.usefixtures("takes_all")
    @pytest.mark.parametrize(
        "more",
        [
            {"extra": None},
            {"extra": False},
            {"extra": transformers.DynamicCache()},
            {"position_ids": PRESENT.cumsum(1) - 1},
            {"some_position": PRESENT.cumsum(1) - 1},
            {"token_type_ids": torch.zeros(3, 4).long()},
            {"use_cache": False},
        ],
    )
    def test_what_asks_nothing(self, generate, more):
        assert torch.equal(generate(**more), generate())

    def test_without_generate(self, model, sampler, generate):
        """Somebody else's loop calls: then all is given."""
        config = transformers.GenerationConfig(max_length=10)
        run = partial(sampler.custom_generate, model, PROMPTS, attention_mask=PRESENT, generation_config=config)
        assert torch.equal(run(), generate())
        with pytest.raises(NapDecodeError, match="got extra, which decoding by unmasking does not pass on"):
            run(extra=torch.zeros(3, 4))
        with pytest.raises(NapDecodeError, match="MaxTimeCriteria cannot stop"):
            run(stopping_criteria=[transformers.MaxTimeCriteria(1.0)])
        with pytest.raises(NapDecodeError, match="TopKLogitsWarper reads"):
            run(logits_processor=[transformers.TopKLogitsWarper(50)])

    def test_under_another_models_generate(self, model, sampler):
        """That call's keywords say nothing of this one."""
        other = tiny_model()
        config = transformers.GenerationConfig(max_length=10)

        def outer(other, ids, **passed):
            return sampler.custom_generate(model, ids, generation_config=config, extra=torch.zeros(3, 4))

        with pytest.raises(NapDecodeError, match="got extra, which decoding by unmasking does not pass on"):
            other.generate(PROMPTS, custom_generate=outer, attention_mask=PRESENT, max_new_tokens=2)


GIVEN = {
    "prefix_allowed_tokens_fn": lambda row, ids: [5],
    "synced_gpus": True,
    "streamer": Recorder(),
    "negative_prompt_ids": PROMPTS,
    "negative_prompt_attention_mask": PRESENT,
}


@pytest.mark.parametrize("name", sorted(inspect.signature(transformers.GenerationMixin.generate).parameters))
def test_every_argument_of_generate_has_an_effect_or_is_refused(model, generate, name):
    if name in ("self", "inputs", "kwargs", "generation_config", "custom_generate", "use_model_defaults"):
        pytest.skip("has an effect")
    if name in ("logits_processor", "stopping_criteria"):
        pytest.skip("looked at one by one, see the tests for them")
    with pytest.raises(NapDecodeError, match=f"(?s){name}=.* would have no effect"):
        generate(**{name: model if name == "assistant_model" else GIVEN.get(name, object())})


@pytest.mark.parametrize(
    "criterion", [transformers.MaxLengthCriteria(8), transformers.EosTokenCriteria(5)], ids=["length", "end"]
)
@pytest.mark.filterwarnings("ignore:A custom stopping criteria")
def test_criteria_of_the_callers_own(generate, criterion):
    with pytest.raises(NapDecodeError, match=f"{type(criterion).__name__} cannot stop a decoder"):
        generate(stopping_criteria=[criterion], eos_token_id=7)


class TestOptions:
    DRAWS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

    @pytest.fixture
    def drawing(self, model):
        return Sampler(model, decoder=DRAWING, mask_token_id=MASK)

    @pytest.fixture
    def checkpoint(self, model, monkeypatch):
        """The generation config that came with the model."""
        config = copy.deepcopy(model.generation_config)
        monkeypatch.setattr(model, "generation_config", config)
        return config

    @pytest.mark.parametrize("name", DRAWS)
    def test_drawing_without_do_sample(self, generate, name):
        value = 3 if name == "top_k" else 0.3
        if not hasattr(transformers.GenerationConfig(), name):
            pytest.skip("not in this release")
        with pytest.raises(NapDecodeError, match=f"{name}={value} would have no effect: the sampler draws as it was"):
            generate(**{name: value})
        config = transformers.GenerationConfig(**{name: value})
        with pytest.raises(NapDecodeError, match=f"{name}={value} would have no effect: the sampler draws as it was"):
            generate(generation_config=config)

    def test_what_asks_for_what_is_done(self, generate):
        plain = generate()
        for more in ({"temperature": 1.0, "top_p": 1.0, "top_k": 50}, {"temperature": None, "top_p": None}):
            assert torch.equal(generate(do_sample=False, **more), plain)
        assert torch.equal(generate(temperature=0.0, top_k=0), plain)

    def test_what_the_checkpoint_says(self, model, checkpoint, generate, drawing):
        plain = generate()
        checkpoint.temperature, checkpoint.top_k, checkpoint.top_p = 0.7, 7, 0.9
        checkpoint.cache_implementation, checkpoint.house_style = "offloaded", "formal"
        assert torch.equal(generate(), plain)
        with pytest.raises(NapDecodeError, match=r"temperature=0.7 would have no effect"):
            generate(temperature=0.7)
        with pytest.raises(NapDecodeError, match=r"top_p=0.8 would have no effect"):
            generate(top_p=0.8)
        checkpoint.do_sample = True
        got = generate(custom_generate=drawing.custom_generate, seed=3)
        assert torch.equal(got, drawing.generate(PROMPTS, PRESENT, max_new_tokens=6, seed=3))
        with pytest.raises(NapDecodeError, match="do_sample=True, but the sampler draws nothing"):
            generate()
        checkpoint.do_sample, checkpoint.num_beams = False, 2
        with pytest.raises(NapDecodeError, match=r"num_beams=2 would have no effect"):
            generate()

    @pytest.mark.parametrize("more", [{"temperature": 1.0}, {"top_k": 0}, {"top_p": 1.0}, {"temperature": 0.0}])
    def test_a_sampler_that_draws_has_its_own(self, generate, drawing, more):
        with pytest.raises(ValueError, match=r"would have no effect|has to be a strictly positive float"):
            generate(custom_generate=drawing.custom_generate, do_sample=True, **more)

    def test_do_sample_false(self, generate, drawing):
        with pytest.raises(NapDecodeError, match="do_sample=False, but the sampler draws"):
            generate(custom_generate=drawing.custom_generate, do_sample=False)

    @pytest.mark.parametrize(
        "options", [{"cache_implementation": "offloaded"}, {"max_new_token": 6}, {"penalty_beta": 0.6}], ids=str
    )
    def test_anything_else(self, generate, options):
        config = transformers.GenerationConfig(**options)
        with pytest.raises(NapDecodeError, match=f"{next(iter(options))}=.* would have no effect"):
            generate(generation_config=config)


class TestProcessors:
    @pytest.mark.parametrize("rows", [slice(0, 3), slice(0, 2), slice(1, 3)])
    def test_repetition_penalty_beside_padding(self, generate, rows):
        got = generate(PROMPTS[rows], attention_mask=PRESENT[rows], repetition_penalty=1.7)
        assert not torch.equal(got, generate(PROMPTS[rows], attention_mask=PRESENT[rows]))
        for row, present, together in zip(PROMPTS[rows], PRESENT[rows], got, strict=True):
            alone = generate(row[present.bool()][None], attention_mask=None, repetition_penalty=1.7)
            assert torch.equal(alone[0, -6:], together[-6:])

    def test_a_penalty_that_skips_the_prompt(self, generate):
        processor = transformers.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=4)
        with pytest.raises(NapDecodeError, match="with prompt_ignore_length reads its input as a prefix"):
            generate(logits_processor=[processor])

    def test_warpers_that_are_not_generates(self, model, generate):
        """Like its default, but the caller's own; and other than its default, slipped in on the way."""
        sampler = Sampler(model, decoder=DRAWING, mask_token_id=MASK)
        own, other = transformers.TopKLogitsWarper(50), transformers.TopKLogitsWarper(3)

        def slipped_in(model, ids, logits_processor, **passed):
            return sampler.custom_generate(model, ids, logits_processor=[*logits_processor, other], **passed)

        for more in (
            {"custom_generate": sampler.custom_generate, "logits_processor": [own]},
            {"custom_generate": slipped_in},
        ):
            with pytest.raises(NapDecodeError, match="TopKLogitsWarper reads"):
                generate(do_sample=True, **more)

    def test_inherited_code_is_known(self, generate):
        class Mine(transformers.NoRepeatNGramLogitsProcessor):
            pass

        class MyOwn(Mine):
            def __call__(self, input_ids, scores):
                return scores

        with pytest.raises(NapDecodeError, match="Mine reads its input as a prefix"):
            generate(logits_processor=[Mine(2)])
        assert torch.equal(generate(logits_processor=[MyOwn(2)]), generate())


@pytest.mark.parametrize(
    "generate", [lambda self, inputs, **options: None, lambda self, custom_generate=None: None], ids=["none", "a name"]
)
def test_releases_that_would_not_call_it(sampler, monkeypatch, generate):
    if "custom_generate" in inspect.signature(generate).parameters:
        generate.__annotations__["custom_generate"] = "str | None"
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    with pytest.raises(NapDecodeError, match=r"takes no function; install 4.57 or later, or call sampler.generate"):
        sampler.custom_generate  # noqa: B018
