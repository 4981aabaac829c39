"""A model of EleutherAI's lm-evaluation-harness (``lm_eval``).

:func:`harness_model` makes the class: a subclass of the harness's ``HFLM`` that generates with one of our samplers and
scores with :mod:`nap_decode.measure.likelihood`.  Batching, chat templates, stop strings, request caches, resuming and
evaluation in several processes are HFLM's own.  ``docs/evaluation.md`` says how to use it.

The harness takes strings from its models.  Those that come from here are :class:`Generation`, strings that know what
they cost, so the costs go wherever the harness puts its responses: into its samples, its caches and from process to
process.  :func:`add_costs` writes them into the samples and results of ``simple_evaluate``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nap_decode import demo
from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name
from nap_decode.base.random import wrap
from nap_decode.canvas import CanvasTemplate
from nap_decode.decoders import presets
from nap_decode.decoders.lookahead import LookaheadCommitter
from nap_decode.integrations._shared import AnySampler, bind, refuse
from nap_decode.measure.arness import ARnessMeter
from nap_decode.measure.likelihood import chain_log_likelihood, check_samples, log_likelihood_bound
from nap_decode.model.denoiser import Denoiser, no_model
from nap_decode.model.load import auto_class, load_all
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.results.output import SamplerOutput
from nap_decode.run.sampler import Sampler

__all__ = ["TASKS", "DecodeCost", "Generation", "add_costs", "harness_model"]

TASKS = demo.CHECKPOINT.parent / "tasks"
"""Directory with task files for the embedded model, for the harness's ``include_path``."""

_log = logging.getLogger(__name__)

LIKELIHOODS = ("bound", "chain")
_CANVAS = ("num_paths", "path_length", "summary_length", "total_length")
_MODEL_OPTIONS = ("attn_implementation", "device_map", "load_in_4bit", "load_in_8bit", "quantization_config")
# What HFLM would do with its own passes through the model.
_WITHOUT_EFFECT = {"backend": "default", "logits_cache": True, "softmax_dtype": None, "mixed_precision_dtype": None}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # generation options that ask for nothing
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1.0, None),
    "length_penalty": (1.0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "min_p": (0.0, None),
    "typical_p": (1.0, None),
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
    """Write what generations cost into the results of ``simple_evaluate(..., log_samples=True)``.

    Every logged sample gets the fields of :class:`DecodeCost` (means over the repeats of a document; None where one is
    not defined), and every task their means and standard errors as metrics, which ``lm_eval.utils.make_table`` then
    shows.  Nothing is added to tasks that generate nothing.

    Args:
        results: is changed.

    Returns:
        The same results.

    Raises:
        NapDecodeError: there are no samples in them.

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
            costs = [dataclasses.asdict(text.cost) for text in texts if isinstance(text, Generation) and text.cost]
            if costs:
                means = {name: _mean([cost[name] for cost in costs])[0] for name in costs[0]}
                sample |= means
                by_document[sample["doc_id"]] = means  # which has a sample for each filter
        for name in (field.name for field in dataclasses.fields(DecodeCost)) if by_document else ():
            mean, error = _mean([means[name] for means in by_document.values()])
            if mean is not None:
                results["results"][task] |= {
                    f"{name},none": mean,
                    f"{name}_stderr,none": "N/A" if error is None else error,
                }
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
    * ``sampler``: name of a preset, path of a file written by ``Sampler.save``, a :class:`Sampler` of a loaded model,
      or a function from a :class:`Denoiser` to a sampler;
    * ``sampler_args``: options of the preset, and of NAP's canvas (``num_paths``, ``path_length``, ``summary_length``,
      ``total_length``), and ``close_on`` and ``compile``; a mapping, or a text ``name=value,...`` with JSON values (as
      part of a text of model arguments ``name:value;...``);
    * ``likelihood``: ``"bound"`` (with its ``samples``) or ``"chain"``, see :mod:`nap_decode.measure.likelihood`;
    * ``seed``: everything that is drawn derives from it and from the request;
    * ``mask_token_id`` and ``cfg_scale``, see :class:`Denoiser`, and ``bidirectional``: set ``is_causal = False``.

    Raises:
        NapDecodeError: the harness is not installed.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = demo.load()
        >>> lm = harness_model()(
        ...     model, tokenizer=tokenizer, sampler_args="path_length=11,summary_length=2,tokens_per_step=4"
        ... )  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["gsm8k"])  # doctest: +SKIP
    """
    need_harness()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    members = {"__doc__": harness_model.__doc__, "__module__": __name__}
    return register_model("nap_decode")(type("NapDecodeLM", (_NapDecode, HFLM), members))


def need_harness() -> None:
    """Raise unless the harness is installed."""
    try:
        import accelerate  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise NapDecodeError(
            f"evaluation needs EleutherAI's lm-evaluation-harness ({error}); run pip install 'nap_decode[eval]'"
        ) from error


class _NapDecode:
    """What the model does differently from ``HFLM``, before which it stands in the class that is made of both."""

    # HFLM's.
    AUTO_MODEL_CLASS: Any
    _config: Any
    accelerator: Any
    backend: str
    batch_size: int
    cache_hook: Any
    max_length: int
    model: Any
    prefix_token_id: int
    rank: int
    tok_encode: Any
    tokenizer: Any

    def __init__(
        self,
        pretrained: Any,
        *,
        sampler: str | AnySampler = "parallel_forced",
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
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise NapDecodeError(
                f"batch_size must be a whole number of at least 1, but is {batch_size!r}; how much memory a batch "
                "takes is not tried out here"
            )
        check_name("likelihood", likelihood, LIKELIHOODS)
        check_samples(samples)
        guidance = 0.0 if cfg_scale is None else cfg_scale
        check_between("cfg_scale", guidance, 0.0, math.inf)
        self.likelihood, self.samples, self.seed = likelihood, samples, wrap(seed)
        self._bidirectional = bidirectional
        arguments = parse_options(sampler_args) if isinstance(sampler_args, str | None) else dict(sampler_args)
        if isinstance(sampler, str):
            # Options are checked before the model is loaded, which may take minutes.
            stand_in = Denoiser(no_model, mask_token_id=0, end_token_ids=[1], cfg_scale=guidance)
            make_sampler(stand_in, sampler, {**arguments, "compile": False}, cfg_scale=cfg_scale)
        harness: Any = super()
        harness.__init__(
            pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=int(batch_size),
            **options,
        )
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # HFLM counts the processes of several GPUs of one machine only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

        def denoiser() -> Denoiser:
            return Denoiser(self.model, self.tokenizer, mask_token_id=mask_token_id, cfg_scale=guidance)

        if isinstance(sampler, str):
            self.sampler = make_sampler(denoiser(), sampler, arguments, cfg_scale=cfg_scale)
        else:
            refuse({"sampler_args": arguments or None}, {}, "the sampler is made already")
            if isinstance(sampler, Sampler):
                own = {"mask_token_id": mask_token_id, "cfg_scale": cfg_scale}
                refuse(own, {}, "the sampler's Denoiser has its own")
            self.sampler = bind(sampler, self.model, denoiser)
        self.denoiser = self.sampler.denoiser
        self._options = sorted((name, str(value)) for name, value in options.items())  # a revision, an adapter, ...
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self._bound: dict[tuple[Any, ...], Sampler] = {}
        # Of the call of generate_until that is under way: which repeats of a text are to be decoded, the texts of
        # the batch, and what its rows cost.
        self._repeats: dict[str, deque[int]] = {}
        self._texts: Sequence[str] = ()
        self._costs: deque[DecodeCost] = deque()

    # ---------------------------------------------------------------------------------------- loading

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        harness: Any = super()
        harness._get_config(*args, **kwargs)
        if self._bidirectional:
            self._config.is_causal = False

    def _get_backend(self, config: Any, backend: str = "default", trust_remote_code: bool | None = False) -> None:
        self.backend = "causal"  # to the harness: what is generated follows the prompt
        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=functools.partial(load_all, auto_class(config)))

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        harness: Any = super()
        harness._create_model(pretrained, config=self._config, **kwargs)

    # ---------------------------------------------------------------------------------------- generating

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a text, if a task does not say: those that the template gives it."""
        return 256 if self.sampler.template is None else sum(block.length for block in _scored(self.sampler.template))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Generation]:
        """Texts, with what they cost; see ``HFLM.generate_until``."""
        from lm_eval.api.model import hash_args

        for options in {hash_args("", [request.args[1]]): request.args[1] for request in requests}.values():
            sampler = self._sampler_for(self._check_generation(options))
            if _temperature(sampler.committer) and not options.get("do_sample") and self.cache_hook.dbdict is not None:
                several = [request for request in requests if request.args[1] == options and _repeats(request) > 1]
                if several:
                    raise NapDecodeError(
                        f"task {several[0].task_name!r} wants {_repeats(several[0])} samples of each text, but a cache "
                        "gives the same one every time, unless do_sample=True is among the task's generation options; "
                        "add it (--gen-kwargs do_sample=True), or leave out the cache"
                    )
        numbers: dict[int, int] = defaultdict(int)
        self._repeats = defaultdict(deque)
        for request in requests:
            # What the harness adds, so that all processes have as many requests, is decoded as it was before.
            self._repeats[request.args[0]].append(numbers[id(request)] % _repeats(request))
            numbers[id(request)] += 1
        self._costs.clear()
        recorder = _Recorder(self.cache_hook, self._costs)
        self.cache_hook = recorder
        harness: Any = super()
        try:
            harness.generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.cache_hook = recorder.hook
        return [recorder.made[hash_args("generate_until", request.args)].popleft() for request in requests]

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same as ``HFLM``'s, which ``generate_until`` calls for the texts of a batch."""
        self._texts = strings
        harness: Any = super()
        encoded: tuple[Tensor, Tensor] = harness.tok_batch_encode(strings, *args, **kwargs)
        return encoded

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        attention_mask = options.pop("attention_mask")
        sampler, prompt = self._sampler_for(options), context.shape[1]
        seeds = [_seed(self.seed, text, self._repeats[text].popleft()) for text in self._texts]
        output = sampler.generate(
            context,
            attention_mask,
            max_new_tokens=None if sampler.template is not None else max_length - prompt,
            row_seeds=seeds,
            progress=False,
            return_dict_in_generate=True,
        )
        assert isinstance(output, SamplerOutput)
        names = None if sampler.template is None else [block.name for block in _scored(sampler.template)]
        trace = output.trace
        blocks = [j for j, name in enumerate(trace.block_names) if names is None or name in names]
        kept = trace.before_end() & torch.isin(trace.block, trace.block.new_tensor(blocks))
        texts = [row[where].tolist() for row, where in zip(trace.tokens, kept, strict=True)]
        self._costs.extend(_cost(output, row, self._behind_stop(ids, stop)) for row, ids in enumerate(texts))
        # The harness cuts the prompt off by its width, and leaves special tokens out.
        fill = self.tokenizer.pad_token_id
        if fill not in self.tokenizer.all_special_ids:
            fill = self.tokenizer.eos_token_id
        width = max(map(len, texts))
        padded = torch.tensor([ids + [fill] * (width - len(ids)) for ids in texts], dtype=context.dtype, device="cpu")
        return torch.cat([context, padded.view(len(texts), width).to(context.device)], dim=1)

    def _behind_stop(self, ids: list[int], stop: list[str]) -> int:
        """How many of the tokens stand behind the first stop string, or are in it."""

        def has_stopped(number: int) -> bool:
            text = self.tokenizer.decode(ids[:number], skip_special_tokens=True)
            return any(term and term in text for term in stop)

        if not has_stopped(len(ids)):
            return 0
        low, high = 0, len(ids)  # has not stopped with that many, has stopped with that many
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if has_stopped(middle) else (middle, high)
        return len(ids) - low

    def _check_generation(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a task as ``_model_generate`` gets them.

        Raises:
            NapDecodeError: one that would have no effect.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        for name in options:
            check_name("option of generation that a sampler honours", name, {"until", *_LENGTHS, *_DRAWS, *_NEUTRAL})
        made: dict[str, Any] = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        length, template = made.pop("max_gen_toks"), self.sampler.template
        check_integer("max_gen_toks", length, 1)
        if template is not None:
            blocks = _scored(template)
            slots = sum(block.length for block in blocks)
            if slots > length:
                raise NapDecodeError(
                    f"the task allows max_gen_toks={length}, but the sampler's template has {slots} slots for the text "
                    f"({', '.join(block.name for block in blocks)}); make it shorter, or allow more "
                    f"(--gen-kwargs max_gen_toks={slots})"
                )
        elif length >= self.max_length:
            raise NapDecodeError(
                f"max_gen_toks={length} leaves no room for a prompt, as the model has {self.max_length} positions; "
                "allow less (--gen-kwargs max_gen_toks=...)"
            )
        made.pop("until", None)
        return made

    def _sampler_for(self, options: Mapping[str, Any]) -> Sampler:
        """The sampler with what a task says about drawing; of ``options`` as :meth:`_model_generate` gets them."""
        for name, values in _NEUTRAL.items():
            if name in options and options[name] not in values:
                refuse({name: options[name]}, {}, "samplers do not implement it")
        own = _temperature(self.sampler.committer)
        # Where a task says nothing about drawing, the harness adds do_sample=False, but no temperature.
        says, draws = "temperature" in options, bool(options.get("do_sample"))
        asked = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name) is not None}
        for name, value in asked.items():
            if name == "top_k":
                check_integer(name, value, -1)
            else:
                check_between(name, value, 0.0, 1.0 if name == "top_p" else math.inf)
        temperature = asked.pop("temperature", 0.0) if draws else 0.0
        if draws and not temperature and not own:
            raise NapDecodeError(
                "the task says do_sample=True, but neither it nor the sampler has a temperature; add one "
                "(--gen-kwargs temperature=1.0)"
            )
        if own and ((says and not draws) or (temperature and temperature != own)):
            wanted = f"temperature {temperature:g}" if temperature else "greedy decoding (temperature 0)"
            raise NapDecodeError(
                f"the task asks for {wanted}, but the sampler draws at temperature {own:g}; leave the temperature out "
                f"of the sampler, or tell the task too (--gen-kwargs do_sample=True,temperature={own:g})"
            )
        neutral = {"top_p": (1,), "top_k": (0, -1), "temperature": ()}
        cuts = {name: value for name, value in asked.items() if name != "temperature" and value not in neutral[name]}
        if not draws and not own:
            cuts = {}  # cutting what is not drawn from changes nothing: the most likely token stays
        changes = ({"temperature": temperature} if temperature else {}) | cuts
        key = tuple(sorted(changes.items()))
        if key not in self._bound:
            sampler = self.sampler
            self._bound[key] = sampler.replace(committer=_drawing(sampler.committer, changes)) if changes else sampler
        return self._bound[key]

    # ---------------------------------------------------------------------------------------- scoring

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        harness: Any = super()
        ids: tuple[list[int], list[int]] = harness._encode_pair(context, continuation)
        closing = self.tok_encode("")[-1:]
        if closing and ids[0][-1:] == closing == [self.tokenizer.sep_token_id]:
            # An encoder's tokenizer closes every text; a continuation stands behind that, as in decoding.
            spaces = len(context) - len(context.rstrip())
            continuation = context[len(context) - spaces :] + continuation
            return ids[0], self.tok_encode(continuation, add_special_tokens=False)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        from transformers.utils.logging import tqdm

        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as bar:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                for n, answer in zip(some, self._score([requests[n] for n in some]), strict=True):
                    found[n] = answer
                    request = requests[n][0]
                    if request is not None:  # else a part of a text, which loglikelihood_rolling caches as a whole
                        self.cache_hook.add_partial("loglikelihood", request, answer)
                    bar.update(1)
        return found

    def _score(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        prompts, completions = [], []
        for _, prompt, completion in requests:
            room = max(0, self.max_length - len(completion))
            if len(prompt) > room:
                _log.warning(
                    "a context of %d tokens and a continuation of %d are more than the model's %d; the context is cut "
                    "on the left",
                    len(prompt),
                    len(completion),
                    self.max_length,
                )
            prompts.append(prompt[max(0, len(prompt) - room) :])
            completions.append(completion)
        texts = self.denoiser, prompts, completions
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
        yield from zip(values, is_greedy, strict=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sums over windows as long as the model allows; see ``LM.loglikelihood_rolling``."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            (text,) = request.args
            # The harness's windows leave out their last token, which a masked model must be given.
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
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
        files = (
            [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir())] if path.is_dir() else []
        )
        facts = [self._name, files, str(self.model.dtype), self._options, self.denoiser.mask_token_id]
        facts += [*self._facts().items(), self.sampler.template]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def _facts(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler.describe(),
            "likelihood": self.likelihood,
            "likelihood_samples": self.samples,
            "decoding_seed": self.seed,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        harness: Any = super()
        info: dict[str, Any] = harness.get_model_info()
        return info | self._facts()


class _Recorder:
    """Stands in for a cache hook while texts are generated, and gives each what it cost."""

    def __init__(self, hook: Any, costs: deque[DecodeCost]) -> None:
        self.hook, self.costs = hook, costs
        self.made: dict[str, deque[Generation]] = defaultdict(deque)

    def add_partial(self, kind: str, request: tuple[str, Any], text: str) -> None:
        from lm_eval.api.model import hash_args

        generation = Generation(text, self.costs.popleft())
        # Equal requests keep their order: the harness sorts stably.
        self.made[hash_args(kind, request)].append(generation)
        self.hook.add_partial(kind, request, generation)


def _scored(template: CanvasTemplate) -> list[Any]:
    """Blocks whose text is the answer: the summary, or all if there is none."""
    return [block for block in template.blocks if block.held] or list(template.blocks)


def _cost(output: SamplerOutput, row: int, unused: int) -> DecodeCost:
    trace = output.trace
    closed = None if trace.closed is None else trace.closed[row : row + 1]
    rows = {name: getattr(trace, name)[row : row + 1] for name in ("tokens", "block", "step", "confidence")}
    one: Any = rows | {"forward_passes": trace.forward_passes[row : row + 1], "closed": closed}
    meter = ARnessMeter()
    meter.update(dataclasses.replace(trace, **one))
    measured, passes = meter.compute(), int(trace.forward_passes[row])
    return DecodeCost(
        forward_passes=passes,
        tokens_per_forward=output.tokens_per_forward[row] - unused / max(passes, 1),
        arness_global=measured.global_at[1],
        arness_local=measured.local_at[1],
    )


def _repeats(request: Any) -> int:
    """How many texts a request wants; one that was made without metadata does not say."""
    return 1 if request.repeats is None else request.repeats


def _seed(seed: int, *of: Any) -> int:
    """A seed that depends on a request alone, whatever its batch, place or process."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *of]).encode()).digest()[:8], "little")


def _temperature(committer: Committer) -> float:
    """At which tokens are drawn; 0 if they are not."""
    while isinstance(committer, LookaheadCommitter):
        committer = committer.committer
    return committer.temperature if isinstance(committer, MicroConfidenceCommitter) else 0.0


def _drawing(committer: Committer, changes: Mapping[str, Any]) -> Committer:
    """The same committer, drawing tokens in another way."""
    if isinstance(committer, LookaheadCommitter):
        inner = _drawing(committer.committer, changes)
        assert isinstance(inner, MicroConfidenceCommitter)
        return dataclasses.replace(committer, committer=inner)
    if not isinstance(committer, MicroConfidenceCommitter):
        refuse(changes, {}, f"{type(committer).__name__} draws in its own way")
        return committer
    return dataclasses.replace(committer, **changes)


# -------------------------------------------------------------------------------------------- samplers by name


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
    options: dict[str, Any] = {}
    depth, part, parts = 0, "", list[str]()
    for character in (text or "") + ",":
        depth += (character in "[{") - (character in "]}")
        if character in ",;" and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    if part:
        raise NapDecodeError(f"a bracket is open in {text!r}")
    for one in filter(None, parts):
        name, separator, value = one.partition("=" if "=" in one else ":")
        if not separator or not name:
            raise NapDecodeError(f"options must be written as name=value,name=value, but {one!r} is not")
        options[name.strip()] = presets.parse_value(value)
    return options


def make_sampler(
    denoiser: Denoiser, name: str, options: Mapping[str, Any], *, cfg_scale: float | None = None
) -> Sampler:
    """A sampler by the name of a preset, or from a file.

    Args:
        denoiser: the model.
        name: of a preset, or path of a file written by ``Sampler.save``.
        options: see :func:`harness_model`; of a file, ``compile`` alone.
        cfg_scale: the guidance that was asked for, which must be that of a file.

    Raises:
        NapDecodeError: names that are not known, or options that do not go together.

    Example:
        >>> from nap_decode import demo
        >>> make_sampler(Denoiser(*demo.load()), "klass", {"treshold": 0.9})
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no option of klass 'treshold'. Did you mean 'threshold'? ...
    """
    compiled = options.get("compile", False)
    if name not in presets.PRESETS and (name.endswith(".json") or os.path.exists(name)):
        refuse({n: value for n, value in options.items() if n != "compile"}, {}, f"{name} says how to decode")
        saved = Sampler.load(name, no_model, mask_token_id=0)
        if cfg_scale not in (None, saved.denoiser.cfg_scale):
            raise NapDecodeError(f"{name} has cfg_scale {saved.denoiser.cfg_scale}, but {cfg_scale} is asked for")
        guided = denoiser.replace(cfg_scale=saved.denoiser.cfg_scale, reuse=saved.denoiser.reuse)
        return Sampler.load(name, guided).replace(compile=compiled)
    known = presets.preset_options(name)
    for option in options:
        check_name(f"option of {name}", option, {*known, *_CANVAS, "close_on", "compile"})
    canvas = {option: options[option] for option in _CANVAS if option in options}
    own = {option: value for option, value in options.items() if option in known}
    template = CanvasTemplate.nap(**canvas) if canvas else None
    sampler = presets.make_preset(name, denoiser, own, template=template)
    return sampler.replace(close_on=options.get("close_on", ()), compile=compiled)
