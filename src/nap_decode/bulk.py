"""Bulk generation: many prompts decoded to Parquet files, restartable, by one worker or by many.

The unit of work is a *part*: rows that follow each other in the input.  One worker decodes it and writes it as one
file, named by a hash of its ids, at first under another name, then renamed.  Three things follow:

* A part is there wholly or not at all, so a restart continues behind those that are there.
* Whoever decodes a part again writes the same file again, so no row can be there twice.
* A row meets the same neighbours whatever the number of workers and however often the run was killed, so its tokens
  are the same to the last bit; cut into other parts, up to floating-point rounding, as its seed derives from its id.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nap_decode.base.errors import NapDecodeError, check_integer, check_seed, is_whole
from nap_decode.prompts import Prompt, encode_prompts
from nap_decode.results.output import SamplerOutput
from nap_decode.run.sampler import Sampler

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["BulkDecoder", "BulkPrompt", "BulkSummary", "cut_into_parts", "generate", "read_prompts", "read_results"]

ROWS_PER_PART = 128
"""Rows of a part, unless said otherwise: what a worker that is killed loses at most."""
_FORMAT = 1
_RUN_FILE = "_run.json"  # readers of Parquet directories pass over names with an underscore or a dot in front
_KINDS = {
    "prompt": "text, or a mapping of messages and options of the chat template",
    "messages": "a list of chat messages",
    "input_ids": "a list of token ids",
}


@dataclass(frozen=True)
class BulkPrompt:
    """A row of the input, checked.

    Args:
        id: different for every row.
        prompt: text, chat messages, these with options of the chat template, or token ids.
        seed: a signed 64-bit integer.
        extra: the row's other columns, as a JSON object.

    Example:
        >>> row = BulkPrompt.parse({"id": 7, "prompt": "1 2 =", "answer": 3}, seed=0)
        >>> row.id, row.extra
        ('7', '{"answer": 3}')
    """

    id: str
    prompt: Prompt
    seed: int
    extra: str

    @classmethod
    def parse(cls, row: Mapping[str, Any], seed: int) -> BulkPrompt:
        """Check a row; one that has no ``seed`` of its own gets one from that of the run and its id.

        It has an ``id`` (text or a whole number) and either a ``prompt`` (text, or a mapping of ``messages`` and
        options of the chat template), ``messages`` (chat) or ``input_ids`` (token ids).  None counts as missing.

        Raises:
            NapDecodeError: anything else.
        """
        if not isinstance(row, Mapping):
            raise NapDecodeError(f"a row must be a mapping such as {{'id': 'a', 'prompt': '...'}}, but is {row!r:.80}")
        given = {name: plain for name, value in row.items() if (plain := _plain(value)) is not None}
        name = given.pop("id", None)
        if name == "" or not (isinstance(name, str) or is_whole(name)):
            raise NapDecodeError(
                f"every row needs an id, a text or a whole number, which a restart and the row's seed go by; this one "
                f"has {name!r:.80}: {dict(row)!r:.200}"
            )
        kinds = [kind for kind in _KINDS if kind in given]
        if len(kinds) != 1:
            has = " and ".join(kinds) or f"none of them, but {', '.join(given) or 'nothing else'}"
            raise NapDecodeError(f"row {name!r}: a row has either prompt, messages or input_ids; this one has {has}")
        prompt = _check_prompt(name, kinds[0], given.pop(kinds[0]))
        seed = check_seed(given.pop("seed")) if "seed" in given else row_seed(seed, str(name))
        return cls(id=str(name), prompt=prompt, seed=seed, extra=_as_json(name, given))

    @staticmethod
    def parse_all(rows: Iterable[Mapping[str, Any]], seed: int) -> list[BulkPrompt]:
        """Check rows, whose ids must be different, too."""
        prompts = [BulkPrompt.parse(row, seed) for row in rows]
        for name, count in Counter(prompt.id for prompt in prompts).items():
            if count > 1:
                raise NapDecodeError(f"two rows have the id {name!r}; ids must be different")
        return prompts

    def columns(self) -> dict[str, Any]:
        """As it is written: the prompt as text; messages and ids as JSON."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)
        return {"id": self.id, "prompt": text, "seed": self.seed, "extra": self.extra}


def row_seed(seed: int, name: str) -> int:
    """The seed of a row from that of the run and the row's id: the same on every machine and in every release.

    Example:
        >>> row_seed(0, "problem 17")
        1221709497238077335
    """
    digest = hashlib.blake2b(f"{check_seed(seed)}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def read_prompts(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines (``.jsonl``), of a ``.parquet`` file, or of a directory of such Parquet files.

    Raises:
        NapDecodeError: another kind of file, or a line that is no JSON object.
    """
    file = Path(path)
    if not file.exists():
        raise NapDecodeError(f"there is no file {file}")
    if file.is_dir() or file.suffix == ".parquet":
        files = sorted(file.glob("*.parquet")) if file.is_dir() else [file]
        if not files:
            raise NapDecodeError(f"there is no .parquet file in the directory {file}")
        table = _pyarrow().dataset.dataset([str(each) for each in files], format="parquet").to_table()
        return list(table.to_pylist())
    if file.suffix != ".jsonl":
        raise NapDecodeError(f"prompts are read from .jsonl and .parquet files, and directories of these, not {file}")
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise NapDecodeError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise NapDecodeError(f"{file}, line {number} must be a JSON object, but is {line.strip():.80}")
    return rows


def cut_into_parts(
    rows: Iterable[Mapping[str, Any]], rows_per_part: int = ROWS_PER_PART
) -> list[list[Mapping[str, Any]]]:
    """Check rows (see :meth:`BulkPrompt.parse`), and cut them into parts, of which the last one may have fewer.

    Raises:
        NapDecodeError: no rows at all, a row that is none, or two with one id.
    """
    check_integer("rows_per_part", rows_per_part, 1)
    rows = list(rows)
    if not rows:
        raise NapDecodeError("there are no prompts")
    BulkPrompt.parse_all(rows, 0)
    rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
    return [rows[start : start + rows_per_part] for start in range(0, len(rows), rows_per_part)]


class BulkDecoder:
    """Decodes rows part by part into a directory; a row that is there already is read instead.

    Args:
        sampler: has a template and, for texts, a tokenizer.
        output: directory for the Parquet files; made if it is missing.  Workers on several machines need to share it.
        seed: rows that have no seed of their own get one from this and their id.
        max_batch: rows that are decoded at a time, at most.
        max_tokens: rows of a batch by tokens of the longest (prompt and canvas), at most.

    Raises:
        NapDecodeError: no pyarrow, a sampler without a template, or a directory that was written by another sampler
            or with another seed.
    """

    def __init__(
        self,
        sampler: Sampler,
        output: str | PathLike[str],
        *,
        seed: int = 0,
        max_batch: int = 8,
        max_tokens: int | None = None,
    ) -> None:
        check_integer("max_batch", max_batch, 1)
        if max_tokens is not None:
            check_integer("max_tokens", max_tokens, 1)
        if sampler.template is None:
            raise NapDecodeError(
                "bulk generation needs a sampler with a template, which says what to decode; give it one, such as "
                "CanvasTemplate.plain(256)"
            )
        self.sampler, self.directory, self.seed = sampler, Path(output), check_seed(seed)
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self._layout = len(sampler.template.encode(sampler.tokenizer, sampler.denoiser.mask_token_id)[0])
        self._schema = _schema([block.name for block in sampler.template.blocks])
        self._claim()
        self._places = _places(self.directory)  # of rows that were there when this worker began, and of its own

    def _claim(self) -> None:
        """Note what the rows of the directory depend on, as far as that can be written down, or compare with it."""
        run = {
            "format": _FORMAT,
            "seed": self.seed,
            "model": str(getattr(self.sampler.denoiser.call.config, "_name_or_path", "")),
            "template": repr(self.sampler.template),
            "sampler": self.sampler.describe().splitlines(),
        }
        file = self.directory / _RUN_FILE
        self.directory.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _write_at_once(file, (json.dumps(run, indent=1) + "\n").encode())
        found = json.loads(file.read_text(encoding="utf-8"))
        for name in {**run, **found}:
            if found.get(name) != run.get(name):
                raise NapDecodeError(
                    f"{self.directory} has rows of another run, whose {name} is {found.get(name)!r} instead of "
                    f"{run.get(name)!r}; write to another directory, or use the same options"
                )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Decode a part: for each row (see :meth:`BulkPrompt.parse`), in their order, what is in the Parquet files.

        Raises:
            NapDecodeError: a row that is none or that cannot be decoded, or two with one id.
        """
        pa = _pyarrow()
        prompts = BulkPrompt.parse_all(rows, self.seed)
        missing = [prompt for prompt in prompts if prompt.id not in self._places]
        if missing:
            names = json.dumps([prompt.id for prompt in missing]).encode()
            path = self.directory / f"part-{hashlib.blake2b(names, digest_size=16).hexdigest()}.parquet"
            if not path.exists():  # unless it was written since this worker began, by one that died of the next part
                content = io.BytesIO()
                pa.parquet.write_table(pa.Table.from_pylist(self._decode(missing), schema=self._schema), content)
                _write_at_once(path, content.getvalue())
            self._places.update((prompt.id, path) for prompt in missing)
        paths = {self._places[prompt.id] for prompt in prompts}
        found = pa.concat_tables([self._schema.empty_table(), *map(_read, sorted(paths))])
        row_of = {name: number for number, name in enumerate(found["id"].to_pylist())}
        table = found.take(pa.array([row_of[prompt.id] for prompt in prompts], pa.int64()))
        for prompt, row in zip(prompts, table.select(["prompt", "seed", "extra"]).to_pylist(), strict=True):
            given = prompt.columns()
            for column, old in row.items():
                if old != given[column]:
                    raise NapDecodeError(
                        f"row {prompt.id!r} is in {self.directory} already, but with {column} {old!r:.80} "
                        f"instead of {given[column]!r:.80}; give it another id, or write to another directory"
                    )
        return table

    def _decode(self, prompts: Sequence[BulkPrompt]) -> list[dict[str, Any]]:
        outputs = self.sampler.stream(
            [self._encode(prompt) for prompt in prompts],
            max_batch=self.max_batch,
            max_tokens=self.max_tokens,
            row_seeds=[prompt.seed for prompt in prompts],
            progress=False,
        )
        return [_record(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def _encode(self, prompt: BulkPrompt) -> list[int]:
        try:
            ids = encode_prompts([prompt.prompt], self.sampler.tokenizer)[0][0]
        except NapDecodeError as error:
            raise NapDecodeError(f"row {prompt.id!r}: {error}") from error
        if self.sampler.denoiser.mask_token_id in ids:
            raise NapDecodeError(f"row {prompt.id!r}: there is a mask token in the prompt")
        if self.max_tokens is not None and len(ids) + self._layout > self.max_tokens:
            raise NapDecodeError(
                f"row {prompt.id!r}: prompt and canvas take {len(ids) + self._layout} tokens, more than max_tokens="
                f"{self.max_tokens}; raise it, or shorten the prompt"
            )
        return ids


@dataclass(frozen=True)
class BulkSummary:
    """What a run did."""

    rows: int
    """Rows in the input."""
    decoded: int
    """Those that were not there before."""
    seconds: float
    """Wall time; on Ray, the start of the workers is in it."""

    def __str__(self) -> str:
        speed = self.decoded / max(self.seconds, 1e-9)
        now = f"{self.decoded} were decoded now, in {self.seconds:.1f} s ({speed:.1f} rows/s)"
        return f"{self.rows} rows, of which {now}"


def generate(
    prompts: str | PathLike[str] | Iterable[Mapping[str, Any]],
    sampler: Sampler,
    output: str | PathLike[str],
    *,
    seed: int = 0,
    rows_per_part: int = ROWS_PER_PART,
    max_batch: int = 8,
    max_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> BulkSummary:
    """Decode many prompts in this process, into Parquet files; a second call continues what a first one began.

    :func:`nap_decode.integrations.ray.generate` does the same on many machines.

    Args:
        prompts: rows (see :meth:`BulkPrompt.parse`), or a file of them (see :func:`read_prompts`).
        sampler: see :class:`BulkDecoder`.
        output: see :class:`BulkDecoder`; :func:`read_results` reads it.
        seed: see :class:`BulkDecoder`.
        rows_per_part: rows of a Parquet file, which are written together; see :mod:`nap_decode.bulk`.
        max_batch: see :class:`BulkDecoder`.
        max_tokens: see :class:`BulkDecoder`.
        progress: called with a line of text after every part.

    Raises:
        NapDecodeError: see :func:`cut_into_parts` and :class:`BulkDecoder`.

    Example:
        >>> import tempfile
        >>> from nap_decode import ParallelForcedSampler, demo
        >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=6)
        >>> rows = [{"id": n, "prompt": p.prompt} for n, p in enumerate(demo.sample_problems(4, seed=2026))]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     first = generate(rows[:3], sampler, directory)
        ...     second = generate(rows, sampler, directory)
        ...     results = read_results(directory)
        >>> first.decoded, second.decoded, results.num_rows
        (3, 1, 4)
    """
    parts = cut_into_parts(read_prompts(prompts) if isinstance(prompts, str | PathLike) else prompts, rows_per_part)
    decoder = BulkDecoder(sampler, output, seed=seed, max_batch=max_batch, max_tokens=max_tokens)
    return run_parts(parts, lambda parts: map(decoder, parts), output, progress)


def run_parts(
    parts: Sequence[Sequence[Mapping[str, Any]]],
    decode: Callable[[Sequence[Sequence[Mapping[str, Any]]]], Iterable[pa.Table]],
    output: str | PathLike[str],
    progress: Callable[[str], None] | None,
) -> BulkSummary:
    """Have parts decoded, count and report; ``decode`` gives the decoded rows of all parts, in any order."""
    started, done, total = time.perf_counter(), 0, sum(map(len, parts))
    before = _places(Path(output))
    there = sum(str(row["id"]) in before for part in parts for row in part)
    for table in decode(parts):
        done += table.num_rows
        if progress is not None:
            progress(f"{done} of {total} rows, {time.perf_counter() - started:.1f} s")
    return BulkSummary(total, total - there, time.perf_counter() - started)


def read_results(output: str | PathLike[str]) -> pa.Table:
    """All rows that were written to a directory, each once, ordered by file.

    Raises:
        NapDecodeError: no such directory, or one id with two prompts.
    """
    pa = _pyarrow()
    paths = _paths(Path(output))
    if not paths:
        raise NapDecodeError(f"there are no results in {output}")
    table = pa.concat_tables(map(_read, paths))
    # Only runs that overlapped in one directory, with other parts, leave a row in two files.
    first: dict[str, int] = {}
    prompts = table["prompt"]
    for number, name in enumerate(table["id"].to_pylist()):
        if prompts[first.setdefault(name, number)] != prompts[number]:
            raise NapDecodeError(f"{output} has two prompts with the id {name!r}; ids must be different")
    return table.take(list(first.values()))


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*.parquet"))


def _places(directory: Path) -> dict[str, Path]:
    """The part of every id that is there."""
    return {name: path for path in _paths(directory) for name in _read(path, columns=["id"])["id"].to_pylist()}


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    pa = _pyarrow()
    try:
        return pa.parquet.ParquetFile(path).read(columns=columns)
    except pa.ArrowInvalid as error:
        raise NapDecodeError(f"{path} is damaged ({error}); delete it, and its rows are decoded again") from error


def _write_at_once(path: Path, content: bytes) -> None:
    """Nobody ever sees a part of the file, however this process ends."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _schema(block_names: Sequence[str]) -> pa.Schema:
    pa = _pyarrow()
    return pa.schema(
        {
            "id": pa.string(),
            "prompt": pa.string(),
            "text": pa.string(),
            "summary": pa.string(),
            "blocks": pa.struct({name: pa.string() for name in block_names}),
            "tokens": pa.list_(pa.int32()),
            "forward_passes": pa.int32(),
            "tokens_per_forward": pa.float64(),
            "finish_reason": pa.string(),
            "seed": pa.int64(),
            "extra": pa.string(),
        }
    )


def _record(prompt: BulkPrompt, output: SamplerOutput) -> dict[str, Any]:
    """What is written about a row."""
    canvas = output.canvas
    decoded = (canvas.attention_mask.bool() & ~canvas.prompt)[0].cpu()  # (L,)
    has_text = output.tokenizer is not None
    return prompt.columns() | {
        "text": output.text if has_text else None,
        "summary": output.summary if has_text and any(canvas.held) else None,
        "blocks": output.blocks if has_text else None,
        "tokens": output.trace.tokens[0][decoded].tolist(),
        "forward_passes": output.forward_passes,
        "tokens_per_forward": output.tokens_per_forward[0],
        "finish_reason": output.finish_reason[0],
    }


def _check_prompt(name: Any, kind: str, value: Any) -> Prompt:
    if kind == "prompt" and isinstance(value, str):
        return value
    if kind == "prompt" and isinstance(value, Mapping) and "messages" in value:
        _as_json(name, value)  # as which it is written
        return {**value, "messages": _check_prompt(name, "messages", _plain(value["messages"]))}
    if kind == "messages" and isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
        # Parquet gives all messages the same keys, and None where there was none.
        return [{key: item for key, item in message.items() if item is not None} for message in value]
    if kind == "input_ids" and isinstance(value, list) and all(map(is_whole, value)):
        return [int(token) for token in value]
    raise NapDecodeError(f"row {name!r}: {kind} must be {_KINDS[kind]}, but is {value!r:.80}")


def _as_json(name: Any, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, ensure_ascii=False)
    except TypeError as error:
        raise NapDecodeError(
            f"row {name!r}: {list(values)} are kept as JSON, which cannot hold them ({error}); drop or convert them"
        ) from error


def _plain(value: Any) -> Any:
    """Numpy's arrays and numbers as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise NapDecodeError(
            "bulk generation writes Parquet files, which needs pyarrow; run pip install 'nap_decode[ray]'"
        ) from error
    return pyarrow
