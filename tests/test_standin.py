"""The stand-in for a device sees what it is there to see."""

from __future__ import annotations

import pytest
import standin
import torch
from models import Words, tiny_model
from samplers import PROMPTS, make

from nap_decode import Denoiser

WHY_NOT = standin.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture
def device():
    with standin.Device(package="/tests/") as opened:
        yield opened


def halve(scores, *, fault=None):
    """A step of some loop, with a fault planted in it."""
    if fault == "item" and scores.max().item() > 9:
        return scores
    if fault == "if" and scores.max() > 9:
        return scores
    half = torch.full(scores.shape, 0.5, device="cpu" if fault == "CPU tensor" else scores.device)
    if fault == "mask":
        return scores[scores > 0]
    if fault == "nonzero":
        return scores.nonzero()
    if fault == "pageable":
        return scores * torch.ones(3).to(scores.device)
    if fault == "non-blocking from pageable":
        return scores * torch.ones(3).to(scores.device, non_blocking=True)
    if fault == "index":
        return scores[torch.tensor([0, 1])]
    if fault == "list":
        return scores.tolist()
    return scores * half


def test_a_step_without_fault_does_not_wait(device):
    scores = torch.arange(6.0).view(2, 3).pin_memory().to("cuda", non_blocking=True)
    half = halve(scores)
    assert half.device == scores.device == torch.device("cuda:0")
    scores[:, 1:] += 1
    scores.clamp_(max=3)
    assert device.waits == []
    assert half.tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    assert scores.tolist() == [[0, 2, 3], [3, 3, 3]]
    assert [wait[2] for wait in device.waits] == ["copy of (2, 3) from the device"] * 2


@pytest.mark.parametrize(
    "fault", ["item", "if", "mask", "nonzero", "pageable", "non-blocking from pageable", "index", "list"]
)
def test_a_planted_wait_is_seen_and_where_it_is(device, fault):
    scores = torch.ones(2, 3, device="cuda")
    device.waits.clear()
    halve(scores, fault=fault)
    (wait,) = device.waits
    assert wait[:2] == ("test_standin.py", "halve")


def test_a_planted_cpu_tensor_raises(device):
    with pytest.raises(
        standin.MixedDevicesError, match=r"mul of tensors on two devices: \(2, 3\) on cuda:0, \(2, 3\) on cpu"
    ):
        halve(torch.ones(2, 3, device="cuda"), fault="CPU tensor")
    with pytest.raises(standin.MixedDevicesError):
        torch.ones(2, 3).add_(torch.ones(2, 3, device="cuda"))


def test_a_number_on_the_cpu_may_go_along(device):
    assert (torch.ones(2, device="cuda") + torch.tensor(1.0)).tolist() == [2, 2]


def test_nothing_is_computed_when_it_is_closed():
    with standin.Device():
        ones = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="closed"):
        ones + 1
    with pytest.raises((AssertionError, NotImplementedError), match="CUDA"):
        torch.ones(2, device="cuda")


@pytest.mark.parametrize("fault", ["item", "CPU tensor"])
def test_a_fault_that_is_planted_in_a_decode_is_seen(monkeypatch, fault):
    from nap_decode.parts.slots import Slots

    pack = Slots.pack

    def faulty(wanted, *args, **options):
        if fault == "item":
            wanted.sum().item()
        else:
            wanted = wanted & torch.ones(wanted.shape, dtype=torch.bool)
        return pack(wanted, *args, **options)

    with standin.Device() as device:
        sampler = make(Denoiser(tiny_model().cuda(), Words()), "parallel_forced")
        sampler(PROMPTS)
        device.waits.clear()
        passes = sampler(PROMPTS).forward_passes
        before = len(device.waits)
        monkeypatch.setattr(Slots, "pack", faulty)
        device.waits.clear()
        if fault == "item":
            sampler(PROMPTS)
            assert len(device.waits) == before + passes
        else:
            with pytest.raises(standin.MixedDevicesError, match="and of tensors"):
                sampler(PROMPTS)
