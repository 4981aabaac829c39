"""PC-Sampler's calibrated confidence."""

from __future__ import annotations

import math

import pytest
import torch
from models import MASK, TableModel

from nap_decode import NapDecodeError, Sampler, decoders
from nap_decode.decoders.calibration import CalibratedConfidence, background_frequencies
from nap_decode.model.statistics import Distribution
from nap_decode.parts.confidence import Candidates
from nap_decode.parts.slots import Slots


def test_calibrated_confidence_agrees_with_the_definition():
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Six slots of a block that begins in column 40: what counts is the place in the block.
    slots = Slots.of(
        torch.zeros(1, 6, dtype=torch.int64),
        torch.ones(1, 1, dtype=torch.int64),
        index=torch.arange(40, 46)[None],
        row_offsets=torch.arange(60)[None] - 40,
    )
    given = Candidates(Distribution(logits), logits.argmax(1), slots, slots.places)
    frequencies = (0.5, 0.25, 0.125, 1e-30, 0.1)
    got = CalibratedConfidence(frequencies, position_decay=0.3, cap=2.0)(given).tolist()
    capped = 0
    for i in range(6):
        token = int(given.tokens[i])
        surprise = -float(logits[i].softmax(0)[token]) * math.log(frequencies[token])
        capped += surprise > 2
        assert got[i] == pytest.approx(math.exp(-0.3 * i) * min(2.0, surprise))
    assert capped


def test_background_frequencies():
    assert background_frequencies([[0, 0, 2], [0]], 4) == (0.75, 0.25, 0.25, 0.25)
    with pytest.raises(NapDecodeError, match="there is no token in the texts"):
        background_frequencies([[], []], 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequencies": (0.5, 0.0)}, "background frequencies must be positive"),
        ({"frequencies": None}, "frequencies must be numbers, but are None"),
        ({"frequencies": "abc"}, "frequencies must be numbers, but are 'abc'"),
        ({"frequencies": (0.5, "a")}, "a background frequency must be a number, but is 'a'"),
        ({"frequencies": (0.5,), "decay": -1}, "position_decay must be a finite number of at least 0, but is -1"),
        ({"frequencies": (0.5,), "cap": -1}, "cap must be a finite number of at least 0, but is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NapDecodeError, match=message):
        decoders.pc_sampler(**options)


def test_every_id_has_a_frequency():
    sampler = Sampler(TableModel(3, 3), decoder=decoders.pc_sampler(frequencies=(0.5, 0.5)), mask_token_id=MASK)
    with pytest.raises(NapDecodeError, match="there are 2 background frequencies for 3 token ids"):
        sampler([[]], max_new_tokens=3)
