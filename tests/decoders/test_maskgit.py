"""MaskGIT's cosine schedule."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nap_decode.decoders.maskgit import CosineSchedule


@settings(max_examples=300)
@given(st.integers(1, 60), st.data())
def test_cosine_commits_at_every_step_and_follows_the_curve(tokens, data):
    steps = data.draw(st.integers(1, tokens))
    committed = CosineSchedule()(torch.tensor([tokens]), torch.tensor([steps]), torch.empty(1, 0))[0].tolist()
    assert committed[-1] == tokens
    for i, got in enumerate(committed):
        masked = math.ceil(tokens * math.cos(math.pi / 2 * (i + 1) / steps) - 1e-9)
        assert got == min(max(tokens - masked, i + 1), tokens - (steps - i - 1))
        assert got > (committed[i - 1] if i else 0)
