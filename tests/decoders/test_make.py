"""Decoders by name."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
from samplers import FREQUENCIES, NAMES

from nap_decode import Decoder, MicroConfidenceCommitter, NapDecodeError, QuotaSelection, decoders
from nap_decode.decoders.dream import DreamSchedule

GIVEN = {"pc_sampler": {"frequencies": FREQUENCIES}}


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_a_function_of_the_options_of_its_paper(name):
    function = decoders.DECODERS[name]
    assert function.__name__ == name
    assert getattr(decoders, name) is function
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    made = function(**GIVEN.get(name, {}))
    assert isinstance(made, Decoder)
    assert made == decoders.make(name, **GIVEN.get(name, {}))
    assert function.__module__.startswith("nap_decode.decoders.")


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_short(name):
    """At most 15 lines besides its documentation."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(decoders.DECODERS[name]))).body
    doc = function.body[0]
    assert ast.get_docstring(function)
    lines = function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1)
    assert lines <= 15


def test_options_of_the_paper_and_of_the_parts_mix():
    made = decoders.make("klass", threshold=0.8, temperature=0.7, block_length=8)
    assert made == decoders.klass(threshold=0.8, block_length=8).set(temperature=0.7)
    assert decoders.make("dream_entropy", steps=4, eps=0.1).scheduler.schedule == DreamSchedule(0.1)
    assert decoders.make("parallel_forced").scheduler.tokens_per_step == 4
    assert decoders.make("parallel_forced", steps=8) == decoders.parallel_forced(steps=8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fast_dllm", {}, "there is no decoder 'fast_dllm'. Did you mean 'fast_dllm_"),
        ("klass", {"treshold": 0.9}, "there is no option of klass 'treshold'. Did you mean 'threshold'"),
        ("klass", {"hold_until": 1.0}, "there is no option of klass 'hold_until'"),
        ("pc_sampler", {}, "pc_sampler needs frequencies; give it among its options"),
        ("dream_origin", {"steps": 4, "tokens_per_step": 3}, r"give steps .4. or tokens_per_step .3., not both"),
        ("parallel_forced", {"steps": 4, "tokens_per_step": 3}, r"give steps .4. or tokens_per_step .3., not both"),
        ("llada2", {"block_length": None}, "block_length must be a whole number of at least 1, but is None"),
        ("llada21_editing", {"block_length": None}, "block_length must be a whole number of at least 1, but is None"),
        ("wino", {"threshold": None}, "threshold must be a number, but is None"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(NapDecodeError, match=message):
        decoders.make(name, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.5", 0.5),
        (" 1e-3 ", 0.001),
        ("[11, 12]", [11, 12]),
        ("null", None),
        ("None", None),
        ("true", True),
        ("True", True),
        ("false", False),
        ("False", False),
        ("margin", "margin"),
        ('"4"', "4"),
        ("", ""),
    ],
)
def test_values_of_command_lines(text, value):
    got = decoders.parse_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dream_entropy", {"alg_temp": 0.5, "selection": QuotaSelection()}),
        ("dream_entropy", {"alg_temp": 0.5, "committer": MicroConfidenceCommitter()}),
        ("wino", {"back_threshold": 0.5, "reviser": None}),
        ("credit", {"strength": 0.5, "adjustment": None}),
        ("klass", {"threshold": 0.5, "selection": QuotaSelection()}),
    ],
)
def test_an_option_of_a_part_that_is_exchanged_is_refused(name, options):
    with pytest.raises(NapDecodeError, match=next(iter(options))):
        decoders.make(name, **options)
