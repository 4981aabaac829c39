"""The command ``nap-decode eval``."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from nap_decode.base.errors import NapDecodeError
from nap_decode.checkpoints import add_model_arguments
from nap_decode.integrations.lm_eval import LIKELIHOODS, TASKS, add_costs, harness_model, parse_options

__all__ = ["add_arguments", "run"]


_OF_MODEL = ("sampler", "sampler_args", "likelihood", "samples", "seed", "cfg_scale", "mask_token_id", "bidirectional")
_OF_HARNESS = ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nap-decode eval``."""
    add = add_model_arguments(parser, device=None)
    add("--cfg-scale", type=float, help="classifier-free guidance (default: 0)")
    add("--model-args", default="", metavar="NAME=VALUE,...", help="other options of the harness's HFLM")
    add = parser.add_argument_group("how").add_argument
    add("--sampler", default="parallel_forced", help="name of a decoder, or file written by Sampler.save")
    add("--sampler-args", default="", metavar="NAME=VALUE,...", help="options of the decoder, and of NAP's canvas")
    add("--likelihood", choices=LIKELIHOODS, default="bound", help="how completions are scored (default: bound)")
    add("--samples", type=int, default=128, help="masks drawn for the bound of a completion (default: 128)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=1, help="rows of a forward pass (default: 1)")
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--tasks", required=True, nargs="+", help="tasks of the harness; nim_sum and nim_sum_path are the demo's")
    add("--include-path", action="append", default=[], metavar="DIR", help="directory with more task files; repeatable")
    add("--num-fewshot", type=int, help="examples in front of each question (default: as the task)")
    add("--limit", type=float, help="documents of each task, or a share of them")
    add("--gen-kwargs", metavar="NAME=VALUE,...", help="generation options instead of those of the tasks")
    add("--apply-chat-template", action="store_true", help="put questions through the chat template")
    add("--system-instruction", help="system message")
    add("--fewshot-as-multiturn", action="store_true", help="examples as turns of a conversation")
    add("--confirm-run-unsafe-code", action="store_true", help="run tasks that execute generated code")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="write results.json there, and with --log-samples samples_TASK.jsonl")
    add("--log-samples", action="store_true", help="write every request and response; needs --output")
    add("--use-cache", metavar="DIR", help="keep responses there; the same command then goes on where it was killed")


def run(args: argparse.Namespace) -> None:
    """Run ``nap-decode eval``."""
    limit = args.limit
    if limit is not None and not 0 < limit < 1:
        if limit < 1 or not limit.is_integer():
            raise NapDecodeError(f"--limit must be a whole number, or a share between 0 and 1, but is {limit:g}")
        limit = int(limit)
    if args.log_samples and args.output is None:
        raise NapDecodeError("--log-samples needs to know where to write; add --output DIR")
    output = None if args.output is None else Path(args.output)
    if output is not None and (output / "results.json").exists():
        raise NapDecodeError(f"{output} has results already; choose another directory for --output, or remove it")
    options = parse_options(args.model_args)
    for name in sorted(options.keys() & vars(args).keys()):
        raise NapDecodeError(f"--model-args names {name}, which has an option of its own: --{name.replace('_', '-')}")
    make = harness_model()
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table, simple_parse_args_string

    manager, tasks = _find_tasks(args)
    given = vars(args)
    lm = make(
        args.model,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        trust_remote_code=args.trust_remote_code,
        **{name: given[name] for name in _OF_MODEL},
        **options,
    )
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        batch_size=args.batch_size,
        use_cache=None if args.use_cache is None else str(Path(args.use_cache) / lm.fingerprint),
        limit=limit,
        log_samples=True,
        gen_kwargs=simple_parse_args_string(args.gen_kwargs) or None,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        **{name: given[name] for name in _OF_HARNESS},
    )
    if results is not None:  # else another process has them
        add_costs(results)
        print(make_table(results))
        if "groups" in results:
            print(make_table(results, "groups"))
        samples = results.pop("samples")
        if output is not None:
            dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
            output.mkdir(parents=True, exist_ok=True)
            for task, of_task in samples.items() if args.log_samples else ():
                lines = (dump(sample) + "\n" for sample in of_task)
                (output / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            (output / "results.json").write_text(dump(results, indent=2) + "\n", encoding="utf-8")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _find_tasks(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names of the tasks."""
    from lm_eval.tasks import TaskManager

    paths = [str(TASKS), *args.include_path]
    for path in paths:
        if not os.path.isdir(path):
            raise NapDecodeError(f"--include-path {path} is no directory")
    tasks = [name for some in args.tasks for name in some.split(",") if name]
    # The harness reads thousands of files to know its own tasks, which is not needed for ours.
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        print("looking for the harness's tasks", file=sys.stderr)
        manager = TaskManager(include_path=paths)
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known and not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise NapDecodeError(f"there is no task {name!r}. {hint}lm-eval ls tasks lists all of them")
    return manager, manager.match_tasks(tasks)
