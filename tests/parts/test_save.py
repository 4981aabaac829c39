from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from models import MASK, Words

from nap_decode import (
    AnyOrderScheduler,
    Block,
    BlockScheduler,
    CalibratedConfidence,
    CanvasTemplate,
    Committer,
    Denoiser,
    LookaheadCommitter,
    MicroConfidenceCommitter,
    NapDecodeError,
    Sampler,
    ThresholdSelection,
)
from nap_decode.parts.confidence import CONFIDENCES, ProbabilityWithout, divergence, support
from nap_decode.parts.save import describe, from_plain, to_plain


def prefer_low(candidates):
    return -candidates.tokens.double()


@dataclass(frozen=True, kw_only=True)
class Backwards(BlockScheduler):
    """Decodes the blocks from the last to the first."""

    twice: bool = False

    def phases(self, lengths, held):
        return torch.diag_embed(lengths).flip(1)


@pytest.fixture
def denoiser(tiny):
    return Denoiser(tiny, Words())


def sampler_of(denoiser, **parts):
    parts = {"scheduler": AnyOrderScheduler(tokens_per_step=2), "template": CanvasTemplate.plain(6)} | parts
    return Sampler(denoiser, **parts)


def test_parts_of_ones_own(denoiser, tmp_path):
    sampler = sampler_of(
        denoiser,
        scheduler=Backwards(tokens_per_step=2, twice=True),
        committer=MicroConfidenceCommitter(confidence=prefer_low),
        template=CanvasTemplate.nap(2, path_length=3, path_header=[(5,), (6,)], summary_length=2, summary_header=(7,)),
    )
    sampler.save(tmp_path / "file")
    loaded = Sampler.load(tmp_path / "file", denoiser, parts=[Backwards, prefer_low])
    assert loaded.scheduler == sampler.scheduler
    assert loaded.committer == sampler.committer
    assert loaded.template == sampler.template
    assert torch.equal(loaded([5, 6], seed=0).sequences, sampler([5, 6], seed=0).sequences)
    with pytest.raises(NapDecodeError, match=r"there is no part of yours .name them in parts=. 'Backwards'"):
        Sampler.load(tmp_path / "file", denoiser)


def test_a_file_holds_what_was_chosen_and_no_defaults(denoiser, tmp_path):
    sampler_of(denoiser).save(tmp_path / "file")
    content = json.loads((tmp_path / "file").read_text())
    assert content == {
        "format": 3,
        "cfg_scale": 0.0,
        "close_on": [],
        "scheduler": {"part": "AnyOrderScheduler", "tokens_per_step": 2},
        "committer": {"part": "MicroConfidenceCommitter"},
        "template": {"part": "CanvasTemplate", "parts": [{"part": "Block", "name": "completion", "length": 6}]},
        "reuse": None,
    }


def test_ends_are_saved(denoiser, tmp_path):
    sampler_of(denoiser).replace(close_on=[2, 7]).save(tmp_path / "file")
    assert Sampler.load(tmp_path / "file", denoiser).close_on == (2, 7)


def test_files_of_the_first_format_can_be_read(denoiser, tmp_path):
    sampler_of(denoiser).save(tmp_path / "file")
    content = json.loads((tmp_path / "file").read_text())
    del content["close_on"]
    (tmp_path / "file").write_text(json.dumps(content | {"format": 1}))
    assert Sampler.load(tmp_path / "file", denoiser).describe() == sampler_of(denoiser).describe()


def test_guidance_is_saved(tiny, tmp_path):
    sampler_of(Denoiser(tiny, Words(), cfg_scale=1.5)).save(tmp_path / "file")
    assert Sampler.load(tmp_path / "file", tiny, Words()).denoiser.cfg_scale == 1.5
    with pytest.raises(NapDecodeError, match=r"the file has cfg_scale 1.5, but the Denoiser has 0.0"):
        Sampler.load(tmp_path / "file", Denoiser(tiny, Words()))


def test_logits_processors_are_refused(tiny, tmp_path):
    sampler = sampler_of(Denoiser(tiny, Words(), logits_processor=[lambda ids, scores: scores]))
    with pytest.raises(NapDecodeError, match="logits processors cannot be saved"):
        sampler.save(tmp_path / "file")


class Plain(Committer):
    def __init__(self, thing):
        self.thing = thing

    def __call__(self, slots, predict):
        raise NotImplementedError


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, candidates):
        return self.weight * candidates.best


def margin(candidates):
    """Not the package's."""
    return -candidates.positions.double()


def test_parts_with_the_names_of_ours_are_not_taken_for_them():
    plain = to_plain(MicroConfidenceCommitter(confidence=margin))
    assert from_plain(plain, [margin]).confidence is margin
    with pytest.raises(NapDecodeError, match="there is no part of yours"):
        from_plain(plain)
    assert to_plain(CONFIDENCES["margin"]) == {"function": "margin"}
    with pytest.raises(NapDecodeError, match="there is no part 'Counter'"):
        from_plain({"part": "Counter"})


def test_numbers_of_numpy_and_lists():
    assert to_plain(AnyOrderScheduler(steps=np.int64(4)))["steps"] == 4
    assert json.dumps(to_plain(ThresholdSelection(np.float32(0.5))))
    template = CanvasTemplate([[10], Block("a", 3)])
    assert from_plain(json.loads(json.dumps(to_plain(template)))) == template


@pytest.mark.parametrize("part", [support, divergence, ProbabilityWithout((2,)), CalibratedConfidence((0.5, 0.25))])
def test_the_confidences_of_the_package_load_by_themselves(part):
    assert from_plain(json.loads(json.dumps(to_plain(part)))) == part


def test_a_lookahead_is_described_whole():
    text = describe(LookaheadCommitter())
    assert "committer: MicroConfidenceCommitter" in text
    assert "selection: ThresholdSelection" in text


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2), object(), {"a": 1}, Weighted(2.0), partial(prefer_low), lambda candidates: candidates.best],
)
def test_what_cannot_be_saved(value):
    with pytest.raises(NapDecodeError, match="cannot be saved; make the part a function with a name, or a frozen"):
        to_plain(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "is not a file written by Sampler.save"),
        ("[]", "is not a file written by Sampler.save"),
        ('{"format": 1}', "is not a file written by Sampler.save"),
        (
            '{"format": "1", "cfg_scale": 0, "scheduler": 0, "committer": 0, "template": 0}',
            "has format 1, but this version reads 3",
        ),
        (
            '{"format": 9, "cfg_scale": 0, "scheduler": 0, "committer": 0, "template": 0}',
            "has format 9, but this version reads 3",
        ),
        (
            '{"format": 1, "cfg_scale": 0, "scheduler": {"part": "AnyOrderSchedular"}, "committer": 0, "template": 0}',
            "Did you mean 'AnyOrderScheduler'",
        ),
        (
            '{"format": 1, "cfg_scale": 0, "scheduler": {"a": 1}, "committer": 0, "template": 0}',
            "is not a part: it has neither",
        ),
        (
            '{"format": 1, "cfg_scale": 0, "scheduler": {"part": "AnyOrderScheduler", "step": 3}, "committer": 0, '
            '"template": 0}',
            "AnyOrderScheduler cannot be made from {'step': 3}",
        ),
    ],
)
def test_bad_files(denoiser, tmp_path, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(NapDecodeError, match=message):
        Sampler.load(tmp_path / "file", denoiser)


def test_a_part_that_is_nothing_but_its_class():
    class Even:
        def __call__(self, candidates):
            return -(candidates.tokens % 2).double()

    plain = to_plain(MicroConfidenceCommitter(confidence=Even()))
    assert plain["confidence"] == {"part": "Even", "own": True}
    assert isinstance(from_plain(plain, [Even]).confidence, Even)


def test_functions_and_nested_parts():
    committer = MicroConfidenceCommitter(confidence=prefer_low, selection=ThresholdSelection(0.25))
    plain = to_plain(committer)
    assert plain == {
        "part": "MicroConfidenceCommitter",
        "confidence": {"function": "prefer_low", "own": True},
        "selection": {"part": "ThresholdSelection", "threshold": 0.25},
    }
    assert from_plain(json.loads(json.dumps(plain)), [prefer_low]) == committer


def test_a_description_names_every_choice(denoiser):
    committer = MicroConfidenceCommitter(temperature=0.5, confidence=prefer_low, selection=ThresholdSelection(0.25))
    text = sampler_of(denoiser, scheduler=Backwards(), committer=committer).describe()
    assert text.splitlines()[1:] == [
        "  canvas: completion (6)",
        "  scheduler: Backwards()",
        "    Decodes the blocks from the last to the first.",
        "  committer: MicroConfidenceCommitter(temperature=0.5, confidence=prefer_low)",
        "    Proposes a token for every open slot, scores it, and commits the best of each block.",
        "    selection: ThresholdSelection(threshold=0.25)",
        "      Every slot that reaches a confidence (Fast-dLLM, arXiv 2505.22618, algorithm 1).",
    ]
    assert describe(Plain(3)) == "Plain()"


def test_replacing_keeps_the_rest(denoiser):
    sampler = sampler_of(denoiser)
    other = sampler.replace(committer=MicroConfidenceCommitter(temperature=1.0))
    assert other.denoiser is denoiser
    assert other.scheduler is sampler.scheduler
    assert other.template is sampler.template
    assert sampler.committer == MicroConfidenceCommitter()
    assert MASK not in other([5], seed=1).sequences
