from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from models import MASK, Words

import nap_decode
from nap_decode import Block, CanvasTemplate, Denoiser, ModelFamily, NapDecodeError, decoders
from nap_decode.integrations.dllm import AlphaSchedule, Sampler

PROMPTS = [[5, 6, 7, 8], [9, 5], [7, 7, 3]]


class Tokenizer(Words):
    bos_token_id = 3

    def get_vocab(self):
        return {str(i): i for i in range(24)}


@dataclass
class Config:
    """As dLLM's MDLMSamplerConfig."""

    return_dict: bool = False
    max_new_tokens: int = 128
    max_length: int = None
    block_size: int = 128
    steps: int = 128
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list = None
    suppress_tokens: list = None
    begin_suppress_tokens: list = None
    right_shift_logits: bool = False


def counts(masked, steps):
    """dLLM's ``get_num_transfer_tokens`` with the linear scheduler, for one row."""
    found = []
    for j in range(steps):
        s, t = torch.tensor((steps - j - 1) / steps), torch.tensor((steps - j) / steps)
        share = 1 - float((1 - (1 - s)) / (1 - (1 - t)))
        found.append(min(round(masked * share), masked))
        masked -= found[-1]
    return [n for n in found if n]


def published(forward, row, blocks, per_block, *, cfg_scale=0.0, keep=(), never=(), last=(), shift=False):
    """dLLM's loop for one row: canvases before the first and after every step."""
    x, history, given = list(row), [list(row)], [t != MASK and t not in keep for t in row]

    def logits_of(ids):
        logits = forward(ids)
        return torch.cat([logits[:1], logits[:-1]]) if shift else logits

    for block in blocks:
        for count in counts(sum(x[p] == MASK for p in block), per_block):
            logits = logits_of(x)
            if cfg_scale:
                free = logits_of([MASK if hide else t for t, hide in zip(x, given, strict=True)])
                logits = free + (cfg_scale + 1) * (logits - free)
            logits[:, list(never)] = -torch.inf
            scored = []
            for p in (p for p in block if x[p] == MASK):
                allowed, own = logits[p].clone(), logits[p].clone()
                allowed[MASK] = -torch.inf
                own[list(last)] = -torch.inf
                scored.append((-float(own.softmax(0)[allowed.argmax()]), p, int(allowed.argmax())))
            for _, p, token in sorted(scored)[:count]:
                x[p] = token
            history.append(list(x))
    return history


@pytest.fixture(scope="module")
def forward(tiny):
    return lambda ids: tiny(input_ids=torch.tensor([ids])).logits[0].detach().clone()


@pytest.fixture
def sampler(tiny):
    return Sampler(model=tiny, tokenizer=Tokenizer())


OPTIONS = [
    {},
    {"cfg_scale": 1.0},
    {"cfg_scale": 1.0, "cfg_keep_tokens": [5, 7]},
    {"suppress_tokens": [8, 9, 10, 11, 12, 13]},
    {"begin_suppress_tokens": list(range(4, 14))},
    {"right_shift_logits": True},
]
NAMES = {
    "cfg_keep_tokens": "keep",
    "suppress_tokens": "never",
    "begin_suppress_tokens": "last",
    "right_shift_logits": "shift",
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("blocks", "steps"), list(itertools.product((1, 3), (1, 4, 7, 40))))
def test_sample_makes_the_published_tokens(sampler, forward, blocks, steps, options):
    out = sampler.sample(
        PROMPTS, Config(max_new_tokens=9, block_size=9 // blocks, steps=steps), return_dict=True, **options
    )
    named = {NAMES.get(name, name): value for name, value in options.items()}
    for index, prompt in enumerate(PROMPTS):
        begin, size = len(prompt), 9 // blocks
        spans = [range(begin + b * size, begin + (b + 1) * size) for b in range(blocks)]
        want = published(forward, prompt + [MASK] * 9, spans, math.ceil(steps / blocks), **named)
        width = 4 - len(prompt)  # rows are padded on the right with the end token
        assert [step[index].tolist() for step in out.histories] == [row + [2] * width for row in want]
        assert out.sequences[index].tolist() == want[-1] + [2] * width


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[5]], ids=str)
def test_infill_makes_the_published_tokens(sampler, forward, steps, options):
    texts = [[5, MASK, MASK, 7, MASK, 8], [MASK, 9, 6, MASK]]
    got = sampler.infill(texts, Config(), steps=steps, **options)
    named = {NAMES.get(name, name): value for name, value in options.items()}
    for row, text in zip(got.tolist(), texts, strict=True):
        want = published(forward, text, [range(len(text))], steps, **named)[-1]
        assert row == want + [2] * (6 - len(text))


def test_infill_in_windows(sampler):
    out = sampler.infill([[5, 6, MASK, MASK, 8, MASK]], block_size=3, steps=2, return_dict=True)
    masks = [[p for p, token in enumerate(step[0].tolist()) if token == MASK] for step in out.histories]
    assert masks == [[2, 3, 5], [3, 5], []]


@pytest.mark.parametrize("tokens", [1, 4, 7, 32])
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_alpha_schedule(tokens, steps):
    got = AlphaSchedule()(torch.tensor([tokens, 3]), torch.tensor([steps, 1]), torch.empty(2, 0))
    assert [n for n in got[0].diff(prepend=torch.tensor([0])).tolist() if n] == counts(tokens, steps)
    assert got[1].tolist() == [3] * steps


def test_another_alpha_scheduler(tiny):
    class Late:
        def reverse_mask_prob(self, s, t):
            return 0.0 if s == 0 else 1.0

    sampler = Sampler(model=tiny, tokenizer=Tokenizer(), scheduler=Late())
    out = sampler.sample(PROMPTS, max_new_tokens=6, steps=4, return_dict=True)
    assert len(out.histories) == 2  # all at the last step
    with pytest.raises(NapDecodeError, match=r"scheduler=.*would have no effect: stochastic_transfer is done for the"):
        sampler.sample(PROMPTS, stochastic_transfer=True)


def test_stochastic_transfer(sampler):
    torch.manual_seed(0)
    out = sampler.sample([[5]] * 400, max_new_tokens=4, steps=2, stochastic_transfer=True, return_dict=True)
    done = torch.stack(out.histories)[1:, :, 1:].ne(MASK).sum(2)
    assert done[-1].eq(4).all()
    first = done[0].double()  # binomial, 4 and 1/2
    assert abs(first.mean() - 2) < 5 / 400**0.5
    assert abs(first.var() - 1) < 0.4


def test_random_remasking(sampler):
    torch.manual_seed(0)
    one, other = (sampler.sample(PROMPTS, max_new_tokens=8, steps=8, remasking="random") for _ in range(2))
    assert not torch.equal(one, other)
    assert MASK not in one


def test_lengths(sampler):
    assert sampler.sample(PROMPTS, max_new_tokens=None, max_length=10, steps=2).shape == (3, 10)
    assert sampler.sample([torch.tensor(row) for row in PROMPTS], max_new_tokens=2, steps=2).shape == (3, 6)
    assert sampler.sample([[], [5]], max_new_tokens=2, steps=2, right_shift_logits=True)[0, 0] == 3
    with pytest.raises(NapDecodeError, match="take 12 tokens, more than max_length=10"):
        sampler.sample(PROMPTS, max_new_tokens=8, max_length=10)
    with pytest.raises(NapDecodeError, match="give max_new_tokens or max_length"):
        sampler.sample(PROMPTS, max_new_tokens=None)


def test_right_shift_is_that_of_the_family_or_forced(tiny):
    sampler = Sampler(model=tiny, tokenizer=Tokenizer())
    shifted = Denoiser(tiny, Tokenizer(), family=ModelFamily(name="shifted", shift=True))
    decoder = decoders.llada_low_confidence().set(steps=4)
    want = nap_decode.Sampler(shifted, decoder=decoder).generate(torch.tensor([[5, 6]]), max_new_tokens=4)
    got = sampler.sample([[5, 6]], max_new_tokens=4, steps=4, right_shift_logits=True)
    assert torch.equal(got, want)
    assert not torch.equal(got, sampler.sample([[5, 6]], max_new_tokens=4, steps=4))


class TestUsing:
    @pytest.fixture
    def make(self, tiny):
        return lambda *args, **options: Sampler.using(*args, **options)(model=tiny, tokenizer=Tokenizer())

    @pytest.mark.parametrize("kind", ["name", "decoder", "file"])
    def test_a_decoder(self, make, tiny, tmp_path, kind):
        config = Config(max_new_tokens=6, cfg_scale=0.5, suppress_tokens=[], begin_suppress_tokens=[])  # the harness's
        denoiser, decoder = Denoiser(tiny, Tokenizer(), cfg_scale=0.5), decoders.klass(threshold=0.5)
        sampler = nap_decode.Sampler(denoiser, decoder=decoder)
        sampler.save(tmp_path / "mine.json")
        given = {"name": "klass", "decoder": decoder, "file": tmp_path / "mine.json"}[kind]
        got = make(given, **({"threshold": 0.5} if kind == "name" else {})).sample([[5, 6, 7]], config)
        assert torch.equal(got, sampler.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6))
        assert Sampler.using("klass").__name__ == "Sampler[klass]"
        assert Sampler.decoder is None

    def test_options_of_the_config_that_it_has(self, make, tiny):
        got = make("llada_low_confidence").sample([[5, 6, 7]], Config(max_new_tokens=6, steps=3, block_size=2))
        decoder = decoders.llada_low_confidence(block_length=2).set(steps=3)
        sampler = nap_decode.Sampler(tiny, Tokenizer(), decoder)
        assert torch.equal(got, sampler.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6))

    def test_options_that_it_has_not(self, make):
        with pytest.raises(NapDecodeError, match="steps=3 would have no effect: the committer decides"):
            make("klass").sample(PROMPTS, Config(steps=3))
        for given, options in (("klass", {"temperature": 0.2}), (decoders.klass(), {})):  # a decoder has all it needs
            with pytest.raises(NapDecodeError, match=r"temperature=0.5 would have no effect: the decoder, or its opt"):
                make(given, **options).sample(PROMPTS, temperature=0.5)
        with pytest.raises(NapDecodeError, match="remasking='random' would have no effect"):
            make("klass").sample(PROMPTS, Config(remasking="random"))

    def test_a_template(self, make):
        template = CanvasTemplate(((11,), Block("a", 2), (12,), Block("b", 2)))
        sampler = make("parallel_forced", template=template, tokens_per_step=2)
        got = sampler.sample(PROMPTS, Config(max_length=10))
        assert got.shape == (3, 10)
        with pytest.raises(NapDecodeError, match="take 10 tokens, more than max_length=9"):
            sampler.sample(PROMPTS, Config(max_length=9))
        assert [got[row, len(prompt)].item() for row, prompt in enumerate(PROMPTS)] == [11] * 3
        with pytest.raises(NapDecodeError, match="max_new_tokens=4 would have no effect: the decoder has a template"):
            sampler.sample(PROMPTS, max_new_tokens=4)

    def test_infill(self, make):
        got = make("fast_dllm_threshold").infill([[5, MASK, 7], [MASK, 6]], Config())
        assert got[0, [0, 2]].tolist() == [5, 7]
        assert got[1, 1:].tolist() == [6, 2]
        assert MASK not in got

    def test_what_is_no_decoder(self, make, tiny):
        with pytest.raises(NapDecodeError, match=r"there is no decoder 'klas'. Did you mean 'klass'"):
            make("klas")
        with pytest.raises(NapDecodeError, match=r"must be a Sampler, a Decoder, .* but is <function"):
            make(decoders.klass)
        with pytest.raises(NapDecodeError, match=r"threshold=0.5 would have no effect: the decoder is made already"):
            make(decoders.klass(), threshold=0.5)
        with pytest.raises(NapDecodeError, match="scheduler=3 would have no effect: the decoder has its own"):
            Sampler.using("klass")(tiny, Tokenizer(), 3).sample(PROMPTS)


@dataclass
class DreamConfig:
    """As dLLM's DreamSamplerConfig."""

    return_dict: bool = False
    max_new_tokens: int = 20
    max_length: int = None
    steps: int = 512
    eps: float = 1e-3
    alg: str = "origin"
    alg_temp: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    stochastic_transfer: bool = False
    right_shift_logits: bool = True
    cfg_scale: float = 0.0


@dataclass
class DreamEvalConfig(DreamConfig):
    """As the DreamEvalSamplerConfig of dLLM's harness."""

    max_new_tokens: int = 128
    steps: int = 128
    temperature: float = 0.0
    top_p: float = None
    top_k: float = None
    alg: str = "entropy"


def published_dream(forward, row, *, alg, steps, top_p=None, top_k=None, cfg_scale=0.0):
    """``DreamSampler`` at temperature 0, for one row: canvases before the first and after every step."""
    x, history, given = list(row), [list(row)], [t != MASK for t in row]

    def logits_of(ids):
        logits = forward(ids)
        return torch.cat([logits[:1], logits[:-1]])

    for count in counts(sum(t == MASK for t in x), steps):
        logits = logits_of(x)
        if cfg_scale:
            free = logits_of([MASK if hide else t for t, hide in zip(x, given, strict=True)])
            logits = free + (cfg_scale + 1) * (logits - free)
        scored = []
        for p in (p for p, t in enumerate(x) if t == MASK):
            own, allowed = logits[p].clone(), logits[p].clone()
            allowed[MASK] = -torch.inf
            if top_p is not None and top_p < 1:
                ordered, order = own.sort(descending=True)
                beyond = ordered.softmax(0).cumsum(0) > top_p
                own[order[1:][beyond[:-1]]] = -torch.inf
            if top_k is not None:
                own[own < own.topk(min(top_k, len(own)))[0][-1]] = -torch.inf
            probs, token = own.softmax(0), int(allowed.argmax())
            if alg == "maskgit_plus":
                confidence = float(probs[token])
            elif alg == "topk_margin":
                confidence = float(probs[token] - torch.cat([probs[:token], probs[token + 1 :]]).max())
            else:
                confidence = float((probs * (probs + 1e-10).log()).sum())
            scored.append((-confidence, p, token))
        for _, p, token in sorted(scored)[:count]:
            x[p] = token
        history.append(list(x))
    return history


class TestDream:
    """In dLLM's harness for Dream, ``alg`` decides."""

    @pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_k": 3}, {"top_p": 0.9}, {"cfg_scale": 1.0}], ids=str)
    @pytest.mark.parametrize("steps", [1, 4, 7, 40])
    @pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
    def test_sample_makes_the_published_tokens(self, sampler, forward, alg, steps, options):
        config = DreamEvalConfig(max_new_tokens=9, steps=steps, alg=alg)
        out = sampler.sample(PROMPTS, config, return_dict=True, **options)
        for index, prompt in enumerate(PROMPTS):
            want = published_dream(forward, prompt + [MASK] * 9, alg=alg, steps=steps, **options)
            width = 4 - len(prompt)  # rows are padded on the left with the end token
            assert [step[index].tolist() for step in out.histories] == [[2] * width + row for row in want]
            assert out.sequences[index].tolist() == [2] * width + want[-1]

    def test_as_the_harness_calls_it(self, tiny, forward):
        """With the defaults of the harness's own config, and nothing said about them."""
        prompts = [torch.tensor(prompt) for prompt in PROMPTS]
        config = DreamEvalConfig(max_new_tokens=12, steps=12)
        got = Sampler(model=tiny, tokenizer=Tokenizer()).sample(inputs=prompts, config=config, return_dict=False)
        for row, prompt in zip(got.tolist(), PROMPTS, strict=True):
            want = published_dream(forward, prompt + [MASK] * 12, alg="entropy", steps=12)[-1]
            assert row[4 - len(prompt) :] == want
            assert want != published(forward, prompt + [MASK] * 12, [range(len(prompt), len(prompt) + 12)], 12)[-1]

    @pytest.mark.parametrize("steps", [1, 3, 30])
    def test_infill_makes_the_published_tokens(self, sampler, forward, steps):
        texts = [[5, MASK, MASK, 7, MASK, 8], [9, MASK, 6, MASK]]
        got = sampler.infill(texts, DreamEvalConfig(steps=steps))
        for row, text in zip(got.tolist(), texts, strict=True):
            want = published_dream(forward, text, alg="entropy", steps=steps)[-1]
            assert row == [2] * (6 - len(text)) + want

    def test_it_draws(self, sampler):
        torch.manual_seed(0)
        config = DreamConfig(max_new_tokens=6, steps=6, alg="entropy")
        one, other = (sampler.sample(PROMPTS, config) for _ in range(2))
        assert not torch.equal(one, other)
        assert MASK not in one
        config.temperature, config.alg_temp = 0.0, 5.0
        one, other = (sampler.sample(PROMPTS, config) for _ in range(2))
        assert not torch.equal(one, other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alg": "origin"}, "there is no alg 'origin'"),
            ({"alg": "entropie"}, "there is no alg 'entropie'. Did you mean 'entropy'"),
            ({"eps": 0.1}, "eps=0.1 would have no effect: DreamSampler does not use it"),
            ({"block_size": 4}, "there is no option of DreamSamplerConfig 'block_size'"),
            ({"generation_tokens_hook_func": print}, "no option of DreamSamplerConfig 'generation_tokens_hook_func'"),
            ({"top_k": 0}, "top_k must be"),
        ],
    )
    def test_refusals(self, sampler, options, message):
        for call in (sampler.check, partial(sampler.sample, PROMPTS), partial(sampler.infill, [[5, MASK]])):
            with pytest.raises(NapDecodeError, match=message):
                call(DreamEvalConfig(), **options)

    def test_guidance_of_infill(self, sampler):
        with pytest.raises(NapDecodeError, match=r"cfg_scale=1.0 would have no effect: DreamSampler's infill has no"):
            sampler.infill([[5, MASK]], DreamEvalConfig(), cfg_scale=1.0)

    def test_decoders(self, tiny):
        make = lambda *args, **options: Sampler.using(*args, **options)(model=tiny, tokenizer=Tokenizer())  # noqa: E731
        config = DreamEvalConfig(max_new_tokens=6)  # the algorithm's options are those of the class: not said
        got = make("klass", threshold=0.5).sample([[5, 6, 7]], config)
        shifted = Denoiser(tiny, Tokenizer(), family=ModelFamily(name="shifted", shift=True))
        run = lambda decoder: nap_decode.Sampler(shifted, decoder=decoder)([[5, 6, 7]], max_new_tokens=6)  # noqa: E731
        assert torch.equal(got, run(decoders.klass(threshold=0.5)).sequences)
        with pytest.raises(NapDecodeError, match="alg='topk_margin' would have no effect: the decoder, or its options"):
            make("klass").check(DreamEvalConfig(alg="topk_margin"))
        got = make("dream_entropy").sample([[5, 6, 7]], DreamEvalConfig(max_new_tokens=6, steps=3, top_k=2))
        assert torch.equal(got, run(decoders.dream_entropy().set(steps=3, top_k=2)).sequences)


class TestCheck:
    """A harness samples after all likelihoods: what is wrong shall be known before."""

    @pytest.mark.parametrize(
        ("make", "config", "message"),
        [
            (Sampler, Config(remasking="low"), "there is no remasking 'low'"),
            (Sampler, Config(steps=0), "steps must be"),
            (Sampler, Config(max_new_tokens=None), "give max_new_tokens or max_length"),
            (Sampler, DreamConfig(), "there is no alg 'origin'"),
            (Sampler.using("klass"), Config(steps=3), "steps=3 would have no effect"),
            (Sampler.using("klass"), Config(block_size=-1), "block_length must be"),
        ],
    )
    def test_options(self, tiny, make, config, message):
        sampler = make(model=tiny, tokenizer=Tokenizer())
        for call in (sampler.check, partial(sampler.sample, PROMPTS)):
            with pytest.raises(NapDecodeError, match=message):
                call(config)

    def test_nothing_is_wrong(self, sampler):
        for config in (None, Config(), DreamEvalConfig(), Config(max_new_tokens=None, max_length=9)):
            sampler.check(config)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"treshold": 0.8}, r"no option of klass 'treshold'. Did you mean 'threshold'"),
            ({"tokens_per_step": 0}, "tokens_per_step must be"),
        ],
    )
    def test_options_of_the_decoder(self, options, message):
        with pytest.raises(NapDecodeError, match=message):
            Sampler.using("klass", **options)


@dataclass
class OfAnother(Config):
    """Of a sampler with a rule of its own, as dLLM's BD3LMSamplerConfig."""

    steps_per_block: int = 4
    ids: list = field(default_factory=list)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {"step": 3}, "'step'. Did you mean 'steps'"),
        (
            OfAnother(),
            {},
            "steps_per_block=4, .* would have no effect: OfAnother has it, but MDLMSamplerConfig does not",
        ),
        (None, {"remasking": "low"}, "there is no remasking 'low'"),
        (None, {"remasking": "random", "begin_suppress_tokens": [3]}, "would have no effect: remasking is random"),
        (None, {"cfg_keep_tokens": [3]}, r"cfg_keep_tokens=\[3\] would have no effect: cfg_scale is 0"),
        (None, {"steps": 0}, "steps must be a whole number of at least 1"),
        (None, {"block_size": -1}, "block_size must be a whole number of at least 1"),
    ],
)
def test_refusals(sampler, config, options, message):
    with pytest.raises(NapDecodeError, match=message):
        sampler.sample(PROMPTS, config, **({"max_new_tokens": 4} | options))


def test_unknown_fields_with_their_defaults(tiny):
    """A decoder has a rule of its own, so that they say nothing."""
    sampler = Sampler.using("klass")(model=tiny, tokenizer=Tokenizer())
    assert sampler.sample(PROMPTS, OfAnother(max_new_tokens=2)).shape == (3, 6)
    with pytest.raises(NapDecodeError, match="steps_per_block=2 would have no effect: OfAnother has it, but"):
        sampler.sample(PROMPTS, OfAnother(max_new_tokens=2, steps_per_block=2))


def test_masks(sampler):
    with pytest.raises(NapDecodeError, match="there is a mask token in prompt 1"):
        sampler.sample([[5], [MASK]], max_new_tokens=2)
    with pytest.raises(NapDecodeError, match="max_new_tokens=2 would have no effect: infill decodes the masks"):
        sampler.infill([[5, MASK]], max_new_tokens=2)
