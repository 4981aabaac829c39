from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from nap_decode import NapDecodeError, ParallelForcedSampler, Sampler, decoders, demo
from nap_decode.demo.problems import NimSum, running_totals, sample_problems
from nap_decode.demo.show import HELD_OUT_SEED, LiveCanvas, run_demo

PLACES = {"path_length": demo.PATH_LENGTH, "summary_length": demo.SUMMARY_LENGTH}


def test_running_totals_all_end_in_the_answer():
    problems = sample_problems(50, seed=1)
    totals = running_totals(np.array([p.digits for p in problems]))
    for problem, paths in zip(problems, totals, strict=True):
        answer = 0
        for digit in problem.digits:
            answer ^= digit
        assert problem.answer == answer
        assert (paths[:, -1] == answer).all()
        assert paths[1, 0] == problem.digits[4] ^ problem.digits[5]


def test_the_example_of_the_docstring():
    totals = running_totals(np.array([[6, 0, 6, 4, 6, 2, 1, 2, 4, 7, 0, 6]]))[0].tolist()
    assert totals == [
        [6, 0, 4, 2, 0, 1, 3, 7, 0, 0, 6],
        [4, 5, 7, 3, 4, 4, 2, 4, 4, 2, 6],
        [3, 3, 5, 3, 3, 5, 1, 7, 5, 4, 6],
    ]


@pytest.mark.parametrize(
    ("text", "correct"), [("6", True), (" 1 6 ", True), ("6 1", False), ("", False), ("<eos>", False)]
)
def test_is_correct(text, correct):
    assert NimSum((6,) + (0,) * 11).is_correct(text) == correct


def test_the_embedded_model_solves_held_out_problems(embedded):
    problems = sample_problems(40, HELD_OUT_SEED + 1)
    for tokens_per_step in (2, 6):
        out = ParallelForcedSampler(*embedded, tokens_per_step=tokens_per_step, **PLACES)([p.prompt for p in problems])
        assert sum(p.is_correct(s) for p, s in zip(problems, out.summary, strict=True)) >= 38  # chance: 5
        assert set(out.finish_reason) == {"end"}


def test_demo_prints_a_canvas_and_a_table():
    file = io.StringIO()
    run_demo(problems=3, tokens_per_step=(6, 12), file=file)
    text = file.getvalue()
    assert "\x1b" not in text
    assert text.count("<summary>") == 9  # a canvas after each of nine steps
    assert re.search(r"The answer \d is (correct|wrong)", text)
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["6", "6"], ["12", "3"]]
    assert {len(row) for row in rows} == {2 + 2 * 4}
    assert [row[9] for row in rows] == ["1.00", "1.00"]  # from left to right
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2::2])
    assert max(map(len, text.splitlines()[-12:])) <= 100


def test_a_terminal_is_redrawn_in_colour(embedded):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    sampler = ParallelForcedSampler(*embedded, tokens_per_step=12, **PLACES)
    sampler(sample_problems(1, 2026)[0].prompt, callback=LiveCanvas(embedded[1], file, pause=0))
    text = file.getvalue()
    assert text.count("\x1b[6F\x1b[J") == 2  # three frames of six lines
    assert "\x1b[1;36m" in text  # path 1, fresh
    assert "\x1b[35m" in text  # path 2, older or masked
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).splitlines()[-6:]
    assert [line.split(" ")[0] for line in plain] == ["step", "<bos>", "<think", "<think", "<think", "<summary>"]


def test_the_embedded_models_are_those_of_the_study():
    """Two kinds, the same compute, and together under 8 MB."""
    logs = [
        json.loads((directory / "training_log.json").read_text())
        for directory in (demo.CHECKPOINT, demo.CHAIN_CHECKPOINT)
    ]
    assert [log["config"]["name"] for log in logs] == ["paths_best", "chain_best"]
    assert [log["log"][-1]["step"] for log in logs] == [1500, 1500]
    assert sum(file.stat().st_size for file in demo.CHECKPOINT.parent.rglob("*") if file.is_file()) < 8e6


def test_the_chain_model_solves_held_out_problems():
    model, tokenizer = demo.load("chain")
    problems = sample_problems(40, HELD_OUT_SEED + 1)
    right = {}
    for name, tokens_per_step in (("left_to_right", 4), ("llada_low_confidence", 18)):
        sampler = Sampler(model, tokenizer, decoders.make(name, tokens_per_step=tokens_per_step))
        texts = sampler([p.prompt for p in problems], max_new_tokens=35).text
        right[tokens_per_step] = sum(p.is_correct(text) for p, text in zip(problems, texts, strict=True))
    assert right[4] >= 38  # chance: 5
    assert right[18] <= 15  # in two steps, that is too much for it


def test_there_are_two_models():
    with pytest.raises(NapDecodeError, match=r"there is no embedded model 'path'\. Did you mean 'paths'"):
        demo.load("path")
