from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from models import MASK

from nap_decode import AnyOrderScheduler, Decoder, DecodeTrace, Denoiser, NapDecodeError, Sampler


@pytest.fixture(scope="module")
def trace(tiny):
    sampler = Sampler(Denoiser(tiny, mask_token_id=MASK), decoder=Decoder(AnyOrderScheduler(tokens_per_step=3)))
    return sampler([[5, 6], [7]], max_new_tokens=7).trace


def test_saves_to_one_file_and_loads_back(trace, tmp_path):
    path = tmp_path / "decode.trace"
    trace.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["decode.trace"]
    loaded = DecodeTrace.load(path)
    for name in ("tokens", "block", "step", "forward_passes"):
        assert torch.equal(getattr(loaded, name), getattr(trace, name))
    torch.testing.assert_close(loaded.confidence, trace.confidence, equal_nan=True, rtol=0, atol=0)
    for name in ("block_names", "mask_token_id", "end_token_ids"):
        assert getattr(loaded, name) == getattr(trace, name)


def test_any_steps_canvas(trace):
    assert torch.equal(trace.canvas_at(0), torch.where(trace.block >= 0, MASK, trace.tokens))
    assert torch.equal(trace.canvas_at(99), trace.tokens)
    assert [(trace.canvas_at(s) == MASK).sum(1).tolist() for s in range(4)] == [[7, 7], [4, 4], [2, 2], [0, 0]]


def test_confidence_is_recorded_where_something_was_decoded(trace):
    assert torch.equal(trace.confidence.isnan(), trace.block < 0)
    assert (trace.confidence[trace.block >= 0] > 0).all()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_files_that_are_no_trace(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(NapDecodeError, match=r"is not a trace written by DecodeTrace.save"):
        DecodeTrace.load(path)


def test_other_archives_and_newer_formats(trace, tmp_path, monkeypatch):
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    np.savez(tmp_path / "bare.npz", header=np.array(json.dumps({})))
    np.save(tmp_path / "array.npy", np.zeros(2))
    for name in ("other.npz", "bare.npz", "array.npy"):
        with pytest.raises(NapDecodeError, match="is not a trace"):
            DecodeTrace.load(tmp_path / name)
    monkeypatch.setattr("nap_decode.results.trace._FORMAT", 2)
    trace.save(tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(NapDecodeError, match="has trace format 2, but this version reads 1"):
        DecodeTrace.load(tmp_path / "new")


def test_before_end():
    trace = DecodeTrace(
        tokens=torch.tensor([[2, 9, 2, 9, 9, 8, 2], [9, 9, 9, 9, 9, 2, 2]]),
        block=torch.tensor([[-1, 0, 0, 0, 1, 1, 1]] * 2),
        step=torch.zeros(2, 7, dtype=torch.int64),
        confidence=torch.zeros(2, 7),
        forward_passes=torch.tensor([1, 1]),
        block_names=("a", "b"),
        mask_token_id=MASK,
    )
    assert torch.equal(trace.before_end(), trace.block >= 0)
    by_two = dataclasses.replace(trace, end_token_ids=(2,))
    assert by_two.before_end().long().tolist() == [[0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]]
    by_two_or_eight = dataclasses.replace(trace, end_token_ids=(2, 8))
    assert by_two_or_eight.before_end().long().tolist() == [[0, 1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
