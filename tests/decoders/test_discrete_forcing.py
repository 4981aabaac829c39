"""D2F's pipeline of blocks."""

from __future__ import annotations

import pytest
import torch
from models import MASK, Words
from papers import BANNED, PAPER_PROMPTS, logits_by
from reference import propose, threshold_rule
from samplers import make

from nap_decode import (
    Decoder,
    Denoiser,
    MicroConfidenceCommitter,
    NapDecodeError,
    Sampler,
    ThresholdSelection,
    decoders,
)
from nap_decode.decoders.discrete_forcing import PipelineScheduler


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


def done_before(trace, row, step):
    """Tokens of each block that were committed before a step, and the step's own."""
    block, when = trace.block[row], trace.step[row]
    number = -(-int((block >= 0).sum()) // 3)
    own = (block >= 0).nonzero()[:, 0]
    before, now = [0] * number, [0] * number
    for place, column in enumerate(own.tolist()):
        before[place // 3] += int(when[column] < step)
        now[place // 3] += int(when[column] == step)
    return before, now


@pytest.mark.parametrize("share", [0.0, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_block_opens_when_the_one_before_is_done_enough(denoiser, adaptive, share):
    """Step by step, in what a decode says that it did: nowhere before, and there as soon as the budget reaches it."""
    scheduler = PipelineScheduler(block_length=3, done_before_next=share, tokens_per_step=None if adaptive else 2)
    selection = {"selection": ThresholdSelection(0.3)} if adaptive else {}
    sampler = Sampler(denoiser, decoder=Decoder(scheduler, MicroConfidenceCommitter(**selection)))
    out = sampler([[5, 6, 7], [8]], max_new_tokens=12)
    at_once = 0
    for row in range(2):
        for step in range(int(out.trace.step[row].max()) + 1):
            before, now = done_before(out.trace, row, step)
            is_open = [all(done >= 3 * share for done in before[:b]) for b in range(4)]
            assert all(is_open[b] for b in range(4) if now[b])
            at_once += sum(n > 0 for n in now) > 1
            assert sum(now) > 0
    assert (at_once > 0) is (share < 1)
    assert adaptive or out.trace.forward_passes.tolist() == [6, 6]


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_agrees_with_the_reference(denoiser, share):
    """What is sure enough in every open block, and the best where a token is owed, in a plain loop over one row."""
    threshold, length, size = 0.4, 12, 3
    logits_of = logits_by(denoiser.model)
    sampler = make(denoiser, "d2f", threshold=threshold, block_length=size, done_before_owed=share)
    together = 0
    for prompt in PAPER_PROMPTS:
        out = sampler(prompt, max_new_tokens=length)
        tokens, passes = [*prompt, *[MASK] * length], 0
        blocks = [range(start, start + size) for start in range(len(prompt), len(tokens), size)]
        while MASK in tokens:
            logits, passes, chosen = logits_of(tokens), passes + 1, set()
            open_blocks = []
            for i, block in enumerate(blocks):
                if i and sum(tokens[p] != MASK for p in blocks[i - 1]) < size / 2:
                    break
                open_blocks.append([p for p in block if tokens[p] == MASK])
            for i, block in enumerate(open_blocks):
                proposals = {p: propose(logits[p], BANNED) for p in block}
                sure = {p for p in block if proposals[p][1][proposals[p][0]] >= threshold}
                # A token at least, in the first block and behind one that is done enough.
                owed = not i or sum(tokens[p] != MASK for p in blocks[i - 1]) >= size * share
                chosen |= threshold_rule(threshold)(proposals, {}) if owed and block else sure
            together += len({(p - len(prompt)) // size for p in chosen}) > 1
            for p in chosen:
                tokens[p] = propose(logits[p], BANNED)[0]
        assert out.sequences[0].tolist() == tokens
        assert out.forward_passes == passes
    assert together > 3


def test_blocks_one_after_the_other_are_fast_dllms(denoiser):
    alone = decoders.d2f(threshold=0.4, block_length=3, done_before_next=1.0)
    other = decoders.fast_dllm_threshold(threshold=0.4, block_length=3)
    outs = [Sampler(denoiser, decoder=decoder)([5, 6, 7], max_new_tokens=12) for decoder in (alone, other)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].trace.step, outs[1].trace.step)


def test_a_row_that_is_owed_tokens_may_get_them_in_any_open_block():
    left, lengths = torch.tensor([[1, 4, 4]]), torch.tensor([[4, 4, 4]])
    for tokens_per_step, expected in ((None, [[1, 0, 0]]), (1, [[0, 1, 0]]), (5, [[1, 4, 0]])):
        scheduler = PipelineScheduler(tokens_per_step=tokens_per_step)
        assert scheduler.least(scheduler.plan(lengths, adaptive=True), left).tolist() == expected


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", None])
@pytest.mark.parametrize("name", ["done_before_next", "done_before_owed"])
def test_bad_options(name, share):
    with pytest.raises(NapDecodeError, match=f"{name} must be a number from 0 to 1"):
        PipelineScheduler(**{name: share})


@pytest.mark.parametrize("percent", range(1, 100))
def test_shares_are_exact(percent):
    lengths = torch.tensor([[100, 1], [50, 1], [25, 1]])
    for done in range(101):
        left = torch.stack([(lengths[:, 0] - done).clamp(min=0), torch.ones(3, dtype=torch.int64)], dim=1)
        opened = PipelineScheduler(done_before_next=percent / 100).open(left, lengths, torch.zeros(3, 2).bool())
        is_done = [100 * min(done, length) >= percent * length for length in (100, 50, 25)]
        assert (opened[:, 1] > 0).tolist() == is_done
