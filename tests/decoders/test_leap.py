"""LocalLeap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Words
from papers import candidates, check_blocks, filled, run
from reference import leap_rule
from samplers import OPTIONS

from nap_decode import Denoiser, NapDecodeError
from nap_decode.decoders.leap import LeapSelection


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_local_leap_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "local_leap", leap_rule(**OPTIONS["local_leap"]), block_length)


@settings(max_examples=300)
@given(candidates(), st.integers(0, 4))
def test_leap(case, radius):
    confidence, _, columns, _, _ = case

    def rule(group):
        anchors = [i for i in group if confidence[i] >= 0.8]
        near = {i for i in group if any(abs(columns[i] - columns[a]) <= radius for a in anchors)}
        return set(anchors) | {i for i in near if confidence[i] >= 0.5}

    assert run(LeapSelection(0.8, 0.5, radius), case) == filled(case, rule)


def test_bad_options():
    with pytest.raises(NapDecodeError, match="radius must be a whole number of at least 0"):
        LeapSelection(radius=-1)
