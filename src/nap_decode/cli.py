"""The command ``nap-decode``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from nap_decode import bench, decoders
from nap_decode.base.errors import NapDecodeError, check_between, check_integer
from nap_decode.base.version import __version__
from nap_decode.bench.workload import SCHEDULERS
from nap_decode.canvas import CanvasTemplate
from nap_decode.checkpoints import add_model_arguments, check_device, load_named
from nap_decode.integrations import evaluation, ray
from nap_decode.integrations._shared import find, given
from nap_decode.measure.arness import ARnessMeter
from nap_decode.model.denoiser import Denoiser
from nap_decode.parts.scheduler import AnyOrderScheduler, Scheduler
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.sampler import Sampler
from nap_decode.speed.reuse import REUSES

_SCHEDULERS: dict[str, type[Scheduler]] = {**SCHEDULERS, "any-order": AnyOrderScheduler}
_SHORTHANDS = ("tokens_per_step", "steps", "temperature")  # for --set
_MAY_BE_EMPTY = ("model_args", "sampler_args", "gen_kwargs")  # lists of options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        _check_empty(args)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("nap-decode: interrupted", file=sys.stderr)
        return 130  # as shells say it
    except BrokenPipeError:  # nobody reads on; the interpreter must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NapDecodeError, OSError) as error:
        print(f"nap-decode: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nap-decode", description="Decode masked-diffusion language models.")
    parser.add_argument("--version", action="version", version=f"nap-decode {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch an embedded model decode, and compare models and decoders")
    demo.add_argument("--problems", type=int, default=50, help="held-out problems in the table (default: 50)")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="decode prompts with any checkpoint")
    generate.set_defaults(run=_generate)
    add_model_arguments(generate)
    add = generate.add_argument_group("what to decode").add_argument
    add("--prompt", action="append", help="text; may be given several times")
    add("--chat", action="store_true", help="put each prompt through the chat template, as a user's message")
    add("--infill", action="store_true", help="decode the mask tokens in the prompts instead of appending")
    add("--max-new-tokens", type=int, help="append one block of this length instead of NAP's canvas")
    add("--num-paths", type=int, help="default: 3")
    add("--path-length", type=int, help="slots of each path (default: 330)")
    add("--summary-length", type=int, help="slots of the summary (default: 32)")
    add("--total-length", type=int, help="slots of all blocks; the paths get equal shares")
    # What is not given is None, here and below: a default is what the part itself has, and 0 is as good as any value.
    add = generate.add_argument_group("how").add_argument
    add("--decoder", help="one of the field's, such as klass, or a file by Sampler.save (default: parallel_forced)")
    add("--set", action="append", metavar="OPTION=VALUE", help="an option of the decoder or its parts; repeatable")
    add("--scheduler", choices=sorted(_SCHEDULERS), help="instead of the decoder's own")
    add("--tokens-per-step", type=int, help="short for --set tokens_per_step=...")
    add("--steps", type=int, help="short for --set steps=...")
    add("--temperature", type=float, help="short for --set temperature=...")
    add("--cfg-scale", type=float, help="classifier-free guidance (default: 0)")
    some = "compute some positions of a pass only; approximate (see docs/reuse.md)"
    add("--reuse", choices=sorted(REUSES), help=some)
    add("--refresh-every", type=int, metavar="PASSES", help="with --reuse, compute everything every so many passes")
    add(
        "--compile",
        choices=("kernels", "graphs"),
        default=False,
        help="compile the model's body, or capture steps as CUDA graphs",
    )
    add("--seed", type=int, default=0)
    add = generate.add_argument_group("output").add_argument
    add("--trace", help="write what happened when to this file")
    add("--stream", action="store_true", help="print what is decoded without a gap while it is decoded; for one prompt")
    add("--summary-only", action="store_true", help="print summaries instead of whole canvases")
    ray.add_arguments(generate)

    measure = commands.add_parser("bench", help="what a decode costs, beside bare forwards and the textbook loop")
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.run)

    evaluate = commands.add_parser("eval", help="accuracy and cost on tasks of the lm-evaluation-harness")
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluation.run)

    arness = commands.add_parser("arness", help="how autoregressive was a decode?")
    arness.set_defaults(run=_arness)
    arness.add_argument("trace", help="file written by generate --trace or DecodeTrace.save")
    arness.add_argument("--k", type=int, nargs="+", default=[1], help="values of k (default: 1)")
    arness.add_argument("--json", action="store_true", help="print all numbers as JSON")
    return parser


def _check_empty(args: argparse.Namespace) -> None:
    """Raise if a name or a path is empty, as a script's variable may be that is not set."""
    for name, value in vars(args).items():
        if value == "" and name not in _MAY_BE_EMPTY:
            raise NapDecodeError(f"{_option(name)} is empty; give it a value, or leave it out")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _demo(args: argparse.Namespace) -> None:
    check_integer("--problems", args.problems, 1)
    from transformers.utils import logging

    from nap_decode.demo.show import run_demo

    logging.disable_progress_bar()  # of loading a few megabytes
    run_demo(problems=args.problems)


def _generate(args: argparse.Namespace) -> None:
    if args.input is not None:
        for name in ("prompt", "infill", "trace", "stream", "summary_only"):
            if getattr(args, name) not in (None, False):
                raise NapDecodeError(f"{_option(name)} does not go with --input, whose results are files")
        _compose(args)  # which checks options before any worker is started
        ray.run_bulk(args, _make_sampler)
        return
    if not args.prompt:
        raise NapDecodeError("there is nothing to decode; give a --prompt, or a file of them with --input")
    for name in given(args, ray.BULK):
        raise NapDecodeError(f"{_option(name)} is for prompts from a file; those of --prompt are printed. Add --input")
    if args.stream and (len(args.prompt) > 1 or args.summary_only):
        but = "--summary-only is given" if args.summary_only else f"{len(args.prompt)} are given"
        raise NapDecodeError(f"--stream shows the whole text of one prompt, but {but}")
    sampler = _make_sampler(args)
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in args.prompt] if args.chat else args.prompt
    decode = sampler.infill if args.infill else sampler
    streamer = None
    if args.stream:
        from transformers import TextStreamer

        print(f"# {args.prompt[0]}")
        streamer = [TextStreamer(sampler.tokenizer, skip_prompt=not args.infill)]
    output = decode(prompts, seed=args.seed, streamer=streamer, interruptible=True)
    if args.trace is not None:
        output.trace.save(args.trace)
    texts = output.summary if args.summary_only else output.text
    for prompt, text, tpf in zip(args.prompt, texts, output.tokens_per_forward, strict=True):
        if not args.stream:
            print(f"# {prompt}\n{text}")
        print(f"# {output.forward_passes} forward passes, {tpf:.2f} tokens per forward pass\n")
    if not output.is_complete:
        raise KeyboardInterrupt  # what was decoded so far is printed, with gaps


def _make_sampler(args: argparse.Namespace) -> Sampler:
    """Load the model, and make the sampler that the options of ``generate`` name."""
    how = _compose(args)  # before the model is loaded, which may take minutes
    model, tokenizer = load_named(args)
    own = {name: how.pop(name) for name in ("cfg_scale", "reuse")}
    return Sampler(Denoiser(model, tokenizer, mask_token_id=args.mask_token_id, **own), compile=args.compile, **how)


def _compose(args: argparse.Namespace) -> dict[str, Any]:
    """The decoder and whatever goes with it, checked without a model."""
    how = {"cfg_scale": 0.0, "reuse": None, "template": None} | _decoder(args)
    if args.cfg_scale is not None:
        check_between("--cfg-scale", args.cfg_scale, 0.0, math.inf)
        how["cfg_scale"] = args.cfg_scale
    if args.reuse is not None:
        how["reuse"] = REUSES[args.reuse](refresh_every=args.refresh_every)
    elif args.refresh_every is not None:
        raise NapDecodeError("--refresh-every goes with --reuse")
    how["template"] = _template(args, how["template"])
    if args.ray_address is None:  # else the workers' device is meant
        check_device(args)
    return how


def _decoder(args: argparse.Namespace) -> dict[str, Any]:
    """The decoder that the options name, and what else its file says."""
    options = given(args, _SHORTHANDS)
    for option in args.set or ():
        name, separator, value = option.partition("=")
        if not separator:
            raise NapDecodeError(f"--set must be written as OPTION=VALUE, but is {option!r}")
        options[name] = decoders.parse_value(value)
    name = args.decoder or "parallel_forced"
    scheduler = {} if args.scheduler is None else {"scheduler": _SCHEDULERS[args.scheduler]()}
    if name in decoders.DECODERS:
        if name == "parallel_forced" and not {"tokens_per_step", "steps"} & {*options}:
            options["tokens_per_step"] = 4  # its own, also for another scheduler
        return {"decoder": decoders.make(name, **scheduler, **options)}
    found = find(name)
    return found | {"decoder": found["decoder"].set(**scheduler, **options)}


def _template(args: argparse.Namespace, default: CanvasTemplate | None) -> CanvasTemplate | None:
    lengths = given(args, ["num_paths", "path_length", "summary_length", "total_length"])
    if not args.infill and args.max_new_tokens is None:
        return default if default is not None and not lengths else CanvasTemplate.nap(**lengths)
    instead = "--infill" if args.infill else "--max-new-tokens"
    others = [*map(_option, lengths)] + ["--summary-only"] * args.summary_only
    others += ["--max-new-tokens"] * (args.infill and args.max_new_tokens is not None)
    if others:
        raise NapDecodeError(f"{others[0]} does not go with {instead}, which decodes no canvas of paths and a summary")
    if args.infill:
        return None
    check_integer("--max-new-tokens", args.max_new_tokens, 1)
    return CanvasTemplate.plain(args.max_new_tokens)


def _arness(args: argparse.Namespace) -> None:
    meter = ARnessMeter(args.k)
    meter.update(DecodeTrace.load(args.trace))
    measured = meter.compute()
    if args.json:
        print(json.dumps(_without_nan(dataclasses.asdict(measured)), indent=1))
        return
    print(measured)
    if measured.before_end is not None:
        print(f"\nBefore the end of each block:\n{measured.before_end}")


def _without_nan(value: Any) -> Any:
    """JSON has no nan; null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    raise SystemExit(main())
