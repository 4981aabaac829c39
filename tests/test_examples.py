from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from models import needs_transformers_5

from nap_decode import CanvasTemplate, Denoiser, presets
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, sample_problems

ROOT = Path(__file__).parents[1]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_presets_are_those_of_the_results():
    example = load_example("compare_presets")
    record = json.loads((ROOT / "docs" / "presets.json").read_text())
    page = (ROOT / "docs" / "presets.md").read_text()
    assert example.fill_in(page, record) == page
    for arrangement in example.ARRANGEMENTS:
        assert list(record[arrangement]) == list(presets.PRESETS)
        assert all(f"| `{name}` | {m['exact']} |" in page for name, m in record[arrangement].items())
    assert f"{record['problems']} held-out problems" in page


@needs_transformers_5
def test_comparing_presets(embedded):
    example = load_example("compare_presets")
    template = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
    for arrangement, passes in (("own scheduler", 6), ("macro-parallel", 6)):
        sampler = example.make_sampler("llada_low_confidence", Denoiser(*embedded), template, arrangement)
        measured = example.measure(sampler, sample_problems(10, example.SEED))
        assert measured["exact"] >= 90
        assert measured["forward_passes"] == passes
        assert 5 < measured["tokens_per_forward"] < 6
