from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from models import MASK, TableModel

from nap_decode import Block, CanvasTemplate, Denoiser, NapDecodeError, Sampler, decoders
from nap_decode.base.random import CONFIDENCE_STREAM, row_seeds, uniform
from nap_decode.decoders.llada import ProbabilityWithout
from nap_decode.integrations.llada import EOS_TOKEN_ID, EOT_TOKEN_ID, generate
from nap_decode.model.statistics import Distribution
from nap_decode.parts import Slots
from nap_decode.parts.confidence import Candidates

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5], [0, 7, 7, 3]])
PRESENT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])


def published(model, prompt, present, *, steps, gen_length, block_length, cfg_scale=0.0, mask, **flags):
    """LLaDA's loop, for one row without its padding at a time: ``forward(ids) -> logits (L, V)``."""
    done = []
    for index, (row, keep) in enumerate(zip(prompt.tolist(), present.bool().tolist(), strict=True)):
        ids = [token for token, kept in zip(row, keep, strict=True) if kept]
        decoded = _row(model, ids, index, steps, gen_length, block_length, cfg_scale, mask, **flags)
        done.append(row + decoded[len(ids) :])
    return torch.tensor(done)


def _row(model, prompt, index, steps, gen_length, block_length, cfg_scale, mask, *, never=(), last=(), draws=None):
    x = prompt + [mask] * gen_length
    num_blocks, step = gen_length // block_length, 0
    for block in range(num_blocks):
        begin = len(prompt) + block * block_length
        per_block = steps // num_blocks
        for i in range(per_block):
            count = block_length // per_block + (i < block_length % per_block)
            logits = model(x)
            if cfg_scale:
                free = model([mask] * len(prompt) + x[len(prompt) :])
                logits = free + (cfg_scale + 1) * (logits - free)
            logits[:, list(never)] = -torch.inf
            proposals = []
            for position in range(begin, begin + block_length):
                if x[position] != mask:
                    continue
                allowed = logits[position].clone()
                allowed[mask] = -torch.inf
                token = int(allowed.argmax())
                scored = logits[position].clone()
                scored[list(last)] = -torch.inf
                confidence = float(scored.softmax(0)[token]) if draws is None else draws(index, step, position)
                proposals.append((-confidence, position, token))
            for _, position, token in sorted(proposals)[:count]:
                x[position] = token
            step += count > 0
    assert mask not in x
    return x


@pytest.fixture(scope="module")
def logits_of(tiny):
    return lambda ids: tiny(input_ids=torch.tensor([ids])).logits[0].detach().clone()


GRID = [
    (length, blocks, steps * blocks)
    for length, blocks, steps in itertools.product((1, 6, 8), (1, 2, 4), (1, 3, 11))
    if length % blocks == 0
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize(("length", "blocks", "steps"), GRID)
def test_it_makes_the_published_tokens(tiny, logits_of, length, blocks, steps, cfg_scale, padded):
    present = PRESENT if padded else torch.ones_like(PRESENT)
    options = {"steps": steps, "gen_length": length, "block_length": length // blocks, "cfg_scale": cfg_scale}
    # Without padding there is no need for a mask, guidance or not; published, guidance without a mask crashes.
    got = generate(tiny, PROMPTS, PRESENT if padded else None, mask_id=MASK, **options)
    assert torch.equal(got, published(logits_of, PROMPTS, present, mask=MASK, **options))


@pytest.mark.parametrize(("length", "blocks", "steps"), [grid for grid in GRID if grid[2] <= grid[0]])
def test_random_remasking_with_the_same_draws(tiny, logits_of, length, blocks, steps):
    options = {"steps": steps, "gen_length": length, "block_length": length // blocks}
    torch.manual_seed(5)
    seeds = row_seeds(int(torch.randint(2**62, ())), range(len(PROMPTS)))

    def draws(row, step, position):
        place = torch.tensor([[position]])
        return float(uniform(seeds[row : row + 1], step, CONFIDENCE_STREAM, place))

    torch.manual_seed(5)
    got = generate(tiny, PROMPTS, PRESENT, remasking="random", mask_id=MASK, **options)
    assert torch.equal(got, published(logits_of, PROMPTS, PRESENT, mask=MASK, draws=draws, **options))


class WithLLaDAsIds(torch.nn.Module):
    """The tiny model with LLaDA's mask and end ids for its own ids 1, 21 and 22, which it likes."""

    def __init__(self, tiny):
        super().__init__()
        self.tiny = tiny
        self.ids = torch.arange(24)
        self.ids[[MASK, 21, 22]] = torch.tensor([126336, EOS_TOKEN_ID, EOT_TOKEN_ID])
        self.own = torch.zeros(126464, dtype=torch.int64)
        self.own[self.ids] = torch.arange(24)

    def forward(self, input_ids, attention_mask):
        tiny = self.tiny(input_ids=self.own[input_ids], attention_mask=attention_mask).logits
        logits = torch.full((*input_ids.shape, 126464), -40.0, dtype=tiny.dtype)
        logits[..., self.ids] = tiny + torch.tensor([0.0] * 21 + [4.0, 3.0, 0.0])
        return logits


@pytest.mark.parametrize(("eos", "ends_last"), [(True, False), (False, True), (True, True)])
def test_flags(tiny, eos, ends_last):
    model = WithLLaDAsIds(tiny).eval()
    flags = {
        "never": [EOS_TOKEN_ID] if eos else [],
        "last": [EOS_TOKEN_ID, EOT_TOKEN_ID] if ends_last else [],
    }
    options = {"steps": 6, "gen_length": 6, "block_length": 3}

    def logits_of(ids):
        ids = torch.tensor([ids])
        return model(ids, torch.ones_like(ids))[0].detach()

    got = generate(model, PROMPTS, PRESENT, logits_eos_inf=eos, confidence_eos_eot_inf=ends_last, **options)
    assert torch.equal(got, published(logits_of, PROMPTS, PRESENT, mask=126336, **flags, **options))
    plain = generate(model, PROMPTS, PRESENT, **options)
    assert bool((plain == EOS_TOKEN_ID).any())
    assert not torch.equal(plain, got)
    assert eos is not bool((got == EOS_TOKEN_ID).any())


def candidates(logits, tokens):
    slots = Slots.of(torch.zeros(1, len(tokens), dtype=torch.int64), torch.tensor([[1]]))
    return Candidates(Distribution(logits), torch.tensor(tokens), slots, slots.places)


def test_probability_without():
    logits = torch.tensor([[1.0, 2.0, 0.5], [1.0, 2.0, 0.5]])
    given = candidates(logits, [0, 1])
    want = torch.tensor([torch.tensor([1.0, 0.5]).softmax(0)[0], 0.0])
    assert torch.allclose(ProbabilityWithout([1])(given), want)
    assert torch.equal(logits, torch.tensor([[1.0, 2.0, 0.5]] * 2))
    assert torch.allclose(ProbabilityWithout(())(given), logits.softmax(1)[[0, 1], [0, 1]])
    with pytest.raises(NapDecodeError, match=r"ids=\(3,\)\) names ids that the model does not have: there are 3"):
        ProbabilityWithout((3,))(given)
    with pytest.raises(NapDecodeError, match="must be a whole number of at least 0, but is -1"):
        ProbabilityWithout((-1,))


def test_probability_without_draws_nothing(tiny):
    decoder = decoders.llada_low_confidence(confidence=ProbabilityWithout((2,)))
    sampler = Sampler(tiny, decoder=decoder, mask_token_id=MASK)
    assert sampler([[5, 6]], max_new_tokens=2).row_seeds is None


def test_flags_mean_the_same_when_sampling():
    """Published, the confidence is written into other logits at temperature 1 than at 0."""
    table = TableModel(4, 2, seed=3)  # ids 0 to 3, of which 1 is the mask and 2 the end
    denoiser = Denoiser(table, mask_token_id=1)
    decoder = decoders.llada_low_confidence(confidence=ProbabilityWithout((2,)))
    sampler = Sampler(denoiser, decoder=decoder.set(steps=2, temperature=1.0))
    out = sampler([[]] * 4000, max_new_tokens=2, seed=1)
    first = out.trace.tokens[out.trace.step == 0]
    # Of two independent proposals the end is committed first only if both are it.
    p = table(torch.tensor([[1, 1]]), None)[0].index_fill(1, torch.tensor([1]), -torch.inf).softmax(1)[:, 2]
    both = float(p[0] * p[1])
    got = float((first == 2).double().mean())
    assert abs(got - both) < 5 * (both * (1 - both) / 4000) ** 0.5  # false alarm: 6e-7


def test_temperature_follows_the_law():
    table = TableModel(4, 2, seed=2)
    torch.manual_seed(0)
    got = generate(table, torch.zeros(6000, 0, dtype=torch.int64), steps=1, gen_length=2, temperature=0.7, mask_id=1)
    chances = (table(torch.tensor([[1, 1]]), None)[0] / 0.7).index_fill(1, torch.tensor([1]), -torch.inf).softmax(1)
    counts = Counter(map(tuple, got.tolist()))
    chi2 = sum(
        (counts[a, b] - 6000 * float(chances[0, a] * chances[1, b])) ** 2
        / (6000 * float(chances[0, a] * chances[1, b]))
        for a in (0, 2, 3)
        for b in (0, 2, 3)
    )
    assert chi2 < 42.7  # 8 degrees of freedom, false alarm: 1e-6


def test_uneven_blocks(tiny):
    got = generate(tiny, PROMPTS, PRESENT, steps=3, gen_length=7, block_length=3, mask_id=MASK)
    decoder = decoders.llada_low_confidence(block_length=3).set(steps=3)
    sampler = Sampler(tiny, decoder=decoder, mask_token_id=MASK)
    assert torch.equal(got[:, 4:], sampler.generate(PROMPTS, PRESENT, max_new_tokens=7)[:, 4:])
    with pytest.raises(NapDecodeError, match="3 phases"):
        generate(tiny, PROMPTS, PRESENT, steps=2, gen_length=7, block_length=3, mask_id=MASK)


def test_the_prompt_comes_back_as_it_was_given(tiny):
    prompt = torch.tensor([[17, 18, 5], [9, 9, 9]])
    got = generate(tiny, prompt, torch.tensor([[0, 0, 1], [1, 1, 1]]), gen_length=2, mask_id=MASK)
    assert torch.equal(got[:, :3], prompt)


class TestOtherSamplers:
    @pytest.mark.parametrize("kind", ["decoder", "name", "file"])
    def test_a_decoder(self, tiny, tmp_path, kind):
        denoiser = Denoiser(tiny, mask_token_id=MASK, cfg_scale=0.5)
        sampler = Sampler(denoiser, decoder=decoders.klass())
        sampler.save(tmp_path / "mine.json")
        given = {"decoder": sampler.decoder, "name": "klass", "file": tmp_path / "mine.json"}[kind]
        got = generate(tiny, PROMPTS, PRESENT, gen_length=6, cfg_scale=0.5, mask_id=MASK, sampler=given)
        assert torch.equal(got[:, 4:], sampler.generate(PROMPTS, PRESENT, max_new_tokens=6)[:, 4:])
        if kind == "file":
            assert torch.equal(generate(tiny, PROMPTS, PRESENT, gen_length=6, mask_id=MASK, sampler=given), got)
            with pytest.raises(NapDecodeError, match=r"the file has cfg_scale 0.5, but 1.0 is asked for"):
                generate(tiny, PROMPTS, gen_length=6, cfg_scale=1.0, mask_id=MASK, sampler=given)

    def test_a_sampler(self, tiny):
        sampler = Sampler(tiny, decoder=decoders.left_to_right().set(tokens_per_step=2), mask_token_id=MASK)
        want = sampler.generate(PROMPTS, PRESENT, max_new_tokens=6)
        assert torch.equal(generate(tiny, PROMPTS, PRESENT, gen_length=6, sampler=sampler), want)
        assert torch.equal(generate(tiny, PROMPTS, PRESENT, gen_length=6, sampler=sampler, mask_id=MASK), want)

    def test_a_template(self, tiny):
        template = CanvasTemplate(((11,), Block("a", 2), (12,), Block("b", 2)))
        decoder = decoders.parallel_forced(tokens_per_step=2)
        sampler = Sampler(tiny, decoder=decoder, template=template, mask_token_id=MASK)
        got = generate(tiny, PROMPTS, PRESENT, mask_id=MASK, sampler=sampler)
        assert got.shape == (3, 10)
        assert got[:, [4, 7]].tolist() == [[11, 12]] * 3
        with pytest.raises(NapDecodeError, match="gen_length=6 would have no effect: the sampler has a template"):
            generate(tiny, PROMPTS, PRESENT, gen_length=6, mask_id=MASK, sampler=sampler)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("steps", 8),
            ("block_length", 4),
            ("temperature", 0.5),
            ("remasking", "random"),
            ("confidence_eos_eot_inf", True),
        ],
    )
    def test_options_without_effect_are_refused(self, tiny, option, value):
        with pytest.raises(NapDecodeError, match=f"{option}={value!r} would have no effect: the sampler decides that"):
            generate(tiny, PROMPTS, mask_id=MASK, sampler="klass", **{option: value})

    @pytest.mark.parametrize("option", [{"mask_id": 3}, {"cfg_scale": 1.0}, {"logits_eos_inf": True}])
    def test_options_of_the_denoiser(self, tiny, option):
        sampler = Sampler(tiny, decoder=decoders.klass(), mask_token_id=MASK)
        with pytest.raises(NapDecodeError, match=f"{next(iter(option))}=.* the sampler has a Denoiser of its own"):
            generate(tiny, PROMPTS, sampler=sampler, **option)

    def test_what_is_no_sampler(self, tiny):
        with pytest.raises(NapDecodeError, match=r"there is no decoder 'klas'. Did you mean 'klass'"):
            generate(tiny, PROMPTS, mask_id=MASK, sampler="klas")
        with pytest.raises(NapDecodeError, match=r"must be a Sampler, a Decoder, .* but is <function"):
            generate(tiny, PROMPTS, mask_id=MASK, sampler=lambda model: None)

    def test_a_sampler_of_another_model(self, tiny):
        other = TableModel(4, 2)
        sampler = Sampler(other, decoder=decoders.klass(), mask_token_id=1)
        with pytest.raises(NapDecodeError, match="the sampler is for another model"):
            generate(tiny, PROMPTS, mask_id=MASK, sampler=sampler)


def test_refusals(tiny):
    with pytest.raises(NapDecodeError, match=r"there is no remasking 'low_confidense'. Did you mean 'low_confidence'"):
        generate(tiny, PROMPTS, mask_id=MASK, remasking="low_confidense")
    with pytest.raises(NapDecodeError, match="confidence_eos_eot_inf=True would have no effect: remasking is random"):
        generate(tiny, PROMPTS, mask_id=MASK, remasking="random", confidence_eos_eot_inf=True)
