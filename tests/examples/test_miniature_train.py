import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.miniature import train as training
from examples.miniature.data import NIM_SUM
from examples.miniature.train import Config, Stage, train

CONFIGS = Path(training.__file__).parent / "configs"
TINY = Config(
    name="tiny",
    task="nim_sum",
    layout="paths",
    noise="structured",
    max_rate=1.0,
    batch=8,
    stages=(Stage(4, 1e-2, neutral=0.5), Stage(2, 1e-3, slips=0.5)),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations(file):
    config = Config.read(file)
    assert config.name == file.stem
    assert file.read_text().startswith("# ")
    # The same compute for every kind.
    assert (config.steps, config.batch, config.hidden_size, config.num_layers) == (1500, 64, 128, 4)


def test_the_shared_recipe_is_shared():
    kinds = [
        Config.read(CONFIGS / f"{kind}.yaml") for kind in ["paths", "joined", "identical", "chain", "short", "terse"]
    ]
    assert len({dataclasses.replace(config, name="", layout="") for config in kinds}) == 1


def write(tmp_path, **changes):
    lines = {"task": "nim_sum", "layout": "chain", "noise": "uniform", "max_rate": 1.0, "batch": 4}
    lines |= {"stages": [{"steps": 5, "peak_learning_rate": 1e-3}]} | changes
    file = tmp_path / "some.yaml"
    file.write_text(json.dumps({name: value for name, value in lines.items() if value is not None}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": None}, r"missing \['batch'\], unknown nothing"),
        ({"noize": "x"}, r"missing nothing, unknown \['noize'\]"),
        ({"task": "xor"}, "task must be one of nim_sum, clock, got 'xor'"),
        ({"layout": "tree"}, "layout must be one of paths, .*, got 'tree'"),
        ({"noise": "structured"}, "need paths and a summary"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    assert Config.read(write(tmp_path)).name == "some"
    with pytest.raises(ValueError, match=message):
        Config.read(write(tmp_path, **changes))


def test_the_learning_rate():
    stage = Stage(steps=200, peak_learning_rate=2.0)
    assert stage.learning_rate(0) == pytest.approx(2 / 50)
    assert stage.learning_rate(100) == pytest.approx(1.0)
    assert stage.learning_rate(199) == pytest.approx(0.0, abs=1e-3)
    assert TINY.length == TINY.draw_batch(0, 0)[0].shape[1] == 53
    assert TINY.stage(3) == (TINY.stages[0], 3)
    assert TINY.stage(4) == (TINY.stages[1], 0)
    with pytest.raises(ValueError, match="past the last stage"):
        TINY.stage(6)


def test_batches_have_streams_of_their_own():
    one, other, same = TINY.draw_batch(0, 1), TINY.draw_batch(0, 2), TINY.draw_batch(0, 1)
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], TINY.draw_batch(1, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_training_is_determined_by_the_seed_and_can_be_interrupted(tmp_path, monkeypatch):
    train(TINY, 1, tmp_path / "whole")
    train(TINY, 2, tmp_path / "other")

    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    draw = Config.draw_batch

    def stop_at_5(config, seed, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(config, seed, step)

    monkeypatch.setattr(Config, "draw_batch", stop_at_5)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, 1, tmp_path / "halves")
    drawn = []
    monkeypatch.setattr(Config, "draw_batch", lambda *a: drawn.append(a[2]) or draw(*a))
    train(TINY, 1, tmp_path / "halves")
    assert drawn == [3, 4, 5]  # it went on after the third step, which had been saved

    whole, halves, other = (weights(tmp_path / name) for name in ("whole", "halves", "other"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert not torch.equal(whole["lm_head.weight"], other["lm_head.weight"])

    train(TINY, 1, tmp_path / "halves")
    assert drawn == [3, 4, 5]  # it is there already
    assert not list((tmp_path / "halves").glob("training_state*"))
    log = json.loads((tmp_path / "halves" / "training_log.json").read_text())
    assert [line["step"] for line in log["log"]] == [3, 6]
    assert log["config"]["stages"][1] == dataclasses.asdict(TINY.stages[1])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "halves")
    assert tokenizer("6 0 =")["input_ids"] == [NIM_SUM.ids[word] for word in ("<bos>", "6", "0", "=")]
    assert tokenizer.mask_token == "<mask>"


def test_it_learns(tmp_path):
    """A few steps bring the loss from that of guessing any word to that of guessing digits."""
    config = dataclasses.replace(TINY, stages=(Stage(80, 5e-2),), batch=32)
    train(config, 0, tmp_path, precision="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, noised, learnt = config.draw_batch(5, 0)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(noised).logits[learnt], tokens[learnt])
    assert loss < 2.4  # 20 words: 3.0; 8 digits: 2.08
