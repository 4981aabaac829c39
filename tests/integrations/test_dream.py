from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import MASK, PAD, TableModel, tiny_model

from nap_decode import Block, CanvasTemplate, Denoiser, ModelFamily, NapDecodeError, Sampler, decoders
from nap_decode.integrations.dream import install, uninstall

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5], [0, 7, 7, 3]])
PRESENT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
TEXTS = torch.tensor([[5, 6, 7, 8], [4, 4, 9, 5], [3, 7, 7, 3]])  # without padding
ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy")


@pytest.fixture
def dream(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "generation_config", SimpleNamespace(mask_token_id=MASK))
    install(tiny)
    yield partial(tiny.diffusion_generate, mask_token_id=MASK, temperature=0.0, top_p=1.0, top_k=None)
    uninstall(tiny)


def cut(p, top_p, top_k):
    """Dream's top_p_logits, then top_k_logits, on probabilities in a list."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_p is not None and top_p < 1:
        kept, total = [], 0.0
        for i in order:
            if not kept or total <= top_p:
                kept.append(i)
            total += p[i]
        order = kept
    if top_k is not None:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    return [p[i] / total if i in order else 0.0 for i in range(len(p))]


def published(
    forward, prompt, *, alg, steps, new, eps=1e-3, top_p=None, top_k=None, tokens_hook=None, logits_hook=None
):
    """Dream's ``_sample`` at temperature 0, for one row without padding; the canvas after every step."""
    x = prompt + [MASK] * new

    def after_hook(step, logits):
        return x if tokens_hook is None else tokens_hook(step, torch.tensor([x]), logits)[0].tolist()

    x = after_hook(None, None)
    times = torch.linspace(1, eps, steps + 1)
    history = []
    for i in range(steps):
        masked = [p for p, token in enumerate(x) if token == MASK]
        logits = forward(x)
        logits = torch.cat([logits[:1], logits[:-1]])
        if logits_hook is not None:
            logits = logits_hook(i, torch.tensor([x]), logits[None])[0]
        scored = []
        for position in masked:
            own = logits[position].clone()
            p = cut(own.softmax(0).tolist(), top_p, top_k)
            own[MASK] = -torch.inf
            token = int(own.argmax())
            if alg == "maskgit_plus":
                confidence = p[token]
            elif alg == "topk_margin":
                confidence = p[token] - max(p[:token] + p[token + 1 :])
            else:
                confidence = sum(q * math.log(q) for q in p if q > 0)
            scored.append((-confidence, position, token))
        share = 1 - times[i + 1] / times[i]
        count = int(torch.tensor(float(len(masked))) * share) if i < steps - 1 else len(masked)
        for _, position, token in sorted(scored)[:count]:
            x[position] = token
        x = after_hook(i, logits[None])
        history.append(list(x))
    return history


GRID = list(itertools.product((1, 5, 9), (1, 4, 20)))


@pytest.mark.parametrize(
    "options", [{}, {"eps": 0.2}, {"top_k": 3}, {"top_p": 0.95}, {"top_p": 0.9, "top_k": 5}], ids=str
)
@pytest.mark.parametrize(("new", "steps"), GRID)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_it_makes_the_published_tokens(tiny, dream, alg, new, steps, options):
    def forward(ids):
        return tiny(input_ids=torch.tensor([ids])).logits[0].detach()

    out = dream(
        PROMPTS,
        attention_mask=PRESENT,
        alg=alg,
        steps=steps,
        max_new_tokens=new,
        alg_temp=0.0,
        return_dict_in_generate=True,
        output_history=True,
        **options,
    )
    assert len(out.history) == steps
    for row, (ids, present) in enumerate(zip(PROMPTS.tolist(), PRESENT.sum(1).tolist(), strict=True)):
        want = published(forward, ids[-present:], alg=alg, steps=steps, new=new, **options)
        assert [step[row, 4 - present :].tolist() for step in out.history] == want
        assert out.sequences[row].tolist() == ids[:-present] + want[-1]


class Table(torch.nn.Module):
    """A table of logits as a model of Dream's kind."""

    device = torch.device("cpu")

    def __init__(self, length, seed=0):
        super().__init__()
        self.table = TableModel(4, length, seed)
        self.config = SimpleNamespace(max_position_embeddings=None)

    def forward(self, ids, attention_mask):
        return self.table(ids, attention_mask)


def law(model, prompt, new, *, steps, alg, alg_temp=None, temperature=1.0, eps=1e-3):
    """Exact law of Dream's ``_sample`` for one row, by enumeration of tokens and positions."""
    times = torch.linspace(1, eps, steps + 1).tolist()

    def chosen(masked, full, drawn, share, is_last):
        if is_last:
            yield set(masked), 1.0
        elif alg == "origin":
            for size in range(len(masked) + 1):
                for places in itertools.combinations(masked, size):
                    yield set(places), share**size * (1 - share) ** (len(masked) - size)
        else:
            weights = {p: math.exp(full[p][drawn[p]] / alg_temp) for p in masked}
            for order in itertools.permutations(masked, int(len(masked) * share)):
                left, chance = dict(weights), 1.0
                for p in order:
                    chance *= left[p] / sum(left.values())
                    del left[p]
                yield set(order), chance

    outcomes = Counter({(*prompt, *[MASK] * new): 1.0})
    for step in range(steps):
        rows, outcomes = outcomes, Counter()
        share = 1 - times[step + 1] / times[step]
        for row, chance in rows.items():
            masked = [p for p, token in enumerate(row) if token == MASK]
            logits = model(torch.tensor([row]), None)[0]
            logits = torch.cat([logits[:1], logits[:-1]])
            full = {p: (logits[p] / temperature).softmax(0).tolist() for p in masked}
            allowed = [i for i in range(4) if i != MASK]
            for tokens in itertools.product(allowed, repeat=len(masked)):
                drawn = dict(zip(masked, tokens, strict=True))
                weight = math.prod(full[p][t] / sum(full[p][i] for i in allowed) for p, t in drawn.items())
                for places, place_chance in chosen(masked, full, drawn, share, step == steps - 1):
                    after = tuple(drawn[p] if p in places else t for p, t in enumerate(row))
                    outcomes[after] += chance * weight * place_chance
    return outcomes


@pytest.mark.parametrize(
    ("options", "degrees"),
    [
        ({"alg": "origin", "steps": 2}, 26),
        ({"alg": "origin", "steps": 6, "eps": 0.1}, 26),
        ({"alg": "maskgit_plus", "steps": 3, "alg_temp": 0.3}, 26),
    ],
    ids=str,
)
def test_laws(options, degrees):
    model, draws = Table(4), 6000
    install(model)
    torch.manual_seed(1)
    got = model.diffusion_generate(
        torch.full((1, 1), 3),
        max_new_tokens=3,
        temperature=1.0,
        num_return_sequences=draws,
        mask_token_id=MASK,
        **options,
    )
    counts = Counter(map(tuple, got.tolist()))
    want = law(model, (3,), 3, **options)
    assert abs(sum(want.values()) - 1) < 1e-9
    assert set(counts) <= set(want)
    chi2 = sum((counts[row] - draws * p) ** 2 / (draws * p) for row, p in want.items())
    assert len(want) == degrees + 1
    assert chi2 < 78  # 26 degrees of freedom, false alarm: 5e-7


class TestInstall:
    def test_and_uninstall(self):
        model = tiny_model()
        with pytest.raises(NapDecodeError, match="nothing is installed on this"):
            uninstall(model)
        install(model)
        install(model, "klass")
        uninstall(model)
        assert not hasattr(model, "diffusion_generate")

    def test_a_wrapper(self):
        """What passes on what it is called with has neither a config nor a signature."""
        model = tiny_model()
        model.config.max_position_embeddings, model.config.alg, model.config.steps = 9, "entropy", 3
        wrapped = torch.nn.DataParallel(model)
        for one in (model, wrapped):
            install(one)
        options = {"mask_token_id": MASK, "max_length": 20, "temperature": 0.0}
        want, got = (one.diffusion_generate(TEXTS, **options) for one in (model, wrapped))
        assert got.shape == (3, 9)
        assert torch.equal(got, want)

    def test_the_models_own_comes_back(self):
        class Own(Table):
            def diffusion_generate(self):
                return "own"

        model = Own(2)
        install(model)
        uninstall(model)
        assert model.diffusion_generate() == "own"
        model.diffusion_generate = lambda: "set"
        install(model)
        install(model)
        uninstall(model)
        assert model.diffusion_generate() == "set"


class TestArguments:
    def test_a_config_object(self, dream, tiny):
        config = SimpleNamespace(steps=3, alg="entropy", max_new_tokens=5, temperature=0.0, mask_token_id=MASK, top_k=4)
        want = dream(TEXTS, steps=3, alg="entropy", max_new_tokens=5, top_k=4)
        assert torch.equal(tiny.diffusion_generate(TEXTS, config), want)
        config.mask_token_id = None  # then that of the model's generation config
        assert torch.equal(tiny.diffusion_generate(TEXTS, config), want)
        other = tiny.diffusion_generate(TEXTS, config, alg="maskgit_plus")
        assert torch.equal(other, dream(TEXTS, steps=3, alg="maskgit_plus", max_new_tokens=5, top_k=4))

    def test_the_models_config(self):
        """Dream reads ``temperature`` and so on from it, which before transformers 5 every config has."""
        model = Table(4)
        model.config = SimpleNamespace(temperature=1.0, steps=3, alg="entropy", return_dict=True, mask_token_id=MASK)
        install(model)
        torch.manual_seed(0)
        got = model.diffusion_generate(torch.full((50, 1), 3), max_length=4)
        assert isinstance(got, torch.Tensor)
        assert len(set(map(tuple, got.tolist()))) > 1

    @pytest.mark.parametrize(
        ("lengths", "width"),
        [({}, 24), ({"max_length": 9}, 9), ({"max_new_tokens": 2, "max_length": 30}, 6), ({"max_length": 20}, 24)],
    )
    def test_lengths(self, dream, lengths, width):
        assert dream(TEXTS, steps=2, alg="entropy", **lengths).shape == (3, width)

    def test_no_room(self, dream):
        with pytest.raises(NapDecodeError, match=r"max_length=4, less a prompt of 4\) must be .* at least 1, but is 0"):
            dream(TEXTS, max_length=4)

    def test_num_return_sequences(self, dream):
        got = dream(PROMPTS, attention_mask=PRESENT, max_new_tokens=4, steps=4, num_return_sequences=2, temperature=1.0)
        assert got.shape == (6, 8)
        assert torch.equal(got[:, :4], PROMPTS.repeat_interleave(2, 0))
        assert not torch.equal(got[0], got[1])

    def test_masks_in_the_prompt_are_decoded(self, dream):
        got = dream(torch.tensor([[5, MASK, 7]]), max_new_tokens=1, steps=2, alg="entropy")
        assert MASK not in got[0]
        assert got[0, [0, 2]].tolist() == [5, 7]

    def test_padding_without_a_mask(self, dream):
        with pytest.warns(UserWarning, match="there is padding in inputs, but no attention_mask"):
            dream(PROMPTS, pad_token_id=PAD, max_new_tokens=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"step": 3}, "'step'. Did you mean 'steps'"),
            ({"alg": "entropie"}, "there is no alg 'entropie'. Did you mean 'entropy'"),
            ({"alg_temp": 0.5}, "alg_temp=0.5 would have no effect: alg='origin' chooses"),
            ({"output_history": True}, "output_history=True would have no effect: return_dict_in_generate is not set"),
            ({"attention_mask": torch.ones(3, 5)}, r"must have one shape, but have \(3, 5\) and \(3, 4\)"),
            ({"num_return_sequences": 0}, "num_return_sequences must be"),
        ],
    )
    def test_refusals(self, dream, options, message):
        with pytest.raises(NapDecodeError, match=message):
            dream(TEXTS, max_new_tokens=2, steps=1, **options)

    def test_inputs(self, dream):
        with pytest.raises(NapDecodeError, match="inputs must be a tensor"):
            dream(None)


def write_some(step, x, logits, steps=0):
    if step == 1:
        x[:, -2:] = 17
    return x


def write_before(step, x, logits, steps=0):
    if step is None:
        x[:, -1] = 16
    return x


def write_everything(step, x, logits, steps=0):
    return torch.where(x == MASK, 15, x) if step == 1 else x


def write_what_is_likely(step, x, logits, steps=0):
    if logits is not None and (x == MASK).any():
        first = int((x[0] == MASK).nonzero()[0])
        x[0, first] = logits[0, first].argmax()
        x[0, first] = 14 if x[0, first] == MASK else x[0, first]
    return x


def mask_again(step, x, logits, steps=0):
    if step is not None and step + 1 < steps and step % 2:
        x[:, -1] = MASK
    return x


def mask_all_again(step, x, logits, steps=0):
    if step is not None and step + 2 == steps:
        x[:, 3:] = MASK
    return x


HOOKS = (write_some, write_before, write_everything, write_what_is_likely, mask_again, mask_all_again)


class TestHooks:
    @pytest.fixture
    def run(self, dream):
        return partial(dream, PROMPTS, attention_mask=PRESENT, alg="entropy", steps=12, max_new_tokens=5)

    def test_what_they_see(self, run, tiny):
        calls = []

        def tokens_hook(step, x, logits):
            calls.append(("tokens", step, x.clone(), None if logits is None else logits.clone()))
            return x

        def logits_hook(step, x, logits):
            calls.append(("logits", step, x.clone(), logits.clone()))
            x.fill_(9)  # a copy
            return logits + 1

        out = run(
            generation_tokens_hook_func=tokens_hook,
            generation_logits_hook_func=logits_hook,
            return_dict=True,
            output_history=True,
        )
        assert torch.equal(out.sequences, run())
        (kind, step, before, nothing), *calls = calls
        assert (kind, step, nothing) == ("tokens", None, None)
        assert torch.equal(before[:, :4], PROMPTS)
        assert (before[:, 4:] == MASK).all()
        steps = [step for _, step, _, _ in calls[::2]]
        canvases = [before, *out.history]
        assert steps == list(range(12))  # those that commit nothing too
        for (first, i, x, logits), (second, j, after, seen) in zip(calls[::2], calls[1::2], strict=True):
            assert (first, second, i) == ("logits", "tokens", j)
            assert torch.equal(x, canvases[i])
            assert torch.equal(after, canvases[i + 1])
            assert torch.equal(seen, logits + 1)
            for row, present in enumerate(PRESENT.sum(1).tolist()):
                full = tiny(input_ids=x[row : row + 1, 4 - present :]).logits[0].detach()
                full = torch.cat([full[:1], full[:-1]])
                assert torch.allclose(logits[row, 4 - present :], full)

    def test_they_may_edit(self, run):
        def clamp(step, x, logits):
            x[:, 6] = 17
            return x

        def forbid(step, x, logits):
            return logits.index_fill(2, torch.tensor(forbidden), -torch.inf)

        plain = run()
        got = run(generation_tokens_hook_func=clamp)
        assert (got[:, 6] == 17).all()
        forbidden = plain[:, 4:].unique().tolist()[:6]
        got = run(generation_logits_hook_func=forbid)
        assert not torch.isin(got[:, 4:], torch.tensor(forbidden)).any()
        assert torch.isin(plain[:, 4:], torch.tensor(forbidden)).any()

    @pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
    @pytest.mark.parametrize(("new", "steps"), [(2, 3), (6, 1), (6, 4), (6, 6), (6, 15), (9, 5)])
    @pytest.mark.parametrize("alg", ALGORITHMS)
    def test_they_are_obeyed_as_published(self, tiny, dream, alg, new, steps, hook):
        """Dream counts the masks at each step: what a hook writes or masks again changes all steps to come."""
        forward = lambda ids: tiny(input_ids=torch.tensor([ids])).logits[0].detach()  # noqa: E731
        masks_again = hook in (mask_again, mask_all_again)
        options = {"alg": alg, "steps": steps}
        hooked = {"generation_tokens_hook_func": partial(hook, steps=steps)}
        for prompt in TEXTS[:, 1:].tolist():
            want = published(forward, prompt, new=new, tokens_hook=partial(hook, steps=steps), **options)
            out = dream(
                torch.tensor([prompt]),
                max_new_tokens=new,
                return_dict_in_generate=True,
                output_history=True,
                **options,
                **hooked,
            )
            assert [canvas[0].tolist() for canvas in out.history] == want
            assert out.sequences[0].tolist() == want[-1]
            plain = published(forward, prompt, new=new, **options)
            if steps > 3 and new > 3 and not masks_again:
                assert plain[-1] != want[-1]

    def test_logits_as_published(self, tiny, dream):
        forward = lambda ids: tiny(input_ids=torch.tensor([ids])).logits[0].detach()  # noqa: E731

        def hook(step, x, logits):
            return logits.index_fill(2, torch.arange(4 + step % 5, 12), -torch.inf)

        for prompt in TEXTS.tolist():
            want = published(forward, prompt, new=7, alg="entropy", steps=5, logits_hook=hook)
            got = dream(
                torch.tensor([prompt]), max_new_tokens=7, alg="entropy", steps=5, generation_logits_hook_func=hook
            )
            assert got[0].tolist() == want[-1]

    def test_rows_are_counted_on_their_own(self, run):
        def one_row(step, x, logits):
            if step == 1:
                x[1, 5:8] = 17
            return x

        got, plain = run(generation_tokens_hook_func=one_row), run()
        assert torch.equal(got[[0, 2]], plain[[0, 2]])
        assert got[1, 5:8].tolist() == [17] * 3

    def test_many_more_steps_than_tokens(self, dream):
        """Nothing is committed for longer than a decode otherwise may come no further."""
        got = dream(
            torch.tensor([[5]]), max_new_tokens=1, steps=1200, alg="entropy", generation_tokens_hook_func=mask_again
        )
        assert MASK not in got

    def test_the_law_of_origin(self):
        """Where a hook writes one of three slots after the first step, the law is that of the two others."""
        model, draws = Table(4), 6000
        install(model)

        def write(step, x, logits):
            if step == 0:
                x[:, 2] = 0
            return x

        torch.manual_seed(1)
        out = model.diffusion_generate(
            torch.full((draws, 1), 3),
            max_new_tokens=3,
            steps=4,
            eps=0.1,
            temperature=1.0,
            mask_token_id=MASK,
            return_dict_in_generate=True,
            output_history=True,
            generation_tokens_hook_func=write,
        )
        times = torch.linspace(1, 0.1, 5).tolist()
        for step in range(3):
            share = (out.history[step][:, [1, 3]] == MASK).double().mean()
            assert abs(share - times[step + 1]) < 5 * (0.25 / (2 * draws)) ** 0.5
        assert not (out.history[-1] == MASK).any()

    def test_masks_after_the_last_step(self, run):
        def always(step, x, logits):
            x[:, 6] = MASK
            return x

        with pytest.raises(NapDecodeError, match="left masks after step 11, the last of steps=12"):
            run(generation_tokens_hook_func=always)

    def test_refusals(self, run):
        with pytest.raises(NapDecodeError, match=r"generation_tokens_hook_func must return the tokens .*, not None"):
            run(generation_tokens_hook_func=lambda step, x, logits: None)
        with pytest.raises(NapDecodeError, match=r"generation_logits_hook_func must return logits .*, not None"):
            run(generation_logits_hook_func=lambda step, x, logits: None)

    def test_samplers_with_other_canvases(self, tiny, dream):
        install(tiny, "lopa")
        options = {"mask_token_id": MASK, "generation_logits_hook_func": lambda step, x, logits: logits}
        with pytest.raises(NapDecodeError, match="looks at other canvases besides its own"):
            tiny.diffusion_generate(TEXTS, max_new_tokens=4, **options)


class TestOtherSamplers:
    @pytest.mark.parametrize(
        "decoder", ["fast_dllm_threshold", decoders.fast_dllm_threshold()], ids=["name", "decoder"]
    )
    def test_a_decoder(self, tiny, dream, decoder):
        install(tiny, decoder)
        out = tiny.diffusion_generate(
            TEXTS, max_new_tokens=4, mask_token_id=MASK, return_dict_in_generate=True, output_history=True
        )
        assert MASK not in out.sequences
        assert torch.equal(out.history[-1], out.sequences)
        with pytest.raises(NapDecodeError, match="steps=4 would have no effect: the sampler that was installed"):
            tiny.diffusion_generate(TEXTS, max_new_tokens=4, mask_token_id=MASK, steps=4)
        with pytest.raises(NapDecodeError, match="alg='entropy' would have no effect: the sampler that was installed"):
            tiny.diffusion_generate(TEXTS, SimpleNamespace(alg="entropy", max_new_tokens=4, mask_token_id=MASK))

    def test_a_template(self, tiny, dream):
        template = CanvasTemplate(((11,), Block("a", 2), (12,), Block("b", 2)))
        decoder = decoders.parallel_forced(tokens_per_step=2)
        family = ModelFamily(name="shifted", shift=True)
        install(tiny, Sampler(Denoiser(tiny, mask_token_id=MASK, family=family), decoder=decoder, template=template))
        got = tiny.diffusion_generate(PROMPTS, attention_mask=PRESENT, mask_token_id=MASK)
        assert got[:, [4, 7]].tolist() == [[11, 12]] * 3
        with pytest.raises(NapDecodeError, match=r"max_new_tokens=3 would have no effect: .* has a template"):
            tiny.diffusion_generate(TEXTS, mask_token_id=MASK, max_new_tokens=3)

    def test_a_sampler_of_another_model(self, tiny):
        with pytest.raises(NapDecodeError, match="the sampler is for another model"):
            install(tiny_model(), Sampler(tiny, decoder=decoders.klass(), mask_token_id=MASK))
        with pytest.raises(NapDecodeError, match=r"there is no decoder 'klas'. Did you mean 'klass'"):
            install(tiny, "klas")
