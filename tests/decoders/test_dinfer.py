"""dInfer's hierarchical decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from models import Words
from papers import best, candidates, check_blocks, filled, run
from reference import hierarchy_rule
from samplers import OPTIONS

from nap_decode import Denoiser
from nap_decode.decoders.dinfer import HierarchySelection


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_hierarchical_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "hierarchical", hierarchy_rule(**OPTIONS["hierarchical"]), block_length)


@settings(max_examples=300)
@given(candidates())
def test_hierarchy(case):
    confidence, _, columns, _, _ = case

    def rule(group):
        chosen, runs = set(), []
        for i in group:
            if runs and columns[i] == columns[runs[-1][-1]] + 1 and i == runs[-1][-1] + 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        for one in runs:
            chosen |= {i for i in best(case, one, 1) if confidence[i] > 0.4}
        return chosen | {i for i in group if confidence[i] > 0.8}

    assert run(HierarchySelection(0.8, 0.4), case) == filled(case, rule)
