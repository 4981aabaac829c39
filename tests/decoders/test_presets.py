"""The published decoders: against slow references, by enumeration, and under the rules that hold for all."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import reference
import torch
from models import KNOWN, MASK, PAD, VOCABULARY, TableModel, Words
from reference import law

from nap_decode import (
    Canvas,
    CanvasTemplate,
    Denoiser,
    LookaheadCommitter,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    QuotaSelection,
    Sampler,
    SemiAutoregressiveScheduler,
    presets,
)

BANNED = {MASK, *range(KNOWN, VOCABULARY)}
TEMPLATE = CanvasTemplate.nap(
    2, path_length=(5, 4), summary_length=3, path_header=[(10,), (11, 12)], summary_header=(14,)
)
PROMPTS = [[5, 6, 7, 8, 9], [7], [5, 6, 7]]
HOLES = [[5, MASK, MASK, 7, MASK, 8, MASK, MASK], [MASK, 9, MASK], [5, 6, MASK, MASK, MASK, 7]]
FREQUENCIES = tuple((1 + i % 5) / 100 for i in range(VOCABULARY))
# Options that make every rule matter on the tiny model, whose probabilities are around a half.
OPTIONS = {
    "fast_dllm_threshold": {"threshold": 0.4},
    "fast_dllm_factor": {"factor": 1.8},
    "entropy_bounded": {"gamma": 1.5},
    "klass": {"threshold": 0.3, "max_divergence": 0.2, "history": 1},
    "hierarchical": {"threshold": 0.5, "low_threshold": 0.3},
    "credit": {"threshold": 0.5},
    "local_leap": {"threshold": 0.5, "low_threshold": 0.3, "radius": 2},
    "wino": {"threshold": 0.2, "back_threshold": 0.3},
    "lopa": {"threshold": 0.5, "branches": 2},
    "llada2": {"threshold": 0.4, "block_length": 4},
    "llada21_editing": {"threshold": 0.3, "edit_threshold": 0.4, "block_length": 4},
    "pc_sampler": {"frequencies": FREQUENCIES, "tokens_per_step": 2},
    "maskgit_cosine": {"tokens_per_step": 2, "position_temperature": 0.3},
    "dream_origin": {"steps": 4},
    "dream_maskgit_plus": {"steps": 4, "alg_temp": 0.4},
    "dream_topk_margin": {"steps": 4},
    "dream_entropy": {"steps": 4, "temperature": 0.7, "top_p": 0.9},
    "mdlm_ancestral": {"steps": 4},
    "llada_low_confidence": {"tokens_per_step": 2, "block_length": 5, "temperature": 0.5},
    "llada_random": {"tokens_per_step": 2},
    "left_to_right": {"tokens_per_step": 2},
    "parallel_forced": {"tokens_per_step": 3},
    "mdlm_first_hitting": {},
}
NAMES = list(presets.PRESETS)


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def make(denoiser, name, **options):
    return presets.PRESETS[name](denoiser, **({"template": TEMPLATE} | OPTIONS[name] | options))


def macro_parallel(sampler):
    scheduler = sampler.scheduler
    tokens = scheduler.tokens_per_step if scheduler.steps is None else None
    return sampler.replace(
        scheduler=MacroParallelScheduler(
            tokens_per_step=tokens, steps=scheduler.steps, schedule=scheduler.schedule, hold_until=0.6
        )
    )


def test_every_preset_has_options_here():
    assert set(OPTIONS) == set(presets.PRESETS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_signatures(name):
    parameters = inspect.signature(presets.PRESETS[name]).parameters
    assert list(parameters)[:2] == ["model", "tokenizer"]
    assert list(parameters)[-2:] == ["template", "mask_token_id"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])


@pytest.mark.parametrize("what", ["template", "infill"])
@pytest.mark.parametrize("arrange", [lambda sampler: sampler, macro_parallel], ids=["own scheduler", "macro-parallel"])
@pytest.mark.parametrize("name", NAMES)
class TestContract:
    """What holds for every preset, under its own scheduler and NAP's, after prompts and in holes."""

    def test_rules(self, denoiser, name, arrange, what):
        sampler = arrange(make(denoiser, name))
        seeds = [100, 101, 102]
        texts = PROMPTS if what == "template" else HOLES
        decode = sampler if what == "template" else sampler.infill
        out = decode(texts, row_seeds=seeds)
        start, decodable = out.canvas.tokens, out.canvas.decodable
        assert torch.equal(out.sequences[~decodable], start[~decodable])  # prompts, headers, padding
        emitted = out.sequences[decodable]
        assert not torch.isin(emitted, torch.tensor(sorted(BANNED))).any()
        assert (out.trace.step[decodable] >= 0).all()
        assert not out.trace.confidence[decodable].isnan().any()

        again = decode(texts, row_seeds=seeds)
        assert torch.equal(again.sequences, out.sequences)
        assert torch.equal(again.trace.step, out.trace.step)
        for row, text in enumerate(texts):
            alone = decode([text], row_seeds=[seeds[row]])
            length = alone.sequences.shape[1]
            assert torch.equal(alone.sequences[0], out.sequences[row, -length:])
            assert torch.equal(alone.trace.step[0], out.trace.step[row, -length:])
            assert alone.trace.forward_passes[0] == out.trace.forward_passes[row]


@pytest.mark.parametrize("arrange", [lambda sampler: sampler, macro_parallel], ids=["own scheduler", "macro-parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_gives_every_row_what_it_gets_in_a_batch(denoiser, name, arrange):
    sampler = arrange(make(denoiser, name))
    prompts = [*PROMPTS, [9, 5, 9, 5, 9, 5, 9], [10], PROMPTS[0]]
    whole = sampler(prompts, seed=5)
    streamed = list(sampler.stream(prompts, max_batch=2, seed=5))
    assert [out.index for out in streamed] == list(range(len(prompts)))
    for row, out in enumerate(streamed):
        length = out.sequences.shape[1]
        assert torch.equal(out.sequences[0], whole.sequences[row, -length:])
        assert torch.equal(out.trace.step[0], whole.trace.step[row, -length:])
        assert out.forward_passes == out.trace.forward_passes[0] == whole.trace.forward_passes[row]
        torch.testing.assert_close(out.trace.confidence[0], whole.trace.confidence[row, -length:], equal_nan=True)


@pytest.mark.parametrize("arrange", [lambda sampler: sampler, macro_parallel], ids=["own scheduler", "macro-parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_closed_blocks_are_filled_and_nothing_else_changes(denoiser, name, arrange):
    sampler = arrange(make(denoiser, name)).replace(close_on=range(10, 16))
    prompts, seeds = PROMPTS, [100, 101, 102]
    out = sampler(prompts, row_seeds=seeds)
    tokens, trace = out.sequences, out.trace
    assert trace.closed is not None
    is_end = (tokens >= 10) & (tokens < 16) & ~trace.closed
    assert (tokens[trace.closed] == PAD).all()
    assert trace.confidence[trace.closed].isnan().all()
    for row in range(len(prompts)):
        for block in range(len(trace.block_names)):
            inside = trace.block[row] == block
            closed = trace.closed[row][inside]
            if closed.any() and not sampler.committer.revises:  # from behind an end on
                first = int(is_end[row][inside].long().argmax())
                assert is_end[row][inside][first]
                assert not closed[: first + 1].any()
        alone = sampler([prompts[row]], row_seeds=[seeds[row]])
        length = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], tokens[row, -length:])
        assert torch.equal(alone.trace.step[0], trace.step[row, -length:])
    never = sampler.replace(close_on=[KNOWN])(prompts, row_seeds=seeds)  # the tokenizer does not have it
    plain = sampler.replace(close_on=[])(prompts, row_seeds=seeds)
    assert torch.equal(never.sequences, plain.sequences)
    assert torch.equal(never.trace.step, plain.trace.step)


@pytest.mark.parametrize("name", NAMES)
def test_files_bring_a_sampler_back(denoiser, name, tmp_path):
    sampler = make(denoiser, name)
    sampler.save(tmp_path / "sampler.json")
    loaded = Sampler.load(tmp_path / "sampler.json", denoiser)
    assert loaded.describe() == sampler.describe()
    assert loaded.scheduler == sampler.scheduler
    assert loaded.committer == sampler.committer
    assert loaded.template == sampler.template


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("dream_maskgit_plus", "probability"),
        ("dream_topk_margin", "margin"),
        ("dream_entropy", "negative_entropy"),
        ("llada_low_confidence", "probability"),
        ("left_to_right", "leftmost"),
    ],
)
def test_fixed_presets_agree_with_the_reference(tiny, denoiser, name, score):
    is_dream = name.startswith("dream")
    for prompt, length, steps in (
        ([5, 6, 7], 12, 5),
        ([8], 7, 7),
        ([9, 9, 5, 6], 10, 3),
        ([7], 4, 9 if is_dream else 2),
    ):
        out = presets.PRESETS[name](denoiser, steps=steps)(prompt, max_new_tokens=length)
        if is_dream:
            times, left, quotas = torch.linspace(1, 1e-3, steps + 1), length, []
            for i in range(steps):
                number = int(torch.tensor(left).float() * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
                quotas.append([number])
                left -= number
        else:
            quotas = [[length // steps + (i < length % steps)] for i in range(steps)]

        def model(ids, _):
            with torch.no_grad():
                return tiny(ids).logits

        expected, when = reference.decode_row(
            model,
            [*prompt, *[MASK] * length],
            [-1] * len(prompt) + [0] * length,
            quotas,
            confidence=score,
            banned=BANNED,
        )
        assert out.sequences[0].tolist() == expected
        assert out.trace.step[0].tolist() == when
        assert out.forward_passes == sum(number > 0 for (number,) in quotas)


RULES = {
    "fast_dllm_threshold": lambda o: reference.threshold_rule(o["threshold"]),
    "fast_dllm_factor": lambda o: reference.factor_rule(o["factor"]),
    "entropy_bounded": lambda o: reference.entropy_rule(o["gamma"]),
    "klass": lambda o: reference.stable_rule(o["threshold"], o["max_divergence"], o["history"]),
    "hierarchical": lambda o: reference.hierarchy_rule(o["threshold"], o["low_threshold"]),
    "local_leap": lambda o: reference.leap_rule(o["threshold"], o["low_threshold"], o["radius"]),
    "credit": lambda o: reference.credit_rule(o["threshold"], 0.7, 0.8, 0.2, BANNED),
}


@pytest.mark.parametrize("block_length", [4, 12])
@pytest.mark.parametrize("name", RULES)
def test_agrees_with_the_reference(tiny, denoiser, name, block_length):
    sampler = make(denoiser, name, block_length=block_length)
    passes = set()
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6]):
        out = sampler(prompt, max_new_tokens=12)
        positions = range(len(prompt), len(prompt) + 12)

        def logits_of(tokens):
            with torch.no_grad():
                return tiny(torch.tensor([tokens])).logits[0].tolist()

        expected, number = reference.decode_blocks(
            logits_of,
            [*prompt, *[MASK] * 12],
            [positions[i : i + block_length] for i in range(0, 12, block_length)],
            RULES[name](OPTIONS[name]),
            banned=BANNED,
            mask=MASK,
        )
        assert out.sequences[0].tolist() == expected
        assert out.forward_passes == number
        passes.add(number)
    assert min(passes) < 12  # the rule did commit several at once


def test_editing_agrees_with_the_reference(tiny, denoiser):
    threshold, edit_threshold, max_passes, block_length = 0.3, 0.4, 3, 4
    sampler = make(denoiser, "llada21_editing", max_passes=max_passes)
    edits = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=9)
        tokens, passes = [*prompt, *[MASK] * 9], 0
        slots = range(len(prompt), len(tokens))
        for line in range(0, len(tokens), block_length):
            block = [p for p in slots if line <= p < line + block_length]
            after = 0
            while block:
                masked = [p for p in block if tokens[p] == MASK]
                after += not masked
                if after > max_passes:
                    break
                passes += 1
                with torch.no_grad():
                    logits = tiny(torch.tensor([tokens])).logits[0].tolist()
                proposals = {p: reference.propose(logits[p], BANNED) for p in block}
                changed = [
                    p
                    for p in block
                    if p not in masked
                    and proposals[p][0] != tokens[p]
                    and proposals[p][1][proposals[p][0]] > edit_threshold
                ]
                edits += len(changed)
                if masked:
                    here = {p: proposals[p] for p in masked}
                    changed += reference.threshold_rule(threshold)(here, {})
                for p in changed:
                    tokens[p] = proposals[p][0]
                if not masked and not changed:
                    break
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert edits > 3


def test_wino_agrees_with_the_reference(denoiser):
    threshold, back_threshold, length, block_length = 0.2, 0.3, 16, 8
    sampler = make(denoiser, "wino", block_length=block_length)
    again = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=length)
        canvas = Canvas.from_prompts([prompt], CanvasTemplate.plain(length), mask_token_id=MASK, pad_token_id=PAD)
        tokens, passes = canvas.tokens.clone(), 0
        for start in range(len(prompt), len(prompt) + length, block_length):
            block = torch.arange(start, start + block_length)
            last = 30
            while (tokens[0, block] == MASK).any():
                masked = tokens[0, block] == MASK
                with torch.no_grad():
                    logits = denoiser(tokens, block[None], canvas, hidden=~masked[None])[0].tolist()
                passes += 1
                proposals = {i: reference.propose(logits[i], BANNED) for i in range(block_length)}
                c = reference.confidences({i: proposals[i] for i in range(block_length) if masked[i]})
                accepted = sorted((i for i in c if c[i] >= threshold), key=lambda i: (-c[i], i))
                accepted = accepted[: min(max(int(len(c) * 0.7), 5), 20)] or [min(c, key=lambda i: (-c[i], i))]
                support = {i: proposals[i][1][int(tokens[0, block[i]])] for i in range(block_length) if not masked[i]}
                doubtful = sorted((i for i in support if support[i] < back_threshold), key=lambda i: (support[i], i))
                doubtful = doubtful[: last - 1] if len(accepted) > 1 else []
                for i in accepted:
                    tokens[0, block[i]] = proposals[i][0]
                for i in doubtful:
                    tokens[0, block[i]] = MASK
                again += len(doubtful)
                last = len(accepted)
        assert out.sequences.tolist() == tokens.tolist()
        assert out.forward_passes == passes
    assert again > 3


def test_hiding_slots_does_not_depend_on_rows_with_more_of_them(denoiser):
    """Rows of one length without padding, but with different numbers of slots to hide."""
    texts = [[5, MASK, 7, MASK, 8, 6, 9, MASK], [MASK] * 8, [5, 6, 7, 8, 9, MASK, MASK, 5]]
    sampler = make(denoiser, "wino")
    out = sampler.infill(texts)
    for row, text in enumerate(texts):
        assert torch.equal(sampler.infill([text]).sequences[0], out.sequences[row])
        alone = sampler.infill([text]).trace.confidence[0]
        torch.testing.assert_close(alone, out.trace.confidence[row], equal_nan=True)


def test_lookahead_agrees_with_the_reference(tiny, denoiser):
    threshold, branches, weight, weakest, length = 0.5, 2, 0.1, 0.5, 10
    sampler = make(denoiser, "lopa", block_length=None, weight=weight)
    won = 0
    for prompt in ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9]):
        out = sampler(prompt, max_new_tokens=length)
        tokens, passes, offers = [*prompt, *[MASK] * length], 0, []
        while MASK in tokens:
            passes += 1
            best = None
            for position, token, creation in [(None, None, 1.0), *offers]:
                branch = list(tokens)
                if position is not None:
                    branch[position] = token
                with torch.no_grad():
                    logits = tiny(torch.tensor([branch])).logits[0].tolist()
                proposals = {p: reference.propose(logits[p], BANNED) for p, t in enumerate(branch) if t == MASK}
                c = sorted(reference.confidences(proposals).values())
                counted = c[: max(1, int(len(c) * weakest))]
                future = sum(counted) / len(counted) if counted else 1.0
                worth = weight * creation + (1 - weight) * future
                if best is None or worth > best[0] + 1e-12:
                    best = worth, branch, proposals, position
            _, tokens, proposals, position = best
            won += position is not None
            chosen = reference.threshold_rule(threshold)(proposals, {}) if proposals else set()
            for p in chosen:
                tokens[p] = proposals[p][0]
            c = reference.confidences({p: proposals[p] for p in proposals if p not in chosen})
            offers = [(p, proposals[p][0], c[p]) for p in sorted(c, key=lambda p: (-c[p], p))[:branches]]
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert won > 3


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["dream_origin", "mdlm_ancestral"])
def test_ancestral_law(name, steps):
    """Every mask is revealed with probability 1 - s/t and gets a drawn token, independently: by enumeration."""
    vocabulary, length, count = 3, 3, 40_000
    model = TableModel(vocabulary, length, seed=5)
    eps = 1e-3
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    expected: Counter = Counter()

    def advance(row, step, chance):
        if step == steps or MASK not in row:
            expected[row] += chance
            return
        logits = model(torch.tensor([row]), None)[0].tolist()
        reveal = 1 - times[step + 1] / times[step] if step < steps - 1 else 1.0
        branches = [(row, chance)]
        for p in [p for p in range(length) if row[p] == MASK]:
            allowed = [i for i in range(vocabulary) if i != MASK]
            q = reference.softmax([logits[p][i] for i in allowed])
            branches = [
                (r if i is None else (*r[:p], i, *r[p + 1 :]), w * share)
                for r, w in branches
                for i, share in [(None, 1 - reveal), *((i, reveal * s) for i, s in zip(allowed, q, strict=True))]
                if share > 0
            ]
        for r, w in branches:
            advance(r, step + 1, w)

    advance((MASK,) * length, 0, 1.0)
    sampler = presets.PRESETS[name](model, mask_token_id=MASK, steps=steps, eps=eps, temperature=1.0)
    out = sampler([[]] * count, max_new_tokens=length, seed=3)
    check_law(expected, out.sequences, count)


def test_first_hitting_law():
    count = 40_000
    model = TableModel(3, 3, seed=6)
    out = presets.mdlm_first_hitting(model, mask_token_id=MASK)([[]] * count, max_new_tokens=3, seed=4)
    check_law(law(model, 3, MASK, [1, 1, 1], random_positions=True), out.sequences, count)


def check_law(expected, rows, count):
    assert sum(expected.values()) == pytest.approx(1)
    seen = Counter(map(tuple, rows.tolist()))
    assert set(seen) <= set(expected)
    for row, p in expected.items():
        assert abs(seen[row] / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 1e-6


def test_dream_scores_what_it_draws_from(tiny, denoiser):
    """At temperature 0 a cut by top_p changes the confidences, and so the order, but not the proposals."""
    plain = make(denoiser, "dream_maskgit_plus", steps=9, alg_temp=None)
    cut = make(denoiser, "dream_maskgit_plus", steps=9, alg_temp=None, top_p=0.6)
    outs = [s([5, 6, 7], max_new_tokens=12) for s in (plain, cut)]
    assert not torch.equal(outs[0].trace.step, outs[1].trace.step)
    row = tiny(outs[1].canvas.tokens).logits[0].detach().softmax(1)
    first = (outs[1].trace.step[0] == 0).nonzero()[0, 0]
    kept, total = 0.0, 0.0
    for p in sorted(row[first].tolist(), reverse=True):
        if total > 0.6:
            break
        kept, total = kept + p, total + p
    allowed = row[first].clone()
    allowed[sorted(BANNED)] = 0
    assert float(outs[1].trace.confidence[0, first]) == pytest.approx(float(allowed.max()) / kept, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: presets.find_preset("fast_dllm"), "there is no preset 'fast_dllm'. Did you mean"),
        (lambda d: presets.pc_sampler(d, frequencies=(0.5, 0.0)), "background frequencies must be positive"),
        (
            lambda d: presets.pc_sampler(d, frequencies=(0.5, 0.5))([5], max_new_tokens=3),
            "there are 2 background frequencies for 24 token ids",
        ),
        (lambda d: presets.dream_origin(d, steps=4, tokens_per_step=3), "give steps .4. or tokens_per_step .3., not"),
        (lambda d: presets.pc_sampler(d, frequencies=None), "frequencies must be numbers, but are None"),
        (lambda d: presets.pc_sampler(d, frequencies="abc"), "frequencies must be numbers, but are 'abc'"),
        (lambda d: presets.dream_entropy(d, alg_temp=-1), "alg_temp must be a finite number of at least 0"),
        (
            lambda d: LookaheadCommitter(committer=presets.credit(d).committer),
            "a committer that looks ahead cannot revise, give credit or compare steps",
        ),
        (lambda d: LookaheadCommitter(committer="best"), "committer must be a MicroConfidenceCommitter, but is 'best'"),
        (lambda d: LookaheadCommitter(branches=0), "branches must be a whole number of at least 1"),
        (lambda d: MicroConfidenceCommitter(reviser="edit"), "reviser must be a Reviser, such as EditReviser"),
        (
            lambda d: presets.klass(d).replace(scheduler=SemiAutoregressiveScheduler(steps=3)),
            "steps=3 cannot be kept",
        ),
        (
            lambda d: presets.klass(d).replace(scheduler=presets.dream_entropy(d).scheduler),
            "DreamSchedule.eps=0.001. has no effect, because the committer decides",
        ),
        (lambda d: SemiAutoregressiveScheduler(on_grid=True), "on_grid needs block_length"),
    ],
)
def test_errors(denoiser, make, message):
    with pytest.raises(NapDecodeError, match=message):
        make(denoiser)


def test_blocks_on_the_grid():
    canvas = Canvas.from_prompts(
        [[5] * 6, [5] * 3, [5] * 9], CanvasTemplate.plain(5), mask_token_id=MASK, pad_token_id=PAD
    )
    partition = SemiAutoregressiveScheduler(tokens_per_step=1, block_length=4, on_grid=True).partition(canvas)
    # Slots at 6 to 10, 3 to 7 and 9 to 13; the lines are at 4, 8 and 12.
    assert [row[row >= 0].tolist() for row in partition.block] == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert partition.lengths.tolist() == [[2, 3], [1, 4], [3, 2]]


def test_quota_selection_with_a_reviser_is_adaptive():
    committer = MicroConfidenceCommitter(selection=QuotaSelection(), reviser=presets.EditReviser())
    assert committer.is_adaptive
