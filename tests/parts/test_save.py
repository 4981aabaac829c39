from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from models import Words
from samplers import NAMES, decoder

from nap_decode import (
    AnyOrderScheduler,
    Block,
    BlockReuse,
    CanvasTemplate,
    Committer,
    Decoder,
    Denoiser,
    MicroConfidenceCommitter,
    NapDecodeError,
    Sampler,
    Scheduler,
    ThresholdSelection,
)
from nap_decode.decoders.calibration import CalibratedConfidence
from nap_decode.decoders.llada import ProbabilityWithout
from nap_decode.decoders.lookahead import LookaheadCommitter
from nap_decode.parts.confidence import CONFIDENCES, divergence, support
from nap_decode.parts.save import describe, from_plain, to_plain


def prefer_low(candidates):
    return -candidates.tokens.double()


@dataclass(frozen=True, kw_only=True)
class Backwards(Scheduler):
    """Decodes the blocks from the last to the first."""

    twice: bool = False

    def open(self, left, lengths, held):
        return left * (left.flip(1).cumsum(1).flip(1) == left)


@pytest.fixture
def denoiser(tiny):
    return Denoiser(tiny, Words())


def sampler_of(denoiser, scheduler=None, template=None, **parts):
    scheduler = AnyOrderScheduler(tokens_per_step=2) if scheduler is None else scheduler
    template = CanvasTemplate.plain(6) if template is None else template
    return Sampler(denoiser, decoder=Decoder(scheduler, **parts), template=template)


def through_json(value, parts=()):
    return from_plain(json.loads(json.dumps(to_plain(value))), parts)


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_comes_back_from_a_file_a_worker_and_words(name, denoiser, tmp_path):
    original = decoder(name).set(close_on=[2, 7])
    for again in (through_json(original), pickle.loads(pickle.dumps(original))):
        assert again == original
        assert hash(again) == hash(original)
        assert describe(again) == describe(original)
    sampler = Sampler(denoiser, decoder=original, template=CanvasTemplate.nap(2, path_length=5, summary_length=2))
    sampler.save(tmp_path / "file")
    loaded = Sampler.load(tmp_path / "file", denoiser)
    assert loaded.decoder == original
    assert loaded.template == sampler.template
    assert loaded.describe() == sampler.describe()


def test_parts_of_ones_own(denoiser, tmp_path):
    sampler = sampler_of(
        denoiser,
        scheduler=Backwards(tokens_per_step=2, twice=True),
        committer=MicroConfidenceCommitter(confidence=prefer_low),
        template=CanvasTemplate.nap(2, path_length=3, path_header=[(5,), (6,)], summary_length=2, summary_header=(7,)),
    )
    sampler.save(tmp_path / "file")
    loaded = Sampler.load(tmp_path / "file", denoiser, parts=[Backwards, prefer_low])
    assert loaded.decoder == sampler.decoder
    assert loaded.template == sampler.template
    assert torch.equal(loaded([5, 6], seed=0).sequences, sampler([5, 6], seed=0).sequences)
    with pytest.raises(NapDecodeError, match=r"there is no part of yours .name them in parts=. 'Backwards'"):
        Sampler.load(tmp_path / "file", denoiser)


def test_a_file_holds_what_was_chosen_and_no_defaults(denoiser, tmp_path):
    sampler_of(denoiser).save(tmp_path / "file")
    content = json.loads((tmp_path / "file").read_text())
    assert content == {
        "format": 4,
        "cfg_scale": 0.0,
        "decoder": {
            "part": "parts.decoder.Decoder",
            "scheduler": {"part": "parts.scheduler.AnyOrderScheduler", "tokens_per_step": 2},
        },
        "template": {
            "part": "canvas.CanvasTemplate",
            "parts": [{"part": "canvas.Block", "name": "completion", "length": 6}],
        },
        "reuse": None,
    }


def test_reuse_is_saved(tiny, tmp_path):
    reuse = BlockReuse()
    sampler_of(Denoiser(tiny, Words(), reuse=reuse)).save(tmp_path / "file")
    assert Sampler.load(tmp_path / "file", tiny, Words()).denoiser.reuse == reuse


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
    assert to_plain(CONFIDENCES["margin"]) == {"function": "parts.confidence.margin"}


@pytest.mark.parametrize("kind", ["part", "function"])
@pytest.mark.parametrize(
    "name",
    [
        "Counter",
        "AnyOrderScheduler",
        "cli.main",
        "os.system",
        "builtins.eval",
        "base.errors.NapDecodeError",
        "base.errors.check_name.__globals__",
        "parts.scheduler.torch",
        "parts.scheduler.replace",
        "parts.scheduler.Canvas",
        "parts.save._named",
        "parts.scheduler",
        "..os.system",
        "parts.scheduler.",
        "",
        ".",
    ],
)
def test_a_file_names_nothing_but_parts_of_this_package(kind, name):
    """Each where it is defined: what a module imports is not its own."""
    with pytest.raises(NapDecodeError, match="there is no part"):
        from_plain({kind: name})


@pytest.mark.parametrize("name", [3, None, ["part"], {"part": "parts.scheduler.AnyOrderScheduler"}])
def test_the_name_of_a_part_is_a_text(name):
    with pytest.raises(NapDecodeError, match="is not a part: it has neither a 'part' nor a 'function'"):
        from_plain({"part": name})


def test_numbers_of_numpy_and_lists():
    assert to_plain(AnyOrderScheduler(steps=np.int64(4)))["steps"] == 4
    assert json.dumps(to_plain(ThresholdSelection(np.float32(0.5))))
    template = CanvasTemplate([[10], Block("a", 3)])
    assert through_json(template) == template


@pytest.mark.parametrize("part", [support, divergence, ProbabilityWithout((2,)), CalibratedConfidence((0.5, 0.25))])
def test_the_confidences_of_the_package_load_by_themselves(part):
    assert through_json(part) == part


def test_a_lookahead_is_described_whole():
    text = describe(LookaheadCommitter())
    assert "inner: MicroConfidenceCommitter" in text
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
        ('{"format": 1}', "has format 1, but this version reads 4"),
        ('{"format": 4}', "is not a file written by Sampler.save"),
        ('{"format": "4", "cfg_scale": 0, "decoder": 0, "template": 0}', "has format 4, but this version reads 4"),
        ('{"format": 3, "cfg_scale": 0, "scheduler": 0, "committer": 0, "template": 0}', "has format 3, but this"),
        ('{"format": 9, "cfg_scale": 0, "decoder": 0, "template": 0}', "has format 9, but this version reads 4"),
        (
            '{"format": 4, "cfg_scale": 0, "decoder": {"part": "parts.decoder.Decodr"}, "template": 0, "reuse": null}',
            "there is no part 'parts.decoder.Decodr' in this version; make it anew, or use the version that wrote it",
        ),
        ('{"format": 4, "cfg_scale": 0, "decoder": {"a": 1}, "template": 0, "reuse": null}', "has neither"),
        (
            '{"format": 4, "cfg_scale": 0, "decoder": {"part": "parts.scheduler.AnyOrderScheduler", "step": 3}, '
            '"template": null, "reuse": null}',
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
        "part": "parts.committer.MicroConfidenceCommitter",
        "confidence": {"function": "prefer_low", "own": True},
        "selection": {"part": "parts.selection.ThresholdSelection", "threshold": 0.25},
    }
    assert through_json(committer, [prefer_low]) == committer


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


@dataclass(frozen=True)
class Owning(ThresholdSelection):
    own: float = 0.5


def test_an_option_that_a_file_has_for_itself_is_refused():
    with pytest.raises(NapDecodeError, match="Owning cannot be saved with an option called 'own'; rename it"):
        to_plain(Owning(own=0.7))
