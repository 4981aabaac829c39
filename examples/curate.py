"""Curate training data for parallel paths: any causal teacher, several sampled trajectories for each question.

    python examples/curate.py --input questions.jsonl --teacher TEACHER --student STUDENT --output curated/

A line of the input has an ``id``, a ``prompt`` and the reference ``answer``.  There are two stages:

1. The teacher samples trajectories, into ``curated/traces``.  This is what costs.  It is done in parts, each written at
   once, so that the same command continues after an interruption.
2. They are laid out on the student's canvas, ``<think 1> path <think 2> path ... <summary> answer``, by the code that
   decodes, into ``curated/nap.jsonl``; or one behind the other, for the baseline, into ``curated/chain.jsonl``.  With
   other lengths, texts or filters this is done anew, and the teacher is not asked again.

docs/curating.md says what is written, and how to train on it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LogitsProcessorList

from nap_decode import Canvas, CanvasTemplate, NapDecodeError
from nap_decode.base.errors import check_between, check_integer
from nap_decode.base.random import TOKEN_STREAM, uniform
from nap_decode.bulk import BulkPrompt, cut_into_parts, read_prompts, row_seed
from nap_decode.checkpoints import load_checkpoint
from nap_decode.model.families import find_family
from nap_decode.prompts import encode_prompts

SUMMARY_REQUEST = (
    "{prompt}\n\nSeveral attempts at this, of which some may be wrong:\n\n{paths}\n\nThe correct answer is {answer}. "
    "Say in one sentence why, ending with the answer, and write nothing else."
)
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length")  # as configs call it
Row = dict[str, Any]


def read_questions(path: Path, seed: int, questions_per_part: int) -> list[list[Row]]:
    """Questions in parts: ``id``, ``prompt`` (text or chat messages), ``answer`` and ``seed``."""
    return [[_question(row, seed) for row in part] for part in cut_into_parts(read_prompts(path), questions_per_part)]


def _question(row: Any, seed: int) -> Row:
    parsed, answer = BulkPrompt.parse(row, seed), row.get("answer")
    if answer is None or not str(answer).strip():
        raise NapDecodeError(f"question {parsed.id!r} has no answer; its columns are {', '.join(row)}")
    prompt: Any = parsed.prompt
    if not isinstance(prompt, str) and not all(isinstance(m, dict) and isinstance(m["content"], str) for m in prompt):
        raise NapDecodeError(f"question {parsed.id!r} must be text, since teacher and student have ids of their own")
    return {"id": parsed.id, "prompt": prompt, "answer": str(answer).strip(), "seed": parsed.seed}


def fill_in(text: str, **values: str) -> str:
    r"""Put values in the place of their names, and leave all other braces (as of ``\boxed{}``) alone."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def check_room(question: Row, config: Any, prompt: int, more: int, remedy: str) -> None:
    """Raise if a model cannot see so many tokens, as far as its config tells."""
    room = next((length for name in CONTEXT if (length := getattr(config, name, None))), prompt + more)
    if prompt + more > room:
        raise NapDecodeError(
            f"question {question['id']!r}: a prompt of {prompt} tokens and {more} more do not fit into the {room} that "
            f"the {remedy}"
        )


# ------------------------------------------------------------------------------------------------- 1. the teacher


class Teacher:
    """Samples from a causal language model, every trajectory from a random stream of its own."""

    def __init__(self, args: argparse.Namespace, questions: Iterable[Row]) -> None:
        self.args = args
        self.config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
        if getattr(self.config, "is_causal", True) is False:
            raise NapDecodeError(f"the teacher {args.teacher} is not causal; see examples/bulk_generate.py for others")
        self.tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
        for question in questions:  # all of them, before the model is loaded
            # If it writes the summary, it reads its own trajectories.
            self.encode(question, args.instruction, times=1 + args.samples * bool(args.write_summary))
        options = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        self.model = load_checkpoint(args.teacher, **options)[0]
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise NapDecodeError(f"the teacher {args.teacher} has no end token, so that no trajectory would end")
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        pad = self.tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None else pad  # attention hides it, so any id will do
        # Instead of the checkpoint's own, which may have a top_k or a repetition penalty that nobody asked for.
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=args.max_new_tokens, eos_token_id=self.ends, pad_token_id=self.pad
        )

    def encode(self, question: Row, instruction: str, times: int = 1, **values: str) -> list[int]:
        """Token ids of an instruction with the question in it; as a chat, if the tokenizer has a template for it."""
        is_text = isinstance(question["prompt"], str)
        chat = [{"role": "user", "content": question["prompt"]}] if is_text else question["prompt"]
        content = fill_in(instruction, prompt=chat[-1]["content"], **values)
        is_chat = not is_text or getattr(self.tokenizer, "chat_template", None) is not None
        prompt = [*chat[:-1], {**chat[-1], "content": content}] if is_chat else content
        ids = encode_prompts([prompt], self.tokenizer)[0][0]
        more = times * self.args.max_new_tokens
        check_room(question, self.config, len(ids), more, "teacher can see; lower --max-new-tokens")
        return ids

    def trace(self, questions: Sequence[Row]) -> list[Row]:
        """Questions of a part, each with what the teacher wrote: texts, and whether they came to their end."""
        each = range(self.args.samples)
        prompts = [ids for q in questions for ids in [self.encode(q, self.args.instruction)] * len(each)]
        seeds = [row_seed(q["seed"], f"trajectory {j}") for q in questions for j in each]
        written = iter(self.sample(prompts, seeds, self.args.temperature))
        traces = [question | {"trajectories": list(islice(written, len(each)))} for question in questions]
        if self.args.write_summary:
            prompts = []
            for trace in traces:
                paths = "\n\n".join(f"Attempt {j + 1}: {t['text']}" for j, t in enumerate(trace["trajectories"]))
                prompts.append(self.encode(trace, self.args.write_summary, paths=paths, answer=trace["answer"]))
            summaries = self.sample(prompts, [0] * len(prompts), temperature=0.0)
            traces = [trace | {"summary": summary} for trace, summary in zip(traces, summaries, strict=True)]
        return traces

    def sample(self, prompts: list[list[int]], seeds: list[int], temperature: float) -> list[Row]:
        results: dict[int, Row] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # similar lengths in a batch
        for start in range(0, len(order), self.args.batch_size):
            batch = order[start : start + self.args.batch_size]
            rows = self._generate([prompts[i] for i in batch], [seeds[i] for i in batch], temperature)
            results.update(zip(batch, rows, strict=True))
        return [results[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int], temperature: float) -> list[Row]:
        device, width = self.model.device, max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(transformers.TemperatureLogitsWarper(float(temperature)))
            if self.args.top_p < 1:
                processors.append(transformers.TopPLogitsWarper(self.args.top_p))
            processors.append(Gumbel(torch.tensor(seeds, device=device), width))
        rows = self.model.generate(
            torch.tensor([[self.pad] * n + prompt for n, prompt in zip(pads, prompts, strict=True)], device=device),
            attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=device),
            logits_processor=processors,
        )
        results = []
        for row in rows[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if token in self.ends), None)
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            results.append({"text": text, "finished": length is not None})
        return results


class Gumbel:
    """Adds noise that depends on the row's seed, the step and the token alone; the highest score then is a draw.

    transformers' own sampling draws for a whole batch from one stream, so that a row would depend on its neighbours.
    """

    def __init__(self, seeds: Tensor, width: int) -> None:
        self.seeds, self.width = seeds, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        draws = uniform(self.seeds, input_ids.shape[1] - self.width, TOKEN_STREAM, tokens)  # (B, V)
        return scores - (-draws.log()).log()


def sample(parts: Sequence[Sequence[Row]], args: argparse.Namespace) -> dict[str, Row]:
    """Traces by id: those that are there already, and those of the parts that are missing."""
    directory, note = args.output / "traces", args.output / "_run.json"
    run = {name: getattr(args, name) for name in args.sampling}
    noted = json.loads(note.read_text(encoding="utf-8")) if note.exists() else run
    for name, value in run.items():
        if noted.get(name) != value:
            raise NapDecodeError(
                f"{args.output} has traces of another run, with --{name.replace('_', '-')} {noted.get(name)!r} instead "
                f"of {value!r}; write to another directory, or use the same options"
            )
    traces: dict[str, Row] = {}
    for file in sorted(directory.glob("part-*.jsonl")):
        for row in read_prompts(file):
            if not {"id", "trajectories"} <= row.keys():
                raise NapDecodeError(f"{file}: a trace has an id and trajectories, but this one {', '.join(row)}")
            traces[str(row["id"])] = row
    for question in (question for part in parts for question in part if question["id"] in traces):
        trace = traces[question["id"]]
        for name in ("prompt", "answer", "seed"):  # which traces from elsewhere need not have
            if trace.get(name, question[name]) != question[name]:
                raise NapDecodeError(
                    f"question {question['id']!r} is in {directory} already, but with {name} {trace[name]!r:.80} "
                    f"instead of {question[name]!r:.80}; give it another id, or write to another directory"
                )
    missing = [left for part in parts if (left := [question for question in part if question["id"] not in traces])]
    if missing:
        teacher = Teacher(args, (question for part in missing for question in part))
        directory.mkdir(parents=True, exist_ok=True)
        write_at_once(note, [json.dumps(run, indent=1)])
    started, done, total = time.perf_counter(), 0, sum(map(len, missing))
    for part in missing:
        name = hashlib.blake2b(json.dumps([question["id"] for question in part]).encode(), digest_size=16).hexdigest()
        new = teacher.trace(part)
        write_at_once(directory / f"part-{name}.jsonl", map(json.dumps, new))
        traces.update((trace["id"], trace) for trace in new)
        done += len(part)
        print(f"sampled {done} of {total} questions, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return traces


# ------------------------------------------------------------------------------------------------- 2. the student


class LeftOutError(Exception):
    """Why a question is not trained on."""


class Layout:
    """Puts traces on the student's canvas, and counts what it leaves out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.counts: Counter[str] = Counter()
        trust = {"trust_remote_code": args.trust_remote_code}
        self.config = AutoConfig.from_pretrained(args.student, **trust)
        self.tokenizer = AutoTokenizer.from_pretrained(args.student, **trust)
        self.mask_token_id = self._find("mask", args.mask_token_id, find_family(self.config).mask_token_id)
        self.end_token_id = self._find("eos", None, self.tokenizer.sep_token_id)
        self.pad_token_id = self._find("pad", None, None)
        # What the decoder could not write, or would stop at.
        self.special = {*self.tokenizer.all_special_ids, self.mask_token_id}
        self.template = CanvasTemplate.nap(
            args.num_paths,
            path_length=args.path_length,
            summary_length=args.summary_length,
            path_header=args.path_header,
            summary_header=args.summary_header,
        )
        self.lengths = [block.length for block in self.template.blocks]
        if args.format == "chain":
            self.template = CanvasTemplate.plain(sum(self.lengths))
        closings = [args.path_closing.replace("{}", str(j + 1)) for j in range(args.num_paths)]
        self.closings = [self._encode(closing) for closing in (*closings, args.summary_closing)]
        for closing, length in zip(self.closings, self.lengths, strict=True):
            if len(closing) >= length:
                raise NapDecodeError(f"a closing text takes {len(closing)} tokens of a block of {length}; lengthen it")

    def _find(self, name: str, given: int | None, known: int | None) -> int:
        """One of the student's ids, from where the decoder takes it."""
        owners = (self.config, self.tokenizer) if name == "eos" else (self.tokenizer, self.config)
        name = f"{name}_token_id"
        for found in (given, *(getattr(owner, name, None) for owner in owners), known):
            if found is not None:
                return int(found[0] if isinstance(found, list | tuple) else found)
        remedy = "pass --mask-token-id" if name == "mask_token_id" else "set it in the files of the tokenizer"
        raise NapDecodeError(f"the student {self.args.student} has no {name}, which the canvas needs; {remedy}")

    def canvas(self, question: Row) -> Canvas:
        """What the decoder would be given, and fill."""
        chat = self.args.chat and isinstance(question["prompt"], str)
        prompt = [{"role": "user", "content": question["prompt"]}] if chat else question["prompt"]
        ids = encode_prompts([prompt], self.tokenizer)[0]
        if self.mask_token_id in ids[0]:
            raise NapDecodeError(f"question {question['id']!r}: there is a mask token of the student in the prompt")
        canvas = Canvas.from_prompts(ids, self.template, mask_token_id=self.mask_token_id, tokenizer=self.tokenizer)
        more = canvas.tokens.shape[1] - len(ids[0])
        check_room(question, self.config, len(ids[0]), more, "student can see; shorten the paths, or have fewer")
        return canvas

    def rows(self, traces: Iterable[Row]) -> Iterator[Row]:
        """What there is to train on."""
        for trace in traces:
            try:
                yield self._row(trace)
            except LeftOutError as reason:
                self.counts[str(reason)] += 1

    def _row(self, trace: Row) -> Row:
        args = self.args
        paths: list[tuple[str, list[int]]] = []
        for trajectory in trace["trajectories"]:
            if len(paths) < args.num_paths:
                path = self._fit("trajectories", trajectory, len(paths), args.too_long == "truncate")
                paths += [] if path is None else [path]
        if len(paths) < args.num_paths:
            raise LeftOutError("questions with too few paths")
        correct = [is_same(final_answer(text, args.answer_regex), trace["answer"]) for text, _ in paths]
        if sum(correct) < args.min_correct:
            raise LeftOutError("questions with too few correct paths")
        written = trace.get("summary") or {"text": fill_in(args.summary, answer=trace["answer"]), "finished": True}
        summary = self._fit("summaries", written, args.num_paths, truncate=False)
        if summary is None:
            raise LeftOutError("questions without a summary")
        blocks = [ids for _, ids in (*paths, summary)]
        if args.format == "chain":
            chain = [token for path in blocks[:-1] for token in path + self._encode(args.separator)]
            room = sum(self.lengths) - len(blocks[-1])
            self.counts["chains too long"] += len(chain) > room
            if len(chain) > room and args.too_long == "drop":
                raise LeftOutError("questions with too long a chain")
            blocks = [chain[:room] + blocks[-1]]
        canvas = self.canvas(trace)
        tokens, block = canvas.tokens[0], canvas.block[0]
        for number, (ids, length) in enumerate(zip(blocks, canvas.lengths[0].tolist(), strict=True)):
            # A block that is full to its last slot has no end token; the canvas ends it.
            tokens[block == number] = torch.tensor((ids + [self.end_token_id] + [self.pad_token_id] * length)[:length])
        return {
            **{name: trace[name] for name in ("id", "prompt", "answer")},
            **{"paths": [text for text, _ in paths], "correct": correct, "summary": summary[0]},
            **{"input_ids": tokens.tolist(), "block": block.tolist(), "loss_mask": canvas.decodable[0].int().tolist()},
        }

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fit(self, kind: str, written: Row, number: int, truncate: bool) -> tuple[str, list[int]] | None:
        """Text and ids of what fits into a block, or is made to; counts what does not."""
        text, is_finished = written["text"], written["finished"]
        ids, closing = self._encode(text), self.closings[number]
        room = self.lengths[number] - len(closing)
        if not ids or not self.special.isdisjoint(ids):
            self.counts[f"{kind} {'with special tokens' if ids else 'without text'}"] += 1
            return None
        if is_finished and len(ids) <= room:
            return text, ids + closing
        self.counts[f"{kind} {'too long' if is_finished else 'without an end'}"] += 1
        return (self.tokenizer.decode(ids[:room]), ids[:room] + closing) if truncate else None


def final_answer(text: str, pattern: re.Pattern[str]) -> str:
    """The last match in a text: its first group if there is one, else all of it."""
    return ["", *((match[pattern.groups and 1] or "").strip() for match in pattern.finditer(text))][-1]


def is_same(found: str, answer: str) -> bool:
    """The same text, or the same number."""
    try:
        return found == answer or float(found.replace(",", "")) == float(answer.replace(",", ""))
    except ValueError:
        return False


def write_at_once(path: Path, lines: Iterable[str]) -> int:
    """Write lines under another name first, so that nobody ever sees a part of the file; returns how many."""
    temporary, number = path.with_name(f".{path.name}.tmp"), 0
    with temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{line}\n")
            number += 1
    temporary.replace(path)
    return number


def write_parquet(lines: Path, path: Path) -> None:
    """The same rows as Parquet."""
    import pyarrow as pa
    from pyarrow import json as readers
    from pyarrow import parquet

    text, numbers = pa.string(), pa.list_(pa.int32())
    kinds = {"id": text, "answer": text, "summary": text, "paths": pa.list_(text)}  # never dates, whatever they say
    kinds |= dict.fromkeys(("input_ids", "block", "loss_mask"), numbers)
    parsing = readers.ParseOptions(explicit_schema=pa.schema(kinds))
    table = readers.read_json(lines, readers.ReadOptions(block_size=2**26), parsing)
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(table, temporary)
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------ 3. the command


def curate(args: argparse.Namespace) -> None:
    check(args)
    parts = read_questions(args.input, args.seed, args.questions_per_part)
    questions = [question for part in parts for question in part]
    layout = Layout(args)
    for question in questions:  # all of them, before the teacher begins
        canvas = layout.canvas(question)
    traces = sample(parts, args)
    rows = map(json.dumps, layout.rows(traces[question["id"]] | question for question in questions))
    path = args.output / f"{args.format}.jsonl"
    path.with_suffix(".parquet").unlink(missing_ok=True)  # of another run
    counts = {"questions": len(questions), "written": write_at_once(path, rows), **layout.counts}
    report = {"counts": counts, "blocks": canvas.block_names, "held": canvas.held, "options": vars(args)}
    report |= {name: getattr(layout, name) for name in ("mask_token_id", "end_token_id", "pad_token_id")}
    write_at_once(args.output / f"{args.format}_report.json", [json.dumps(report, indent=1, default=str)])
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not counts["written"]:
        raise NapDecodeError(f"no question is left: {told}. See --too-long, --path-length and --min-correct")
    if args.parquet:
        write_parquet(path, path.with_suffix(".parquet"))
    print(f"{path}: {told}", file=sys.stderr)


def check(args: argparse.Namespace) -> None:
    """What can be checked of the options without anything else."""
    args.samples = args.num_paths if args.samples is None else args.samples
    for name in ("max_new_tokens", "batch_size", "questions_per_part", "summary_length", "num_paths"):
        check_integer(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    check_integer("--samples", args.samples, args.num_paths)
    check_between("--min-correct", args.min_correct, 0, args.num_paths)
    check_between("--temperature", args.temperature, 0.0 if args.samples == 1 else 1e-3, float("inf"))
    check_between("--top-p", args.top_p, 1e-3, 1.0)
    for name, place in (("instruction", "{prompt}"), ("summary", "{answer}"), ("write_summary", "{paths}")):
        if place not in (getattr(args, name) or place):
            raise NapDecodeError(f"--{name.replace('_', '-')} must have {place} in it, but is {getattr(args, name)!r}")
    if args.write_summary and args.samples != args.num_paths:
        raise NapDecodeError(
            f"--write-summary is about all trajectories of a question, but of --samples {args.samples} there are only "
            f"--num-paths {args.num_paths} in a canvas; make them equal"
        )
    if args.parquet and importlib.util.find_spec("pyarrow") is None:
        raise NapDecodeError("--parquet needs pyarrow; run pip install 'nap_decode[ray]'")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="questions: .jsonl, .parquet, or a directory of .parquet")
    add("--output", type=Path, required=True, help="directory")
    add("--student", required=True, help="checkpoint to be trained: its tokenizer and config are used")
    add("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    add("--parquet", action="store_true", help="write a Parquet file too")
    teacher = parser.add_argument_group("what the teacher writes; an output directory belongs to one choice of these")
    add = teacher.add_argument
    add("--teacher", required=True, help="checkpoint of a causal language model")
    add("--samples", type=int, help="trajectories for each question, spare ones included (default: --num-paths)")
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=512, help="tokens of a trajectory, at most (default: 512)")
    add("--instruction", default="{prompt}", help="what the teacher is told, with {prompt} for the question")
    add("--write-summary", nargs="?", const=SUMMARY_REQUEST, help="let the teacher write summaries; see the docs")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.set_defaults(sampling=[action.dest for action in teacher._group_actions])
    add = parser.add_argument_group("how it is run").add_argument
    add("--device", default="cpu")
    add("--batch-size", type=int, default=24, help="trajectories at a time (default: 24)")
    add("--questions-per-part", type=int, default=64, help="an interruption costs this many at most (default: 64)")
    add = parser.add_argument_group("the canvas").add_argument
    add("--format", choices=("nap", "chain"), default="nap", help="parallel paths, or the same ones in a row")
    add("--num-paths", type=int, default=3)
    add("--path-length", type=int, default=330, help="slots of each path (default: 330)")
    add("--summary-length", type=int, default=32, help="slots of the summary (default: 32)")
    add("--path-header", default="<think {}>", help="clamped text, with {} for the number of the path")
    add("--summary-header", default="<summary>", help="clamped text")
    add("--path-closing", default="", help="text that ends every path, inside its block, such as '</think {}>'")
    add("--summary-closing", default="", help="text that ends the summary, inside its block")
    add("--separator", default="\n\n", help="text behind every path of a chain")
    add("--summary", default="The answer is {answer}.", help="unless the teacher writes it")
    add("--chat", action="store_true", help="put prompts through the student's chat template")
    add("--mask-token-id", type=int, help="the student's, if neither tokenizer nor config names it")
    add = parser.add_argument_group("which questions").add_argument
    add("--too-long", choices=("drop", "truncate"), default="drop", help="what to do with trajectories that do not fit")
    add("--min-correct", type=int, default=0, help="paths that must come to the reference answer (default: 0)")
    add(
        "--answer-regex",
        type=re.compile,
        default=r"-?\d[\d,]*(?:\.\d+)?",
        help="the last match (its first group) is a path's answer",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        curate(make_parser().parse_args(arguments))
    except (NapDecodeError, OSError) as error:
        raise SystemExit(f"curate.py: error: {error}") from error


if __name__ == "__main__":
    main()
