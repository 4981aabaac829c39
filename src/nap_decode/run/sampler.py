"""The sampler: a model, and how to decode with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from nap_decode.base.batching import copy_of, join, select, to_device, to_host
from nap_decode.base.errors import NapDecodeError, check_flag, check_integer, check_name, check_seed
from nap_decode.base.random import row_seeds as seeds_of_rows
from nap_decode.canvas import Canvas, CanvasTemplate
from nap_decode.model.denoiser import Denoiser, Model
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.save import Part, describe, from_plain, to_plain
from nap_decode.prompts import Prompt, Prompts, encode_prompts
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.generate import for_generate
from nap_decode.run.loop import Batch, Loop, Watch
from nap_decode.run.queue import Queue, longest_first
from nap_decode.run.state import Callback, DecodeState, State
from nap_decode.run.watch import Streams, interrupts
from nap_decode.speed.compile import prepare
from nap_decode.speed.graphs import Graphs
from nap_decode.speed.reuse import exact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 4


class RunOptions(TypedDict, total=False):
    """Options of one run, the same for every way to decode.

    Args:
        seed: the seed that row seeds derive from, with each row's index.  If draws are needed and there is none, it is
            drawn from torch's global generator (``torch.manual_seed``).
        row_seeds: a seed for every row instead, so that a row's result does not depend on its place in the batch.
        callback: called with the :class:`DecodeState` after every step of the batch; may edit the canvas.  Rows that
            are finished are in it too; one that edits these, or goes by the number of the step, makes a row's result
            depend on its batch.
        streamer: shows rows while they are decoded: a ``transformers.TextStreamer``, ``TextIteratorStreamer`` or the
            like for a single row, or a list with one for each row (None for rows that nobody looks at).  It gets the
            prompt (of text with holes, what stands before the first), then what is decoded without a gap, and ``end()``
            when its row is finished; one that has ``put_draft`` also gets what is behind the gap, after every step.
        interruptible: whether Ctrl-C ends the decode after the step it is at, and what was decoded so far is returned:
            see :attr:`SamplerOutput.is_complete`.  Otherwise, and the second time, it raises ``KeyboardInterrupt``.
        progress: show a bar on stderr; None shows it in terminals and notebooks only.
    """

    seed: int | None
    row_seeds: Sequence[int] | None
    callback: Callback | None
    streamer: Any
    interruptible: bool
    progress: bool | None


def _check_run(options: Mapping[str, Any]) -> None:
    """Raise unless these are options of a run, and of the right kind; :class:`Streams` looks at streamers."""
    for name, value in options.items():
        check_name("option of a run", name, RunOptions.__annotations__)
        if value is None and name != "interruptible":
            continue
        if name == "seed":
            check_seed(value)
        elif name in ("interruptible", "progress"):
            check_flag(name, value)
        elif name == "callback" and not callable(value):
            raise NapDecodeError(f"callback must be a function of the DecodeState, but is {value!r:.80}")
        elif name == "row_seeds" and (not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0):
            raise NapDecodeError(f"row_seeds must be a list with a seed for every row, but is {value!r:.80}")


class Sampler:
    """Decodes with a model.

    Args:
        model: a :class:`Denoiser`, or whatever one can be made of.
        tokenizer: see :class:`Denoiser`; a Denoiser has its own.
        decoder: how to decode; :mod:`nap_decode.decoders` has the field's.
        template: what follows a prompt; needed unless ``max_new_tokens`` is given with the prompts.
        mask_token_id: see :class:`Denoiser`.
        compile: ``"kernels"`` puts the model's body and what is done to its logits through ``torch.compile``;
            ``"graphs"`` captures whole steps as CUDA graphs, a few for each shape of batch, unless a part keeps things
            from step to step; True does both on CUDA, the first elsewhere.  Off by default: compiling takes a minute,
            which pays for long runs, and capturing pays for models whose kernels are shorter than their launches.
            Tokens are the same up to rounding.

    Raises:
        NapDecodeError: something that does not go together.

    Example:
        >>> from nap_decode import decoders, demo
        >>> sampler = Sampler(*demo.load(), decoders.llada_low_confidence(block_length=4).set(tokens_per_step=2))
        >>> out = sampler("1 2 3 4 5 6 7 0 1 2 3 4 = <think 1>", max_new_tokens=8)
        >>> out.forward_passes, out.tokens_per_forward
        (4, [2.0])
    """

    def __init__(
        self,
        model: Denoiser | Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoder: Decoder | None = None,
        *,
        template: CanvasTemplate | None = None,
        mask_token_id: int | None = None,
        compile: bool | str = False,
    ) -> None:
        if not isinstance(decoder, Decoder):
            raise NapDecodeError(
                "a Sampler takes a model, its tokenizer and a Decoder, such as decoders.parallel_forced(); the decoder "
                f"is {decoder!r:.80}"
            )
        if not isinstance(template, CanvasTemplate | None):
            raise NapDecodeError(
                f"template must be a CanvasTemplate, such as CanvasTemplate.plain(256), but is {template!r:.80}"
            )
        if not isinstance(model, Denoiser):
            model = Denoiser(model, tokenizer, mask_token_id=mask_token_id)
        elif mask_token_id not in (None, model.mask_token_id) or tokenizer not in (None, model.tokenizer):
            raise NapDecodeError(
                "the Denoiser has its own tokenizer and mask_token_id; give them to it, not to the sampler"
            )
        self.denoiser, self.tokenizer = model, model.tokenizer
        self.decoder, self.template, self.compile = decoder, template, compile
        self._ends = self._find_ends()
        self._prepared = self._prepare()

    # ---------------------------------------------------------------------------------------- ways to decode

    def __call__(
        self, prompts: Prompts, *, max_new_tokens: int | None = None, **options: Unpack[RunOptions]
    ) -> SamplerOutput:
        """Decode the template (or ``max_new_tokens`` slots) after one prompt or a batch.

        Args:
            prompts: text, chat messages, token ids, or a list of any of these (a ragged batch).
            max_new_tokens: slots to decode, instead of the template.
            options: see :class:`RunOptions`.
        """
        return self.decode(self.canvas(prompts, max_new_tokens=max_new_tokens), **options)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        return_dict_in_generate: bool = False,
        **options: Unpack[RunOptions],
    ) -> Tensor | SamplerOutput:
        """Ids in, ids out, like a transformers model's ``generate``.

        Args:
            input_ids: ``(B, P)`` int64, padded on either side.
            attention_mask: ``(B, P)``, 0 for padding; without it nothing is padding.
            max_new_tokens: slots to decode, instead of the template.
            return_dict_in_generate: return a :class:`SamplerOutput`, whose ``sequences`` are what is returned else.
            options: see :class:`RunOptions`.

        Returns:
            ``(B, P + canvas)`` int64, prompts padded on the left, on the device of ``input_ids``.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else f"{input_ids!r:.80}"
            raise NapDecodeError(f"input_ids must be a tensor (B, P), but are {got}; lists go to sampler(...)")
        rows, _ = encode_prompts(input_ids, self.tokenizer, attention_mask)
        canvas = self._append(rows, max_new_tokens)
        output = self.decode(canvas, **options)
        # The one place with padding on the left.
        width = input_ids.shape[1] + int(canvas.row_lengths[0]) - len(rows[0])
        columns = torch.arange(width, device="cpu") - (width - canvas.row_lengths[:, None])
        sequences = output.trace.tokens.gather(1, columns.clamp(min=0))
        sequences = sequences.masked_fill(columns < 0, self.denoiser.pad_token_id).to(input_ids.device)
        return replace(output, sequences=sequences) if return_dict_in_generate else sequences

    def infill(self, texts: Prompts, **options: Unpack[RunOptions]) -> SamplerOutput:
        """Decode the mask tokens in texts; every run of masks is a block of its own.

        Args:
            texts: as the prompts of a call, with mask tokens in them.
            options: see :class:`RunOptions`.
        """
        rows, is_single = encode_prompts(texts, self.tokenizer)
        mask, pad = self.denoiser.mask_token_id, self.denoiser.pad_token_id
        device = self.denoiser.device
        canvas = Canvas.from_infill(rows, mask_token_id=mask, pad_token_id=pad, device=device, is_single=is_single)
        return self.decode(canvas, **options)

    def decode(self, canvas: Canvas, **options: Unpack[RunOptions]) -> SamplerOutput:
        """Decode a canvas.

        Args:
            canvas: what to decode.
            options: see :class:`RunOptions`.

        Raises:
            NapDecodeError: see :meth:`Denoiser.check` and :meth:`Scheduler.plan`.
        """
        _check_run(options)
        started = time.perf_counter()
        callback, streamer = options.get("callback"), options.get("streamer")
        self._check(canvas)
        seeds = self._row_seeds(range(len(canvas.tokens)), options.get("seed"), options.get("row_seeds"))
        streams = None

        def watch(state: State, step: int) -> State:
            if callback is not None:
                seen = DecodeState(**vars(copy_of(state)), canvas=canvas, step=step, total_steps=total_steps)
                tokens = callback(seen)
                if tokens is not None:
                    vocab_size = loop.vocab_size or int(state.tokens.max()) + 1  # of a function that was not asked
                    banned = self.denoiser.banned(vocab_size, state.tokens.device)
                    before = replace(seen, **vars(state))  # whatever the callback did to what it was shown
                    state = before.edit(tokens, self.denoiser.mask_token_id, banned, vocab_size)
            if streams is not None:
                streams(state)
            return state

        loop = self.loop(watch=None if callback is None and streamer is None else watch)
        first = [loop.start(canvas, None, seeds)]
        total_steps = None if self.decoder.needs.adaptive else int(first[0].plan.steps.max())
        if streamer is not None:
            is_final = callback is None and not self.decoder.needs.committed
            streams = Streams(streamer, canvas, ends=self.denoiser.end_token_ids, is_final=is_final)
        shown = 0

        def arrivals(_: Batch | None) -> Batch | None:
            nonlocal shown
            bar.update(loop.turns - shown)
            shown = loop.turns
            return first.pop() if first else None

        with (
            _progress_bar(total_steps, options.get("progress")) as bar,
            interrupts(caught=options.get("interruptible", False)) as interrupted,
        ):
            done = [*loop.run(arrivals, interrupted)]
            output = self._output(canvas, done, loop, started, seeds, is_interrupted=interrupted())
        if streams is not None:
            streams.end(output.trace.tokens, ~output.trace.masked())
        return output

    def stream(
        self,
        prompts: Iterable[Prompt],
        *,
        max_batch: int = 8,
        max_tokens: int | None = None,
        max_new_tokens: int | None = None,
        in_order: bool = True,
        seed: int | None = None,
        row_seeds: Iterable[int] | None = None,
        progress: bool | None = None,
    ) -> Iterator[SamplerOutput]:
        """Decode any number of prompts; a row that is finished leaves the batch, and the next prompt takes its place.

        The tokens of a row are those that a call with all prompts at once gives it.

        Args:
            prompts: prompts, read as they are needed: ``16 * max_batch`` at a time, which are decoded from the longest
                to the shortest, so that rows of a batch have similar lengths.
            max_batch: rows of a batch, at most.
            max_tokens: rows of a batch by tokens of the longest (prompt and canvas), at most: what bounds memory.
            max_new_tokens: slots to decode, instead of the template.
            in_order: whether outputs come in the order of the prompts, or as they are finished.  Outputs that wait for
                an earlier one are kept.
            seed: see :class:`RunOptions`.
            row_seeds: a seed for every prompt instead, read along with them.
            progress: see :class:`RunOptions`; it counts prompts.

        Yields:
            An output of one row for each prompt, with its ``index``.

        Raises:
            NapDecodeError: see :meth:`decode`; a prompt that is too long for ``max_tokens``; more prompts than seeds,
                or more seeds.

        Example:
            >>> from nap_decode import ParallelForcedSampler, demo
            >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
            >>> problems = ["6 0 6 4 6 2 1 2 4 7 0 6 =", "1 2 3 4 5 6 7 0 1 2 3 4 =", "5 5 5 5 1 1 1 1 0 0 0 0 ="]
            >>> [out.summary for out in sampler.stream(problems, max_batch=2)]
            ['6', '4', '0']
        """
        _check_run({"seed": seed, "row_seeds": row_seeds, "progress": progress})
        check_flag("in_order", in_order)
        check_integer("max_batch", max_batch, 1)
        if max_tokens is not None:
            check_integer("max_tokens", max_tokens, 1)
        if isinstance(prompts, str | Mapping | Tensor) or not isinstance(prompts, Iterable):
            raise NapDecodeError(f"stream takes a list or an iterator of prompts, not {type(prompts).__name__}")
        append_to = partial(self._append, max_new_tokens=max_new_tokens)
        length = append_to([[]]).tokens.shape[1]  # raises, if it cannot be made
        seed = self._base_seed(seed, row_seeds)
        waiting = longest_first(prompts, row_seeds, self.tokenizer, window=16 * max_batch)
        queue = Queue(waiting, length, max_batch, max_tokens)
        total = len(prompts) if isinstance(prompts, Sized) else None
        outputs = self._stream(queue, append_to, seed, partial(_progress_bar, total, progress, "row"))
        return _in_order(outputs) if in_order else outputs

    def _stream(
        self, queue: Queue, append_to: Callable[..., Canvas], seed: int | None, open_bar: Callable[[], Any]
    ) -> Iterator[SamplerOutput]:
        loop = self.loop()
        admitted: dict[int, tuple[float, list[int], Tensor | None]] = {}

        def arrivals(batch: Batch | None) -> Batch | None:
            size, width = (0, 0) if batch is None else batch.given.block.shape
            coming = queue.take(size, width)
            if not coming:
                return None
            numbers, rows, own = zip(*coming, strict=True)
            canvas = append_to(rows, numbers=numbers)
            self._check(canvas)
            seeds = self._row_seeds(numbers, seed, None if own[0] is None else own)
            started = time.perf_counter()
            for i, number in enumerate(numbers):
                admitted[number] = started, rows[i], None if seeds is None else seeds[i : i + 1]
            return loop.start(canvas, numbers, seeds)

        with open_bar() as bar:
            for done in loop.run(arrivals):
                for number in done.number.tolist():
                    started, ids, seeds = admitted.pop(number)
                    bar.update(1)
                    canvas, one = append_to([ids], is_single=True), done.some(done.number == number)
                    yield self._output(canvas, [one], loop, started, seeds, number)

    # ---------------------------------------------------------------------------------------- by hand

    def canvas(self, prompts: Prompts, *, max_new_tokens: int | None = None) -> Canvas:
        """What a call with these prompts decodes, see :meth:`__call__`."""
        rows, is_single = encode_prompts(prompts, self.tokenizer)
        return self._append(rows, max_new_tokens, is_single=is_single)

    def loop(self, watch: Watch | None = None) -> Loop:
        """The loop that decodes, to step it by hand; see :class:`~nap_decode.run.loop.Loop`."""
        denoiser, decoder, graphs = self._prepared
        return Loop(denoiser, decoder, ends=self._ends, graphs=graphs, watch=watch)

    @property
    def custom_generate(self) -> Callable[..., Tensor | SamplerOutput]:
        """For ``model.generate(**inputs, custom_generate=sampler.custom_generate)`` of transformers 4.57 or later.

        See :func:`~nap_decode.run.generate.custom_generate`.
        """
        return for_generate(self)

    # ---------------------------------------------------------------------------------------- as data

    def set(self, **options: Any) -> Sampler:
        """The same with options of its decoder exchanged, see :meth:`Decoder.set`.

        Example:
            >>> from nap_decode import MacroParallelScheduler, decoders, demo
            >>> sampler = Sampler(*demo.load(), decoders.entropy_bounded())
            >>> sampler.set(scheduler=MacroParallelScheduler(), gamma=0.2).decoder.scheduler.hold_until
            1.0
        """
        return Sampler(self.denoiser, decoder=self.decoder.set(**options), template=self.template, compile=self.compile)

    def over(self, denoiser: Denoiser) -> Sampler:
        """The same of another Denoiser."""
        return Sampler(denoiser, decoder=self.decoder, template=self.template, compile=self.compile)

    def describe(self) -> str:
        """What this sampler does, in words.

        Example:
            >>> from nap_decode import decoders, demo
            >>> print(Sampler(*demo.load(), decoders.llada_low_confidence(block_length=4).set(steps=8)).describe())
            Sampler of LlamaForCausalLM
              scheduler: SemiAutoregressiveScheduler(steps=8, block_length=4)
                One block after the other, each with steps in proportion to its tokens (LLaDA, arXiv 2502.09992).
              committer: MicroConfidenceCommitter()
                Proposes a token for every open slot, scores it, and commits the best of each block.
                selection: QuotaSelection()
                  The most confident slots of each block, exactly as many as its quota.
        """
        model, decoder = self.denoiser.model, self.decoder
        lines = [f"Sampler of {getattr(model, '__name__', type(model).__name__)}"]
        if self.denoiser.cfg_scale:
            lines.append(f"guidance: {self.denoiser.cfg_scale}")
        if self.denoiser.reuse is not None:
            lines.append(f"reuse: {describe(self.denoiser.reuse)}")
        if self.template is not None:
            blocks = (f"{b.name} ({b.length}{', held' if b.held else ''})" for b in self.template.blocks)
            lines.append(f"canvas: {', '.join(blocks)}")
        if self._ends:
            lines.append(f"blocks end with: {', '.join(map(str, self._ends))}")
        lines += [f"scheduler: {describe(decoder.scheduler)}", f"committer: {describe(decoder.committer)}"]
        return "\n".join(lines).replace("\n", "\n  ")

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a JSON file how this sampler decodes: not its model, nor how that is compiled.

        Raises:
            NapDecodeError: a part that is no dataclass of plain values, or logits processors.
        """
        if self.denoiser.logits_processor:
            raise NapDecodeError(
                "logits processors cannot be saved; save the sampler without them, and give them to the Denoiser that "
                "it is loaded with"
            )
        own = {"cfg_scale": float(self.denoiser.cfg_scale), "reuse": self.denoiser.reuse}
        parts = {"decoder": self.decoder, "template": self.template} | own
        content = {"format": _FORMAT} | {name: to_plain(part) for name, part in parts.items()}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @staticmethod
    def load(
        path: str | PathLike[str],
        model: Denoiser | Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        parts: Iterable[Part] = (),
        mask_token_id: int | None = None,
    ) -> Sampler:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            model: see :class:`Sampler`.
            tokenizer: see :class:`Sampler`.
            parts: classes and functions of yours that the file names.
            mask_token_id: see :class:`Denoiser`.

        Raises:
            NapDecodeError: see :meth:`read`; a :class:`Denoiser` with other guidance or reuse.
        """
        whole = Sampler.read(path, parts=parts)
        own = {name: whole.pop(name) for name in ("cfg_scale", "reuse")}
        if not isinstance(model, Denoiser):
            model = Denoiser(model, tokenizer, mask_token_id=mask_token_id, **own)
        for name, value in own.items():
            if getattr(model, name) != value:
                raise NapDecodeError(f"the file has {name} {value}, but the Denoiser has {getattr(model, name)}")
        return Sampler(model, **whole)

    @staticmethod
    def read(path: str | PathLike[str], *, parts: Iterable[Part] = ()) -> dict[str, Any]:
        """What :meth:`save` wrote, without a model: decoder, template, and the Denoiser's cfg_scale and reuse.

        Raises:
            NapDecodeError: not such a file, or a part that is not known.
        """
        names = ("cfg_scale", "decoder", "template", "reuse")
        try:
            content = json.loads(Path(path).read_text())
            found = content["format"]
            plain = {name: content[name] for name in names if found == _FORMAT}
        except (ValueError, KeyError, TypeError) as error:
            raise NapDecodeError(f"{path} is not a file written by Sampler.save ({error})") from error
        if found != _FORMAT:
            raise NapDecodeError(
                f"{path} has format {found}, but this version reads {_FORMAT}; use the version that wrote it, or save "
                "the sampler anew"
            )
        return {name: from_plain(data, tuple(parts)) for name, data in plain.items()}

    # ---------------------------------------------------------------------------------------- behind the doors

    def _append(
        self,
        rows: list[list[int]],
        max_new_tokens: int | None,
        *,
        is_single: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> Canvas:
        if max_new_tokens is not None:
            check_integer("max_new_tokens", max_new_tokens, 1)
        template = self.template if max_new_tokens is None else CanvasTemplate.plain(max_new_tokens)
        if template is None:
            raise NapDecodeError("say what to decode: give the sampler a template, or pass max_new_tokens=")
        for row, ids in zip(numbers or range(len(rows)), rows, strict=True):
            if self.denoiser.mask_token_id in ids:
                raise NapDecodeError(f"there is a mask token in prompt {row}; infill(...) decodes masks inside a text")
        return Canvas.from_prompts(
            rows,
            template,
            mask_token_id=self.denoiser.mask_token_id,
            pad_token_id=self.denoiser.pad_token_id,
            tokenizer=self.tokenizer,
            device=self.denoiser.device,
            is_single=is_single,
        )

    def _find_ends(self) -> tuple[int, ...]:
        ends = self.decoder.close_on
        if isinstance(ends, str):
            if not self.denoiser.end_token_ids:
                raise NapDecodeError(
                    f'close_on="{ends}" needs a model that says which ids end a text, but it says none; give the ids'
                )
            return self.denoiser.end_token_ids
        size, mask = self.denoiser.call.num_embeddings, self.denoiser.mask_token_id
        for token in ends:
            if token >= (size or token + 1) or token == mask:
                known = f"ids from 0 to {size - 1}" if size else "ids"
                raise NapDecodeError(
                    f"close_on names id {token}, which the model never emits: it has {known}, and {mask} is the mask"
                )
        return tuple(ends)

    def _prepare(self) -> tuple[Denoiser, Decoder, Graphs | None]:
        """What runs in place of model and decoder, and what captures their steps."""
        denoiser, decoder, graphs = prepare(self.denoiser, self.decoder, self.compile)
        return exact(denoiser) if graphs is None else denoiser, decoder, graphs

    def _check(self, canvas: Canvas) -> None:
        if not isinstance(canvas, Canvas):
            raise NapDecodeError(f"decode takes a Canvas, such as sampler.canvas(prompts) makes, not {canvas!r:.80}")
        self.denoiser.check(canvas)
        if self._prepared[0].is_stale:
            self._prepared = self._prepare()
        tokens, block, mask = canvas.host
        if bool(((tokens == self.denoiser.mask_token_id) & (mask > 0) & (block < 0)).any()):
            raise NapDecodeError(
                f"there is a mask token ({self.denoiser.mask_token_id}) in a slot of the canvas that is not to be "
                "decoded; give it a block, or another token"
            )
        if self.decoder.needs.left_out:
            self.denoiser.check_leave_one_out()

    def _base_seed(self, seed: int | None, row_seeds: Any) -> int | None:
        """The seed that those of rows derive from; None if these are given, or nothing is drawn."""
        if row_seeds is not None and seed is not None:
            raise NapDecodeError("row_seeds are seeds of their own for every row; leave out seed")
        if row_seeds is not None or not self.decoder.needs.random:
            return None
        return int(torch.randint(2**62, (), device="cpu")) if seed is None else check_seed(seed)

    def _row_seeds(self, numbers: Sequence[int], seed: int | None, row_seeds: Iterable[int] | None) -> Tensor | None:
        """``(B,)`` int64 on the host; None if nothing is drawn."""
        base = self._base_seed(seed, row_seeds)
        if row_seeds is None:
            return None if base is None else seeds_of_rows(base, numbers)
        own = [check_seed(seed) for seed in row_seeds]
        if len(own) != len(numbers):
            raise NapDecodeError(f"row_seeds must be one for every row; given: {len(own)} for {len(numbers)} rows")
        return torch.tensor(own, dtype=torch.int64, device="cpu") if self.decoder.needs.random else None

    def _output(
        self,
        canvas: Canvas,
        done: Sequence[Batch],
        loop: Loop,
        started: float,
        seeds: Tensor | None,
        index: int | None = None,
        *,
        is_interrupted: bool = False,
    ) -> SamplerOutput:
        """That of rows which left one after the other."""
        fills = {"tokens": self.denoiser.pad_token_id, "block": -1, "step": -1, "confidence": torch.nan}
        states = to_host([torch.stack(_facts_of(batch)) for batch in done])
        confidences = to_host([batch.state.confidence for batch in done])
        traces = [
            self._trace(canvas, batch, loop, state, confidence, is_interrupted=is_interrupted)
            for batch, state, confidence in zip(done, states, confidences, strict=True)
        ]
        order = torch.cat([batch.number for batch in done]).argsort()
        trace = select(reduce(partial(join, fills=fills), traces), order, order)
        saved = torch.cat([batch.plan.busy_steps - batch.spent[:, 0] for batch in done])[order]
        saves = self._ends and not self.decoder.needs.adaptive and not bool(trace.masked().any())
        return SamplerOutput(
            sequences=to_device(trace.tokens.clone(), canvas.tokens.device),
            canvas=canvas,
            trace=trace,
            forward_passes=loop.forward_passes if index is None else int(trace.forward_passes),
            wall_time=time.perf_counter() - started,
            row_seeds=None if seeds is None else seeds.tolist(),
            tokenizer=self.tokenizer,
            steps_saved=saved.tolist() if saves else None,
            index=index,
            cost=self.denoiser.cost,
        )

    def _trace(
        self, canvas: Canvas, done: Batch, loop: Loop, facts: Tensor, confidence: Tensor, *, is_interrupted: bool
    ) -> DecodeTrace:
        """What happened to rows that are done; raises where a model or a part of somebody else's made nonsense."""
        reuse, (turns, passes) = loop.denoiser.reuse, done.spent.unbind(1)
        tokens, block, step, *flags = facts
        masked, edited, closed = (flag.bool() for flag in flags)
        trace = DecodeTrace(
            tokens=tokens,
            block=block,
            step=step,
            confidence=confidence,
            forward_passes=passes,
            block_names=canvas.block_names,
            mask_token_id=self.denoiser.mask_token_id,
            end_token_ids=self.denoiser.end_token_ids,
            closed=closed if self._ends else None,
            forwarded=None if reuse is None else reuse.computed(done.kept, passes),
        )
        lost = (block >= 0) & ~masked & ~edited & ~closed & trace.confidence.isnan()
        if bool(lost.any()):
            remedy = (
                "Try another precision (bfloat16 instead of float16) or attention implementation, and look at the "
                "logits processors"
            )
            empty = lost.any(1) & ((block >= 0).sum(1) == done.given.lengths)
            if bool(empty.any()):
                remedy = (
                    f"Row {int(done.number[empty][0])} held nothing but masks at the start, and some models divide by "
                    "the number of the other tokens (ESM, whose token dropout does); give it a prompt, or the "
                    "tokenizer's special tokens"
                )
            raise NapDecodeError(
                "the model's logits, or the confidences made of them, were nan in places, or left no id to emit; the "
                f"tokens committed there mean nothing. {remedy}"
            )
        committer, size = type(self.decoder.committer).__name__, self.denoiser.call.num_embeddings
        decoded = tokens[(block >= 0) & ~masked]
        wrong = decoded[(decoded < 0) | (decoded >= (size or 2**62))].tolist()
        if wrong:
            ids = f"{sorted(set(wrong))!r:.80}"
            raise NapDecodeError(f"{committer} committed token ids that the model does not have: {ids}")
        if bool((decoded == self.denoiser.mask_token_id).any()):
            raise NapDecodeError(
                f"{committer} committed the mask token; it must not propose the banned ids of the prediction"
            )
        who, rule = f"{committer}, or a part of it,", "it must commit the quota, or say needs = Needs(adaptive=True)"
        if bool(masked.any()) and not is_interrupted:
            raise NapDecodeError(
                f"{int(masked.sum())} slots are masked though all steps are done, because {who} committed less than "
                f"the quota, or masked slots again; {rule}"
            )
        busy = torch.zeros(len(step), int(step.max()) + 2, dtype=torch.bool, device="cpu").scatter_(1, step + 1, True)
        if loop.is_fixed and not is_interrupted and bool((busy[:, 1:].sum(1) < turns).any()):
            raise NapDecodeError(
                f"steps had nothing left to commit, because {who} committed more than the quota before; {rule}"
            )
        return trace


def _facts_of(done: Batch) -> list[Tensor]:
    """``(B, W)`` int64 each."""
    state = done.state
    facts = state.tokens, done.given.canvas_block, state.commit_step, state.masked, state.edited, state.closed
    return [tensor.long() for tensor in facts]


def _in_order(outputs: Iterable[SamplerOutput]) -> Iterator[SamplerOutput]:
    """Outputs in the order of their prompts; those that come too early are kept."""
    early: dict[int | None, SamplerOutput] = {}
    following = 0
    for output in outputs:
        early[output.index] = output
        while following in early:
            yield early.pop(following)
            following += 1


def _progress_bar(total: int | None, progress: bool | None, unit: str = "step") -> Any:
    from transformers.utils import logging  # its bars obey transformers' own switch

    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return logging.tqdm(total=total, desc="decoding", unit=unit, disable=not progress)
