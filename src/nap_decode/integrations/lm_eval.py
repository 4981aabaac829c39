"""A model of EleutherAI's lm-evaluation-harness (``lm_eval``).

:func:`harness_model` makes the class: a subclass of the harness's ``HFLM`` that generates with one of our samplers and
scores with :mod:`nap_decode.measure.likelihood`.  Batching, chat templates, stop strings, request caches, resuming and
evaluation in several processes are HFLM's own.  ``docs/evaluation.md`` says how to use it.

The harness takes strings from its models.  Those that come from here are :class:`Generation`, strings that know what
they cost, so the costs go wherever the harness puts its responses: into its samples, its caches and from process to
process.  :func:`add_costs` writes them into the samples and results of ``simple_evaluate``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nap_decode import demo
from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name, check_seed, refuse
from nap_decode.canvas import Block, CanvasTemplate
from nap_decode.checkpoints import auto_class, load_all
from nap_decode.decoders import parse_value
from nap_decode.integrations._shared import AnySampler, find, make
from nap_decode.measure.arness import ARnessMeter
from nap_decode.measure.likelihood import chain_log_likelihood, check_samples, log_likelihood_bound
from nap_decode.parts.decoder import Decoder
from nap_decode.results.output import SamplerOutput
from nap_decode.run.generate import check_same_model
from nap_decode.run.sampler import Sampler

__all__ = ["TASKS", "DecodeCost", "Generation", "add_costs", "harness_model"]

TASKS = demo.CHECKPOINT.parent / "tasks"
"""Directory with task files for the embedded model, for the harness's ``include_path``."""
LIKELIHOODS = ("bound", "chain")

_log = logging.getLogger(__name__)
_CANVAS = ("num_paths", "path_length", "summary_length", "total_length")
_MODEL_OPTIONS = ("attn_implementation", "device_map", "load_in_4bit", "load_in_8bit", "quantization_config")
# What HFLM would do with its own passes through the model.
_WITHOUT_EFFECT = {"backend": "default", "logits_cache": True, "softmax_dtype": None, "mixed_precision_dtype": None}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # generation options that ask for nothing
    **dict.fromkeys(("num_beams", "num_return_sequences"), (1, None)),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), (1.0, None)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), (0.0, None)),
    "use_cache": (True, False, None),
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWS = ("do_sample", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class DecodeCost:
    """What a generation cost, and in which order it was made.

    Args:
        forward_passes: forward passes that its row took part in.
        tokens_per_forward: decoded tokens by forward passes; what stands behind the end of a block or behind a stop
            string counts for nothing.
        arness_global: Global AR-ness@1, see :mod:`nap_decode.measure.arness`.
        arness_local: Local AR-ness@1; nan for a single token.
    """

    forward_passes: int
    tokens_per_forward: float
    arness_global: float
    arness_local: float


class Generation(str):
    """A generated text, with what it cost.

    Example:
        >>> text = Generation("6", DecodeCost(9, 3.9, 0.1, 0.2))
        >>> text == "6", text.cost.forward_passes
        (True, 9)
    """

    cost: DecodeCost | None

    def __new__(cls, text: str, cost: DecodeCost | None = None) -> Generation:
        """A string; pickling keeps its cost."""
        made = super().__new__(cls, text)
        made.cost = cost
        return made


def add_costs(results: dict[str, Any]) -> dict[str, Any]:
    """Write what generations cost into the results of ``simple_evaluate(..., log_samples=True)``, and return them.

    Every logged sample gets the fields of :class:`DecodeCost` (means over the repeats of a document; None where one is
    not defined), and every task that generates their means and standard errors as metrics, which
    ``lm_eval.utils.make_table`` then shows.

    Example:
        >>> sample = {"doc_id": 0, "resps": [[Generation("6", DecodeCost(9, 3.9, 0.1, 0.2))]]}
        >>> results = add_costs({"results": {"nim_sum": {}}, "samples": {"nim_sum": [sample]}})
        >>> results["results"]["nim_sum"]["forward_passes,none"], sample["tokens_per_forward"]
        (9.0, 3.9)
    """
    if "samples" not in results:
        raise NapDecodeError(
            "the results have no samples, which know the costs; call simple_evaluate(log_samples=True)"
        )
    for task, samples in results["samples"].items():
        by_document: dict[Any, dict[str, float | None]] = {}
        for sample in samples:
            texts = [text for responses in sample["resps"] for text in responses]
            costs = [asdict(text.cost) for text in texts if isinstance(text, Generation) and text.cost]
            means = {name: _mean([cost[name] for cost in costs])[0] for name in (costs[0] if costs else ())}
            sample |= means
            by_document[sample["doc_id"]] = means  # which has a sample for each filter
        for name in [field.name for field in fields(DecodeCost)]:
            mean, error = _mean([means.get(name) for means in by_document.values()])
            if mean is not None:
                shown = {f"{name},none": mean, f"{name}_stderr,none": "N/A" if error is None else error}
                results["results"][task] |= shown
    return results


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean of those that are defined, and its standard error; None if there are too few."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    error = float(np.std(defined, ddof=1)) / math.sqrt(len(defined)) if len(defined) > 1 else None
    return float(np.mean(defined)) if defined else None, error


# -------------------------------------------------------------------------------------------- the model


@functools.cache
def harness_model() -> Any:
    """The class of the harness's model, registered there under the name ``"nap_decode"``.

    It takes, besides what ``HFLM`` takes:

    * ``pretrained``: path or hub name, or a loaded model;
    * ``sampler``: the name of a decoder, a file written by ``Sampler.save``, a :class:`Decoder`, or a :class:`Sampler`;
    * ``sampler_args``: options of the decoder, of NAP's canvas (``num_paths``, ``path_length``, ``summary_length``,
      ``total_length``), and ``compile``; a mapping, or a text, see :func:`parse_options`;
    * ``likelihood``: ``"bound"`` (with its ``samples``) or ``"chain"``, see :mod:`nap_decode.measure.likelihood`;
    * ``seed``: everything that is drawn derives from it and from the request;
    * ``mask_token_id`` and ``cfg_scale``, see :class:`Denoiser`, and ``bidirectional``: set ``is_causal = False``.

    Raises:
        NapDecodeError: the harness is not installed.
    """
    try:
        import accelerate  # noqa: F401
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise NapDecodeError(
            f"evaluation needs EleutherAI's lm-evaluation-harness ({error}); run pip install 'nap_decode[eval]'"
        ) from error
    members = {"__doc__": harness_model.__doc__, "__module__": __name__}
    return register_model("nap_decode")(type("NapDecodeLM", (_NapDecode, HFLM), members))


_HFLM: Any = object  # at run time the harness's class stands behind


class _NapDecode(_HFLM):  # type: ignore[misc]
    """What the model does differently from ``HFLM``, before which it stands in the class that is made of both."""

    def __init__(
        self,
        pretrained: Any,
        *,
        sampler: AnySampler = "parallel_forced",
        sampler_args: str | Mapping[str, Any] | None = None,
        likelihood: str = "bound",
        samples: int = 128,
        seed: int = 0,
        cfg_scale: float | None = None,
        mask_token_id: int | None = None,
        bidirectional: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        known = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
        for name in options:
            check_name("option of the model", name, {*known, *_MODEL_OPTIONS})
        passes = {name: options[name] for name in _WITHOUT_EFFECT if options.get(name) is not None}
        refuse(passes, _WITHOUT_EFFECT, "it is for passes through the model that HFLM makes, not the Denoiser")
        # How much memory a batch takes is not tried out here.
        check_integer("batch_size", int(batch_size) if str(batch_size).isdecimal() else batch_size, 1)
        check_name("likelihood", likelihood, LIKELIHOODS)
        check_samples(samples)
        guidance = 0.0 if cfg_scale is None else cfg_scale
        check_between("cfg_scale", guidance, 0.0, math.inf)
        self.likelihood, self.samples, self.seed = likelihood, samples, check_seed(seed)
        self._bidirectional = bidirectional
        # Options are checked before the model is loaded, which may take minutes.
        arguments = parse_options(sampler_args) if isinstance(sampler_args, str | None) else dict(sampler_args)
        if isinstance(sampler, Sampler):
            given = {"sampler_args": arguments or None, "mask_token_id": mask_token_id, "cfg_scale": cfg_scale}
            refuse(given, {}, "the sampler is made already, and its Denoiser has its own")
        else:
            lengths = {name: arguments.pop(name) for name in _CANVAS if name in arguments}
            template = CanvasTemplate.nap(**lengths) if lengths else None
            ours = {"template": template, "compile": arguments.pop("compile", False)}
            how = find(sampler, arguments)
            if cfg_scale not in (None, how.get("cfg_scale", cfg_scale)):
                raise NapDecodeError(f"{sampler} has cfg_scale {how['cfg_scale']}, but {cfg_scale} is asked for")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, batch_size=int(batch_size), **options)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # HFLM counts the processes of several GPUs of one machine only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if isinstance(sampler, Sampler):
            check_same_model(sampler, self.model)
            self.sampler = sampler
        else:
            ours |= {"mask_token_id": mask_token_id, "cfg_scale": guidance}
            self.sampler = make(how, self.model, self.tokenizer, **ours)
        self.denoiser = self.sampler.denoiser
        self._options = sorted((name, str(value)) for name, value in options.items())  # a revision, an adapter, ...
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__

    # ---------------------------------------------------------------------------------------- loading

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        if self._bidirectional:
            self._config.is_causal = False

    def _get_backend(self, config: Any, backend: str = "default", trust_remote_code: bool | None = False) -> None:
        self.backend = "causal"  # to the harness: what is generated follows the prompt
        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=functools.partial(load_all, auto_class(config)))

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        super()._create_model(pretrained, config=self._config, **kwargs)

    # ---------------------------------------------------------------------------------------- generating

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a text, if a task does not say: those that the template gives it."""
        return 256 if self.sampler.template is None else sum(block.length for block in _scored(self.sampler.template))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Generation]:
        """Texts, with what they cost; see ``HFLM.generate_until``.  Rows that are finished leave the batch."""
        from lm_eval.api.model import hash_args

        groups, seeds, numbers = defaultdict[str, list[int]](list), list[int](), defaultdict[int, int](int)
        for number, request in enumerate(requests):
            groups[hash_args("", [request.args[1]])].append(number)
            # What the harness adds, so that all processes have as many requests, is decoded as it was before.
            seeds.append(_seed(self.seed, request.args[0], numbers[id(request)] % _repeats(request)))
            numbers[id(request)] += 1
        ways = [(some, *self._way([requests[number] for number in some])) for some in groups.values()]
        made: dict[int, Generation] = {}
        with self._progress(len(requests), disable_tqdm, "generate_until") as bar:
            for some, sampler, length, until in ways:
                encode = functools.partial(
                    self.tok_batch_encode, left_truncate_len=self.max_length - length, truncation=self.truncation
                )
                outputs = sampler.stream(
                    [encode([requests[number].args[0]])[0][0] for number in some],
                    max_batch=self.batch_size,
                    max_new_tokens=None if sampler.template is not None else length,
                    row_seeds=[seeds[number] for number in some],
                    in_order=False,
                    progress=False,
                )
                for output in outputs:
                    number = some[output.index or 0]
                    made[number] = self._generation(output, until)
                    self.cache_hook.add_partial("generate_until", requests[number].args, made[number])
                    bar.update(1)
        return [made[number] for number in range(len(requests))]

    def _progress(self, total: int, is_disabled: bool, what: str) -> Any:
        from transformers.utils.logging import tqdm

        return tqdm(total=total, disable=is_disabled or self.rank != 0, desc=f"Running {what} requests")

    def _generation(self, output: SamplerOutput, until: list[str]) -> Generation:
        """The text of a single row, up to a stop string, and what the row cost."""
        from lm_eval.models.utils import postprocess_generated_text

        trace, think = output.trace, self.think_end_token
        names = [block.name for block in _scored(self.sampler.template)] if self.sampler.template else trace.block_names
        blocks = [j for j, name in enumerate(trace.block_names) if name in names]
        ids = trace.tokens[trace.before_end() & torch.isin(trace.block, trace.block.new_tensor(blocks))].tolist()

        def has_stopped(number: int) -> bool:
            text = self.tok_decode(ids[:number])
            return any(term and term in text for term in until)

        unused = len(ids) + 1 - bisect_left(range(len(ids) + 1), True, key=has_stopped)  # behind a stop string
        meter = ARnessMeter()
        meter.update(trace)
        measured, passes = meter.compute(), output.forward_passes
        tokens_per_forward = output.tokens_per_forward[0] - unused / max(passes, 1)
        cost = DecodeCost(passes, tokens_per_forward, measured.global_at[1], measured.local_at[1])
        if isinstance(think, int) and think in ids:
            ids = ids[len(ids) - ids[::-1].index(think) :]
        text = self.tok_decode(ids)
        text = text.lstrip() if isinstance(think, int) else text
        return Generation(postprocess_generated_text(text, until, think if isinstance(think, str) else None), cost)

    def _way(self, requests: Sequence[Any]) -> tuple[Sampler, int, list[str]]:
        """Sampler, slots of a text and stop strings of requests with the same options.

        Raises:
            NapDecodeError: an option that would have no effect.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        given, eos = requests[0].args[1], self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for name in given:
            check_name("option of generation that a sampler honours", name, {"until", *_LENGTHS, *_DRAWS, *_NEUTRAL})
        options: dict[str, Any] = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        length, slots, template = options.pop("max_gen_toks"), self.max_gen_toks, self.sampler.template
        check_integer("max_gen_toks", length, 1)
        if template is not None and length < slots:
            raise NapDecodeError(
                f"the task allows max_gen_toks={length}, but the sampler's template has {slots} slots for the text "
                f"({', '.join(block.name for block in _scored(template))}); make it shorter, or allow more "
                f"(--gen-kwargs max_gen_toks={slots})"
            )
        if length >= self.max_length:
            raise NapDecodeError(
                f"max_gen_toks={length} leaves no room for a prompt, as the model has {self.max_length} positions; "
                "allow less (--gen-kwargs max_gen_toks=...)"
            )
        sampler, several = self._sampler_for(options), [one for one in requests if _repeats(one) > 1]
        draws = _temperature(sampler.decoder) and not given.get("do_sample")
        if draws and several and self.cache_hook.dbdict is not None:
            raise NapDecodeError(
                f"task {several[0].task_name!r} wants {_repeats(several[0])} samples of each text, but a cache "
                "gives the same one every time, unless do_sample=True is among the task's generation options; "
                "add it (--gen-kwargs do_sample=True), or leave out the cache"
            )
        return sampler, length, until

    def _sampler_for(self, options: Mapping[str, Any]) -> Sampler:
        """The sampler with what a task says about drawing."""
        asks = {n: options[n] for n, values in _NEUTRAL.items() if n in options and options[n] not in values}
        refuse(asks, {}, "samplers do not implement it")
        draws, own = options.get("do_sample"), _temperature(self.sampler.decoder)
        # Where a task says nothing about drawing, the harness adds do_sample=False, but no temperature.
        asked = options.get("temperature") if draws else 0.0 if "temperature" in options else None
        if draws and not asked and not own:
            raise NapDecodeError(
                "the task says do_sample=True, but neither it nor the sampler has a temperature; add one "
                "(--gen-kwargs temperature=1.0)"
            )
        if own and asked not in (None, own):
            wanted = f"temperature {asked:g}" if asked else "greedy decoding (temperature 0)"
            raise NapDecodeError(
                f"the task asks for {wanted}, but the sampler draws at temperature {own:g}; leave the temperature out "
                f"of the sampler, or tell the task too (--gen-kwargs do_sample=True,temperature={own:g})"
            )
        changes = {"temperature": asked} if asked else {}
        for name, neutral in (("top_p", (1,)), ("top_k", (0, -1))):
            value = options.get(name)
            asks_nothing = value is None or (value in neutral and not isinstance(value, bool))
            if (draws or own) and not asks_nothing:  # greedily, the most likely token stays whatever is cut off
                changes[name] = value
        unknown = {n: v for n, v in changes.items() if n not in self.sampler.decoder.options()}
        refuse(unknown, {}, f"{type(self.sampler.decoder.committer).__name__} draws in its own way")
        return self.sampler.set(**changes) if changes else self.sampler

    # ---------------------------------------------------------------------------------------- scoring

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        closing = self.tok_encode("")[-1:]
        if closing and ids[0][-1:] == closing == [self.tokenizer.sep_token_id]:
            # An encoder's tokenizer closes every text; a continuation stands behind that, as in decoding.
            spaces = len(context) - len(context.rstrip())
            continuation = context[len(context) - spaces :] + continuation
            return ids[0], self.tok_encode(continuation, add_special_tokens=False)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        found: dict[int, tuple[float, bool]] = {}
        with self._progress(len(requests), disable_tqdm, "loglikelihood") as bar:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                found |= zip(some, self._score([requests[n] for n in some]), strict=True)
                for n in some:
                    if requests[n][0] is not None:  # else a part of a text, which is cached as a whole
                        self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
                    bar.update(1)
        return [found[n] for n in range(len(requests))]

    def _score(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        prompts = [prompt[max(0, len(prompt) + len(text) - self.max_length) :] for _, prompt, text in requests]
        for (_, prompt, text), kept in zip(requests, prompts, strict=True):
            if len(kept) < len(prompt):
                sizes = len(prompt), len(text), self.max_length
                _log.warning("a context of %d tokens is cut on the left: with %d more, the model takes %d", *sizes)
        texts = self.denoiser, prompts, [text for _, _, text in requests]
        is_greedy, values = [False] * len(requests), list[float]()
        if self.likelihood == "chain" or any(key is not None for key, _, _ in requests):
            chain = chain_log_likelihood(*texts, batch_size=self.batch_size)
            assert chain.is_greedy is not None
            is_greedy, values = chain.is_greedy.tolist(), chain.value.tolist()
        if self.likelihood == "bound":
            # Seeds of the context: alternatives of one length are looked at through the same masks.
            seeds = [_seed(self.seed, prompt) for prompt in prompts]
            bound = log_likelihood_bound(*texts, samples=self.samples, batch_size=self.batch_size, row_seeds=seeds)
            values = bound.value.tolist()
        return list(zip(values, is_greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sums over windows as long as the model allows; see ``LM.loglikelihood_rolling``."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            (text,) = request.args
            # The harness's windows leave out their last token, which a masked model must be given.
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    # ---------------------------------------------------------------------------------------- records

    @property
    def fingerprint(self) -> str:
        """Changes with everything that responses depend on, for the name of a cache."""
        path = Path(self._name)
        paths = sorted(path.iterdir()) if path.is_dir() else []
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        facts = [self._name, files, str(self.model.dtype), self._options, self.denoiser.mask_token_id]
        facts += [*self._facts().items(), self.sampler.template]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def _facts(self) -> dict[str, Any]:
        facts = {"sampler": self.sampler.describe(), "likelihood": self.likelihood}
        return facts | {"likelihood_samples": self.samples, "decoding_seed": self.seed}

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return dict(super().get_model_info()) | self._facts()


def _scored(template: CanvasTemplate) -> list[Block]:
    """Blocks whose text is the answer: the summary, or all if there is none."""
    return [block for block in template.blocks if block.held] or list(template.blocks)


def _temperature(decoder: Decoder) -> Any:
    """That at which tokens are drawn; None if there are several, or the decoder draws in its own way."""
    paths = decoder.options().get("temperature", [])
    return functools.reduce(getattr, (*paths[0], "temperature"), decoder) if len(paths) == 1 else None


def _repeats(request: Any) -> int:
    """How many texts a request wants; one that was made without metadata does not say."""
    return 1 if request.repeats is None else request.repeats


def _seed(seed: int, *of: Any) -> int:
    """A seed that depends on a request alone, whatever its batch, place or process."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *of]).encode()).digest()[:8], "little")


def parse_options(text: str | None) -> dict[str, Any]:
    """Options written as ``name=value,name=value``; values are JSON, or names.

    Inside one of the harness's own texts of model arguments, which are cut at commas, write ``name:value;name:value``.

    Raises:
        NapDecodeError: something else.

    Example:
        >>> parse_options("tokens_per_step=4,path_length=[11,12],confidence=margin")
        {'tokens_per_step': 4, 'path_length': [11, 12], 'confidence': 'margin'}
        >>> parse_options("tokens_per_step:4;path_length:11")
        {'tokens_per_step': 4, 'path_length': 11}
    """
    depth, parts = 0, [""]
    for character in text or "":
        depth += (character in "[{") - (character in "]}")
        if character in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise NapDecodeError(f"a bracket is open in {text!r}")
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, parts)):
        name, separator, value = part.partition("=" if "=" in part else ":")
        if not separator or not name:
            raise NapDecodeError(f"options must be written as name=value,name=value, but {part!r} is not")
        options[name.strip()] = parse_value(value)
    return options
