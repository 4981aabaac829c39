"""Reuse of keys and values: exact where it must be, and what it says of itself elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MASK, PAD, VOCABULARY, DreamLike, OwnBlocks, Words, build, needs_transformers_5, tiny_model
from samplers import NAMES, PROMPTS, TEMPLATE, make
from transformers import BertConfig, BertForMaskedLM

from nap_decode import (
    AnyOrderScheduler,
    BlockReuse,
    Canvas,
    CommittedReuse,
    Decoder,
    Denoiser,
    DriftReuse,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    ModelFamily,
    NapDecodeError,
    ParallelForcedSampler,
    PromptReuse,
    Sampler,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
    demo,
)
from nap_decode.base.rows import Rows
from nap_decode.speed.reuse import ExactReuse, Kept, Reuse

POLICIES = [PromptReuse, CommittedReuse, BlockReuse, DriftReuse]


class Everything(Reuse):
    """Computes everything that is there, but as a choice."""

    def select(self, glance):
        return glance.present


class EverythingKept(Everything):
    """The same, by what is kept of the output."""

    leaves_out_wanted = True


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.6,
            pad_token_id=PAD,
        )
        return BertForMaskedLM(config).to(torch.float64).eval()


@pytest.fixture(
    scope="module", params=["decoder", pytest.param("encoder", marks=needs_transformers_5), "decoder, eager"]
)
def model(request, encoder):
    if request.param == "encoder":
        return encoder
    return tiny_model(attn_implementation="eager" if "eager" in request.param else "sdpa")


def sampler_of(model, reuse, scheduler=None, compile=False, **options):
    denoiser = Denoiser(model, Words(), reuse=reuse, **options)
    decoder = Decoder(scheduler or MacroParallelScheduler(tokens_per_step=3))
    return Sampler(denoiser, decoder=decoder, template=TEMPLATE, compile=compile)


def same(one, other):
    assert one.sequences.tolist() == other.sequences.tolist()
    assert one.trace.step.tolist() == other.trace.step.tolist()
    assert torch.allclose(one.trace.confidence, other.trace.confidence, equal_nan=True)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_with_a_refresh_at_every_pass_every_decoder_decodes_as_without_reuse(tiny, name, policy):
    outputs = [
        make(Denoiser(tiny, Words(), reuse=reuse), name)(PROMPTS, seed=5) for reuse in (None, policy(refresh_every=1))
    ]
    same(*outputs)
    assert outputs[1].positions_forwarded == outputs[1].positions_exact
    assert outputs[0].trace.forwarded is None


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_computing_everything_as_a_choice_is_exact(model, guidance):
    """Positions, masks and the store are right: all of a ragged batch goes through the partial call."""
    outputs = [sampler_of(model, reuse, cfg_scale=guidance)(PROMPTS) for reuse in (None, Everything())]
    same(*outputs)
    assert outputs[1].positions_forwarded == outputs[1].positions_exact


@pytest.mark.parametrize("policy", [Everything(), EverythingKept()])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Llama", ModelFamily(name="shifted", shift=True)),
        ("Llama", ModelFamily(name="blocks", attention="4d", block_size=4)),
        ("Qwen3", None),
        pytest.param("Roberta", None, marks=needs_transformers_5),  # counts positions from another number
    ],
)
def test_conventions_of_families_hold(name, family, policy):
    model = build(name)
    same(*(sampler_of(model, reuse, family=family)(PROMPTS) for reuse in (None, policy)))


# ------------------------------------------------------------------------------------------------ closed blocks

BLOCKS = ModelFamily(name="blocks", attention="4d", block_size=4)


def by_blocks(denoiser, tokens_per_step=2):
    scheduler = SemiAutoregressiveScheduler(block_length=4, on_grid=True, tokens_per_step=tokens_per_step)
    return Sampler(denoiser, decoder=Decoder(scheduler))


def everything(denoiser):
    """The same model, all of which is forwarded in every pass."""
    return denoiser.replace(reuse=PromptReuse(refresh_every=1))


def test_the_prompt_is_forwarded_once_and_each_block_once_more_when_it_is_closed():
    denoiser = Denoiser(build("Llama"), Words(), family=BLOCKS)
    out = by_blocks(denoiser)([[5, 6, 7, 8] * 3, [5, 6, 7, 8, 9, 10]], max_new_tokens=12)
    # Two tokens of the second prompt stand in the first block that is decoded, and two slots in the last.
    assert out.trace.forwarded.tolist() == [[12 + 4, 4, 4 + 4, 4, 4 + 4, 4], [4 + 4, 4 + 4, 4, 4 + 4, 4, 4 + 2]]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("compile", [False, "kernels"])
def test_with_guidance_and_compiled(guidance, compile):
    denoiser = Denoiser(build("Llama"), Words(), family=BLOCKS, cfg_scale=guidance)
    outputs = [
        Sampler(one, decoder=Decoder(MacroParallelScheduler(tokens_per_step=3)), template=TEMPLATE, compile=how)(
            PROMPTS
        )
        for one, how in ((denoiser, compile), (denoiser.replace(reuse=PromptReuse(refresh_every=1)), False))
    ]
    same(*outputs)
    assert sum(outputs[0].positions_forwarded) < sum(outputs[0].positions_exact)


@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("attention", ["none", "4d"])
@pytest.mark.filterwarnings("ignore:.*in groups of equal length:UserWarning")
def test_a_model_that_only_claims_blocks_is_decoded_without(attention, size):
    """One that looks at no mask, or at a row of it, so that its blocks see what is behind them."""

    class Claims(DreamLike):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            if attention_mask is not None and attention_mask.shape[2] == attention_mask.shape[3]:
                attention_mask = attention_mask[:, :, -1:]  # what the last one sees
            return self.run(input_ids, position_ids, attention_mask)

    denoiser = Denoiser(Claims("x"), Words(), family=ModelFamily(name="x", attention=attention, block_size=size))
    assert by_blocks(denoiser)(PROMPTS, max_new_tokens=40).trace.forwarded is None
    with pytest.raises(NapDecodeError, match="it does not say what it says when it is asked for all"):
        denoiser.replace(reuse=ExactReuse())


def test_a_model_that_changes_is_asked_again():
    model = build("Llama")
    sampler = by_blocks(Denoiser(model, Words(), family=BLOCKS))
    assert sampler(PROMPTS, max_new_tokens=8).trace.forwarded is not None
    model.lm_head = torch.nn.Linear(16, VOCABULARY, bias=False).double()
    model.eval()
    same(
        sampler(PROMPTS, max_new_tokens=8),
        by_blocks(Denoiser(model, Words(), family=BLOCKS))(PROMPTS, max_new_tokens=8),
    )


@given(st.data())
def test_what_is_computed_is_what_can_have_changed(data):
    """Block by block: a block says something else if a token in it, or before it, is another; none behind is needed."""
    size, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    values = st.integers(-1, 2), st.integers(0, 2), st.booleans()
    before, after, wanted = (data.draw(st.lists(some, min_size=width, max_size=width)) for some in values)
    rows = Rows((width,), torch.zeros(1, width, dtype=torch.bool))
    kept = replace(Kept.nothing(torch.zeros(1, width)), tokens=torch.tensor([before]))
    computed, whole, known = ExactReuse().plan(kept, rows, torch.tensor([after]), torch.tensor([wanted]), size)
    expected = []
    for place in range(width):
        block_end = (place // size + 1) * size
        is_other = any(a != b for a, b in zip(before[:block_end], after[:block_end], strict=True))
        expected.append(wanted[place] or (is_other and any(wanted[place // size * size :])))
    assert computed[0].tolist() == expected
    assert bool(whole) == all(expected)
    assert known.tokens[0].tolist() == [a if new else b for a, b, new in zip(after, before, expected, strict=True)]


# ------------------------------------------------------------------------------------------------ models without help


class ByIndex(DreamLike):
    """LLaDA: rotary positions by the index, no mask but a flat one, and a cache that may not be used."""

    class Rotary(torch.nn.Module):
        def forward(self, q, k):
            angles = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor(
                [1.0, 0.3, 0.1, 0.03], dtype=q.dtype
            )
            sin, cos = angles.sin().repeat(1, 4), angles.cos().repeat(1, 4)
            return tuple(x * cos + x.roll(1, dims=-1) * sin for x in (q, k))

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.rotary = self.Rotary()

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        assert past_key_values is None
        seen = None if attention_mask is None else attention_mask[:, None, None].bool()
        x = self.embed(input_ids)
        for layer in self.layers:
            q, k, v = layer(x)[:, None].chunk(3, dim=-1)
            q, k = self.turn(q, k)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0].tanh()
        return SimpleNamespace(logits=self.head(x))

    def turn(self, q, k):
        return self.rotary(q, k)


class ByIndexOrNot(ByIndex):
    """Copies of LLaDA with caches of their own: what stands where is said only to these."""

    class Rotary(ByIndex.Rotary):
        def forward(self, q, k, ends_at=None, is_cached=False):
            assert ends_at is None
            assert not is_cached
            return super().forward(q, k)

    def turn(self, q, k):
        return self.rotary(q, k, None, is_cached=False)


def test_positions_are_told_to_the_part_that_there_is_now():
    model = ByIndex("llada")
    sampler = sampler_of(model, Everything())
    sampler(PROMPTS)
    model.rotary = ByIndex.Rotary()
    same(sampler(PROMPTS), sampler_of(model, PromptReuse(refresh_every=1))(PROMPTS))


@pytest.mark.parametrize(
    ("make_model", "family"),
    [
        (lambda: ByIndex("llada"), None),
        (lambda: ByIndexOrNot("llada"), None),
        (lambda: OwnBlocks("Fast_dLLM_Qwen", bd_size=4), None),
    ],
    ids=["positions by the index", "by the index unless told", "a mask of its own"],
)
@pytest.mark.filterwarnings("ignore:.*in groups of equal length:UserWarning")
def test_models_that_take_neither_positions_nor_mask(make_model, family):
    """Everything computed as a choice is exact; a policy computes less; the model is as it was afterwards."""
    model = make_model()
    before = copy.deepcopy(vars(model))
    whole, chosen, some = (
        sampler_of(model, reuse, family=family)(PROMPTS)
        for reuse in (PromptReuse(refresh_every=1), Everything(), CommittedReuse())
    )
    same(whole, chosen)
    assert sum(some.positions_forwarded) < sum(some.positions_exact)
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in model.modules())
    assert vars(model).keys() == before.keys()


@pytest.mark.parametrize("policy", [CommittedReuse(), DriftReuse(max_age=100), BlockReuse()])
def test_positions_whose_surroundings_stay_need_no_second_look(model, policy):
    """If nothing changes between two passes, what is reused is what would be computed."""
    denoiser = Denoiser(model, Words(), reuse=policy)
    canvas = Canvas.from_infill([[5, MASK, 6, MASK, 7], [8, MASK, 9]], mask_token_id=MASK, pad_token_id=PAD)
    rows, tokens = canvas.rows, canvas.tokens
    wanted, places, kept = torch.tensor([[1, 3], [1, 1]]), torch.tensor([0, 1, 2]), {}
    first, second = (denoiser.predict(rows, tokens, wanted, places, kept=kept).logits for _ in range(2))
    exact = Denoiser(model, Words()).predict(rows, tokens, wanted, places).logits
    assert torch.allclose(first, exact)
    assert torch.allclose(second, exact)
    assert int(kept["given"].counts[:, 1].sum()) < 8
    # The last entry is no slot of its own, and takes nothing from the one that it repeats.
    assert kept["given"].opened.nonzero().tolist() == [[0, 1], [0, 3], [1, 1]]


@pytest.mark.parametrize("policy", [CommittedReuse(), DriftReuse(), BlockReuse(), PromptReuse(refresh_every=3)])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_a_row_is_decoded_alone_as_in_any_batch(model, policy, is_adaptive):
    """Ragged rows, rows that leave, and rows that come later, each with a store of its own."""
    sampler = sampler_of(model, policy)
    if is_adaptive:  # rows are finished at different times, and others take their places
        committer = MicroConfidenceCommitter(selection=ThresholdSelection(0.4))
        sampler = sampler.set(scheduler=MacroParallelScheduler(), committer=committer)
    prompts = [*PROMPTS, [9, 9, 5, 6, 7, 8, 5, 6], [8]]
    alone = [sampler([prompt]) for prompt in prompts]
    together = sampler(prompts)
    streamed = list(sampler.stream(prompts, max_batch=2))
    watched = sampler(prompts, callback=lambda state: None)  # keeps rows that are finished
    assert watched.trace.forwarded.tolist() == together.trace.forwarded.tolist()
    for row, one in enumerate(alone):
        width = one.sequences.shape[1]
        assert together.sequences[row, :width].tolist() == one.sequences[0].tolist()
        assert streamed[row].sequences[0].tolist() == one.sequences[0].tolist()
        forwarded = one.trace.forwarded[0].tolist()
        assert together.trace.forwarded[row, : len(forwarded)].tolist() == forwarded
        assert not bool(together.trace.forwarded[row, len(forwarded) :].any())
        assert streamed[row].trace.forwarded[0].tolist() == forwarded


def test_compiled_passes_reuse_as_others_do(tiny):
    """Some rows or all, some positions or all, more of them or fewer: that must not compile anything each time."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for policy in (CommittedReuse(), DriftReuse(), PromptReuse(refresh_every=3)):
        plain = sampler_of(tiny, policy)
        compiled = sampler_of(tiny, policy, compile="kernels")
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[:2]):
            one, other = plain(prompts), compiled(prompts)
            assert one.sequences.tolist() == other.sequences.tolist()
            assert one.trace.forwarded.tolist() == other.trace.forwarded.tolist()
        for one, other in zip(plain.stream(PROMPTS, max_batch=2), compiled.stream(PROMPTS, max_batch=2), strict=True):
            assert one.sequences.tolist() == other.sequences.tolist()
    # The body: whole rows, some positions; several rows, one row. What is done to logits: several rows, one row.
    assert 4 <= counters["stats"]["unique_graphs"] <= 8


# ------------------------------------------------------------------------------------------------ policies


def forwarded(model, policy, scheduler):
    return sampler_of(model, policy, scheduler)([PROMPTS[0]]).trace.forwarded[0].tolist()


PROMPT, CANVAS, HEADERS = 5, 12, 4  # of the first prompt and the template
LENGTH = PROMPT + CANVAS + HEADERS


def test_the_prompt_is_computed_when_all_is(tiny):
    counts = forwarded(tiny, PromptReuse(refresh_every=3), AnyOrderScheduler(tokens_per_step=2))
    rest = LENGTH - PROMPT
    assert counts == [LENGTH, rest, rest, LENGTH, rest, rest]


@pytest.mark.parametrize("delay", [1, 2])
def test_committed_tokens_are_computed_so_often(tiny, delay):
    counts = forwarded(tiny, CommittedReuse(delay=delay), AnyOrderScheduler(tokens_per_step=2))
    masked = [CANVAS - 2 * step for step in range(6)]
    # The first pass computes all for the first time; what is committed then is new in the next ones.
    young = [min(2 * step, 2 * delay) for step in range(6)]
    if delay == 2:
        young[1] += PROMPT + HEADERS  # which were computed once before
    assert counts == [LENGTH, *(m + y for m, y in zip(masked[1:], young[1:], strict=True))]


def test_blocks_are_computed_while_they_are_open(tiny):
    scheduler = SemiAutoregressiveScheduler(tokens_per_step=1, block_length=4)
    counts = forwarded(tiny, BlockReuse(), scheduler)
    # The first step of a block computes everything, the others the block as it was then.
    assert counts == [LENGTH, 4, 4, 4] * 3
    with_suffix = forwarded(tiny, BlockReuse(with_suffix=True), scheduler)
    assert with_suffix[::4] == [LENGTH] * 3
    rest = with_suffix[1::4]
    assert rest[0] == LENGTH - PROMPT - 1  # the prompt and the first header
    assert LENGTH > rest[0] > rest[1] > rest[2] >= 4
    assert with_suffix[1:4] == [rest[0]] * 3


def test_drift_computes_its_share_and_nothing_gets_too_old(tiny):
    counts = forwarded(tiny, DriftReuse(share=0.5, max_age=100), AnyOrderScheduler(tokens_per_step=2))
    assert counts == [LENGTH, *(2 + (CANVAS - 2 * step + 1) // 2 for step in range(1, 6))]
    old = forwarded(tiny, DriftReuse(share=0.0, max_age=2), AnyOrderScheduler(tokens_per_step=2))
    assert old == [LENGTH, 2, 2 + 8, 2, 2 + 4, 2]


def plan(policy, tokens, wanted, kept=None):
    tokens, wanted = torch.tensor([tokens]), torch.tensor([wanted], dtype=torch.bool)
    rows = Rows((tokens.shape[1],), torch.zeros_like(wanted))
    return policy.plan(kept or Kept.nothing(wanted), rows, tokens, wanted, None)


@pytest.mark.parametrize(
    ("ages", "expected"),
    [((2, 3), [[], [2, 3], [0, 1], [2, 3], [], [0, 1, 2, 3]]), ((4, 2), [[], [0, 1], [], [0, 1, 2, 3]])],
)
def test_under_drift_nothing_gets_older_than_it_may(ages, expected):
    policy = DriftReuse(share=0.0, max_age=ages[0], max_age_committed=ages[1])
    row, wanted, passes = [7, 8, MASK, MASK], [0, 0, 1, 1], []
    _, _, kept = plan(policy, row, wanted)
    for _ in expected:
        computed, _, kept = plan(policy, row, wanted, kept)
        passes.append(computed[0].nonzero().flatten().tolist())
    assert passes == expected


def test_drift_goes_where_something_happened():
    policy, row = DriftReuse(share=0.25, reach=1.0, max_age=100), [MASK] * 8
    computed, whole, kept = plan(policy, row, [1] * 8)
    assert bool(whole)
    assert bool(computed.all())
    row[3] = 7
    computed, whole, kept = plan(policy, row, [token == MASK for token in row], kept)
    assert not bool(whole)
    assert computed[0].nonzero().flatten().tolist() == [2, 3, 4]  # the change, and two neighbours
    # Their neighbours have waited since then; those that were computed have nothing pending.
    computed, _, kept = plan(policy, row, [token == MASK for token in row], kept)
    assert computed[0].nonzero().flatten().tolist() == [1, 5]
    # A second change close by comes first.
    row[6] = 8
    computed, _, kept = plan(policy, row, [token == MASK for token in row], kept)
    assert computed[0].nonzero().flatten().tolist() == [5, 6, 7]


def test_where_nothing_happens_drift_takes_turns():
    policy, row = DriftReuse(share=0.5, max_age=100), [MASK] * 4
    _, _, kept = plan(policy, row, [1] * 4)
    turns = []
    for _ in range(3):
        computed, _, kept = plan(policy, row, [1] * 4, kept)
        turns.append(computed[0].nonzero().flatten().tolist())
    assert turns == [[0, 1], [2, 3], [0, 1]]


def test_drift_computes_what_was_never_wanted_before():
    """What opens late was last looked at when nothing was there yet."""
    policy, row = DriftReuse(share=0.0, max_age=100), [MASK] * 6
    _, _, kept = plan(policy, row, [1, 1, 0, 0, 0, 0])
    computed, _, kept = plan(policy, row, [1, 1, 0, 0, 0, 0], kept)
    assert not bool(computed.any())
    computed, _, kept = plan(policy, row, [0, 1, 1, 1, 0, 0], kept)
    assert computed[0].nonzero().flatten().tolist() == [2, 3]
    computed, _, kept = plan(policy, row, [1, 1, 1, 1, 0, 0], kept)
    assert not bool(computed.any())


def test_influence_falls_with_distance():
    changed = torch.zeros(1, 60, dtype=torch.bool)
    changed[0, [10, 12]] = True
    found = DriftReuse(reach=2.0).concerns(changed)[0]
    places = torch.arange(60)
    expected = sum(torch.exp(-(places - place).abs() / 2.0) for place in (10, 12))
    assert torch.allclose(found, expected, atol=1e-3)


def test_edited_tokens_are_computed(tiny):
    """A callback changes a token that would be reused."""

    def edit(state):
        tokens = state.tokens.clone()
        if state.step == 2:
            slot = int((state.canvas.decodable[0] & ~state.masked[0]).nonzero()[0])
            tokens[0, slot] = 5 if int(tokens[0, slot]) != 5 else 6
        return tokens

    sampler = sampler_of(tiny, CommittedReuse(), AnyOrderScheduler(tokens_per_step=2))
    counts = sampler([PROMPTS[0]], callback=edit).trace.forwarded[0].tolist()
    assert counts == [LENGTH, 12, 10 + 1, 8, 6, 4]


# ------------------------------------------------------------------------------------------------ what it says


def test_the_embedded_model_saves_most_of_its_work():
    model, tokenizer = demo.load()
    problems = demo.sample_problems(40, 20_261_122)
    denoiser = Denoiser(model, tokenizer, reuse=DriftReuse())
    sampler = ParallelForcedSampler(denoiser, path_length=11, summary_length=2, tokens_per_step=4)
    out = sampler([problem.prompt for problem in problems])
    right = sum(problem.is_correct(text) for problem, text in zip(problems, out.summary, strict=True))
    assert right >= 38
    assert sum(out.flops(exact=True)) > 2.5 * sum(out.flops())


def test_guidance_counts_both_branches(tiny):
    exact = sampler_of(tiny, PromptReuse(refresh_every=1), cfg_scale=1.0)([PROMPTS[0]])
    assert exact.positions_exact == [2 * LENGTH * exact.forward_passes]
    assert exact.positions_forwarded == exact.positions_exact


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", ["wino", "lopa"])
def test_passes_with_shadows_or_alternatives_compute_everything(tiny, name, branches):
    out, plain = (
        make(Denoiser(tiny, Words(), reuse=reuse, cfg_scale=branches - 1), name)([PROMPTS[0]])
        for reuse in (CommittedReuse(), None)
    )
    counts = out.trace.forwarded[0].tolist()
    assert len(counts) == int(out.trace.forward_passes)
    if name == "wino":  # each of its passes has shadows
        same(out, plain)
        assert set(counts) == {branches * LENGTH}
    else:  # it begins with a plain pass, and looks at alternatives after that
        assert counts[1] == branches * LENGTH


def test_a_trace_keeps_what_was_computed(tiny, tmp_path):
    from nap_decode import DecodeTrace

    trace = sampler_of(tiny, CommittedReuse())(PROMPTS).trace
    trace.save(tmp_path / "a.trace")
    assert DecodeTrace.load(tmp_path / "a.trace").forwarded.tolist() == trace.forwarded.tolist()


def test_a_sampler_says_that_it_reuses(tiny):
    text = sampler_of(tiny, CommittedReuse(delay=2)).describe()
    assert "  reuse: CommittedReuse(delay=2)" in text


def test_a_file_keeps_the_policy(tiny, tmp_path):
    sampler = sampler_of(tiny, DriftReuse(share=0.5))
    sampler.save(tmp_path / "sampler.json")
    loaded = Sampler.load(tmp_path / "sampler.json", tiny, Words())
    assert loaded.denoiser.reuse == DriftReuse(share=0.5)
    with pytest.raises(NapDecodeError, match=r"the file has reuse DriftReuse.*, but the Denoiser has None"):
        Sampler.load(tmp_path / "sampler.json", Denoiser(tiny, Words()))


def test_the_command_line_has_them(tmp_path, capsys):
    from nap_decode.cli import main

    trace = str(tmp_path / "a.trace")
    arguments = ["generate", "--model", str(demo.CHECKPOINT), "--path-length", "11", "--summary-length", "2"]
    arguments += ["--prompt", "6 0 6 4 6 2 1 2 4 7 0 6 =", "--trace", trace]
    assert main([*arguments, "--reuse", "committed", "--refresh-every", "4"]) == 0
    from nap_decode import DecodeTrace

    counts = DecodeTrace.load(trace).forwarded[0].tolist()
    assert [count == 53 for count in counts] == [True, False, False, False] * 2 + [True]
    assert main([*arguments, "--refresh-every", "4"]) == 2
    assert "--refresh-every goes with --reuse" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "refresh_every must be a whole number of at least 1, but is 0"),
        ({"delay": 0}, "delay must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(NapDecodeError, match=message):
        CommittedReuse(**options)


@pytest.mark.parametrize("options", [{"share": 1.5}, {"reach": 0.0}, {"max_age": 0}, {"max_age_committed": 0}])
def test_options_of_drift_are_checked(options):
    with pytest.raises(NapDecodeError, match=f"{next(iter(options))} must be"):
        DriftReuse(**options)


def test_captured_steps_cannot_choose(tiny):
    with pytest.raises(NapDecodeError, match="CommittedReuse chooses positions at each pass"):
        sampler_of(tiny, CommittedReuse(), compile="graphs")


def test_models_that_cannot_are_refused(tiny):
    from models import LLaDALike

    with pytest.raises(NapDecodeError, match="reuse must be a Reuse, such as CommittedReuse"):
        Denoiser(tiny, Words(), reuse="prompt")
    with pytest.raises(NapDecodeError, match="cannot reuse keys and values: it takes no position_ids"):
        Denoiser(LLaDALike("llada"), Words(), reuse=CommittedReuse())
    with pytest.raises(NapDecodeError, match="cannot reuse keys and values: it takes no position_ids"):
        Denoiser(lambda ids, mask: torch.zeros(*ids.shape, VOCABULARY), Words(), reuse=CommittedReuse())


class ByHand(DreamLike):
    """Attention that is written out, and no cache."""

    def run(self, input_ids, position_ids, seen):
        def attend(query, key, value, attn_mask=None):
            scores = query @ key.transpose(-1, -2)
            return (scores if attn_mask is None else scores.masked_fill(~attn_mask, -99.0)).softmax(-1) @ value

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
            return super().run(input_ids, position_ids, seen)


class Switches(DreamLike):
    """SDAR's code: attention that no mask hides anything from is flash-attn's, and passes torch's by.

    Besides, its cache is given nothing unless it is told to store it; what flash-attn does sees the cache.
    """

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.attend(input_ids, attention_mask, position_ids)

    def attend(self, input_ids, seen, position_ids, cache=None):
        x = self.embed(input_ids)
        x = x + self.place(torch.arange(input_ids.shape[1]) if position_ids is None else position_ids)
        for number, layer in enumerate(self.layers):
            q, k, v = layer(x)[:, None].chunk(3, dim=-1)
            if cache is not None:
                k, v = cache.update(k, v, number)
            if self.is_flash(seen):
                x = x + ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v)[:, 0].tanh()
            else:
                x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0].tanh()
        return SimpleNamespace(logits=self.head(x))

    def is_flash(self, seen):
        return seen is None or bool(seen.all())


class OnOrder(Switches):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, store_kv=False):
        assert past_key_values is None or store_kv or len(past_key_values)  # there is no len, as of most caches
        return self.attend(input_ids, attention_mask, position_ids, past_key_values)


@pytest.mark.parametrize("size", [None, 2, 4, 16, 32])
def test_a_model_that_attends_another_way_where_nothing_is_hidden_is_found_out(size):
    """Also if blocks are as long as what it is tried with, or as short."""
    family = ModelFamily(name="x", attention="4d", block_size=size)
    denoiser = Denoiser(Switches("x"), Words(), family=family)
    assert by_blocks(denoiser)(PROMPTS[:1], max_new_tokens=30).trace.forwarded is None
    with pytest.raises(NapDecodeError, match="cannot reuse keys and values"):
        denoiser.replace(reuse=CommittedReuse())


@pytest.mark.parametrize("size", [2, 4, 16, 32])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "ragged"])
def test_one_whose_cache_is_told_to_store_is_exact_all_the_same(size, prompts):
    denoiser = Denoiser(OnOrder("x"), Words(), family=ModelFamily(name="x", attention="4d", block_size=size))
    outputs = [
        by_blocks(one)(prompts, max_new_tokens=30)
        for one in (denoiser, Denoiser(Switches("x"), Words(), family=denoiser.family))
    ]
    same(*outputs)
    assert sum(outputs[0].positions_forwarded) < sum(outputs[0].positions_exact)
    assert outputs[1].trace.forwarded is None


def test_attention_that_is_missed_later_is_an_error_and_not_a_result():
    model = Switches("x")
    model.is_flash = lambda seen: False
    sampler = by_blocks(Denoiser(model, Words(), family=BLOCKS))
    assert sampler(PROMPTS, max_new_tokens=8).trace.forwarded is not None
    model.is_flash = lambda seen: True
    with pytest.raises(NapDecodeError, match="0 times in a pass, and 2 times before"):
        sampler(PROMPTS, max_new_tokens=8)


def test_a_model_that_keeps_its_keys_to_itself_is_refused():
    with pytest.raises(NapDecodeError, match="keys and values: it takes no cache, and its attention is not"):
        Denoiser(ByHand("Dream", mask_token_id=MASK), Words(), reuse=CommittedReuse())
