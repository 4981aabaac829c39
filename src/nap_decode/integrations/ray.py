"""Bulk generation on many machines, as a stage of Ray Data, and the command that does it on one or on many.

Ray moves rows to workers and starts a worker again that died; what a part of the rows is, and that none is written
twice, is :mod:`nap_decode.bulk`'s.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from nap_decode import bulk
from nap_decode.base.errors import NapDecodeError, check_between, check_integer
from nap_decode.canvas import CanvasTemplate
from nap_decode.checkpoints import load_checkpoint
from nap_decode.integrations._shared import find, given, make
from nap_decode.parts.decoder import Decoder
from nap_decode.run.sampler import Sampler

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

__all__ = ["add_arguments", "generate", "run_bulk"]

_COMMAND: dict[str, dict[str, Any]] = {  # options of the command
    "output": {"metavar": "DIR", "help": "for Parquet files; run again, it continues after the rows that are there"},
    "rows_per_part": {"type": int, "help": f"in a file (default: {bulk.ROWS_PER_PART})"},
    "max_batch": {"type": int, "help": "rows that a worker decodes at a time (default: 8)"},
    "max_tokens": {"type": int, "help": "rows of a batch by tokens of the longest, at most"},
    "workers": {"type": int, "help": "with more than one, on Ray (default: 1, in this process)"},
    "cpus_per_worker": {"type": float, "help": "cores and threads of each (default: 1)"},
    "gpus_per_worker": {"type": float, "help": "default: 1 with --device cuda, else 0"},
    "ray_address": {"help": "of a running cluster, or auto; otherwise one is started on this machine"},
}
BULK = tuple(_COMMAND)
"""Options of ``nap-decode generate`` that go with ``--input``."""
_PACKED = "nap_decode row"  # a column of JSON, for rows that come from no Ray dataset and may differ in their columns
_OBJECT_STORE = 256 * 2**20  # bytes; prompts and texts are small, and what does not fit goes to the disk


def generate(
    dataset: Dataset | str | PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    model: str | PathLike[str] | Callable[[], Any],
    sampler: Decoder | str | PathLike[str] | None = None,
    output: str | PathLike[str],
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
    seed: int = 0,
    rows_per_part: int = bulk.ROWS_PER_PART,
    max_batch: int = 8,
    max_tokens: int | None = None,
    concurrency: int | tuple[int, int] = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Dataset:
    """Decode a dataset on a Ray cluster, one model per worker; finished rows are on disk, and are not decoded again.

    Rows that do not come from a Ray dataset are cut into parts here, so that their tokens are the same to the last bit
    whatever the number of workers.  A Ray dataset is cut into parts by Ray, as its blocks come; unless blocks have a
    multiple of ``rows_per_part`` rows, tokens are the same up to floating-point rounding.

    Args:
        dataset: rows with the columns of :meth:`BulkPrompt.parse <nap_decode.bulk.BulkPrompt.parse>`: a Ray dataset, a
            file that :func:`~nap_decode.bulk.read_prompts` reads, or an iterable.  That ids of a Ray dataset are
            different is found out only when the results are read.
        model: directory or hub name of a checkpoint, as every worker sees it; it goes to CUDA if ``num_gpus`` is not 0.
            Or a function without arguments that loads in the worker: a model, a model and its tokenizer, a Denoiser, or
            a whole Sampler.
        sampler: how to decode: a :class:`Decoder`, the name of one, or a file written by :meth:`Sampler.save`, which
            is read here.  To be left out if the function returns a Sampler.
        output: see :class:`~nap_decode.bulk.BulkDecoder`.
        template: what follows each prompt, unless the file has one.
        mask_token_id: see :class:`Denoiser`.
        seed: see :class:`~nap_decode.bulk.BulkDecoder`.
        rows_per_part: rows of a Parquet file: what a worker that dies loses at most.
        max_batch: see :class:`~nap_decode.bulk.BulkDecoder`.
        max_tokens: see :class:`~nap_decode.bulk.BulkDecoder`.
        concurrency: workers; a pair is the least and the most.
        num_cpus: CPU cores for each worker, and threads.
        num_gpus: GPUs for each worker; 0.5 puts two workers on one.

    Returns:
        A lazy Ray dataset of decoded rows, with the columns of the Parquet files; consume it to run it, for example
        with ``materialize()``.  A worker that is killed is started again by Ray.

    Raises:
        NapDecodeError: no Ray, options out of range, an unknown decoder, or no prompts; in the workers, what
            :class:`~nap_decode.bulk.BulkDecoder` raises.

    Example:
        >>> generate([{"id": 1, "prompt": "1 2 ="}], model="a directory", sampler="klas", output="results")
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no decoder 'klas'. Did you mean 'klass'? ...
    """
    if isinstance(sampler, Sampler):
        raise NapDecodeError(
            "a Sampler holds a model, but every worker loads its own: give its decoder, and template=sampler.template"
        )
    if sampler is None and not callable(model):
        raise NapDecodeError("say how to decode: sampler= takes a Decoder, such as decoders.klass(), or its name")
    how = None if sampler is None else find(sampler)
    least, most = concurrency if isinstance(concurrency, tuple) and len(concurrency) == 2 else (concurrency,) * 2
    numbers = {"rows_per_part": rows_per_part, "max_batch": max_batch, "concurrency (the least)": least}
    if max_tokens is not None:
        numbers["max_tokens"] = max_tokens
    for name, value in numbers.items():
        check_integer(name, value, 1)
    check_integer("concurrency (the most)", most, int(least))
    for name, share in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        check_between(name, share, 0, math.inf)
    data = _ray().data
    packed = not isinstance(dataset, data.Dataset)
    stage: Any = dataset
    if packed:
        import pyarrow as pa

        rows: Any = bulk.read_prompts(dataset) if isinstance(dataset, str | PathLike) else dataset
        parts = [list(map(json.dumps, part)) for part in bulk.cut_into_parts(rows, rows_per_part)]
        stage = data.from_arrow([pa.table({_PACKED: part}) for part in parts])  # each a block of its own
    load = partial(_load, model, how, template, mask_token_id, "cuda" if num_gpus else "cpu")
    options = {"output": os.path.abspath(output), "seed": seed, "max_batch": max_batch, "max_tokens": max_tokens}
    return stage.map_batches(
        _Worker,
        fn_constructor_args=(load, packed, options),
        batch_format="pyarrow",
        batch_size=rows_per_part,
        zero_copy_batch=True,
        compute=data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def _load(
    model: str | PathLike[str] | Callable[[], Any],
    how: Mapping[str, Any] | None,
    template: CanvasTemplate | None,
    mask_token_id: int | None,
    device: str,
) -> Sampler:
    """In a worker: load the model and make the sampler."""
    loaded = model() if callable(model) else load_checkpoint(model, device=device)
    if how is None and isinstance(loaded, Sampler):
        return loaded
    if how is None or isinstance(loaded, Sampler):
        raise NapDecodeError(f"give sampler= unless the function returns a Sampler; it returns {loaded!r:.80}")
    network, tokenizer = loaded if isinstance(loaded, tuple) else (loaded, None)
    return make(how, network, tokenizer, template=template, mask_token_id=mask_token_id)


class _Worker:
    """What Ray Data calls with a part, in a process of its own: the model is loaded once."""

    def __init__(self, load: Callable[[], Sampler], packed: bool, options: Mapping[str, Any]) -> None:
        self.decoder, self.packed = bulk.BulkDecoder(load(), **options), packed

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [json.loads(row) for row in batch[_PACKED].to_pylist()] if self.packed else batch.to_pylist()
        return self.decoder(rows)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise NapDecodeError("this runs on Ray; pip install 'nap_decode[ray]'") from error
    return ray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of bulk generation to those of ``nap-decode generate``."""
    add = parser.add_argument_group("bulk: prompts from a file").add_argument
    add("--input", metavar="FILE", help="instead of --prompt: .jsonl or .parquet with id and prompt; see docs/bulk.md")
    for name, options in _COMMAND.items():
        add(f"--{name.replace('_', '-')}", **options)


def run_bulk(args: argparse.Namespace, make: Callable[[argparse.Namespace], Sampler]) -> None:
    """Run ``nap-decode generate --input``; every worker calls ``make``, which loads the model, with the options."""
    if args.output is None:
        raise NapDecodeError("--input needs --output, a directory for the results")
    workers = 1 if args.workers is None else args.workers
    check_integer("--workers", workers, 0)  # 0, too, is this process alone
    on_ray = workers > 1 or args.ray_address is not None
    resources = given(args, ["cpus_per_worker", "gpus_per_worker"])
    for name, value in resources.items():
        flag = f"--{name.replace('_', '-')}"
        if not on_ray:
            raise NapDecodeError(f"{flag} is for --workers of 2 or more; --device says where a single one runs")
        check_between(flag, value, 0, math.inf)
    cpus = resources.get("cpus_per_worker", 1.0)
    gpus = resources.get("gpus_per_worker", 1.0 if on_ray and args.device.startswith("cuda") else 0.0)
    if on_ray and gpus and args.device not in ("cuda", "auto"):
        raise NapDecodeError(f"--gpus-per-worker {gpus:g} needs --device cuda, but it is {args.device}")
    rows = [_as_chat(row) if args.chat else row for row in bulk.read_prompts(args.input)]
    rows_per_part = bulk.ROWS_PER_PART if args.rows_per_part is None else args.rows_per_part
    parts = bulk.cut_into_parts(rows, rows_per_part)
    options = {"seed": args.seed, **given(args, ["max_batch", "max_tokens"])}
    say = partial(print, file=sys.stderr, flush=True)
    if not on_ray:
        decoder = bulk.BulkDecoder(make(args), args.output, **options)
        print(bulk.run_parts(parts, lambda parts: map(decoder, parts), args.output, say))
        return

    def decode(parts: Sequence[Sequence[Mapping[str, Any]]]) -> Iterable[pa.Table]:
        stage = generate(
            [row for part in parts for row in part],
            model=partial(make, args),
            output=args.output,
            rows_per_part=rows_per_part,
            concurrency=max(workers, 1),
            num_cpus=cpus,
            num_gpus=gpus,
            **options,
        )
        return stage.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[no-any-return]

    ray = _ray()
    own = {"num_cpus": max(math.ceil(workers * cpus), 1), "object_store_memory": _OBJECT_STORE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = own | {"include_dashboard": False} if args.ray_address is None else {"address": args.ray_address}
    ray.init(**cluster, log_to_driver=False)
    try:
        if args.ray_address is None and gpus * workers > (found := ray.cluster_resources().get("GPU", 0)):
            raise NapDecodeError(
                f"{workers} workers with {gpus:g} GPUs each need more than the {found:g} GPUs of this machine; take "
                "fewer --workers, a part of a GPU for each (--gpus-per-worker 0.5), or a cluster (--ray-address)"
            )
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        print(bulk.run_parts(parts, decode, args.output, say))
    except ray.exceptions.RayError as error:
        # Of what a worker raised, Ray keeps the text.
        raised = re.findall(r"^(?:[\w.]+\.NapDecodeError|OSError): (.+)", str(error), flags=re.MULTILINE)
        if not raised:
            raise
        raise NapDecodeError(f"in a worker: {raised[-1]}") from error
    finally:
        ray.shutdown()


def _as_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose text becomes a user's message."""
    if not isinstance(row.get("prompt"), str) or row.get("messages") is not None:
        return dict(row)
    others = {name: value for name, value in row.items() if name != "prompt"}
    return others | {"messages": [{"role": "user", "content": row["prompt"]}]}
