from __future__ import annotations

import argparse
import builtins
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nap_decode import (
    CanvasTemplate,
    CommittedReuse,
    Denoiser,
    NapDecodeError,
    ParallelForcedSampler,
    Sampler,
    decoders,
    demo,
)
from nap_decode.bulk import BulkDecoder, BulkPrompt, cut_into_parts, generate, read_prompts, read_results, row_seed
from nap_decode.integrations import ray as integration

pytest.importorskip("pyarrow")
import pyarrow as pa
from pyarrow import parquet

TEMPLATE = CanvasTemplate.nap(path_length=11, summary_length=2)


def make_sampler(embedded, **options):
    return ParallelForcedSampler(*embedded, template=TEMPLATE, tokens_per_step=12, **options)


def make_rows(count, seed=2026):
    return [{"id": f"problem {i}", "prompt": p.prompt} for i, p in enumerate(demo.sample_problems(count, seed))]


def by_id(table):
    return {row["id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_are_those_of_the_sampler(embedded, tmp_path, temperature):
    sampler = make_sampler(embedded, temperature=temperature)
    rows = make_rows(5)
    summary = generate(rows, sampler, tmp_path, seed=3, rows_per_part=2, max_batch=2)
    assert (summary.rows, summary.decoded) == (5, 5)
    found = by_id(read_results(tmp_path))
    assert sorted(found) == sorted(row["id"] for row in rows)
    for row in rows:
        seed = row_seed(3, row["id"])
        out = sampler(row["prompt"], row_seeds=[seed])
        canvas = (out.canvas.attention_mask.bool() & ~out.canvas.prompt)[0]
        assert found[row["id"]] == {
            "id": row["id"],
            "prompt": row["prompt"],
            "text": out.text,
            "summary": out.summary,
            "blocks": out.blocks,
            "tokens": out.sequences[0][canvas].tolist(),
            "forward_passes": out.forward_passes,
            "tokens_per_forward": out.tokens_per_forward[0],
            "finish_reason": out.finish_reason[0],
            "seed": seed,
            "extra": "{}",
        }


def test_rows_that_are_there_are_not_decoded_again(embedded, tmp_path, monkeypatch):
    sampler, rows = make_sampler(embedded, temperature=1.0), make_rows(7)
    generate(rows, sampler, tmp_path / "whole", rows_per_part=3)
    decoded = []
    decode = BulkDecoder._decode

    def counting(self, prompts):
        decoded.extend(prompt.id for prompt in prompts)
        return decode(self, prompts)

    monkeypatch.setattr(BulkDecoder, "_decode", counting)
    assert generate(rows[:4], sampler, tmp_path / "some", rows_per_part=2).decoded == 4
    lines = []
    again = generate(rows, sampler, tmp_path / "some", rows_per_part=3, progress=lines.append)  # cut in another way
    assert again.decoded == 3
    assert [line.split(",")[0] for line in lines] == ["3 of 7 rows", "6 of 7 rows", "7 of 7 rows"]
    assert sorted(decoded) == sorted(row["id"] for row in rows)
    assert by_id(read_results(tmp_path / "some")) == by_id(read_results(tmp_path / "whole"))
    assert str(again).startswith("7 rows, of which 3 were decoded now")
    assert generate(rows, sampler, tmp_path / "some").decoded == 0
    assert len(decoded) == 7


def test_a_part_is_in_the_order_of_its_rows(embedded, tmp_path):
    decoder, rows = BulkDecoder(make_sampler(embedded), tmp_path), make_rows(5)
    decoder([rows[3], rows[1]])
    table = decoder(rows)
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    assert decoder([]).num_rows == 0
    assert pa.concat_tables(map(parquet.read_table, tmp_path.glob("*.parquet"))).num_rows == 5


def test_a_part_that_another_worker_wrote_is_read(embedded, tmp_path, monkeypatch):
    first, second = (BulkDecoder(make_sampler(embedded), tmp_path) for _ in range(2))
    rows = make_rows(4)
    second(rows[:2])  # from here on it knows what was there
    table = first(rows[2:])
    monkeypatch.setattr(BulkDecoder, "_decode", None)
    assert second(rows[2:]) == table


def test_seeds(embedded, tmp_path):
    sampler, rows = make_sampler(embedded, temperature=1.0), make_rows(2)
    same = [rows[0] | {"id": "a"}, rows[0] | {"id": "b"}, rows[0] | {"id": "c", "seed": 5}, rows[0] | {"id": 5}]
    found = by_id(BulkDecoder(sampler, tmp_path, seed=2**64 + 1)(same))
    assert found["c"]["seed"] == 5
    assert found["5"]["seed"] == row_seed(1, "5")
    assert len({row["seed"] for row in found.values()}) == 4
    assert len({tuple(row["tokens"]) for row in found.values()}) == 4
    assert row_seed(0, "problem 17") == 1221709497238077335  # for ever
    assert all(-(2**63) <= row_seed(n, "a") < 2**63 for n in range(100))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_are_bounded(embedded, tmp_path, temperature):
    model, tokenizer = embedded
    sizes = []

    def watched(input_ids, attention_mask):
        sizes.append(tuple(input_ids.shape))
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    layout, longest = 3 * 12 + 3, 14
    rows = [{"id": n, "input_ids": [2] + [9] * length} for n, length in enumerate((3, 13, 1, 13, 2))]
    sampler = make_sampler((Denoiser(watched, tokenizer, mask_token_id=1),), temperature=temperature)
    sizes.clear()
    decoder = BulkDecoder(sampler, tmp_path / "a", max_batch=3, max_tokens=2 * (longest + layout))
    decoder(rows)
    assert max(sizes)[0] == 2
    BulkDecoder(sampler, tmp_path / "b", max_batch=3)(rows)
    assert max(sizes)[0] == 3
    with pytest.raises(NapDecodeError, match=rf"row '1': .* {longest + layout} tokens, more than max_tokens=50"):
        BulkDecoder(sampler, tmp_path / "c", max_tokens=50)(rows)


def test_prompts_of_every_kind(tiny, tmp_path):
    from models import Words

    sampler = Sampler(tiny, Words(), decoders.left_to_right(), template=CanvasTemplate.plain(3))
    rows = [
        {"id": "a", "prompt": "5 6", "messages": None, "level": 3},
        {"id": "b", "messages": [{"role": "user", "content": "5 6", "name": None}]},
        {"id": "c", "input_ids": np.array([3, 5, 6])},
        {"id": "d", "prompt": {"messages": [{"role": "user", "content": "5 6", "name": None}]}},
    ]
    found = by_id(BulkDecoder(sampler, tmp_path)(rows))
    assert found["a"]["text"] == found["c"]["text"] == sampler("5 6").text
    assert found["d"]["prompt"] == '{"messages": [{"role": "user", "content": "5 6"}]}'
    assert found["b"]["text"] == found["d"]["text"] == sampler([{"role": "user", "content": "5 6"}]).text
    assert [json.loads(found[name]["prompt"]) for name in "bc"] == [[{"role": "user", "content": "5 6"}], [3, 5, 6]]
    assert json.loads(found["a"]["extra"]) == {"level": 3}
    assert found["a"]["summary"] is None
    bare = Sampler(tiny, decoder=decoders.left_to_right(), template=CanvasTemplate.plain(3), mask_token_id=1)
    row = BulkDecoder(bare, tmp_path / "bare")(rows[2:3]).to_pylist()[0]
    assert (row["text"], row["blocks"], row["tokens"]) == (None, None, found["c"]["tokens"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1 2 =", "a row must be a mapping"),
        ({"prompt": "1 2 ="}, "every row needs an id.*has None"),
        ({"id": 1.5, "prompt": "1 2 ="}, r"every row needs an id.*has 1\.5"),
        ({"id": True, "prompt": "1 2 ="}, "every row needs an id.*has True"),
        ({"id": "", "prompt": "1 2 ="}, "every row needs an id"),
        ({"id": "a", "text": "1 2 ="}, "row 'a': a row has either prompt.* none of them, but text"),
        ({"id": "a", "prompt": "1", "input_ids": [1]}, "has prompt and input_ids"),
        ({"id": "a", "prompt": ["1"]}, r"row 'a': prompt must be text, or a mapping of messages .*, but is \['1'\]"),
        ({"id": "a", "prompt": {"messages": []}}, "row 'a': messages must be a list of chat messages"),
        ({"id": "a", "prompt": {"messages": [{"role": "user"}], "tools": [print]}}, "row 'a': .* are kept as JSON"),
        ({"id": "a", "messages": []}, "messages must be a list of chat messages"),
        ({"id": "a", "messages": ["1"]}, "messages must be a list of chat messages"),
        ({"id": "a", "input_ids": [1.0]}, "input_ids must be a list of token ids"),
        ({"id": "a", "prompt": "1", "seed": "x"}, "a seed must be a whole number"),
        ({"id": "a", "prompt": "1", "when": object()}, r"row 'a': \['when'\] are kept as JSON"),
    ],
)
def test_rows_that_are_none(row, message):
    with pytest.raises(NapDecodeError, match=message):
        BulkPrompt.parse(row, 0)


def test_ids_must_be_different(embedded, tmp_path):
    rows = [{"id": 1, "prompt": "1 2 ="}, {"id": "1", "prompt": "1 3 ="}]
    with pytest.raises(NapDecodeError, match="two rows have the id '1'"):
        cut_into_parts(rows)
    decoder = BulkDecoder(make_sampler(embedded), tmp_path)
    with pytest.raises(NapDecodeError, match="two rows have the id '1'"):
        decoder(rows)
    decoder(rows[:1])
    with pytest.raises(NapDecodeError, match=r"row '1' is in .* already, but with prompt '1 2 =' instead of '1 3 ='"):
        decoder(rows[1:])
    with pytest.raises(NapDecodeError, match="already, but with seed"):
        decoder([rows[0] | {"seed": 1}])
    # Two runs that overlapped, with other parts, and one row with two prompts.
    table = decoder(rows[:1])
    parquet.write_table(table, tmp_path / "part-0.parquet")
    assert read_results(tmp_path).num_rows == 1
    other = table.set_column(1, "prompt", pa.array(["1 3 ="]))
    parquet.write_table(other, tmp_path / "part-1.parquet")
    with pytest.raises(NapDecodeError, match="two prompts with the id '1'"):
        read_results(tmp_path)


def test_a_directory_belongs_to_one_run(embedded, tmp_path):
    sampler = make_sampler(embedded)
    BulkDecoder(sampler, tmp_path)
    BulkDecoder(sampler, tmp_path)
    with pytest.raises(NapDecodeError, match="of another run, whose seed is 0 instead of 1"):
        BulkDecoder(sampler, tmp_path, seed=1)
    with pytest.raises(NapDecodeError, match="whose sampler is"):
        BulkDecoder(make_sampler(embedded, temperature=1.0), tmp_path)
    other = CanvasTemplate.nap(path_length=11, summary_length=2, summary_header="<bos>")
    with pytest.raises(NapDecodeError, match="whose template is"):
        BulkDecoder(Sampler(sampler.denoiser, decoder=sampler.decoder, template=other), tmp_path)


def test_what_cannot_be_decoded_is_said(embedded, tmp_path):
    sampler = make_sampler(embedded)
    with pytest.raises(NapDecodeError, match="needs a sampler with a template"):
        BulkDecoder(Sampler(*embedded, decoders.klass()), tmp_path)
    with pytest.raises(NapDecodeError, match="max_batch must be a whole number of at least 1"):
        BulkDecoder(sampler, tmp_path, max_batch=0)
    with pytest.raises(NapDecodeError, match="max_tokens must be a whole number of at least 1"):
        BulkDecoder(sampler, tmp_path, max_tokens=0)
    with pytest.raises(NapDecodeError, match="rows_per_part must be"):
        cut_into_parts([{"id": 1, "prompt": ""}], 0)
    with pytest.raises(NapDecodeError, match="there are no prompts"):
        generate([], sampler, tmp_path)
    decoder = BulkDecoder(sampler, tmp_path)
    with pytest.raises(NapDecodeError, match="row 'a': there is a mask token in the prompt"):
        decoder([{"id": "a", "prompt": "1 <mask>"}])
    with pytest.raises(NapDecodeError, match=r"row 'a': .*no chat template"):
        decoder([{"id": "a", "messages": [{"role": "user", "content": "1"}]}])
    with pytest.raises(NapDecodeError, match="there are no results"):
        read_results(tmp_path)
    decoder([{"id": "a", "prompt": "1 2 ="}])
    (path,) = tmp_path.glob("part-*.parquet")
    path.write_bytes(b"")
    with pytest.raises(NapDecodeError, match="is damaged"):
        read_results(tmp_path)


def test_reading_prompts(tmp_path):
    rows = [{"id": "a", "prompt": "ä"}, {"id": "b", "prompt": "2"}]
    lines, table = tmp_path / "prompts.jsonl", tmp_path / "sub" / "prompts.parquet"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    table.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), table)
    assert read_prompts(lines) == read_prompts(table) == read_prompts(str(table.parent)) == rows
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": ')
    with pytest.raises(NapDecodeError, match=r"bad\.jsonl, line 2 is not JSON"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n3\n')
    with pytest.raises(NapDecodeError, match=r"line 2 must be a JSON object, but is 3"):
        read_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(NapDecodeError, match="there is no file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").touch()
    with pytest.raises(NapDecodeError, match="prompts are read from"):
        read_prompts(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NapDecodeError, match=r"no \.parquet file"):
        read_prompts(tmp_path / "empty")


def test_without_pyarrow(monkeypatch, embedded, tmp_path):
    load = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NapDecodeError, match=r"pip install 'nap_decode\[ray\]'"):
        generate(make_rows(1), make_sampler(embedded), tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys
from nap_decode import CanvasTemplate, ParallelForcedSampler, bulk, demo
import torch
torch.set_num_threads(1)
sampler = ParallelForcedSampler(
    *demo.load(), template=CanvasTemplate.nap(path_length=11, summary_length=2), tokens_per_step=12, temperature=1.0
)
rows = [{"id": f"problem {i}", "prompt": p.prompt} for i, p in enumerate(demo.sample_problems(400, 2026))]
bulk.generate(rows, sampler, sys.argv[1], rows_per_part=4, progress=lambda line: print(line, flush=True))
"""


def test_a_killed_run_continues(embedded, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        killed.stdout.readline()
    time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    count = len(list((tmp_path / "out").glob("part-*.parquet")))
    assert 3 <= count < 100
    sampler, rows = make_sampler(embedded, temperature=1.0), make_rows(4 * count + 6)
    assert generate(rows, sampler, tmp_path / "out", rows_per_part=4).decoded == 6
    generate(rows, sampler, tmp_path / "whole", rows_per_part=4)
    assert by_id(read_results(tmp_path / "out")) == by_id(read_results(tmp_path / "whole"))
    files = [path.name for path in (tmp_path / "out").glob("part-*")]
    assert sorted(files) == sorted(path.name for path in (tmp_path / "whole").glob("part-*"))


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")])
def test_a_writer_that_dies_leaves_nothing_that_is_read(embedded, tmp_path, monkeypatch, owner, step):
    decoder = BulkDecoder(make_sampler(embedded), tmp_path)

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, die)
    with pytest.raises(KeyboardInterrupt):
        decoder(make_rows(2))
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.parquet"))) == 0
    assert decoder(make_rows(2)).num_rows == 2
    assert parquet.read_table(tmp_path).num_rows == 2  # other readers pass over what is not a part


class TestCommand:
    """``nap-decode generate --input``, in this process."""

    def run(self, tmp_path, embedded, *arguments):
        parser = argparse.ArgumentParser()
        integration.add_arguments(parser)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--chat", action="store_true")
        parser.add_argument("--device", default="cpu")
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(map(json.dumps, make_rows(5))))
        args = parser.parse_args(["--input", str(prompts), *arguments])
        integration.run_bulk(args, lambda args: make_sampler(embedded, temperature=1.0))

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_in_process(self, tmp_path, embedded, capsys, workers):
        options = ["--output", str(tmp_path / "out"), "--seed", "3", "--rows-per-part", "2", "--workers", workers]
        self.run(tmp_path, embedded, *options)
        captured = capsys.readouterr()
        assert captured.out.startswith("5 rows, of which 5 were decoded now")
        assert captured.err.splitlines()[-1].startswith("5 of 5 rows")
        assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
        generate(make_rows(5), make_sampler(embedded, temperature=1.0), tmp_path / "same", seed=3, rows_per_part=2)
        assert by_id(read_results(tmp_path / "out")) == by_id(read_results(tmp_path / "same"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "--input needs --output"),
            (["--output", "out", "--workers", "-1"], "--workers must be a whole number of at least 0"),
            (["--output", "out", "--gpus-per-worker", "1"], "--gpus-per-worker is for --workers of 2 or more"),
            (["--output", "out", "--workers", "2", "--gpus-per-worker", "1"], "needs --device cuda, but it is cpu"),
        ],
    )
    def test_what_does_not_go_together(self, tmp_path, embedded, options, message):
        with pytest.raises(NapDecodeError, match=message):
            self.run(tmp_path, embedded, *options)

    def test_chat(self, tmp_path, embedded):
        with pytest.raises(NapDecodeError, match="no chat template"):
            self.run(tmp_path, embedded, "--output", str(tmp_path / "out"), "--chat")


def test_the_sampler_of_a_worker(embedded, tmp_path):
    """What is checked before Ray starts, and what a worker makes of it."""
    file, sampler = tmp_path / "sampler.json", make_sampler(embedded)
    sampler.save(file)

    def load(given, model=lambda: embedded, template=None):
        how = pickle.loads(pickle.dumps(integration.find(given)))
        return integration._load(model, how, template, None, "cpu")

    for given, template in ((sampler.decoder, TEMPLATE), (file, None)):
        for model in (demo.CHECKPOINT, lambda: embedded, lambda: Denoiser(*embedded)):
            assert load(given, model, template).describe() == sampler.describe()
    assert integration._load(lambda: sampler, None, None, None, "cpu") is sampler
    for loaded, how in ((sampler, {}), (embedded, None)):
        with pytest.raises(NapDecodeError, match="give sampler= unless the function returns a Sampler"):
            integration._load(lambda loaded=loaded: loaded, how, None, None, "cpu")
    guided = Denoiser(*embedded, cfg_scale=0.5)
    Sampler(guided, decoder=decoders.klass(), template=TEMPLATE).save(file)
    assert load(file).denoiser.cfg_scale == 0.5
    assert load("klass", lambda: guided).denoiser is guided
    Sampler(Denoiser(*embedded, reuse=CommittedReuse()), decoder=decoders.klass()).save(file)
    assert load(file).denoiser.reuse == CommittedReuse()


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("klas", "there is no decoder 'klas'. Did you mean 'klass'"),
        ("pc_sampler", "pc_sampler needs frequencies; give it among its options"),
        (__file__, "not a file written by Sampler.save"),
        (decoders.klass, "must be a Sampler, a Decoder, .* but is <function klass"),
        (None, "say how to decode"),
    ],
)
def test_samplers_that_are_none(sampler, message):
    with pytest.raises(NapDecodeError, match=message):
        integration.generate([], model="m", sampler=sampler, output="o")


def test_a_sampler_with_a_model_is_not_sent(embedded):
    with pytest.raises(NapDecodeError, match="every worker loads its own"):
        integration.generate([], model="m", sampler=make_sampler(embedded), output="o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_part": 0}, "rows_per_part must be"),
        ({"max_batch": 0}, "max_batch must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"num_gpus": -1}, "num_gpus must be"),
        ({"num_cpus": -1}, "num_cpus must be"),
        ({"concurrency": 0}, "concurrency .* must be"),
        ({"concurrency": (2, 1)}, "concurrency .the most. must be a whole number of at least 2"),
        ({"concurrency": "2"}, "concurrency .* must be"),
        ({"concurrency": (1, 2, 3)}, "concurrency .* must be"),
    ],
)
def test_options_of_the_stage(options, message):
    with pytest.raises(NapDecodeError, match=message):
        integration.generate([], model="m", sampler="klass", output="o", **options)
