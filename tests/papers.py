"""What the tests of single papers share: made-up slots for a selection, and comparisons with slow references."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import reference
import torch
from hypothesis import strategies as st
from models import KNOWN, MASK, VOCABULARY
from samplers import make

from nap_decode import Sampler, decoders
from nap_decode.parts.slots import Proposal, Slots

BANNED = {MASK, *range(KNOWN, VOCABULARY)}
PAPER_PROMPTS = ([5, 6, 7], [8], [9, 9, 5, 6], [7, 6, 5, 8, 9])
BLOCKS = 3
"""Block 3 stands for no block."""
scores = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, -math.inf])
shares = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def candidates(draw, score=shares):
    """Slots of one row in the order of their columns: lists of scores, blocks, columns and flags, and a quota."""
    number = draw(st.integers(1, 12))
    confidence = draw(st.lists(score, min_size=number, max_size=number))
    block = sorted(draw(st.lists(st.integers(0, BLOCKS), min_size=number, max_size=number)))
    steps = draw(st.lists(st.integers(1, 3), min_size=number, max_size=number))
    columns = [sum(steps[: i + 1]) for i in range(number)]
    committed = draw(st.lists(st.integers(0, 4).map(lambda n: n == 0), min_size=number, max_size=number))
    quota = draw(st.lists(st.integers(0, 3), min_size=BLOCKS, max_size=BLOCKS))
    return confidence, block, columns, committed, quota


def run(selection, case, **statistics):
    """Indices of the slots that are chosen."""
    confidence, block, columns, committed, quota = case
    slots = Slots.of(
        torch.tensor([block]),
        torch.tensor([quota]),
        index=torch.tensor([columns]),
        committed=torch.tensor([committed]),
        row_tokens=torch.zeros(1, 40, dtype=torch.int64),
    )
    statistics = {name: torch.tensor([values], dtype=torch.float64) for name, values in statistics.items()}
    proposal = Proposal.of(slots, torch.tensor([confidence], dtype=torch.float64), **statistics)
    chosen = selection(proposal)[0].tolist()
    return {i for i, c in enumerate(chosen) if c}


def members(case, b):
    _, block, _, committed, _ = case
    return [i for i in range(len(block)) if block[i] == b and not committed[i]]


def best(case, group, number):
    return set(sorted(group, key=lambda i: (-case[0][i], i))[:number])


def filled(case, rule):
    """What a rule chooses in each block, and the best others where that is less than the quota."""
    chosen = set()
    for b in range(BLOCKS):
        group = members(case, b)
        own = rule(group)
        rest = [i for i in group if i not in own]
        chosen |= own | best(case, rest, max(0, case[4][b] - len(own)))
    return chosen


def check_law(expected, rows, count):
    """Compare decoded rows with their exact law."""
    assert sum(expected.values()) == pytest.approx(1)
    seen = Counter(map(tuple, rows.tolist()))
    assert set(seen) <= set(expected)
    for row, p in expected.items():
        assert abs(seen[row] / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 1e-6


def logits_by(model):
    """A function from the tokens of a row to a list of logits for every position."""

    def logits_of(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].tolist()

    return logits_of


def check_blocks(denoiser, name, rule, block_length):
    """Compare an adaptive decoder with its rule applied to one block after the other."""
    sampler = make(denoiser, name, block_length=block_length)
    passes = set()
    for prompt in PAPER_PROMPTS[:3]:
        out = sampler(prompt, max_new_tokens=12)
        positions = range(len(prompt), len(prompt) + 12)
        expected, number = reference.decode_blocks(
            logits_by(denoiser.model),
            [*prompt, *[MASK] * 12],
            [positions[i : i + block_length] for i in range(0, 12, block_length)],
            rule,
            banned=BANNED,
            mask=MASK,
        )
        assert out.sequences[0].tolist() == expected
        assert out.forward_passes == number
        passes.add(number)
    assert min(passes) < 12  # the rule did commit several at once


def check_fixed(denoiser, name, confidence, quotas_of, cases):
    """Compare a decoder of a fixed schedule, at temperature 0, with the definition of its confidence.

    ``quotas_of(tokens, steps)`` lists the tokens of every step; cases are (prompt, tokens, steps).
    """
    for prompt, length, steps in cases:
        quotas = quotas_of(length, steps)
        out = Sampler(denoiser, decoder=decoders.make(name, steps=steps))(prompt, max_new_tokens=length)

        def model(ids, _):
            with torch.no_grad():
                return denoiser.model(ids).logits

        expected, when = reference.decode_row(
            model,
            [*prompt, *[MASK] * length],
            [-1] * len(prompt) + [0] * length,
            [[number] for number in quotas],
            confidence=confidence,
            banned=BANNED,
        )
        assert out.sequences[0].tolist() == expected
        assert out.trace.step[0].tolist() == when
        assert out.forward_passes == sum(number > 0 for number in quotas)
