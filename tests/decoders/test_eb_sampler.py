"""The EB-Sampler."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Words
from papers import candidates, check_blocks, filled, run, shares
from reference import entropy_rule
from samplers import OPTIONS

from nap_decode import Denoiser, NapDecodeError
from nap_decode.decoders.eb_sampler import EntropyBoundSelection


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_entropy_bounded_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "entropy_bounded", entropy_rule(OPTIONS["entropy_bounded"]["gamma"]), block_length)


@settings(max_examples=300)
@given(candidates(), st.sampled_from([0.0, 0.26, 1.01]), st.data())
def test_entropy_bound(case, gamma, data):
    number = len(case[0])
    entropy = data.draw(st.lists(shares, min_size=number, max_size=number))

    def rule(group):
        ranked = sorted(group, key=lambda i: (-case[0][i], i))
        fits = 0
        for k in range(1, len(ranked) + 1):
            prefix = [entropy[i] for i in ranked[:k]]
            if sum(prefix) - max(prefix) > gamma + 1e-9:
                break
            fits = k
        return set(ranked[:fits])

    assert run(EntropyBoundSelection(gamma + 1e-9), case, negative_entropy=[-h for h in entropy]) == filled(case, rule)


def test_bad_options():
    with pytest.raises(NapDecodeError, match="gamma must be a finite number of at least 0"):
        EntropyBoundSelection(-0.1)
