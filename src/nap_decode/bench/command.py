"""The command ``nap-decode bench``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nap_decode.base.errors import NapDecodeError, check_integer
from nap_decode.bench.comparing import BenchmarkResult, benchmark
from nap_decode.bench.growth import LADDER, LadderResult, ladder
from nap_decode.bench.workload import SCHEDULERS, SHAPES, Shape, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nap-decode bench``."""
    defaults = Workload()
    add = parser.add_argument_group("model").add_argument
    add("--model", help="directory or hub name of a transformers checkpoint")
    add("--shape", help=f"random weights instead: {', '.join(SHAPES)}, or hidden=512,layers=12,... (default: small)")
    add("--device", default="cpu", help="where to run, for example cuda (default: cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--mask-token-id", type=int, help="the mask id, if neither tokenizer nor config names it")
    add("--bidirectional", action="store_true", help="set is_causal = False in the config of a decoder")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add("--compile", choices=("kernels", "graphs"), help="passed on to the sampler, see there")
    add = parser.add_argument_group("what to decode").add_argument
    for option in dataclasses.fields(Workload):
        name, value = "--" + option.name.replace("_", "-"), getattr(defaults, option.name)
        if isinstance(value, bool):
            add(name, action="store_true", help="prompts of different lengths")
        else:
            choices = sorted(SCHEDULERS) if option.name == "scheduler" else None
            add(name, type=type(value), default=value, choices=choices, help=f"(default: {value})")
    add = parser.add_argument_group("measuring").add_argument
    add("--repeats", type=int, default=5, help="repetitions, after a warm-up (default: 5)")
    add("--threads", type=int, help="CPU threads; torch's choice by default")
    add("--ladder", nargs="*", choices=LADDER, help="measure growth instead, in these dimensions (default: all)")
    add(
        "--ladder-limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for all repetitions of one size (default: 60)",
    )
    add("--json", metavar="FILE", help="write everything measured to this file")


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], tuple[Any, Any]]) -> None:
    """Run ``nap-decode bench``.

    Args:
        args: the options.
        load: loads the model and tokenizer that they name.

    Raises:
        NapDecodeError: options out of range or that do not go together.
    """
    workload = Workload(**{option.name: getattr(args, option.name) for option in dataclasses.fields(Workload)})
    check_integer("--repeats", args.repeats, 1)
    if args.model is not None and (args.shape is not None or args.ladder is not None):
        raise NapDecodeError("--model does not go with --shape or --ladder, which have random weights")
    if args.ladder is not None:
        for option in dataclasses.fields(Workload):
            if option.name not in ("temperature", "seed") and getattr(args, option.name) != option.default:
                raise NapDecodeError(
                    f"--{option.name.replace('_', '-')} does not go with --ladder, which has sizes of its own"
                )
    shape = Shape.parse(args.shape or ("small" if args.ladder is None else "tiny"))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise NapDecodeError(f"--device {args.device}: this torch sees no CUDA device")
    if args.threads is not None:
        check_integer("--threads", args.threads, 1)
        torch.set_num_threads(args.threads)
    automatic = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype: torch.dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    common: dict[str, Any] = {"repeats": args.repeats, "compile": args.compile, "progress": say}
    result: BenchmarkResult | LadderResult
    if args.ladder is not None:
        sizes = {dimension: LADDER[dimension] for dimension in args.ladder or LADDER}
        options = {"temperature": args.temperature, "limit": args.ladder_limit, "seed": args.seed}
        result = ladder(shape, sizes, dtype=dtype, device=args.device, **options, **common)
    else:
        say(f"loading {args.model}" if args.model else f"making {shape}")
        model, tokenizer = (
            load(args) if args.model else (shape.build(dtype=dtype, device=args.device, seed=args.seed), None)
        )
        result = benchmark(model, workload, tokenizer, mask_token_id=args.mask_token_id, **common)
    print(result)
    if args.json:
        chosen = {name: value for name, value in vars(args).items() if name != "run"}
        Path(args.json).write_text(json.dumps({"options": chosen} | result.to_dict(), indent=1) + "\n")
