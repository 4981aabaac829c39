from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from nap_decode import CanvasTemplate, Denoiser, DriftReuse, PromptReuse, decoders
from nap_decode.demo.problems import NUM_PATHS, PATH_LENGTH, SUMMARY_LENGTH, sample_problems

ROOT = Path(__file__).parents[1]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def load_example(name):
    return importlib.import_module(f"examples.{name}")


def test_the_tables_of_decoders_are_those_of_the_results():
    example = load_example("compare_decoders")
    record = json.loads((ROOT / "docs" / "decoders.json").read_text())
    page = (ROOT / "docs" / "decoders.md").read_text()
    assert example.fill_in(page, record) == page
    for arrangement in example.ARRANGEMENTS:
        assert list(record[arrangement]) == [name for name in decoders.DECODERS if name in record[arrangement]]
        assert all(f"| `{name}` | {m['exact']} |" in page for name, m in record[arrangement].items())
    assert f"{record['problems']} held-out problems" in page


def test_comparing_decoders(embedded):
    example = load_example("compare_decoders")
    template = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
    for arrangement, passes in (("own scheduler", 6), ("macro-parallel", 6)):
        sampler = example.make_sampler("llada_low_confidence", Denoiser(*embedded), template, arrangement)
        measured = example.measure(sampler, sample_problems(10, example.SEED))
        assert measured["exact"] >= 90
        assert measured["forward_passes"] == passes
        assert 5 < measured["tokens_per_forward"] < 6


def test_the_tables_of_reuse_are_those_of_the_results():
    example = load_example("study_reuse")
    record = json.loads((ROOT / "docs" / "reuse.json").read_text())
    page = (ROOT / "docs" / "reuse.md").read_text()
    assert example.fill_in(page, record) == page
    assert {row["policy"] for row in record["accuracy"]["rows"]} == set(example.POLICIES)
    assert f"{record['accuracy']['problems']} held-out problems" in page


def test_the_frontier_of_reuse():
    example = load_example("study_reuse")
    rights = {"none": (98, 1.0), "little": (98, 0.8), "more": (96, 0.5), "most": (95, 0.1)}
    rows = [
        {"decoder": "any", "tokens_per_step": 4, "policy": policy, "right": right, "flops": flops}
        for policy, (right, flops) in rights.items()
    ]
    table = example.frontier_table({"accuracy": {"problems": 100, "rows": rows}})
    assert table.splitlines()[-1] == "| any | 4 | 98.0 | 1.25x: little (98.0) | 2.00x: more (96.0) |"
    table = example.frontier_table({"accuracy": {"problems": 100, "rows": [rows[0], rows[3]]}})
    assert table.splitlines()[-1] == "| any | 4 | 98.0 | - | - |"


def test_following_an_exact_decode():
    example = load_example("study_reuse")
    shape = example.Shape(hidden=32, layers=2, heads=2, intermediate=64, vocab=100)
    workload = example.Workload(prompt_length=8, new_tokens=16, steps=4, blocks=2)
    policies = {"all": PromptReuse(refresh_every=1), "some": DriftReuse(share=0.3, max_age=9)}
    found = example.follow(shape.build(), workload, policies)
    assert found["all"] == {"equal_tokens": 1, "divergence": 0, "same_most_likely": 1, "flops": 1}
    assert 0 < found["some"]["divergence"] < 1
    assert 0 < found["some"]["same_most_likely"] < 1
    assert found["some"]["flops"] < 0.6


def test_the_tables_of_releases_are_those_of_the_results():
    example = load_example("check_checkpoints")
    record = json.loads((ROOT / "docs" / "families.json").read_text())
    assert list(record) == list(example.FAMILIES)
    assert len({tuple(found) for found in record.values()}) == 1, "the same releases for all families"
    for name, families in example.PAGES.items():
        page = (ROOT / "docs" / name).read_text()
        assert example.fill_in(page, record, families) == page
        assert "| transformers | 4" not in page.replace(example.table(record, families), ""), "no other claim"


def test_checking_a_checkpoint(tmp_path, monkeypatch):
    example = load_example("check_checkpoints")
    model = BertForMaskedLM(BertConfig(**SMALL, mask_token_id=1))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    assert example.check(tmp_path) == "works"
    with monkeypatch.context() as patch:
        patch.setattr(example, "predict", lambda model, family, row: torch.randn(len(row), 40))
        assert example.check(tmp_path) == "decodes other tokens than a plain loop"
    with monkeypatch.context() as patch:
        patch.setattr(BertForMaskedLM, "from_pretrained", lambda *_, **__: BertForMaskedLM(BertConfig(**SMALL)))
        assert "tensors are not those of the checkpoint" in example.check(tmp_path)
    (tmp_path / "config.json").unlink()
    assert example.check(tmp_path).startswith("does not load: ")
    assert str(tmp_path) not in example.check(tmp_path)


def test_the_sections_on_speed_are_those_of_the_results():
    example = load_example("study_speed")
    page = example.PAGE.read_text()
    for device in example.RUNS:
        file = example.record_of(device)
        record = json.loads(file.read_text()) if file.exists() else None
        assert example.fill_in(page, device, record) == page
        assert record is None or (device == "cuda") == ("gpu" in record["machine"])


def test_measuring_speed(tmp_path):
    example = load_example("study_speed")
    file = tmp_path / "speed.json"
    assert example.main(["--small", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["tests"]["failed"] == 0
    (row,) = record["rows"]
    assert row["identical"] == 1
    assert record["left_out"] == []
    page = example.fill_in("before\n<!-- cpu -->\nold\n<!-- end of cpu -->\nafter\n", "cpu", record)
    assert "| `small` | 1 row, prompt 64, 256 new tokens, 8 steps, temperature 0 | `False` |" in page
    assert "by canvas" in page
    assert page.startswith("before\n<!-- cpu -->\n")
    assert page.endswith("<!-- end of cpu -->\nafter\n")
    assert "old" not in page
