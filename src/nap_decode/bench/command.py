"""The command ``nap-decode bench``."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nap_decode.base.errors import NapDecodeError, check_integer
from nap_decode.bench.comparison import BenchmarkResult, benchmark
from nap_decode.bench.growth import LADDER, LadderResult, ladder
from nap_decode.bench.workload import SCHEDULERS, SHAPES, Shape, Workload
from nap_decode.checkpoints import add_model_arguments, check_device, load_named

_WORKLOAD = {  # options, by fields
    "prompt_length": "random tokens before the canvas",
    "new_tokens": "slots to decode in each row",
    "steps": "forward passes",
    "blocks": "blocks of equal length, into which the slots are cut",
    "batch_size": "rows",
    "ragged": "prompts of different lengths, from half of --prompt-length on",
    "scheduler": "all blocks together, or one after the other",
    "temperature": "0 takes the most likely token",
    "seed": "of weights, prompts and draws",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nap-decode bench``."""
    add = add_model_arguments(parser, required=False)
    add("--shape", help=f"random weights instead: {', '.join(SHAPES)}, or hidden=512,layers=12,... (default: small)")
    add("--compile", choices=("kernels", "graphs"), default=False, help="as of nap-decode generate")
    add = parser.add_argument_group("what to decode").add_argument
    for name, text in _WORKLOAD.items():
        flag, value = "--" + name.replace("_", "-"), getattr(Workload, name)
        if name == "ragged":
            add(flag, action="store_true", help=text)
        else:
            choices = sorted(SCHEDULERS) if name == "scheduler" else None
            add(flag, type=type(value), default=value, choices=choices, help=f"{text} (default: {value})")
    add = parser.add_argument_group("measuring").add_argument
    add("--repeats", type=int, default=5, help="repetitions, after a warm-up (default: 5)")
    add("--threads", type=int, help="CPU threads; torch's choice by default")
    add("--ladder", nargs="*", choices=LADDER, help="measure growth instead, in these dimensions (default: all)")
    limit = "for all repetitions of one size; larger ones are skipped (default: 60)"
    add("--ladder-limit", type=float, default=60.0, metavar="SECONDS", help=limit)
    add("--json", metavar="FILE", help="write everything measured to this file")


def run(args: argparse.Namespace) -> None:
    """Run ``nap-decode bench``.

    Raises:
        NapDecodeError: options out of range or that do not go together.
    """
    workload = Workload(**{name: getattr(args, name) for name in _WORKLOAD})
    check_integer("--repeats", args.repeats, 1)
    if args.model is not None and (args.shape is not None or args.ladder is not None):
        raise NapDecodeError("--model does not go with --shape or --ladder, which have random weights")
    for name in _WORKLOAD.keys() - {"temperature", "seed"} if args.ladder is not None else ():
        if getattr(args, name) != getattr(Workload, name):
            flag = f"--{name.replace('_', '-')}"
            raise NapDecodeError(f"{flag} does not go with --ladder, which has sizes of its own")
    shape = Shape.parse(args.shape or ("small" if args.ladder is None else "tiny"))
    check_device(args)
    if args.threads is not None:
        check_integer("--threads", args.threads, 1)
        torch.set_num_threads(args.threads)
    automatic = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype: torch.dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)

    say = partial(print, file=sys.stderr, flush=True)
    common: dict[str, Any] = {"repeats": args.repeats, "compile": args.compile, "progress": say}
    result: BenchmarkResult | LadderResult
    if args.ladder is not None:
        sizes = {dimension: LADDER[dimension] for dimension in args.ladder} or None
        options = {"temperature": args.temperature, "limit": args.ladder_limit, "seed": args.seed}
        result = ladder(shape, sizes, dtype=dtype, device=args.device, **options, **common)
    else:
        say(f"loading {args.model}" if args.model else f"making {shape}")
        made = load_named(args) if args.model else (shape.build(dtype=dtype, device=args.device, seed=args.seed), None)
        model, tokenizer = made
        family = None if args.model else shape.family
        result = benchmark(model, workload, tokenizer, mask_token_id=args.mask_token_id, family=family, **common)
    print(result)
    if args.json:
        chosen = {name: value for name, value in vars(args).items() if name != "run"}
        Path(args.json).write_text(json.dumps({"options": chosen} | result.to_dict(), indent=1) + "\n")
