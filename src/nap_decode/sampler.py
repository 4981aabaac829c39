"""The loop that decodes a canvas, and NAP's decoder as a composition of its parts."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nap_decode.canvas import Canvas, CanvasTemplate, Prompts, count_blocks, encode_prompts
from nap_decode.committers import Committer, MicroConfidenceCommitter
from nap_decode.confidence import Confidence
from nap_decode.denoiser import Denoiser, Model
from nap_decode.errors import NapDecodeError
from nap_decode.output import SamplerOutput
from nap_decode.randomness import row_seeds as seeds_of_rows
from nap_decode.randomness import wrap
from nap_decode.saving import Part, describe, from_plain, to_plain
from nap_decode.schedulers import BlockScheduler, MacroParallelScheduler, Partition, Plan
from nap_decode.schedules import EvenSchedule
from nap_decode.selections import QuotaSelection, Selection
from nap_decode.slots import Slots
from nap_decode.state import Callback, DecodeState
from nap_decode.trace import DecodeTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_PATIENCE = 1000
"""Steps without progress after which decoding is given up."""


@dataclass(frozen=True, eq=False)
class _Step:
    index: int  # in the schedule; the same for a row whatever its batch
    is_open: Tensor  # (B, M) bool, blocks that may commit
    quota: Tensor  # (B, M) tokens that each block shall commit
    width: int  # slots of open blocks in the row that has most
    active: Tensor  # (B,) on the host, 1 for rows that are not finished


class _Predict:
    """What a committer asks the model at one step; see :class:`Predict`."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, tokens: Tensor, slots: Slots) -> None:
        self.denoiser, self.canvas, self.tokens, self.slots = denoiser, canvas, tokens, slots
        self.calls = 0
        self.vocab_size = denoiser.num_embeddings  # what the logits say is surer

    def __call__(self, tokens: Tensor | None = None, *, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
        slots, whole, index = self.slots, self.tokens, self.slots.index
        if tokens is not None and leave_one_out:
            raise NapDecodeError("alternatives cannot be predicted with slots left out; ask for one of the two")
        if tokens is not None:
            spread = torch.stack([slots.spread(alternative) for alternative in tokens])  # (J, B, L)
            whole = torch.where(slots.rank >= 0, spread, whole).flatten(0, 1)
            index = index.repeat(len(tokens), 1)
        hidden = slots.committed if leave_one_out else None
        if leave_one_out:  # what only fills a row up has no part in it
            index = index.where(slots.block < slots.quota.shape[1], -1)
        logits = self.denoiser(whole, index, self.canvas, hidden=hidden)
        logits = logits.to(slots.index.device)
        self.calls += 1
        self.vocab_size = logits.shape[-1]
        if tokens is not None:
            logits = logits.view(*tokens.shape, -1)
        return logits, self.denoiser.banned(logits.shape[-1], logits.device)

    def edit(self, state: DecodeState, tokens: Tensor) -> DecodeState:
        """The state with a callback's tokens."""
        vocab_size = self.vocab_size or int(self.tokens.max()) + 1  # of a function that was not asked
        banned = self.denoiser.banned(vocab_size, state.tokens.device)
        return state.edit(tokens, self.denoiser.mask_token_id, banned, vocab_size)


def _remaining(partition: Partition, masked: Tensor, unsettled: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, M)`` slots of each block still to decode, and 1 for blocks that are not settled; on the host."""
    remaining = count_blocks(partition.block, partition.lengths.shape[1], masked)
    unsettled = torch.zeros_like(remaining) if unsettled is None else unsettled.long()
    both = torch.stack([remaining, unsettled]).cpu()
    return both[0], both[1]


class Sampler:
    """Decodes with any scheduler and committer.

    Args:
        model: a :class:`Denoiser`, or whatever one can be made of.
        tokenizer: see :class:`Denoiser`; a Denoiser has its own.
        scheduler: how many tokens each block commits at each step.
        committer: which positions and tokens; :class:`MicroConfidenceCommitter` at temperature 0 by default.
        template: what follows a prompt; needed unless ``max_new_tokens`` is given with the prompts.
        mask_token_id: see :class:`Denoiser`.

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
        self.committer: Committer = committer or MicroConfidenceCommitter()
        self.template = template
        check_parts(self.scheduler, self.committer)

    def __call__(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> SamplerOutput:
        """Decode the template (or ``max_new_tokens`` slots) after one prompt or a batch.

        Args:
            prompts: text, chat messages, token ids, or a list of any of these (a ragged batch).
            max_new_tokens: slots to decode, instead of the sampler's template.
            seed: see :meth:`decode`.
            row_seeds: see :meth:`decode`.
            callback: see :meth:`decode`.
            progress: see :meth:`decode`.
        """
        rows, is_single = encode_prompts(prompts, self.tokenizer)
        canvas = self._append(rows, max_new_tokens, is_single=is_single)
        return self.decode(canvas, seed=seed, row_seeds=row_seeds, callback=callback, progress=progress)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
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
        output = self.decode(canvas, seed=seed, row_seeds=row_seeds, callback=callback, progress=progress)
        return output if return_dict_in_generate else output.sequences.to(input_ids.device)

    def infill(
        self,
        texts: Prompts,
        *,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> SamplerOutput:
        """Decode the mask tokens in texts; every run of masks is a block of its own.

        Args:
            texts: as the prompts of a call, with mask tokens in them.
            seed: see :meth:`decode`.
            row_seeds: see :meth:`decode`.
            callback: see :meth:`decode`.
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
        return self.decode(canvas, seed=seed, row_seeds=row_seeds, callback=callback, progress=progress)

    @property
    def custom_generate(self) -> Callable[..., Tensor | SamplerOutput]:
        """For ``model.generate(**inputs, custom_generate=sampler.custom_generate)`` of transformers 4.57 or later.

        See :func:`~nap_decode.integrations.huggingface.custom_generate`.
        """
        from nap_decode.integrations.huggingface import custom_generate

        return partial(custom_generate, self)

    def decode(
        self,
        canvas: Canvas,
        *,
        seed: int | None = None,
        row_seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
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
            progress: show a bar on stderr; None shows it in terminals and notebooks only.

        Raises:
            NapDecodeError: see :meth:`Denoiser.check` and :meth:`BlockScheduler.plan`.
        """
        self.denoiser.check(canvas)
        if self.committer.leaves_one_out:
            self.denoiser.check_leave_one_out()
        adaptive, revises, device = self.committer.is_adaptive, self.committer.revises, canvas.tokens.device
        partition = self.scheduler.partition(canvas)
        drawn = self._seeds(canvas, seed, row_seeds)
        plan = self.scheduler.plan(
            partition.lengths, partition.held, adaptive=adaptive, seeds=None if drawn is None else drawn.cpu()
        )
        total_steps = None if adaptive else int(plan.steps.max())
        seeds = torch.zeros(len(canvas.tokens), dtype=torch.int64, device=device) if drawn is None else drawn

        state = DecodeState.start(canvas, total_steps)
        remaining = partition.lengths  # (B, M), on the host
        # What is known of the steps to come: everything, unless the model or a callback has a say.
        known = None if not adaptive and callback is None else 1
        pending = self._schedule(plan, remaining, 0, known, device)
        passes: list[Tensor] = []
        fewest, stalled = int(remaining.sum()), 0
        memory: dict[str, Any] = {}
        started = time.perf_counter()
        with torch.no_grad(), _progress_bar(total_steps, progress) as bar:
            while pending:
                step = pending.popleft()
                slots = Slots.pack(
                    canvas,
                    partition,
                    state.tokens,
                    state.masked,
                    step.is_open,
                    step.quota,
                    step.width,
                    seeds,
                    step=step.index,
                    memory=memory,
                    revises=revises,
                )
                predict = _Predict(self.denoiser, canvas, state.tokens, slots)
                commit = self.committer(slots, predict)
                passes += [step.active] * predict.calls
                state = state.after(commit, slots, self.denoiser.mask_token_id)
                edit = callback(state.copy()) if callback is not None else None
                if edit is not None:
                    state = predict.edit(state, edit)
                if known is not None:
                    # The one place that waits for the device: only it knows how many slots are left.
                    remaining, unsettled = _remaining(partition, state.masked, commit.unsettled)
                    left = int(torch.maximum(remaining, unsettled).sum())
                    fewest, stalled = min(fewest, left), stalled + 1 if left >= fewest else 0
                    if stalled > _PATIENCE:
                        raise NapDecodeError(
                            f"{stalled} steps in a row came no further; {type(self.committer).__name__}, its parts or "
                            "the callback must leave fewer slots masked, and blocks settled, some time"
                        )
                    pending = self._schedule(plan, remaining, state.step, known, device, unsettled)
                bar.update(1)
            trace = self._trace(state, sum(passes, torch.zeros(len(canvas.tokens), dtype=torch.int64)))
        if bool((trace.confidence.isnan() & (trace.block >= 0) & ~state.edited.cpu()).any()):
            raise NapDecodeError(
                "the model's logits, or the confidences made of them, were nan in places, or left no id to emit; the "
                "tokens committed there mean nothing. Try another precision (bfloat16 instead of float16) or "
                "attention implementation, and look at the logits processors"
            )
        if bool(((trace.tokens == self.denoiser.mask_token_id) & (trace.block >= 0)).any()):
            raise NapDecodeError(
                f"{type(self.committer).__name__} committed the mask token; it must not propose the banned ids that "
                "predict() returns"
            )
        return SamplerOutput(
            sequences=state.tokens,
            canvas=canvas,
            trace=trace,
            forward_passes=len(passes),
            wall_time=time.perf_counter() - started,
            row_seeds=None if drawn is None else drawn.tolist(),
            tokenizer=self.tokenizer,
        )

    def replace(
        self,
        *,
        denoiser: Denoiser | None = None,
        scheduler: BlockScheduler | None = None,
        committer: Committer | None = None,
        template: CanvasTemplate | None = None,
    ) -> Sampler:
        """The same sampler with some parts exchanged.

        Example:
            >>> from nap_decode import demo, presets
            >>> sampler = presets.entropy_bounded(*demo.load())
            >>> print(sampler.replace(scheduler=MacroParallelScheduler()).describe().splitlines()[1])
              scheduler: MacroParallelScheduler()
        """
        return Sampler(
            denoiser or self.denoiser,
            scheduler=scheduler or self.scheduler,
            committer=committer or self.committer,
            template=template or self.template,
        )

    def describe(self) -> str:
        """What this composition does, in words.

        Example:
            >>> from nap_decode import demo, presets
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
        if self.template is not None:
            blocks = (f"{b.name} ({b.length}{', held' if b.held else ''})" for b in self.template.blocks)
            lines.append(f"canvas: {', '.join(blocks)}")
        lines += [f"scheduler: {describe(self.scheduler)}", f"committer: {describe(self.committer)}"]
        return "\n".join(lines).replace("\n", "\n  ")

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a JSON file how this sampler decodes: its parts, not its model.

        Raises:
            NapDecodeError: a part that is no dataclass of plain values, or logits processors.
        """
        if self.denoiser.logits_processor:
            raise NapDecodeError(
                "logits processors cannot be saved; save the sampler without them, and give them to the Denoiser that "
                "it is loaded with"
            )
        parts = {name: to_plain(getattr(self, name)) for name in ("scheduler", "committer", "template")}
        content = {"format": _FORMAT, "cfg_scale": float(self.denoiser.cfg_scale)} | parts
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
            NapDecodeError: not such a file, a part that is not known, or a :class:`Denoiser` with other guidance.
        """
        try:
            content = json.loads(Path(path).read_text())
            found, cfg_scale = content["format"], content["cfg_scale"]
            plain = {name: content[name] for name in ("scheduler", "committer", "template")}
        except (ValueError, KeyError, TypeError) as error:
            raise NapDecodeError(f"{path} is not a file written by Sampler.save ({error})") from error
        if not isinstance(found, int) or found > _FORMAT:
            raise NapDecodeError(f"{path} has format {found}, but this version reads {_FORMAT}; update it")
        if not isinstance(model, Denoiser):
            model = Denoiser(model, tokenizer, mask_token_id=mask_token_id, cfg_scale=cfg_scale)
        elif model.cfg_scale != cfg_scale:
            raise NapDecodeError(f"the file has cfg_scale {cfg_scale}, but the Denoiser has {model.cfg_scale}")
        return Sampler(model, **{name: from_plain(data, tuple(parts)) for name, data in plain.items()})

    def _append(
        self, rows: list[list[int]], max_new_tokens: int | None, *, prompt_width: int = 0, is_single: bool = False
    ) -> Canvas:
        template = self.template if max_new_tokens is None else CanvasTemplate.plain(max_new_tokens)
        if template is None:
            raise NapDecodeError("say what to decode: give the sampler a template, or pass max_new_tokens=")
        for row, ids in enumerate(rows):
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

    def _schedule(
        self,
        plan: Plan,
        remaining: Tensor,
        step: int,
        known: int | None,
        device: torch.device,
        unsettled: Tensor | None = None,
    ) -> deque[_Step]:
        """The next ``known`` steps, or all: computed on the host, and copied to the device together."""
        adaptive = self.committer.is_adaptive
        steps: list[tuple[int, Tensor, Tensor]] = []
        # A block that is not settled stays open, as if one of its slots were masked; but it is owed nothing.
        occupied = remaining if unsettled is None else torch.maximum(remaining, unsettled)
        while bool((occupied > 0).any()) and len(steps) != known:
            quota = plan.least(remaining) if adaptive else plan.quota(remaining, step)
            is_open = plan.open(occupied) if adaptive else quota > 0
            if bool(is_open.any()):  # after an edit there may be steps of the plan with nothing left to do
                # A committer that revises looks at all slots of an open block, the others at masked ones.
                steps.append((step, quota, (plan.lengths if self.committer.revises else remaining) * is_open))
            remaining = occupied = remaining - quota
            step += 1
        if not steps:
            return deque()
        indices, quotas, slots = zip(*steps, strict=True)
        counts = torch.stack(slots)  # (S, B, M) slots of open blocks
        return deque(
            _Step(*values)
            for values in zip(
                indices,
                (counts > 0).to(device),
                torch.stack(quotas).to(device),
                counts.sum(2).amax(1).tolist(),
                (counts > 0).any(2).long(),
                strict=True,
            )
        )

    def _seeds(self, canvas: Canvas, seed: int | None, row_seeds: Sequence[int] | None) -> Tensor | None:
        """``(B,)`` int64; None if nothing is drawn."""
        num_rows, device = canvas.tokens.shape[0], canvas.tokens.device
        if row_seeds is not None and (seed is not None or len(row_seeds) != num_rows):
            given = "seed too" if seed is not None else f"{len(row_seeds)} for {num_rows} rows"
            raise NapDecodeError(f"row_seeds must be one seed for every row, and no seed besides; given: {given}")
        given_seeds = None if row_seeds is None else [wrap(s) for s in row_seeds]
        seed = None if seed is None else wrap(seed)
        if not (self.committer.is_random or self.scheduler.is_random):
            return None
        if given_seeds is not None:
            return torch.tensor(given_seeds, dtype=torch.int64, device=device)
        return seeds_of_rows(int(torch.randint(2**62, ())) if seed is None else seed, num_rows, device)

    def _trace(self, state: DecodeState, row_passes: Tensor) -> DecodeTrace:
        def host(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", copy=True)

        return DecodeTrace(
            tokens=host(state.tokens),
            block=host(state.canvas.block),
            step=host(state.commit_step),
            confidence=host(state.confidence),
            forward_passes=row_passes,
            block_names=state.canvas.block_names,
            mask_token_id=self.denoiser.mask_token_id,
            end_token_ids=self.denoiser.end_token_ids,
        )


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
    ) -> None:
        committer = MicroConfidenceCommitter(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            confidence=confidence,
            selection=selection or QuotaSelection(),
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
            template=template
            or CanvasTemplate.nap(
                3 if num_paths is None else num_paths,
                path_length=path_length,
                summary_length=32 if summary_length is None else summary_length,
                total_length=total_length,
            ),
            mask_token_id=mask_token_id,
        )


def _progress_bar(total: int | None, progress: bool | None) -> Any:
    from transformers.utils import logging  # its bars obey transformers' own switch

    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return logging.tqdm(total=total, desc="decoding", unit="step", disable=not progress)
