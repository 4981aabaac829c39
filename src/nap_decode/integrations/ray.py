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
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nap_decode import bulk
from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name
from nap_decode.decoders import presets
from nap_decode.integrations._shared import given
from nap_decode.model.denoiser import Denoiser, no_model
from nap_decode.model.load import load_checkpoint
from nap_decode.run.sampler import Sampler

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

__all__ = ["add_arguments", "generate", "run_bulk"]

Loader: TypeAlias = "Callable[[], Any]"
"""Returns a model, a model and its tokenizer, or a Denoiser."""
Rows: TypeAlias = "Iterable[Mapping[str, Any]]"

BULK = (
    "output",
    "rows_per_part",
    "max_batch",
    "max_tokens",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "ray_address",
)
"""Options of ``nap-decode generate`` that go with ``--input``."""
_PACKED = "nap_decode row"  # a column of JSON, for rows that come from no Ray dataset and may differ in their columns
_OBJECT_STORE = 256 * 2**20  # bytes; prompts and texts are small, and what does not fit goes to the disk


def generate(
    dataset: Dataset | str | PathLike[str] | Rows,
    *,
    model: str | PathLike[str] | Loader,
    sampler: str | PathLike[str] | Callable[[Denoiser], Sampler],
    output: str | PathLike[str],
    sampler_options: Mapping[str, Any] | None = None,
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
            file that :func:`~nap_decode.bulk.read_prompts` reads, or an iterable.  Ids must be different; of a Ray
            dataset that is found out only when the results are read.
        model: directory or hub name of a checkpoint, as every worker sees it; it goes to CUDA if ``num_gpus`` is not 0.
            Or a function without arguments that loads in the worker: a model, a model and its tokenizer, or a Denoiser.
        sampler: name of a preset; a file written by :meth:`Sampler.save`, which is read here; or a function from a
            Denoiser to a sampler, such as ``functools.partial(presets.klass, threshold=0.8, template=template)``.
        output: directory for the Parquet files, on a file system that all workers share.
        sampler_options: options of the preset; one of them is the ``template``, unless it has one.
        mask_token_id: see :class:`Denoiser`.
        seed: rows that have no ``seed`` of their own get one from this and their id.
        rows_per_part: rows of a Parquet file: what a worker that dies loses at most.
        max_batch: rows that a worker decodes at a time, at most.
        max_tokens: rows of a batch by tokens of the longest (prompt and canvas), at most.
        concurrency: workers; a pair is the least and the most.
        num_cpus: CPU cores for each worker, and threads.
        num_gpus: GPUs for each worker; 0.5 puts two workers on one.

    Returns:
        A lazy Ray dataset of decoded rows, with the columns of the Parquet files; consume it to run it, for example
        with ``materialize()``.  A worker that is killed is started again by Ray.

    Raises:
        NapDecodeError: no Ray, options out of range, an unknown preset, or no prompts; in the workers, what
            :class:`~nap_decode.bulk.BulkDecoder` raises.

    Example:
        >>> generate([{"id": 1, "prompt": "1 2 ="}], model="a directory", sampler="klas", output="results")
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no preset (nor a file) 'klas'. Did you mean 'klass'? ...
    """
    make = partial(_make, model, _composition(sampler, sampler_options), mask_token_id, "cuda" if num_gpus else "cpu")
    for name, value, least in (("rows_per_part", rows_per_part, 1), ("max_batch", max_batch, 1)):
        check_integer(name, value, least)
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, 1)
    check_between("num_cpus", num_cpus, 0, math.inf)
    check_between("num_gpus", num_gpus, 0, math.inf)
    _check_concurrency(concurrency)
    data = _ray().data
    packed = not isinstance(dataset, data.Dataset)
    if packed:
        rows = bulk.read_prompts(dataset) if isinstance(dataset, str | PathLike) else dataset
        dataset = _pack(bulk.cut_into_parts(rows, rows_per_part))
    return _stage(
        dataset,
        make,
        output,
        {"seed": seed, "max_batch": max_batch, "max_tokens": max_tokens},
        packed=packed,
        batch_size=rows_per_part,
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def _stage(
    dataset: Dataset,
    make: Callable[[], Sampler],
    output: str | PathLike[str],
    options: Mapping[str, Any],
    *,
    packed: bool,
    concurrency: int | tuple[int, int],
    **resources: Any,
) -> Dataset:
    told = {"make": make, "output": os.path.abspath(output), "options": options, "packed": packed}
    least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    return dataset.map_batches(
        _Worker,
        fn_constructor_kwargs=told,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=_ray().data.ActorPoolStrategy(min_size=least, max_size=most),
        **resources,
    )


class _Worker:
    """What Ray Data calls with a part, in a process of its own: the model is loaded once."""

    def __init__(
        self, make: Callable[[], Sampler], output: str, options: Mapping[str, Any], packed: bool = False
    ) -> None:
        self.decoder = bulk.BulkDecoder(make(), output, **options)
        self.packed = packed

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [json.loads(row) for row in batch[_PACKED].to_pylist()] if self.packed else batch.to_pylist()
        return self.decoder(rows)


@dataclass(frozen=True)
class _Recipe:
    """Makes for a model the sampler that was put together, and checked, for a stand-in."""

    parts: Sampler

    def __call__(self, denoiser: Denoiser) -> Sampler:
        options = {name: getattr(self.parts.denoiser, name) for name in ("cfg_scale", "reuse")}
        chosen: dict[str, Any] = {name: value for name, value in options.items() if value}
        return self.parts.replace(denoiser=denoiser.replace(**chosen) if chosen else denoiser)


def _make(
    model: str | PathLike[str] | Loader,
    sampler: Callable[[Denoiser], Sampler],
    mask_token_id: int | None,
    device: str,
) -> Sampler:
    """In a worker: load the model and put the sampler together."""
    loaded = model() if callable(model) else load_checkpoint(model, device=device)
    if not isinstance(loaded, Denoiser):
        network, tokenizer = loaded if isinstance(loaded, tuple) else (loaded, None)
        loaded = Denoiser(network, tokenizer, mask_token_id=mask_token_id)
    made = sampler(loaded)
    if not isinstance(made, Sampler):
        raise NapDecodeError(f"sampler must be a function from a Denoiser to a Sampler, but gives {made!r:.80}")
    return made


def _composition(
    sampler: str | PathLike[str] | Callable[[Denoiser], Sampler], options: Mapping[str, Any] | None
) -> Callable[[Denoiser], Sampler]:
    if isinstance(sampler, Sampler):
        raise NapDecodeError(
            "a Sampler holds a model, but every worker loads its own: give a preset's name, a file written by "
            "Sampler.save, or a function from a Denoiser to a Sampler"
        )
    if callable(sampler):
        if options:
            raise NapDecodeError("sampler_options are for a preset; put a function's own into functools.partial")
        return sampler
    name = os.fspath(sampler)
    if name not in presets.PRESETS and Path(name).is_file():
        if options:
            raise NapDecodeError(f"sampler_options are for a preset, but {name} is a file, which has its own")
        return _Recipe(Sampler.load(name, no_model, mask_token_id=0))
    check_name("preset (nor a file)", name, presets.PRESETS)
    own = dict(options or {})
    template = own.pop("template", None)
    return _Recipe(presets.make_preset(name, Denoiser(no_model, mask_token_id=0), own, template=template))


def _check_concurrency(concurrency: int | tuple[int, int]) -> None:
    if isinstance(concurrency, tuple) and len(concurrency) == 2:
        check_integer("concurrency (the least)", concurrency[0], 1)
        check_integer("concurrency (the most)", concurrency[1], concurrency[0])
    else:
        check_integer("concurrency", concurrency, 1)


def _pack(parts: Sequence[Sequence[Mapping[str, Any]]]) -> Dataset:
    """A dataset with one block for every part."""
    import pyarrow as pa

    return _ray().data.from_arrow([pa.table({_PACKED: [json.dumps(row) for row in part]}) for part in parts])


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
    add("--output", metavar="DIR", help="for Parquet files; run again, it continues after the rows that are there")
    add("--rows-per-part", type=int, help=f"in a file (default: {bulk.ROWS_PER_PART})")
    add("--max-batch", type=int, help="rows that a worker decodes at a time (default: 8)")
    add("--max-tokens", type=int, help="rows of a batch by tokens of the longest, at most")
    add("--workers", type=int, help="with more than one, on Ray (default: 1, in this process)")
    add("--cpus-per-worker", type=float, help="cores and threads of each (default: 1)")
    add("--gpus-per-worker", type=float, help="default: 1 with --device cuda, else 0")
    add("--ray-address", help="of a running cluster, or auto; otherwise one is started on this machine")


def run_bulk(args: argparse.Namespace, make: Callable[[argparse.Namespace], Sampler]) -> None:
    """Run ``nap-decode generate --input``.

    Args:
        args: the options, see :func:`add_arguments`; of those of ``generate``, ``seed``, ``chat`` and ``device``.
        make: loads the model and makes the sampler that the options name; called in every worker.

    Raises:
        NapDecodeError: options that do not go together; see also :func:`generate`.
    """
    if args.output is None:
        raise NapDecodeError("--input needs --output, a directory for the results")
    workers = 1 if args.workers is None else args.workers
    check_integer("--workers", workers, 0)  # 0, too, is this process alone
    on_ray = workers > 1 or args.ray_address is not None
    resources = given(args, ["cpus_per_worker", "gpus_per_worker"])
    for name, value in resources.items():
        option = f"--{name.replace('_', '-')}"
        if not on_ray:
            raise NapDecodeError(f"{option} is for --workers of 2 or more; --device says where a single one runs")
        check_between(option, value, 0, math.inf)
    cpus = resources.get("cpus_per_worker", 1.0)
    gpus = resources.get("gpus_per_worker", 1.0 if on_ray and args.device.startswith("cuda") else 0.0)
    if on_ray and gpus and args.device not in ("cuda", "auto"):
        raise NapDecodeError(f"--gpus-per-worker {gpus:g} needs --device cuda, but it is {args.device}")
    rows = bulk.read_prompts(args.input)
    if args.chat:
        rows = [_as_chat(row) for row in rows]
    rows_per_part = bulk.ROWS_PER_PART if args.rows_per_part is None else args.rows_per_part
    parts = bulk.cut_into_parts(rows, rows_per_part)
    options = {"seed": args.seed, **given(args, ["max_batch", "max_tokens"])}

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if not on_ray:
        decoder = bulk.BulkDecoder(make(args), args.output, **options)
        print(bulk.run_parts(parts, lambda parts: map(decoder, parts), args.output, say))
        return

    ray, workers = _ray(), max(workers, 1)
    if args.ray_address is not None:
        ray.init(address=args.ray_address, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=max(math.ceil(workers * cpus), 1),
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
        )
    try:
        if args.ray_address is None and gpus * workers > (found := ray.cluster_resources().get("GPU", 0)):
            raise NapDecodeError(
                f"{workers} workers with {gpus:g} GPUs each need more than the {found:g} GPUs of this machine; take "
                "fewer --workers, a part of a GPU for each (--gpus-per-worker 0.5), or a cluster (--ray-address)"
            )
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False

        def decode(parts: Sequence[Sequence[Mapping[str, Any]]]) -> Iterable[pa.Table]:
            stage = _stage(
                _pack(parts),
                partial(make, args),
                args.output,
                options,
                packed=True,
                batch_size=rows_per_part,
                concurrency=workers,
                num_cpus=cpus,
                num_gpus=gpus,
            )
            return stage.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[no-any-return]

        print(bulk.run_parts(parts, decode, args.output, say))
    except ray.exceptions.RayError as error:
        # Of what a worker raised, Ray keeps the text.
        raised = re.findall(r"^(?:nap_decode\.errors\.NapDecodeError|OSError): (.+)", str(error), flags=re.MULTILINE)
        if not raised:
            raise
        raise NapDecodeError(f"in a worker: {raised[-1]}") from error
    finally:
        ray.shutdown()


def _as_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose text is a user's message."""
    if not isinstance(row.get("prompt"), str) or row.get("messages") is not None:
        return dict(row)
    others = {name: value for name, value in row.items() if name != "prompt"}
    return others | {"messages": [{"role": "user", "content": row["prompt"]}]}
