"""Rows as release 0.6.0 decoded them: tokens, commit steps, forward passes and draws of every decoder.

``same_rows.json`` was written by that release.  Each case says how it was decoded, and of each row a digest of its
tokens and of its steps, its forward passes, the sum of its confidences, and the steps that closing blocks saved or a
digest of the positions that passes with reuse computed; one case of each decoder has its rows in full.
Blocks that close early under a fixed schedule are left out: since then their budget goes to whatever is open.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from models import MASK, Words, needs_transformers_5, tiny_model
from samplers import HOLES, OPTIONS, PROMPTS, TEMPLATE, macro_parallel

from nap_decode import (
    BlockReuse,
    CommittedReuse,
    Denoiser,
    DriftReuse,
    ModelFamily,
    PromptReuse,
    Sampler,
    decoders,
)
from nap_decode.speed.graphs import Graphs

FIXTURES = json.loads((Path(__file__).parent / "same_rows.json").read_text())
MORE_PROMPTS = [*PROMPTS, [9, 5, 9, 5, 9, 5, 9], [10], PROMPTS[0]]
POLICIES = {
    "CommittedReuse": CommittedReuse(),
    "DriftReuse": DriftReuse(max_age=4, max_age_committed=None),  # as it was by default then
    "BlockReuse": BlockReuse(),
    "PromptReuse": PromptReuse(refresh_every=3),
}
FAMILIES = {
    "shift": ModelFamily(name="shifted", shift=True),
    "none": ModelFamily(name="untold", attention="none"),
    "4d": ModelFamily(name="blocks", attention="4d", block_size=4),
    "additive": ModelFamily(name="blocks", attention="additive", block_size=4),
}


def forget(state):
    """All is masked again."""
    return torch.where(state.canvas.decodable, MASK, state.tokens) if state.step == 3 else None


def fill(state):
    """All is committed."""
    return torch.where(state.masked, 9, state.tokens) if state.step == 2 else None


def some(state):
    """The first block is masked again, twice."""
    again = (state.canvas.block == 0) & ~state.masked
    return torch.where(again, MASK, state.tokens) if state.step in (1, 2) else None


CALLBACKS = {None: None, "forget": forget, "fill": fill, "some": some}


@pytest.fixture(scope="module")
def denoisers():
    made: dict[str, Denoiser] = {}

    def make(kind):
        if kind not in made:
            policy, *guided = kind.split(", ")
            options = {"cfg_scale": 1.0} if "guided" in (policy, *guided) else {}
            if policy in POLICIES:
                model = tiny_model(attn_implementation="sdpa")
            else:
                model = tiny_model().to(torch.bfloat16 if kind == "bfloat16" else torch.float64)
            made[kind] = Denoiser(model, Words(), reuse=POLICIES.get(policy), **options, family=FAMILIES.get(kind))
        return made[kind]

    return make


def sampler_of(case, denoiser):
    name = case["decoder"]
    options = {k: v for k, v in OPTIONS[name].items() if not case.get("bare") or k == "frequencies"}
    options |= case.get("options", {})
    sampler = Sampler(denoiser, decoder=decoders.make(name, **options), template=TEMPLATE)
    if case.get("macro"):
        sampler = macro_parallel(sampler)
    if case.get("close_on"):
        sampler = sampler.set(close_on=range(10, 16))
    if case.get("graphs"):
        sampler._prepared = (*sampler._prepared[:2], Graphs(record))
    return sampler


def record(function):
    """Stands in for capturing: runs a function a few times, as warming up does, and gives it back."""
    for _ in range(3):
        function()
    return function


def decode(case, sampler):
    options = {"callback": CALLBACKS[case.get("callback")]}
    match case["way"]:
        case "batch":
            return [sampler(PROMPTS, row_seeds=[100, 101, 102], **options)]
        case "infill":
            return [sampler.infill(HOLES, row_seeds=[100, 101, 102], **options)]
        case "plain":
            return [sampler(PROMPTS, max_new_tokens=20, seed=5)]
        case "unseeded":
            torch.manual_seed(7)
            return [sampler(PROMPTS)]
    return list(sampler.stream(MORE_PROMPTS, max_batch=2, row_seeds=range(50, 56)))


def rows_of(outs):
    """Rows without padding, as plain values."""
    for out in outs:
        trace = out.trace
        for row, there in enumerate(out.canvas.attention_mask.bool()):
            closed = None if trace.closed is None else trace.closed[row][there].nonzero()[:, 0].tolist()
            yield {
                "tokens": trace.tokens[row][there].tolist(),
                "step": trace.step[row][there].tolist(),
                "confidence": trace.confidence[row][there].tolist(),
                "passes": int(trace.forward_passes[row]),
                "closed": closed,
                "saved": None if out.steps_saved is None else out.steps_saved[row],
                "forwarded": None if trace.forwarded is None else [n for n in trace.forwarded[row].tolist() if n],
            }


def brief(row):
    """What a case has of a row."""
    total = sum(c for c in row["confidence"] if abs(c) < 1e6)  # neither nan nor infinite
    exact = [digest(row["tokens"], row["closed"]), digest(row["step"]), row["passes"]]
    exact += [] if row["saved"] is None else [row["saved"]]
    exact += [] if row["forwarded"] is None else [digest(row["forwarded"])]
    return exact, total


def digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def name_of(case):
    parts = [case["decoder"], case["way"], *(k for k in ("bare", "macro", "close_on", "graphs") if case.get(k))]
    parts += [case[k] for k in ("callback", "denoiser") if k in case]
    return " ".join([*parts, *(f"{k}={v}" for k, v in case.get("options", {}).items())])


def check_model(kind, denoiser):
    """Skip where the model is not that of the file."""
    logits = denoiser.model(input_ids=torch.tensor([[5, MASK, MASK, 7]])).logits[0, 1, :4].double().tolist()
    tolerance = 0 if kind == "bfloat16" else 1e-9
    if logits != pytest.approx(FIXTURES["logits"]["bfloat16" if kind == "bfloat16" else "plain"], abs=tolerance, rel=0):
        pytest.skip("the tiny model of this release or machine has other logits")


def marks(case):
    needs = case["decoder"] == "wino" or case.get("denoiser") in ("4d", "additive")
    return needs_transformers_5 if needs else ()


@pytest.mark.filterwarnings("ignore:.*in groups of equal length:UserWarning")
@pytest.mark.parametrize("case", [pytest.param(c, id=name_of(c), marks=marks(c)) for c in FIXTURES["cases"]])
@torch.no_grad()
def test_rows(case, denoisers):
    kind = case.get("denoiser", "plain")
    denoiser = denoisers(kind)
    check_model(kind, denoiser)
    rows = list(rows_of(decode(case, sampler_of(case, denoiser))))
    for row, expected in zip(rows, case.get("whole", ()), strict="whole" in case):
        assert row["tokens"] == expected["tokens"]
        assert row["step"] == expected["step"]
        assert row["confidence"] == pytest.approx(
            [float("nan") if c is None else c for c in expected["confidence"]], abs=1e-4, nan_ok=True
        )
    found, totals = zip(*map(brief, rows), strict=True)
    stored = [[*row[:3], *row[4:]] for row in case["rows"]]  # no positions where all were computed
    assert [row[: len(stored[0])] for row in found] == stored
    assert list(totals) == pytest.approx([row[3] for row in case["rows"]], abs=2e-3)


def test_every_decoder_of_that_release_is_here():
    assert {case["decoder"] for case in FIXTURES["cases"]} == set(decoders.DECODERS) - {"d2f"}
