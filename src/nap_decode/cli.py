"""The command ``nap-decode``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nap_decode import __version__, bench
from nap_decode.base.errors import NapDecodeError, check_between, check_integer
from nap_decode.canvas import CanvasTemplate
from nap_decode.decoders import presets
from nap_decode.integrations import evaluation, ray
from nap_decode.integrations._shared import given
from nap_decode.measure.arness import ARnessMeter
from nap_decode.model.denoiser import Denoiser, no_model
from nap_decode.model.load import load_checkpoint
from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.confidence import CONFIDENCES
from nap_decode.parts.scheduler import (
    AnyOrderScheduler,
    BlockScheduler,
    MacroParallelScheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.parts.selection import QuotaSelection, ThresholdSelection
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.sampler import Sampler
from nap_decode.speed.reuse import REUSES

_SCHEDULERS: dict[str, type[BlockScheduler]] = {
    "macro-parallel": MacroParallelScheduler,
    "semi-autoregressive": SemiAutoregressiveScheduler,
    "any-order": AnyOrderScheduler,
}
_OF_PARTS = (
    "scheduler",
    "tokens_per_step",
    "steps",
    "hold_until",
    "share_last_step",
    "block_length",
    "temperature",
    "top_k",
    "top_p",
    "confidence",
    "threshold",
)
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
    add = generate.add_argument_group("model").add_argument
    add("--model", required=True, help="directory or hub name of a transformers checkpoint")
    add("--device", default="cpu", help="where to run, for example cuda (default: cpu)")
    add(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as the checkpoint"
    )
    add("--mask-token-id", type=int, help="the mask id, if neither tokenizer nor config names it")
    add("--bidirectional", action="store_true", help="set is_causal = False in the config of a decoder")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add = generate.add_argument_group("what to decode").add_argument
    add("--prompt", action="append", help="text; may be given several times")
    add("--chat", action="store_true", help="put each prompt through the chat template, as a user's message")
    add("--infill", action="store_true", help="decode the mask tokens in the prompts instead of appending")
    add("--max-new-tokens", type=int, help="append one block of this length instead of NAP's canvas")
    add("--num-paths", type=int, help="default: 3")
    add("--path-length", type=int, help="slots of each path (default: 330)")
    add("--summary-length", type=int, help="slots of the summary (default: 32)")
    add("--total-length", type=int, help="slots of all blocks; the paths get equal shares")
    add = generate.add_argument_group("how: a whole decoder").add_argument
    add("--preset", help="a published decoder, such as fast_dllm_threshold")
    add("--set", action="append", metavar="OPTION=VALUE", help="an option of the preset; repeatable")
    add("--sampler", help="file written by Sampler.save")
    # What is not given is None, here and below: a default is what the part itself has, and 0 is as good as any value.
    add = generate.add_argument_group("how: parts of your choice").add_argument
    add("--scheduler", choices=sorted(_SCHEDULERS), help="default: macro-parallel")
    add("--tokens-per-step", type=int, help="default: 4; the least number, by default 1, with --threshold")
    add("--steps", type=int, help="instead of --tokens-per-step")
    add("--hold-until", type=float, help="share of path tokens before the summary opens (macro-parallel; default: 1)")
    add(
        "--share-last-step",
        action="store_true",
        default=None,
        help="let the summary share the step that completes the paths",
    )
    add("--block-length", type=int, help="cut the canvas into blocks of this length (semi-autoregressive)")
    add("--temperature", type=float, help="default: 0")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--confidence", choices=sorted(CONFIDENCES), help="default: probability")
    add("--threshold", type=float, help="commit every token with this confidence, and at least --tokens-per-step")
    add = generate.add_argument_group("how: in any case").add_argument
    add("--cfg-scale", type=float, help="classifier-free guidance (default: 0)")
    add("--close-on-end", action="store_true", help="fill a block behind the model's end token instead of decoding it")
    add(
        "--reuse", choices=sorted(REUSES), help="compute some positions of a pass only; approximate (see docs/reuse.md)"
    )
    add("--refresh-every", type=int, metavar="PASSES", help="with --reuse, compute everything every so many passes")
    add("--compile", choices=("kernels", "graphs"), help="compile the model's body, or capture steps as CUDA graphs")
    add("--seed", type=int, default=0)
    add = generate.add_argument_group("output").add_argument
    add("--trace", help="write what happened when to this file")
    add("--stream", action="store_true", help="print what is decoded without a gap while it is decoded; for one prompt")
    add("--summary-only", action="store_true", help="print summaries instead of whole canvases")
    ray.add_arguments(generate)

    measure = commands.add_parser("bench", help="what a decode costs, beside bare forwards and the textbook loop")
    bench.add_arguments(measure)
    measure.set_defaults(run=partial(bench.run, load=_load))

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
    if args.problems < 1:
        raise NapDecodeError(f"--problems must be at least 1, but is {args.problems}")
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
    composition, template = _compose(args)  # before the model is loaded, which may take minutes
    model, tokenizer = _load(args)
    own = composition.denoiser
    denoiser = Denoiser(model, tokenizer, mask_token_id=args.mask_token_id, cfg_scale=own.cfg_scale, reuse=own.reuse)
    return Sampler(
        denoiser,
        scheduler=composition.scheduler,
        committer=composition.committer,
        template=template,
        close_on="end" if args.close_on_end else composition.close_on,
        compile=args.compile or False,
    )


def _compose(args: argparse.Namespace) -> tuple[Sampler, CanvasTemplate | None]:
    if args.cfg_scale is not None:
        check_between("--cfg-scale", args.cfg_scale, 0.0, math.inf)
    composition = _composition(args)
    template = _template(args, composition.template)
    if args.device.startswith("cuda") and not torch.cuda.is_available() and args.ray_address is None:
        raise NapDecodeError(f"--device {args.device}: this torch sees no CUDA device")
    return composition, template


def _composition(args: argparse.Namespace) -> Sampler:
    """The decoder asked for, of a stand-in for the model."""
    if args.reuse is None and args.refresh_every is not None:
        raise NapDecodeError("--refresh-every goes with --reuse")
    reuse = None if args.reuse is None else REUSES[args.reuse](refresh_every=args.refresh_every)
    model = Denoiser(no_model, mask_token_id=0, reuse=reuse, **given(args, ["cfg_scale"]))
    whole = list(given(args, ["preset", "sampler"]))
    if not whole:
        if args.set is not None:
            raise NapDecodeError(f"--set {args.set[0]} is for an option of a --preset; name one")
        selection = QuotaSelection() if args.threshold is None else ThresholdSelection(args.threshold)
        own = given(args, ["temperature", "top_k", "top_p", "confidence"])
        return Sampler(
            model, scheduler=_scheduler(args), committer=MicroConfidenceCommitter(selection=selection, **own)
        )
    others = [*given(args, _OF_PARTS), *whole[1:]]
    if args.preset is None:  # the file has its own
        others += given(args, ["set", "cfg_scale", "reuse"])
    if others:
        remedy = "; options of a preset are given by --set" if whole[0] == "preset" else ""
        raise NapDecodeError(f"{_option(others[0])} does not go with --{whole[0]}{remedy}")
    if args.sampler is not None:
        return Sampler.load(args.sampler, no_model, mask_token_id=0)
    options = {}
    for option in args.set or ():
        name, separator, value = option.partition("=")
        if not separator:
            raise NapDecodeError(f"--set must be written as OPTION=VALUE, but is {option!r}")
        options[name] = presets.parse_value(value)
    return presets.make_preset(args.preset, model, options)


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


def _scheduler(args: argparse.Namespace) -> BlockScheduler:
    chosen = args.scheduler or "macro-parallel"
    options = given(args, ["steps", "tokens_per_step"])
    if not options:
        options["tokens_per_step"] = 4 if args.threshold is None else 1
    own = {"hold_until": "macro-parallel", "share_last_step": "macro-parallel", "block_length": "semi-autoregressive"}
    extra = given(args, own)
    for name in extra:
        if chosen != own[name]:
            raise NapDecodeError(f"{_option(name)} goes with --scheduler {own[name]}, not {chosen}")
    return _SCHEDULERS[chosen](**options, **extra)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    return load_checkpoint(
        args.model,
        device=args.device,
        dtype=args.dtype,
        bidirectional=args.bidirectional,
        trust_remote_code=args.trust_remote_code,
    )


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
