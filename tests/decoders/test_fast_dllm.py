"""Fast-dLLM's threshold and factor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Words
from papers import candidates, check_blocks, filled, run
from reference import factor_rule, threshold_rule
from samplers import OPTIONS

from nap_decode import Denoiser, NapDecodeError
from nap_decode.decoders.fast_dllm import FactorSelection


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_fast_dllm_threshold_agrees_with_the_reference(denoiser, block_length):
    check_blocks(
        denoiser, "fast_dllm_threshold", threshold_rule(OPTIONS["fast_dllm_threshold"]["threshold"]), block_length
    )


@pytest.mark.parametrize("block_length", [4, 12])
def test_fast_dllm_factor_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "fast_dllm_factor", factor_rule(OPTIONS["fast_dllm_factor"]["factor"]), block_length)


@settings(max_examples=300)
@given(candidates(), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_factor(case, factor):
    def rule(group):
        ranked = sorted(group, key=lambda i: (-case[0][i], i))
        numbers = [n for n in range(1, len(ranked) + 1) if case[0][ranked[n - 1]] >= 1 - factor / (n + 1)]
        return set(ranked[: max(numbers, default=0)])

    assert run(FactorSelection(factor), case) == filled(case, rule)


def test_bad_options():
    with pytest.raises(NapDecodeError, match="factor must be a finite number of at least 0, but is -1"):
        FactorSelection(-1)
