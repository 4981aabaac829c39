"""On a Ray cluster of this machine, in processes of their own, which can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("ray")

from pyarrow import parquet

from nap_decode import CanvasTemplate, ParallelForcedSampler, demo
from nap_decode.bulk import generate, read_results

# A worker that has decoded a part, but not written it, and finds the file `kill`, dies of it.
SCRIPT = """
import json, logging, os, signal, sys
import ray

ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False, logging_level=40)
logging.getLogger("ray.data").setLevel(logging.ERROR)
from nap_decode import CanvasTemplate, decoders, demo
from nap_decode.integrations.ray import generate

prompts, output, kill, workers = sys.argv[1:]


def load():
    from nap_decode import Sampler  # as the worker has it

    stream = Sampler.stream

    def die(self, *arguments, **options):
        decoded = list(stream(self, *arguments, **options))
        if len([name for name in os.listdir(output) if name.endswith(".parquet")]) >= 2 and os.path.exists(kill):
            os.remove(kill)
            os.kill(os.getpid(), signal.SIGKILL)
        return iter(decoded)

    Sampler.stream = die
    return demo.load()


dataset = prompts
if workers == "1":
    dataset = ray.data.read_json(prompts, override_num_blocks=3).map_batches(lambda batch: batch)  # a stage before ours
stage = generate(
    dataset,
    model=load,
    sampler=decoders.parallel_forced(tokens_per_step=12).set(temperature=1.0),
    template=CanvasTemplate.nap(path_length=11, summary_length=2),
    output=output,
    rows_per_part=4,
    max_batch=4,
    concurrency=int(workers),
    num_cpus=0.5,
)
for batch in stage.iter_batches(batch_size=None, batch_format="pyarrow"):
    for name in batch["id"].to_pylist():
        print("row", name, flush=True)
"""


def make_rows(count):
    return [{"id": f"problem {i}", "prompt": p.prompt} for i, p in enumerate(demo.sample_problems(count, 2026))]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process makes of 48 rows, and their file."""
    directory = tmp_path_factory.mktemp("single")
    rows = make_rows(48)
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sampler = ParallelForcedSampler(
        *demo.load(),
        template=CanvasTemplate.nap(path_length=11, summary_length=2),
        tokens_per_step=12,
        temperature=1.0,
    )
    generate(rows, sampler, directory / "out", rows_per_part=4, max_batch=4)
    return directory, sampler


def start(single, output, kill, workers):
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(single / "prompts.jsonl"), str(output), str(kill), str(workers)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def files(directory):
    return sorted(path.name for path in directory.glob("part-*.parquet"))


def test_a_worker_and_the_run_are_killed(single, tmp_path):
    directory, sampler = single
    output, kill = tmp_path / "out", tmp_path / "kill"
    kill.touch()
    with start(directory, output, kill, workers=2) as run:
        while kill.exists() or len(files(output)) < 6:  # one worker is dead by then, the other goes on
            assert run.poll() is None
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
    before = len(files(output))
    assert before < 12
    # One process continues what several began.
    assert generate(make_rows(48), sampler, output, rows_per_part=4, max_batch=4).decoded <= 48 - 4 * before
    assert files(output) == files(directory / "out")
    for name in files(output):  # to the last bit
        assert (output / name).read_bytes() == (directory / "out" / name).read_bytes()


def test_a_dataset_whose_worker_is_killed_and_begun_by_one_process(single, tmp_path):
    directory, sampler = single
    output, kill = tmp_path / "out", tmp_path / "kill"
    assert generate(make_rows(48)[:21], sampler, output, rows_per_part=7).decoded == 21
    kill.touch()
    with start(directory, output, kill, workers=1) as run:
        names, _ = run.communicate(timeout=240)
    assert not kill.exists()
    rows = [line.removeprefix("row ") for line in names.splitlines() if line.startswith("row ")]
    assert sorted(rows) == sorted(row["id"] for row in make_rows(48))
    written = [name for file in files(output) for name in parquet.read_table(output / file)["id"].to_pylist()]
    assert sorted(written) == sorted(rows)
    found, expected = (read_results(path).sort_by("id") for path in (output, directory / "out"))
    for column in ("id", "prompt", "seed", "text", "tokens"):
        assert found[column].to_pylist() == expected[column].to_pylist()
