"""MDLM's ancestral sampling (and Dream's origin, which is the same) and the first-hitting sampler: by enumeration."""

from __future__ import annotations

from collections import Counter

import pytest
import reference
import torch
from models import MASK, TableModel
from papers import check_law
from reference import law

from nap_decode import Sampler, decoders


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["dream_origin", "mdlm_ancestral"])
def test_ancestral_law(name, steps):
    """Every mask is revealed with probability 1 - s/t and gets a drawn token, independently: by enumeration."""
    vocabulary, length, count = 3, 3, 8_000
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
    sampler = Sampler(model, decoder=decoders.make(name, eps=eps, steps=steps, temperature=1.0), mask_token_id=MASK)
    out = sampler([[]] * count, max_new_tokens=length, seed=3)
    check_law(expected, out.sequences, count)


def test_first_hitting_law():
    count = 8_000
    model = TableModel(3, 3, seed=6)
    out = Sampler(model, decoder=decoders.mdlm_first_hitting(), mask_token_id=MASK)(
        [[]] * count, max_new_tokens=3, seed=4
    )
    check_law(law(model, 3, MASK, [1, 1, 1], random_positions=True), out.sequences, count)
