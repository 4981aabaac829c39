"""CreditDecoding."""

from __future__ import annotations

import pytest
import torch
from models import Words
from papers import BANNED, check_blocks
from reference import credit_rule
from samplers import OPTIONS

from nap_decode import Denoiser, NapDecodeError
from nap_decode.decoders.credit_decoding import Credit
from nap_decode.parts.slots import Slots


@pytest.fixture(scope="module")
def denoiser(tiny):
    return Denoiser(tiny, Words())


@pytest.mark.parametrize("block_length", [4, 12])
def test_credit_agrees_with_the_reference(denoiser, block_length):
    check_blocks(denoiser, "credit", credit_rule(OPTIONS["credit"]["threshold"], 0.7, 0.8, 0.2, BANNED), block_length)


def test_the_ledger_is_the_dense_matrix():
    """dInfer keeps a credit for every id; the ledger has one for the most likely token of every step."""
    generator = torch.Generator().manual_seed(0)
    credit = Credit(strength=0.7, decay=0.8, boost=0.2)
    dense = torch.zeros(5, 4, dtype=torch.float64)
    tokens, amounts = torch.empty(5, 0, dtype=torch.int64), torch.empty(5, 0, dtype=torch.float64)
    for _ in range(8):
        logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        before = logits.clone()
        dense *= 0.8
        top, best = logits.softmax(1).max(1)
        dense[torch.arange(5), best] += top**0.2
        fused, tokens, amounts = credit.add(logits, tokens, amounts)
        torch.testing.assert_close(fused, logits + 0.7 * (dense + 1).log())
        assert torch.equal(logits, before)


def adjust(slots, logits, *chunks):
    """One step of slots whose logits ``(R, V)`` come in chunks of places."""
    places = [torch.tensor([*chunk]) for chunk in chunks]
    return torch.cat([adjusted for _, adjusted in Credit()(slots, ((at, logits[at]) for at in places))])


def test_credit_follows_its_slot():
    first = Slots.of(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1]]), rank=torch.tensor([[0, 1, 2, -1]]))
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    adjust(first, logits, [0, 1], [2])  # in two chunks
    # Columns 1 and 3: the first was the second slot, the other was none.
    second = Slots.of(
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([[1]]),
        index=torch.tensor([[1, 3]]),
        rank=torch.tensor([[-1, 0, -1, 1]]),
        memory=first.memory,
    )
    got, gained = adjust(second, logits[:2] * 0, [0, 1]), logits[1].softmax(0).max() ** 0.2
    now = torch.tensor(0.5**0.2)  # of the first of two equal ids
    torch.testing.assert_close(got[0], 0.7 * torch.stack([now, 0.8 * gained]).log1p())
    torch.testing.assert_close(got[1], 0.7 * torch.stack([now, torch.tensor(0.0)]).log1p())


def test_a_row_that_has_joined_has_no_credit():
    """It is filled up with zeros, and the batch is a column wider for it."""
    slots = Slots.of(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1]]))
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    for _ in range(2):
        adjust(slots, logits, [0, 1, 2])
    memory = {name: torch.cat([kept, torch.zeros_like(kept)]) for name, kept in slots.memory.items()}
    wider = Slots.of(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[1], [1]]), memory=memory)
    both = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    plain, _, _ = Credit().add(both, torch.zeros(8, 0, dtype=torch.int64), torch.zeros(8, 0))
    got = adjust(wider, both, range(8))
    # The three slots that were there have some already; the fourth of their row is as new as the second row.
    assert (got != plain).any(1).tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength must be a finite number of at least 0"),
        ({"decay": 1.5}, "decay must be a number from 0 to 1"),
        ({"boost": -0.1}, "boost must be a finite number of at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NapDecodeError, match=message):
        Credit(**options)
