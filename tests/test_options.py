"""Options of every public part: what is no such value is refused by name, never converted without a word."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from models import MASK, tiny_model

import nap_decode
from nap_decode import (
    ARnessMeter,
    Block,
    CanvasTemplate,
    Decoder,
    Denoiser,
    NapDecodeError,
    ParallelForcedSampler,
    Sampler,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
    bulk,
    chain_log_likelihood,
    decoders,
    log_likelihood_bound,
)
from nap_decode.base.errors import check_seed
from nap_decode.measure import parallelism
from nap_decode.run.sampler import RunOptions

DENOISER = Denoiser(tiny_model(), mask_token_id=MASK)
SAMPLER = Sampler(DENOISER, decoder=decoders.make("llada_low_confidence"))
TEMPLATE = CanvasTemplate.plain(2)
FREQUENCIES = [0.5] * 24


def modules_of(*names):
    """Modules, and for a package those in it."""
    for name in names:
        module = importlib.import_module(name)
        yield module
        yield from (
            importlib.import_module(m.name) for m in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}.")
        )


PARTS = [
    part
    for module in modules_of("nap_decode.parts", "nap_decode.decoders", "nap_decode.speed.reuse")
    for part in vars(module).values()
    if inspect.isclass(part) and dataclasses.is_dataclass(part) and part.__module__ == module.__name__
]
GIVEN = {  # what else they need
    "CalibratedConfidence": {"frequencies": FREQUENCIES},
    "CappedSelection": {"capped": ThresholdSelection(0.5)},
    "Block": {"name": "a", "length": 1},
    "pc_sampler": {"frequencies": FREQUENCIES},
    "on_grid": {"block_length": 2},
    "top_k": {"temperature": 1.0},
    "top_p": {"temperature": 1.0},
    "tolerance": {},
}
NOT_OPTIONS = {
    "Needs",
    "Left",
    "Plan",
    "Kept",
    "Slots",
    "Decision",
    "Proposal",
    "Candidates",
}  # parts make these for each other


CALLS = ("call", "generate", "stream")  # whose flags decide nothing about the tokens


def calls():
    """Name, function, and the arguments it needs besides, of everything that has options."""
    for part in [*PARTS, Block, nap_decode.MicroConfidenceCommitter]:
        if part.__name__ not in NOT_OPTIONS and not part.__name__.startswith("_") and not inspect.isabstract(part):
            yield part.__name__, part, GIVEN.get(part.__name__, {})
    for name, decoder in decoders.DECODERS.items():
        yield name, decoder, GIVEN.get(name, {})
    rows = {"prompts": [[5]], "completions": [[6]], "denoiser": DENOISER}
    yield "log_likelihood_bound", log_likelihood_bound, rows
    yield "chain_log_likelihood", chain_log_likelihood, rows
    yield "ParallelForcedSampler", ParallelForcedSampler, {"model": DENOISER}
    yield "nap", CanvasTemplate.nap, {}
    yield "plain", CanvasTemplate.plain, {}
    yield "call", SAMPLER, {"prompts": [5]}
    yield "generate", SAMPLER.generate, {"input_ids": torch.tensor([[5]])}
    yield "stream", lambda **o: list(SAMPLER.stream([[5]], **{"max_new_tokens": 2} | o)), {"of": SAMPLER.stream}
    yield "cut_into_parts", bulk.cut_into_parts, {"rows": [{"id": 1, "prompt": "a"}]}
    yield (
        "BulkDecoder",
        bulk.BulkDecoder,
        {"sampler": Sampler(DENOISER, decoder=SAMPLER.decoder, template=TEMPLATE), "output": "nowhere"},
    )
    points = {"points": [(1, 90)]}
    yield "accuracy_under_parallelism", parallelism.accuracy_under_parallelism, points


def options(kind):
    """Every option of a kind: ``(name of its owner, function, other arguments, name, whether None is a value)``."""
    for owner, function, given in calls():
        signature = inspect.signature(given.get("of", function), eval_str=False)
        for name, parameter in signature.parameters.items():
            kinds = [one.strip() for one in str(parameter.annotation).split("|")]
            if kind in kinds and name not in ("mask_token_id", "seed") and not (kind == "bool" and owner in CALLS):
                others = {key: value for key, value in given.items() if key not in ("of", name)}
                yield pytest.param(function, others | GIVEN.get(name, {}), name, "None" in kinds, id=f"{owner}-{name}")


def test_every_public_part_is_looked_at():
    looked_at = {inspect.unwrap(given.get("of", function)) for _, function, given in calls()}
    elsewhere = {"Denoiser", "ModelFamily", "Sampler"}  # have tests of their own
    elsewhere |= {
        "ARness",
        "DecodeState",
        "DecodeTrace",
        "LogLikelihood",
        "SamplerOutput",
    }  # results
    for name in set(nap_decode.__all__) - elsewhere - {"decoders"}:
        thing = getattr(nap_decode, name)
        annotations = getattr(thing, "__init__" if inspect.isclass(thing) else "__call__", thing)
        kinds = {
            kind for p in inspect.signature(annotations).parameters.values() for kind in str(p.annotation).split(" ")
        }
        if kinds & {"int", "float"} and not inspect.isabstract(thing):
            assert thing in looked_at, name


@pytest.mark.parametrize("seed", [2.7, True, "3", None, math.nan])
def test_seeds(seed):
    with pytest.raises(NapDecodeError, match="a seed must be a whole number"):
        check_seed(seed)
    assert check_seed(np.int32(-1)) == check_seed(2**64 - 1) == -1


@pytest.mark.parametrize("ks", [(2.7,), (True,), ("3",), 0, (np.float64(1),)])
def test_values_of_k(ks):
    with pytest.raises(NapDecodeError, match="k must be a whole number"):
        ARnessMeter(ks)


def test_numbers_of_numpy_are_numbers():
    assert CanvasTemplate.nap(np.int64(2), path_length=np.int32(3)) == CanvasTemplate.nap(2, path_length=3)
    scheduler = SemiAutoregressiveScheduler(tokens_per_step=np.int64(2), block_length=np.int8(2))
    sampler = Sampler(DENOISER, decoder=Decoder(scheduler))
    expected = sampler.set(scheduler=SemiAutoregressiveScheduler(tokens_per_step=2, block_length=2))
    outs = [one([5, np.int64(6)], max_new_tokens=np.int64(4)) for one in (sampler, expected)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].forward_passes == 2


@pytest.mark.parametrize("path_length", [2.7, True, "3", [2, 2.7, 2], [True] * 3, [2, None, 2]])
def test_path_lengths(path_length):
    with pytest.raises(NapDecodeError, match="path_length must be a whole number of at least 1"):
        CanvasTemplate.nap(3, path_length=path_length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"close_on": [2.0]}, "a token id of close_on must be a whole number of at least 0, but is 2.0"),
        ({"close_on": [True]}, "a token id of close_on must be a whole number"),
        ({"close_on": 2}, "close_on must be a list of token ids, but is 2"),
        ({"committer": 0}, "committer must be a Committer"),
        ({"scheduler": 0}, "scheduler must be a Scheduler"),
    ],
)
def test_parts_of_a_decoder(options, message):
    with pytest.raises(NapDecodeError, match=message):
        Decoder(**{"scheduler": SAMPLER.decoder.scheduler} | options)


@pytest.mark.parametrize("template", ["text", ()])
def test_the_template_of_a_sampler(template):
    with pytest.raises(NapDecodeError, match="template must be a CanvasTemplate, such as"):
        Sampler(DENOISER, decoder=SAMPLER.decoder, template=template)


def refused(function, given, name, value):
    with pytest.raises(NapDecodeError) as raised:
        function(**given, **{name: value})
    said = str(raised.value)
    assert name.replace("_", " ") in said.replace("_", " "), said
    assert "must be" in said
    assert repr(value) in said


@pytest.mark.parametrize(("function", "given", "name", "may_be_none"), list(options("int")))
def test_whole_numbers(function, given, name, may_be_none):
    wrong = [2.7, 2.0, True, "3", math.nan, -1, np.float64(2.0), *([] if may_be_none else [None])]
    for value in wrong:
        refused(function, given, name, value)


@pytest.mark.parametrize(("function", "given", "name", "may_be_none"), list(options("float")))
def test_numbers(function, given, name, may_be_none):
    for value in [True, "3", math.nan, *([] if may_be_none else [None])]:
        refused(function, given, name, value)


@pytest.mark.parametrize(("function", "given", "name", "may_be_none"), list(options("bool")))
def test_flags(function, given, name, may_be_none):
    for value in ["False", 0, 1, "", *([] if may_be_none else [None])]:
        refused(function, given, name, value)


WRONG_IN_A_RUN = {  # for every option of a run: what is said, and of what
    "seed": ("a seed must be a whole number", ["1", 2.5, True]),
    "row_seeds": ("(row_seeds must be a list with a seed for every row|a seed must .*)", [3, "1", [0.5], np.array(1)]),
    "callback": ("callback must be a function of the DecodeState", [3, "print"]),
    "streamer": (r"a streamer must have put\(ids\) and end\(\)", [3, "stderr", print, [3]]),
    "interruptible": ("interruptible must be True or False", ["no", 1, None]),
    "progress": ("progress must be True or False", ["no", 0]),
}
WAYS = {
    "call": lambda options: SAMPLER([5], max_new_tokens=2, **options),
    "generate": lambda options: SAMPLER.generate(torch.tensor([[5]]), max_new_tokens=2, **options),
    "infill": lambda options: SAMPLER.infill([5, MASK], **options),
    "stream": lambda options: list(SAMPLER.stream([[5]], max_new_tokens=2, **options)),
}
OF_A_STREAM = inspect.signature(SAMPLER.stream).parameters


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in WAYS for name in RunOptions.__annotations__ if way != "stream" or name in OF_A_STREAM],
)
def test_options_of_a_run(monkeypatch, way, name):
    monkeypatch.setattr(Denoiser, "predict", lambda *_, **__: pytest.fail("a forward pass was made"))
    message, values = WRONG_IN_A_RUN[name]
    for value in values:
        [inner] = value if isinstance(value, list) else [value]
        with pytest.raises(NapDecodeError, match=f"{message}, .*but is {re.escape(repr(inner))}"):
            WAYS[way]({name: value})
