"""The loop that decodes a canvas, and NAP's decoder as a composition of its parts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, check_ids, check_integer
from nap_decode.base.random import row_seeds as seeds_of_rows
from nap_decode.base.random import wrap
from nap_decode.canvas import Canvas, CanvasTemplate, Prompt, Prompts, encode_prompts, is_part
from nap_decode.model.denoiser import Denoiser, Model
from nap_decode.model.rows import to_canvas
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.parts.confidence import Confidence
from nap_decode.parts.save import Part, describe, from_plain, to_plain
from nap_decode.parts.schedule import EvenSchedule
from nap_decode.parts.scheduler import BlockScheduler, MacroParallelScheduler
from nap_decode.parts.selection import QuotaSelection, Selection
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.loop import Decoding, Finished
from nap_decode.run.state import Callback, DecodeState, RowState
from nap_decode.run.watch import Streams, interrupts
from nap_decode.speed.graphs import CudaRecorder, StepGraphs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 3


class Sampler:
    """Decodes with any scheduler and committer.

    Args:
        model: a :class:`Denoiser`, or whatever one can be made of.
        tokenizer: see :class:`Denoiser`; a Denoiser has its own.
        scheduler: how many tokens each block commits at each step.
        committer: which positions and tokens; :class:`MicroConfidenceCommitter` at temperature 0 by default.
        template: what follows a prompt; needed unless ``max_new_tokens`` is given with the prompts.
        mask_token_id: see :class:`Denoiser`.
        close_on: ids that end a block of the canvas, or ``"end"`` for those of the model.  Once such an id and
            everything before it are committed, the rest of the block is filled with the padding id without being
            decoded, and its share of the steps goes to the other blocks; with a fixed schedule, fewer steps are
            taken.
        compile: ``"kernels"`` puts the model's body and what is done to its logits through ``torch.compile``;
            ``"graphs"`` captures whole steps as CUDA graphs, a few for each shape of batch, unless a part keeps things
            from step to step; True does both on CUDA, the first elsewhere.  Off by default: compiling takes a minute,
            which pays for long runs, and capturing pays for models whose kernels are shorter than their launches.
            Tokens are the same up to rounding.

    Raises:
        NapDecodeError: parts that do not go together.

    Example:
        >>> from nap_decode import SemiAutoregressiveScheduler, demo
        >>> sampler = Sampler(*demo.load(), scheduler=SemiAutoregressiveScheduler(tokens_per_step=2, block_length=4))
        >>> out = sampler("1 2 3 4 5 6 7 0 1 2 3 4 = <think 1>", max_new_tokens=8)
        >>> out.forward_passes, out.tokens_per_forward
        (4, [2.0])
    """

    def __init__(
        self,
        model: Denoiser | Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        scheduler: BlockScheduler,
        committer: Committer | None = None,
        template: CanvasTemplate | None = None,
        mask_token_id: int | None = None,
        close_on: Sequence[int] | str = (),
        compile: bool | str = False,
    ) -> None:
        if not isinstance(model, Denoiser):
            model = Denoiser(model, tokenizer, mask_token_id=mask_token_id)
        elif mask_token_id not in (None, model.mask_token_id) or tokenizer not in (None, model.tokenizer):
            raise NapDecodeError(
                "the Denoiser has its own tokenizer and mask_token_id; give them to it, not to the sampler"
            )
        self.denoiser = model
        self.tokenizer = model.tokenizer
        self.scheduler = scheduler
        self.committer: Committer = MicroConfidenceCommitter() if committer is None else committer
        if not isinstance(template, CanvasTemplate | None):
            raise NapDecodeError(
                f"template must be a CanvasTemplate, such as CanvasTemplate.plain(256), but is {template!r:.80}"
            )
        self.template = template
        self.close_on = self._find_ends(close_on)
        self.compile = compile
        check_parts(self.scheduler, self.committer)
        self._set_compiled()

    def __call__(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        streamer: Any = None,
        interruptible: bool = False,
        progress: bool | None = None,
    ) -> SamplerOutput:
        """Decode the template (or ``max_new_tokens`` slots) after one prompt or a batch.

        Args:
            prompts: text, chat messages, token ids, or a list of any of these (a ragged batch).
            max_new_tokens: slots to decode, instead of the sampler's template.
            seed: see :meth:`decode`.
            row_seeds: see :meth:`decode`.
            callback: see :meth:`decode`.
            streamer: see :meth:`decode`.
            interruptible: see :meth:`decode`.
            progress: see :meth:`decode`.
        """
        rows, is_single = encode_prompts(prompts, self.tokenizer)
        canvas = self._append(rows, max_new_tokens, is_single=is_single)
        return self.decode(
            canvas,
            seed=seed,
            row_seeds=row_seeds,
            callback=callback,
            streamer=streamer,
            interruptible=interruptible,
            progress=progress,
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        streamer: Any = None,
        interruptible: bool = False,
        progress: bool | None = None,
        return_dict_in_generate: bool = False,
    ) -> Tensor | SamplerOutput:
        """Ids in, ids out, like a transformers model's ``generate``.

        Args:
            input_ids: ``(B, P)`` int64, padded on either side.
            attention_mask: ``(B, P)``, 0 for padding; without it nothing is padding.
            max_new_tokens: slots to decode, instead of the sampler's template.
            seed: see :meth:`decode`.
            row_seeds: see :meth:`decode`.
            callback: see :meth:`decode`.
            streamer: see :meth:`decode`.
            interruptible: see :meth:`decode`.
            progress: see :meth:`decode`.
            return_dict_in_generate: return a :class:`SamplerOutput`.

        Returns:
            ``(B, P + canvas)`` int64, prompts padded on the left, on the device of ``input_ids``.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else f"{input_ids!r:.80}"
            raise NapDecodeError(f"input_ids must be a tensor (B, P), but are {got}; lists go to sampler(...)")
        rows, _ = encode_prompts(input_ids, self.tokenizer, attention_mask)
        canvas = self._append(rows, max_new_tokens, prompt_width=input_ids.shape[1])
        output = self.decode(
            canvas,
            seed=seed,
            row_seeds=row_seeds,
            callback=callback,
            streamer=streamer,
            interruptible=interruptible,
            progress=progress,
        )
        return output if return_dict_in_generate else output.sequences.to(input_ids.device)

    def infill(
        self,
        texts: Prompts,
        *,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        streamer: Any = None,
        interruptible: bool = False,
        progress: bool | None = None,
    ) -> SamplerOutput:
        """Decode the mask tokens in texts; every run of masks is a block of its own.

        Args:
            texts: as the prompts of a call, with mask tokens in them.
            seed: see :meth:`decode`.
            row_seeds: see :meth:`decode`.
            callback: see :meth:`decode`.
            streamer: see :meth:`decode`.
            interruptible: see :meth:`decode`.
            progress: see :meth:`decode`.
        """
        rows, is_single = encode_prompts(texts, self.tokenizer)
        canvas = Canvas.from_infill(
            rows,
            mask_token_id=self.denoiser.mask_token_id,
            pad_token_id=self.denoiser.pad_token_id,
            device=self.denoiser.device,
            is_single=is_single,
        )
        return self.decode(
            canvas,
            seed=seed,
            row_seeds=row_seeds,
            callback=callback,
            streamer=streamer,
            interruptible=interruptible,
            progress=progress,
        )

    @property
    def custom_generate(self) -> Callable[..., Tensor | SamplerOutput]:
        """For ``model.generate(**inputs, custom_generate=sampler.custom_generate)`` of transformers 4.57 or later.

        See :func:`~nap_decode.integrations.huggingface.custom_generate`.

        Raises:
            NapDecodeError: this release of transformers would not call it.
        """
        from nap_decode.integrations.huggingface import for_generate

        return for_generate(self)

    def decode(
        self,
        canvas: Canvas,
        *,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        streamer: Any = None,
        interruptible: bool = False,
        progress: bool | None = None,
    ) -> SamplerOutput:
        """Decode a canvas.

        Args:
            canvas: what to decode.
            seed: the seed that row seeds derive from, with each row's index.  If draws are needed and
                there is none, it is drawn from torch's global generator (``torch.manual_seed``).
            row_seeds: a seed for every row instead, so that a row's result does not depend on its place in
                the batch.
            callback: called with the :class:`DecodeState` after every step of the batch; may edit the canvas.  Rows
                that are finished are in it too; one that edits these, or goes by the number of the step, makes a
                row's result depend on its batch.
            streamer: shows rows while they are decoded: a ``transformers.TextStreamer``, ``TextIteratorStreamer`` or
                the like for a single row, or a list with one for each row (None for rows that nobody looks at).  It
                gets the prompt, then what is decoded without a gap, and ``end()`` when its row is finished; one that
                has ``put_draft`` also gets what is behind the gap, after every step.
            interruptible: whether Ctrl-C ends the decode after the step it is at, and what was decoded so far is
                returned: see :attr:`SamplerOutput.is_complete`.  Otherwise it raises ``KeyboardInterrupt`` as ever;
                so does a second Ctrl-C.
            progress: show a bar on stderr; None shows it in terminals and notebooks only.

        Raises:
            NapDecodeError: see :meth:`Denoiser.check` and :meth:`BlockScheduler.plan`.
        """
        started = time.perf_counter()
        decoding = self._decoding(is_watched=callback is not None or streamer is not None)
        self._check(canvas)
        streams = None
        if streamer is not None:
            is_final = callback is None and not self.committer.revises
            streams = Streams.of(streamer, canvas, ends=self.denoiser.end_token_ids, is_final=is_final)
        seeds = self._seeds(len(canvas.tokens), seed, row_seeds)
        plan = decoding.add(canvas, range(len(canvas.tokens)), seeds)
        total_steps = None if self.committer.is_adaptive else int(plan.steps.max())

        def watch(rows: RowState, step: int) -> RowState:
            state = DecodeState.of(rows, canvas, step, total_steps)
            tokens = None if callback is None else callback(state)
            if tokens is not None:
                state = DecodeState.of(rows, canvas, step, total_steps)  # whatever the callback did to its own
                vocab_size = decoding.vocab_size or int(rows.tokens.max()) + 1  # of a function that was not asked
                banned = self.denoiser.banned(vocab_size, rows.tokens.device)
                state = state.edit(tokens, self.denoiser.mask_token_id, banned, vocab_size)
                rows = state.to_rows(rows)
            if streams is not None:
                streams(state)
            return rows

        with (
            torch.no_grad(),
            _progress_bar(total_steps, progress) as bar,
            interrupts(caught=interruptible) as interrupted,
        ):
            finished = decoding.leave()
            while decoding.size and not interrupted():
                decoding.step(watch if decoding.is_watched else None)
                bar.update(1)
                finished += decoding.leave()
            finished += decoding.stop()
            output = self._output(canvas, Finished.sorted(finished), decoding.forward_passes, started, seeds)
        if streams is not None:
            streams.end(output.trace.tokens, output.trace.block, output.trace.step >= 0)
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
            prompts: prompts, read as they are needed: ``16 * max_batch`` at a time, which are decoded from the
                longest to the shortest, so that rows of a batch have similar lengths.
            max_batch: rows of a batch, at most.
            max_tokens: rows of a batch by tokens of the longest (prompt and canvas), at most: what bounds memory.
            max_new_tokens: slots to decode, instead of the sampler's template.
            in_order: whether outputs come in the order of the prompts, or as they are finished.  Outputs that wait
                for an earlier one are kept.
            seed: see :meth:`decode`.
            row_seeds: a seed for every prompt instead, read along with them.
            progress: show a bar on stderr, counting prompts; None shows it in terminals and notebooks only.

        Yields:
            An output of one row for each prompt, with its ``index``.

        Raises:
            NapDecodeError: see :meth:`decode`; a prompt that is too long for ``max_tokens``; more prompts than seeds,
                or more seeds.

        Example:
            >>> from nap_decode import demo
            >>> sampler = ParallelForcedSampler(*demo.load(), path_length=11, summary_length=2, tokens_per_step=4)
            >>> problems = ["6 0 6 4 6 2 1 2 4 7 0 6 =", "1 2 3 4 5 6 7 0 1 2 3 4 =", "5 5 5 5 1 1 1 1 0 0 0 0 ="]
            >>> [out.summary for out in sampler.stream(problems, max_batch=2)]
            ['6', '4', '0']
        """
        check_integer("max_batch", max_batch, 1)
        if max_tokens is not None:
            check_integer("max_tokens", max_tokens, 1)
        if isinstance(prompts, str | Mapping | Tensor):
            raise NapDecodeError(f"stream takes a list or an iterator of prompts, not {type(prompts).__name__}")
        canvas = partial(self._append, max_new_tokens=max_new_tokens)
        canvas([[]])  # raises, if it cannot be made
        if row_seeds is not None and seed is not None:
            raise NapDecodeError("row_seeds are seeds of their own for every prompt; leave out seed")
        base = None if row_seeds is not None else self._base_seed(seed)
        total = len(prompts) if isinstance(prompts, Sized) else None
        seeded = ((prompt, None) for prompt in prompts) if row_seeds is None else _with_seeds(prompts, row_seeds)
        waiting = _longest_first(seeded, self.tokenizer, window=16 * max_batch)
        outputs = self._stream(waiting, canvas, max_batch, max_tokens, base, total, progress)
        return _in_order(outputs) if in_order else outputs

    def _stream(
        self,
        waiting: Iterator[_Waiting],
        canvas_of: Callable[..., Canvas],
        max_batch: int,
        max_tokens: int | None,
        seed: int | None,
        total: int | None,
        progress: bool | None,
    ) -> Iterator[SamplerOutput]:
        decoding, layout = self._decoding(), canvas_of([[]]).longest
        upcoming = next(waiting, None)
        admitted: dict[int, tuple[float, list[int], Tensor | None]] = {}
        with _progress_bar(total, progress, "row") as bar:
            while upcoming is not None or decoding.size:
                coming: list[_Waiting] = []
                while upcoming is not None and (size := decoding.size + len(coming)) < max_batch:
                    longest = len(upcoming[1]) + layout
                    if max_tokens is not None and longest > max_tokens:
                        raise NapDecodeError(
                            f"prompt {upcoming[0]} and its canvas take {longest} tokens, more than max_tokens="
                            f"{max_tokens}; raise it, or shorten the prompt"
                        )
                    widths = [longest, decoding.width, *(len(ids) + layout for _, ids, _ in coming)]
                    if max_tokens is not None and (size + 1) * max(widths) > max_tokens:
                        break
                    coming.append(upcoming)
                    upcoming = next(waiting, None)
                with torch.no_grad():  # around no yield: what the caller does in between is not ours
                    if coming:
                        numbers, rows, own = (list(values) for values in zip(*coming, strict=True))
                        canvas = canvas_of(rows, numbers=numbers)
                        self._check(canvas)
                        seeds = self._seeds_in_stream(seed, numbers, own)
                        decoding.add(canvas, numbers, seeds)
                        for i, (number, ids, _) in enumerate(coming):
                            admitted[number] = time.perf_counter(), ids, None if seeds is None else seeds[i : i + 1]
                    else:
                        decoding.step()
                    finished = decoding.leave()
                for row, several in ((row, group) for group in finished for row in range(len(group.numbers))):
                    one = several.rows(torch.tensor([row], device="cpu"))
                    started, ids, seeds = admitted.pop(one.numbers[0])
                    canvas = canvas_of([ids], is_single=True)
                    bar.update(1)
                    yield self._output(canvas, one, int(one.passes[0]), started, seeds, index=one.numbers[0])

    def _decoding(self, *, is_watched: bool = False) -> Decoding:
        denoiser, committer = self._compiled
        return Decoding(
            denoiser,
            self.scheduler,
            committer,
            close_on=self.close_on,
            is_watched=is_watched,
            graphs=self._graphs,
        )

    def _find_ends(self, close_on: Sequence[int] | str) -> tuple[int, ...]:
        if isinstance(close_on, str):
            if close_on != "end" or not self.denoiser.end_token_ids:
                known = self.denoiser.end_token_ids or "none"
                raise NapDecodeError(
                    f'close_on must be token ids, or "end" if the model says which ids end a text (it says {known}), '
                    f"but is {close_on!r}"
                )
            close_on = self.denoiser.end_token_ids
        size, mask = self.denoiser.num_embeddings, self.denoiser.mask_token_id
        ids = check_ids("close_on", close_on)
        for token in ids:
            if token >= (size or token + 1) or token == mask:
                known = f"ids from 0 to {size - 1}" if size else "ids"
                raise NapDecodeError(
                    f"close_on names id {token}, which the model never emits: it has {known}, and {mask} is the mask"
                )
        return tuple(ids)

    def _set_compiled(self) -> None:
        """The parts that the loop runs with, as ``compile`` says."""
        modes: dict[bool | str, tuple[bool, bool]] = {
            False: (False, False),
            "kernels": (True, False),
            "graphs": (False, True),
            True: (True, self.denoiser.device.type == "cuda"),
        }
        if not isinstance(self.compile, bool | str) or self.compile not in modes:
            raise NapDecodeError(f'compile must be False, True, "kernels" or "graphs", but is {self.compile!r}')
        kernels, graphs = modes[self.compile]
        if graphs and self.committer.remembers:
            raise NapDecodeError(
                f"{type(self.committer).__name__} keeps things from step to step, which captured steps cannot; use "
                'compile="kernels"'
            )
        if graphs and self.denoiser.reuse is not None:
            raise NapDecodeError(
                f"{type(self.denoiser.reuse).__name__} chooses positions at each pass, which captured steps cannot; "
                'use compile="kernels"'
            )
        device = self.denoiser.device
        if graphs and device.type != "cuda":
            raise NapDecodeError(
                f'compile="graphs" needs a model on a CUDA device, but it is on {device}; use compile="kernels", or '
                "leave it out"
            )
        if graphs and (self.denoiser.is_split or not self.denoiser.hides_padding):
            reason = "is split over devices" if self.denoiser.is_split else "does not hide padding"
            raise NapDecodeError(f'compile="graphs" is not for a model that {reason}; use compile="kernels"')
        parts = self.denoiser, self.committer
        self._compiled = (parts[0].compiled(), parts[1].compiled()) if kernels else parts
        self._graphs = StepGraphs(CudaRecorder(device)) if graphs else None

    def _check(self, canvas: Canvas) -> None:
        self.denoiser.check(canvas)
        if self._compiled[0] is not self.denoiser:
            self._compiled[0].refresh()
        masked = (canvas.tokens == self.denoiser.mask_token_id) & canvas.attention_mask.bool()
        if bool((masked & ~canvas.decodable).any()):
            raise NapDecodeError(
                f"there is a mask token ({self.denoiser.mask_token_id}) in a slot of the canvas that is not to be "
                "decoded; give it a block, or another token"
            )
        if self.committer.leaves_one_out:
            self.denoiser.check_leave_one_out()

    def _output(
        self,
        canvas: Canvas,
        finished: Finished,
        forward_passes: int,
        started: float,
        seeds: Tensor | None,
        index: int | None = None,
    ) -> SamplerOutput:
        state = DecodeState.of(finished.state, canvas, 0, None)

        def host(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", copy=True)

        trace = DecodeTrace(
            tokens=host(state.tokens),
            block=host(canvas.block),
            step=host(state.commit_step),
            confidence=host(state.confidence),
            forward_passes=finished.passes,
            block_names=canvas.block_names,
            mask_token_id=self.denoiser.mask_token_id,
            end_token_ids=self.denoiser.end_token_ids,
            closed=host(to_canvas(canvas, finished.state.closed, False)) if self.close_on else None,
            forwarded=None if self.denoiser.reuse is None else finished.computed[:, : int(finished.passes.max())],
        )
        is_masked = host(state.masked)  # after an interruption
        expected = (trace.block >= 0) & ~host(state.edited) & ~is_masked
        if trace.closed is not None:
            expected &= ~trace.closed
        if bool((trace.confidence.isnan() & expected).any()):
            given = (trace.block < 0) & host(canvas.attention_mask.bool())
            empty = ((trace.confidence.isnan() & expected).any(1) & ~given.any(1)).nonzero()[:, 0].tolist()
            remedy = "Try another precision (bfloat16 instead of float16) or attention implementation, and look at the "
            remedy += "logits processors"
            if empty:
                remedy = (
                    f"Row {empty[0]} held nothing but masks at the start, and some models divide by the number of the "
                    "other tokens (ESM, whose token dropout does); give it a prompt, or the tokenizer's special tokens"
                )
            raise NapDecodeError(
                "the model's logits, or the confidences made of them, were nan in places, or left no id to emit; the "
                f"tokens committed there mean nothing. {remedy}"
            )
        if bool(((trace.tokens == self.denoiser.mask_token_id) & (trace.block >= 0) & ~is_masked).any()):
            raise NapDecodeError(
                f"{type(self.committer).__name__} committed the mask token; it must not propose the banned ids of the "
                "prediction"
            )
        saves = self.close_on and not self.committer.is_adaptive and not bool(is_masked.any())
        return SamplerOutput(
            sequences=state.tokens,
            canvas=canvas,
            trace=trace,
            forward_passes=forward_passes,
            wall_time=time.perf_counter() - started,
            row_seeds=None if seeds is None else seeds.tolist(),
            tokenizer=self.tokenizer,
            steps_saved=finished.steps_saved.tolist() if saves else None,
            index=index,
            cost=self.denoiser.cost,
        )

    def replace(
        self,
        *,
        denoiser: Denoiser | None = None,
        scheduler: BlockScheduler | None = None,
        committer: Committer | None = None,
        template: CanvasTemplate | None = None,
        close_on: Sequence[int] | str | None = None,
        compile: bool | str | None = None,
    ) -> Sampler:
        """The same sampler with some parts exchanged.

        Example:
            >>> from nap_decode import demo
            >>> from nap_decode.decoders import presets
            >>> sampler = presets.entropy_bounded(*demo.load())
            >>> print(sampler.replace(scheduler=MacroParallelScheduler()).describe().splitlines()[1])
              scheduler: MacroParallelScheduler()
        """
        return Sampler(
            self.denoiser if denoiser is None else denoiser,
            scheduler=self.scheduler if scheduler is None else scheduler,
            committer=self.committer if committer is None else committer,
            template=self.template if template is None else template,
            close_on=self.close_on if close_on is None else close_on,
            compile=self.compile if compile is None else compile,
        )

    def describe(self) -> str:
        """What this composition does, in words.

        Example:
            >>> from nap_decode import demo
            >>> from nap_decode.decoders import presets
            >>> print(presets.llada_low_confidence(*demo.load(), steps=8, block_length=4).describe())
            Sampler of LlamaForCausalLM
              scheduler: SemiAutoregressiveScheduler(steps=8, block_length=4)
                One block after the other, each with steps in proportion to its tokens (LLaDA, arXiv 2502.09992).
              committer: MicroConfidenceCommitter()
                Proposes a token for every open slot, scores it, and commits the best of each block.
                selection: QuotaSelection()
                  The most confident slots of each block, exactly as many as its quota.
        """
        lines = [f"Sampler of {_name(self.denoiser.model)}"]
        if self.denoiser.cfg_scale:
            lines.append(f"guidance: {self.denoiser.cfg_scale}")
        if self.denoiser.reuse is not None:
            lines.append(f"reuse: {describe(self.denoiser.reuse)}")
        if self.template is not None:
            blocks = (f"{b.name} ({b.length}{', held' if b.held else ''})" for b in self.template.blocks)
            lines.append(f"canvas: {', '.join(blocks)}")
        if self.close_on:
            lines.append(f"blocks end with: {', '.join(map(str, self.close_on))}")
        lines += [f"scheduler: {describe(self.scheduler)}", f"committer: {describe(self.committer)}"]
        return "\n".join(lines).replace("\n", "\n  ")

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a JSON file how this sampler decodes: its parts, not its model, nor how that is compiled.

        Raises:
            NapDecodeError: a part that is no dataclass of plain values, or logits processors.
        """
        if self.denoiser.logits_processor:
            raise NapDecodeError(
                "logits processors cannot be saved; save the sampler without them, and give them to the Denoiser that "
                "it is loaded with"
            )
        parts = {name: to_plain(getattr(self, name)) for name in ("scheduler", "committer", "template")}
        parts["reuse"] = to_plain(self.denoiser.reuse)
        content = {"format": _FORMAT, "cfg_scale": float(self.denoiser.cfg_scale), "close_on": self.close_on} | parts
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
            NapDecodeError: not such a file, a part that is not known, or a :class:`Denoiser` with other guidance or
                reuse.
        """
        try:
            content = json.loads(Path(path).read_text())
            found, cfg_scale = content["format"], content["cfg_scale"]
            plain = {name: content[name] for name in ("scheduler", "committer", "template")}
            close_on = content.get("close_on", ())  # since format 2
            plain["reuse"] = content.get("reuse")  # since format 3
        except (ValueError, KeyError, TypeError) as error:
            raise NapDecodeError(f"{path} is not a file written by Sampler.save ({error})") from error
        if not isinstance(found, int) or found > _FORMAT:
            raise NapDecodeError(f"{path} has format {found}, but this version reads {_FORMAT}; update it")
        whole = {name: from_plain(data, tuple(parts)) for name, data in plain.items()}
        own = {"cfg_scale": cfg_scale, "reuse": whole.pop("reuse")}
        if not isinstance(model, Denoiser):
            model = Denoiser(model, tokenizer, mask_token_id=mask_token_id, **own)
        for name, value in own.items():
            if getattr(model, name) != value:
                raise NapDecodeError(f"the file has {name} {value}, but the Denoiser has {getattr(model, name)}")
        return Sampler(model, **whole, close_on=close_on)

    def _append(
        self,
        rows: list[list[int]],
        max_new_tokens: int | None,
        *,
        prompt_width: int = 0,
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
            prompt_width=prompt_width,
            device=self.denoiser.device,
            is_single=is_single,
        )

    def _seeds(self, num_rows: int, seed: int | None, row_seeds: Sequence[int] | None) -> Tensor | None:
        """``(B,)`` int64 on the host; None if nothing is drawn."""
        if row_seeds is not None and (seed is not None or len(row_seeds) != num_rows):
            given = "seed too" if seed is not None else f"{len(row_seeds)} for {num_rows} rows"
            raise NapDecodeError(f"row_seeds must be one seed for every row, and no seed besides; given: {given}")
        given_seeds = None if row_seeds is None else [wrap(s) for s in row_seeds]
        base = None if given_seeds is not None else self._base_seed(seed)
        if given_seeds is not None:
            return torch.tensor(given_seeds, dtype=torch.int64, device="cpu") if self._draws else None
        return None if base is None else seeds_of_rows(base, range(num_rows))

    def _seeds_in_stream(self, seed: int | None, numbers: list[int], own: list[int | None]) -> Tensor | None:
        """``(B,)`` int64 on the host: the rows' own, or those that derive from the seed; None if nothing is drawn."""
        if not self._draws:
            return None
        if seed is not None:
            return seeds_of_rows(seed, numbers)
        seeds = [wrap(row_seed) for row_seed in own if row_seed is not None]
        return torch.tensor(seeds, dtype=torch.int64, device="cpu")

    @property
    def _draws(self) -> bool:
        return self.committer.is_random or self.scheduler.is_random

    def _base_seed(self, seed: int | None) -> int | None:
        """The seed that those of rows derive from; None if nothing is drawn."""
        seed = None if seed is None else wrap(seed)
        if not self._draws:
            return None
        return int(torch.randint(2**62, (), device="cpu")) if seed is None else seed


_Waiting: TypeAlias = "tuple[int, list[int], int | None]"
"""Number, ids and, if it has one of its own, seed of a prompt."""


def _with_seeds(prompts: Iterable[Prompt], row_seeds: Iterable[int]) -> Iterator[tuple[Prompt, int]]:
    seeds, number = iter(row_seeds), 0
    for prompt in prompts:
        seed = next(seeds, None)
        if seed is None:
            raise NapDecodeError(f"row_seeds must be one for every prompt, but there are {number}, and more prompts")
        yield prompt, seed
        number += 1
    if next(seeds, None) is not None:
        raise NapDecodeError(f"row_seeds must be one for every prompt, but there are more than {number} prompts")


def _longest_first(
    prompts: Iterable[tuple[Prompt, int | None]], tokenizer: PreTrainedTokenizerBase | None, *, window: int
) -> Iterator[_Waiting]:
    """Prompts with their numbers and seeds, from the longest to the shortest of each window."""
    numbered = enumerate(prompts)
    while some := list(islice(numbered, window)):
        rows: list[_Waiting] = []
        for number, (prompt, seed) in some:
            if is_part(prompt):
                raise NapDecodeError(
                    f"a stream takes many prompts, but number {number} of them is {prompt!r:.80}; put a single one "
                    "into a list of its own"
                )
            rows.append((number, encode_prompts([prompt], tokenizer)[0][0], seed))
        yield from sorted(rows, key=lambda row: -len(row[1]))


def _in_order(outputs: Iterable[SamplerOutput]) -> Iterator[SamplerOutput]:
    """Outputs in the order of their prompts; those that come too early are kept."""
    early: dict[int | None, SamplerOutput] = {}
    following = 0
    for output in outputs:
        early[output.index] = output
        while following in early:
            yield early.pop(following)
            following += 1


def _name(model: Model) -> str:
    return getattr(model, "__name__", type(model).__name__)


def check_parts(scheduler: BlockScheduler, committer: Committer) -> None:
    """Raise unless a scheduler and a committer go together.

    Raises:
        NapDecodeError: something else than these, a fixed committer without a number of steps, or an
            adaptive one with it.
    """
    if not isinstance(scheduler, BlockScheduler):
        raise NapDecodeError(
            f"scheduler must be a BlockScheduler, such as AnyOrderScheduler(steps=8), but is {scheduler!r}"
        )
    if not isinstance(committer, Committer):
        raise NapDecodeError(f"committer must be a Committer, such as MicroConfidenceCommitter(), but is {committer!r}")
    if not committer.is_adaptive and not scheduler.is_fixed:
        raise NapDecodeError(
            f"{type(committer).__name__} commits exactly what the scheduler says, so {type(scheduler).__name__} needs "
            "steps= or tokens_per_step="
        )
    if committer.is_adaptive and scheduler.schedule != EvenSchedule():
        raise NapDecodeError(
            f"{scheduler.schedule!r} has no effect, because the committer decides how many tokens a step commits; "
            "leave it out"
        )
    if committer.is_adaptive and scheduler.shares_steps():
        raise NapDecodeError(
            "share_last_step=True has no effect, because the committer decides how many tokens a step commits; leave "
            "it out"
        )
    if committer.is_adaptive and scheduler.steps is not None:
        raise NapDecodeError(
            f"steps={scheduler.steps} cannot be kept: the committer's selection decides by confidence how many tokens "
            "a step commits; use tokens_per_step= for the least number"
        )


class ParallelForcedSampler(Sampler):
    """NAP's parallel-forced decoding (arXiv 2602.23225, section 4.2).

    A canvas of m paths and a summary; every step's budget is spread over all paths (macro-parallel), and
    inside each path the most confident positions are committed (micro-confidence).  The authors published
    no decoder; what the paper leaves open is decided in :class:`MacroParallelScheduler`.

    Args:
        model: see :class:`Sampler`.
        tokenizer: see :class:`Sampler`.
        num_paths: see :meth:`CanvasTemplate.nap`; 3 by default.
        path_length: see :meth:`CanvasTemplate.nap`; 330 by default.
        summary_length: see :meth:`CanvasTemplate.nap`; 32 by default.
        total_length: see :meth:`CanvasTemplate.nap`.
        template: a canvas of your own instead of the four options above.
        tokens_per_step: see :class:`BlockScheduler`; if ``steps`` is not given either it is 4, or 1 with an
            adaptive selection.
        steps: see :class:`BlockScheduler`.
        hold_until: see :class:`MacroParallelScheduler`.
        share_last_step: see :class:`MacroParallelScheduler`.
        temperature: see :class:`MicroConfidenceCommitter`.
        top_k: see :class:`MicroConfidenceCommitter`.
        top_p: see :class:`MicroConfidenceCommitter`.
        confidence: see :class:`MicroConfidenceCommitter`.
        selection: see :class:`MicroConfidenceCommitter`.
        mask_token_id: see :class:`Denoiser`.
        close_on: see :class:`Sampler`.
        compile: see :class:`Sampler`.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = demo.load()
        >>> sampler = ParallelForcedSampler(model, tokenizer, path_length=11, summary_length=2, tokens_per_step=6)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> print(out.text)
        <think 1> 6 0 4 2 0 1 3 7 0 0 6
        <think 2> 4 5 7 3 4 4 2 4 4 2 6
        <think 3> 3 3 5 3 3 5 1 7 5 4 6
        <summary> 6
    """

    def __init__(
        self,
        model: Denoiser | Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_paths: int | None = None,
        path_length: int | Sequence[int] | None = None,
        summary_length: int | None = None,
        total_length: int | None = None,
        template: CanvasTemplate | None = None,
        tokens_per_step: int | None = None,
        steps: int | None = None,
        hold_until: float = 1.0,
        share_last_step: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        confidence: str | Confidence = "probability",
        selection: Selection | None = None,
        mask_token_id: int | None = None,
        close_on: Sequence[int] | str = (),
        compile: bool | str = False,
    ) -> None:
        committer = MicroConfidenceCommitter(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            confidence=confidence,
            selection=QuotaSelection() if selection is None else selection,
        )
        if tokens_per_step is None and steps is None:
            tokens_per_step = 1 if committer.is_adaptive else 4
        lengths = (num_paths, path_length, summary_length, total_length)
        if template is not None and lengths != (None,) * 4:
            raise NapDecodeError("a template has its own blocks; leave out num_paths and the lengths, or the template")
        super().__init__(
            model,
            tokenizer,
            scheduler=MacroParallelScheduler(
                steps=steps,
                tokens_per_step=tokens_per_step,
                hold_until=hold_until,
                share_last_step=share_last_step,
            ),
            committer=committer,
            template=CanvasTemplate.nap(
                3 if num_paths is None else num_paths,
                path_length=path_length,
                summary_length=32 if summary_length is None else summary_length,
                total_length=total_length,
            )
            if template is None
            else template,
            mask_token_id=mask_token_id,
            close_on=close_on,
            compile=compile,
        )


def _progress_bar(total: int | None, progress: bool | None, unit: str = "step") -> Any:
    from transformers.utils import logging  # its bars obey transformers' own switch

    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return logging.tqdm(total=total, desc="decoding", unit=unit, disable=not progress)
