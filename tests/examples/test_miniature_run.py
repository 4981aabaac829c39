import pytest

from examples.miniature import run as running
from examples.miniature.evaluate import RESULTS_FILE, read_results
from examples.miniature.run import FULL, KINDS, QUICK, Plan, run

TINY = """
task: nim_sum
layout: paths
noise: uniform
max_rate: 1.0
batch: 4
stages: [{steps: 2, peak_learning_rate: 1.0e-3}]
hidden_size: 16
num_layers: 1
num_heads: 2
intermediate_size: 16
"""
OPTIONS = ("--tune", "2", "--test", "3", "--decoders", "any_order", "--tokens-per-step", "12")


def test_the_plans():
    assert {kind for kind, _ in FULL.models()} == set(KINDS)
    assert len(list(FULL.models())) == 3 * len(KINDS)
    assert len(list(QUICK.models())) == 2
    assert list(Plan(("a", "b"), (0, 1)).models()) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_from_nothing_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "CONFIGS", tmp_path)
    (tmp_path / "one.yaml").write_text(TINY)
    (tmp_path / "other.yaml").write_text("{task: nim_sum}")
    output = tmp_path / "out"
    run(Plan(("one",), (4,), OPTIONS), output, workers=2, training=[], measuring=["--dtype", "bfloat16"])
    results = read_results(output / RESULTS_FILE)
    assert [(r.kind, r.seed, r.split, r.problems, r.value) for r in results] == [
        ("one", 4, split, problems, 12) for split, problems in (("tune", 2), ("test", 3))
    ]
    assert "1 of 1 models" in capsys.readouterr().out
    assert "any_order tokens_per_step 12" in (output / "one-4.log").read_text()

    with pytest.raises(RuntimeError, match=r"train .*other\.yaml.* failed with 1; see .*other-4\.log"):
        run(Plan(("other",), (4,), OPTIONS), output, workers=1, training=[], measuring=[])
    assert "missing ['layout'" in (output / "other-4.log").read_text()
