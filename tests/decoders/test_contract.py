"""What holds for every decoder, under its own scheduler and NAP's, in every way to decode.

Every decoder with every way, every decoder with either scheduler, and every way with either: all pairs.
"""

from __future__ import annotations

import pytest
import torch
from models import KNOWN, MASK, PAD, VOCABULARY, Words, build
from samplers import HOLES, NAMES, OPTIONS, PROMPTS, macro_parallel, make

from nap_decode import Denoiser, ModelFamily, PromptReuse, decoders

BANNED = torch.tensor([MASK, *range(KNOWN, VOCABULARY)])
ARRANGEMENTS = {"own scheduler": lambda sampler: sampler, "macro-parallel": macro_parallel}
SEEDS = [100, 101, 102]
WAYS = ["batch", "infill", "stream", "generate"]


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def test_every_decoder_has_options_here():
    assert set(OPTIONS) == set(decoders.DECODERS)


def decode(sampler, way, rows=slice(None), **options):
    """Outputs of one or more rows each."""
    texts, options = (HOLES if way == "infill" else PROMPTS)[rows], {"row_seeds": SEEDS[rows]} | options
    if way == "stream":
        return list(sampler.stream(texts, max_batch=2, **options))
    if way == "generate":  # where prompts are padded on the left
        width = max(map(len, texts))
        ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
        present = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        return [sampler.generate(ids, present, return_dict_in_generate=True, **options)]
    return [sampler.infill(texts, **options) if way == "infill" else sampler(texts, **options)]


def rows_of(outputs):
    """Of every row its tokens, commit steps, confidences and forward passes, without padding."""
    rows = []
    for out in outputs:
        for i, length in enumerate(out.canvas.row_lengths.tolist()):
            trace = out.trace
            values = (tensor[i, :length] for tensor in (trace.tokens, trace.step, trace.confidence))
            rows.append((*values, int(trace.forward_passes[i])))
    return rows


def assert_same(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert torch.equal(row[0], other[0])
        assert torch.equal(row[1], other[1])
        torch.testing.assert_close(row[2], other[2], equal_nan=True)
        assert row[3] == other[3]


CASES = [
    pytest.param(name, way, arrangement, id=f"{name}-{way}-{arrangement}")
    for i, name in enumerate(NAMES)
    for j, way in enumerate(WAYS)
    for k, arrangement in enumerate(ARRANGEMENTS)
    if (i + j + j // 2) % 2 == k
]


@pytest.fixture(scope="module")
def blocks():
    """A block-causal model."""
    return Denoiser(build("Llama"), Words(), family=ModelFamily(name="blocks", attention="4d", block_size=4))


@pytest.mark.parametrize(("name", "way", "arrangement"), CASES)
def test_what_is_kept_of_closed_blocks_changes_nothing(blocks, name, way, arrangement):
    """By default a pass forwards what can have changed."""
    everything = blocks.replace(reuse=PromptReuse(refresh_every=1))
    kept, whole = (decode(ARRANGEMENTS[arrangement](make(one, name)), way) for one in (blocks, everything))
    assert_same(rows_of(kept), rows_of(whole))
    for out in kept:
        assert all(some <= every for some, every in zip(out.positions_forwarded, out.positions_exact, strict=True))


@pytest.mark.parametrize(("name", "way", "arrangement"), CASES)
def test_contract(denoiser, name, way, arrangement):
    sampler = ARRANGEMENTS[arrangement](make(denoiser, name))
    outputs = decode(sampler, way)
    for out in outputs:
        start, decodable, present = out.canvas.tokens, out.canvas.decodable, out.canvas.attention_mask.bool()
        assert torch.equal(out.trace.tokens[~decodable], start[~decodable])  # prompts, headers, padding
        assert not torch.isin(out.trace.tokens[decodable], BANNED).any()
        assert (out.trace.step[decodable] >= 0).all()
        assert not out.trace.confidence[decodable].isnan().any()
        assert (start[decodable] == MASK).all()
        if way == "generate":
            width = out.sequences.shape[1]
            for row, tokens, inside in zip(out.sequences, out.trace.tokens, present, strict=True):
                assert row.tolist() == [PAD] * (width - int(inside.sum())) + tokens[inside].tolist()
        else:
            assert torch.equal(out.sequences, out.trace.tokens)
    if way == "stream":
        assert [out.index for out in outputs] == [0, 1, 2]
        assert all(out.forward_passes == out.trace.forward_passes[0] for out in outputs)
    rows = rows_of(outputs)
    assert_same(rows, rows_of(decode(sampler, way)))
    # In a batch, in a stream, or alone: a row gets what it gets.
    alone = "infill" if way == "infill" else "batch"
    assert_same(rows, [rows_of(decode(sampler, alone, slice(i, i + 1)))[0] for i in range(3)])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_needs_a_seed_draws(denoiser, name):
    """Torch's generator is asked for a seed, once, if there is something to draw; other seeds, other draws."""
    sampler = make(denoiser, name)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        out = sampler(PROMPTS * 8)
        assert torch.equal(torch.get_rng_state(), before) is not sampler.decoder.needs.random
        assert (out.row_seeds is not None) is sampler.decoder.needs.random
    other = sampler(PROMPTS * 8, seed=12345)
    same = torch.equal(out.sequences, other.sequences) and torch.equal(out.trace.step, other.trace.step)
    assert same is not sampler.decoder.needs.random


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_closed_blocks_are_filled_and_nothing_else_changes(denoiser, name, arrangement):
    plain = ARRANGEMENTS[arrangement](make(denoiser, name))
    sampler = plain.set(close_on=range(10, 16))
    (out,) = outputs = decode(sampler, "batch")
    tokens, trace = out.trace.tokens, out.trace
    assert trace.closed is not None
    is_end = (tokens >= 10) & (tokens < 16) & ~trace.closed
    assert (tokens[trace.closed] == PAD).all()
    assert trace.confidence[trace.closed].isnan().all()
    assert not torch.isin(tokens[out.canvas.decodable & ~trace.closed], BANNED).any()
    for row in range(len(PROMPTS)):
        for block in range(len(trace.block_names)):
            inside = trace.block[row] == block
            closed = trace.closed[row][inside]
            if closed.any() and not sampler.decoder.needs.committed:  # from behind an end on
                first = int(is_end[row][inside].long().argmax())
                assert is_end[row][inside][first]
                assert not closed[: first + 1].any()
    assert_same(rows_of(outputs), [rows_of(decode(sampler, "batch", slice(i, i + 1)))[0] for i in range(3)])
    never = sampler.set(close_on=[KNOWN])  # the tokenizer does not have it
    assert_same(rows_of(decode(never, "batch")), rows_of(decode(plain, "batch")))
