"""LLaDA's decoders."""

from __future__ import annotations

import pytest
from models import Words
from papers import check_fixed

from nap_decode import Denoiser, NapDecodeError
from nap_decode.decoders.llada import ProbabilityWithout


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize(
    ("name", "confidence"), [("llada_low_confidence", "probability"), ("left_to_right", "leftmost")]
)
def test_agrees_with_the_reference(denoiser, name, confidence):
    def quotas(tokens, steps):  # LLaDA's get_num_transfer_tokens
        return [tokens // steps + (i < tokens % steps) for i in range(steps)]

    cases = [([5, 6, 7], 12, 5), ([8], 7, 7), ([9, 9, 5, 6], 10, 3), ([7], 4, 2)]
    check_fixed(denoiser, name, confidence, quotas, cases)


@pytest.mark.parametrize("ids", [[-1], [2.0], [True], ["5"]])
def test_bad_ids(ids):
    with pytest.raises(NapDecodeError, match="an id of ProbabilityWithout must be a whole number of at least 0"):
        ProbabilityWithout(ids)
