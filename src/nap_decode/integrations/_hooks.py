"""Dream's hooks, which see the tokens and all logits of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError
from nap_decode.base.random import SCHEDULE_STREAM
from nap_decode.canvas import Canvas
from nap_decode.decoders.dream import AncestralSchedule, DreamSchedule
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.prediction import Prediction
from nap_decode.model.rows import Rows, to_canvas
from nap_decode.parts.committer import Committer, Predict
from nap_decode.parts.scheduler import AnyOrderScheduler, BlockScheduler
from nap_decode.parts.slots import Commit, Slots
from nap_decode.run.sampler import Sampler
from nap_decode.run.state import Callback, DecodeState
from nap_decode.speed.reuse import Kept

TokensHook: TypeAlias = Callable[["int | None", Tensor, "Tensor | None"], Tensor]
"""``(step, tokens (B, L), logits (B, L, V)) -> tokens (B, L)``; step and logits are None before the first step."""
LogitsHook: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""``(step, tokens (B, L), logits (B, L, V)) -> logits (B, L, V)``, entry p predicting position p."""


def with_hooks(
    sampler: Sampler, tokens_hook: TokensHook | None, logits_hook: LogitsHook | None, history: list[Tensor]
) -> tuple[Sampler, Callback | None]:
    """A sampler that calls the hooks, and the callback to decode with.

    Args:
        sampler: what decodes without hooks.
        tokens_hook: see :data:`TokensHook`.
        logits_hook: see :data:`LogitsHook`.
        history: gets the canvas after every step, if there is a hook.
    """
    if tokens_hook is None and logits_hook is None:
        return sampler, None
    denoiser = _HookedDenoiser(sampler.denoiser, logits_hook)
    shares = _shares(sampler.scheduler)
    if shares is None:
        hooked = sampler.replace(denoiser=denoiser, committer=_StepTeller(sampler.committer, denoiser))
    else:
        counts_draws = sampler.scheduler.schedule.is_random
        recounting = _Recounting(sampler.committer, denoiser, shares, counts_draws)
        hooked = sampler.replace(denoiser=denoiser, scheduler=AnyOrderScheduler(), committer=recounting)

    def callback(state: DecodeState) -> Tensor:  # while one looks on, no row leaves the batch
        tokens = state.tokens
        if tokens_hook is not None:
            tokens = edit_tokens(tokens_hook, state.step - 1, tokens, denoiser.seen)
        history.append(tokens.clone())
        return tokens

    return hooked, callback


def _shares(scheduler: BlockScheduler) -> list[float] | None:
    """The share of the masked tokens that each step of Dream's schedules commits; None for other schedules."""
    schedule, steps = scheduler.schedule, scheduler.steps
    if steps is None or not isinstance(scheduler, AnyOrderScheduler):
        return None
    if not isinstance(schedule, DreamSchedule | AncestralSchedule):
        return None
    times = torch.linspace(1, schedule.eps, steps + 1)  # in float32 as there, because rounding decides
    return [*(1 - times[1:] / times[:-1]).tolist()[:-1], 1.0]


def edit_tokens(hook: TokensHook, step: int | None, tokens: Tensor, logits: Tensor | None) -> Tensor:
    """What a hook makes of the tokens."""
    changed = hook(step, tokens, logits)
    if not isinstance(changed, Tensor) or changed.shape != tokens.shape:
        raise NapDecodeError(
            f"generation_tokens_hook_func must return the tokens {tuple(tokens.shape)}, not {changed!r:.80}"
        )
    return changed


class _HookedDenoiser(Denoiser):
    """Asks for all logits, and lets Dream's hook change them."""

    def __init__(self, denoiser: Denoiser, hook: LogitsHook | None) -> None:
        vars(self).update(vars(denoiser))  # one that is set up already: nothing is probed again
        self.denoiser, self.hook, self.step = denoiser, hook, 0
        self.reuse = None  # a hook wants all logits, of this step
        self.canvas: Canvas | None = None
        self.seen: Tensor | None = None

    @override
    def check(self, canvas: Canvas) -> None:
        super().check(canvas)
        self.canvas = canvas

    @override
    def predict(
        self,
        rows: Rows,
        tokens: Tensor,
        wanted: Tensor,
        places: Tensor,
        *,
        hidden: Tensor | None = None,
        alternatives: int | None = None,
        kept: dict[str, Kept] | None = None,
    ) -> Prediction:
        canvas = self.canvas
        if hidden is not None or alternatives is not None or canvas is None:
            raise NapDecodeError(
                "a sampler that looks at other canvases besides its own cannot show its logits to hooks"
            )
        whole = torch.where(canvas.attention_mask > 0, to_canvas(canvas, tokens, 0), canvas.tokens)
        columns = torch.arange(whole.shape[1], device=whole.device).expand_as(whole)
        logits = self.denoiser(whole, columns, canvas)  # (B, L, V)
        if self.hook is not None:
            changed = self.hook(self.step, whole.clone(), logits)
            if not isinstance(changed, Tensor) or changed.shape != logits.shape:
                raise NapDecodeError(
                    f"generation_logits_hook_func must return logits {tuple(logits.shape)}, not {changed!r:.80}"
                )
            logits = changed
        self.seen = logits
        columns = (wanted.clamp(min=0) + canvas.padding).to(logits.device)
        chosen = logits.take_along_dim(columns[:, :, None], dim=1)  # (B, K, V)
        return Prediction.of(chosen, banned=self.banned(logits.shape[-1], tokens.device), places=places)


class _StepTeller(Committer):
    """A committer that tells a denoiser with hooks which step it is."""

    def __init__(self, committer: Committer, denoiser: _HookedDenoiser) -> None:
        self.committer, self.denoiser = committer, denoiser

    @property
    @override
    def is_adaptive(self) -> bool:
        return self.committer.is_adaptive

    @property
    @override
    def is_random(self) -> bool:
        return self.committer.is_random

    @property
    @override
    def revises(self) -> bool:
        return self.committer.revises

    @property
    @override
    def leaves_one_out(self) -> bool:
        return self.committer.leaves_one_out

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Commit:
        self.denoiser.step = int(slots.step.max())
        return self.committer(slots, predict)


class _Recounting(_StepTeller):
    """A committer of Dream's algorithms that goes by the masks there are, as Dream does, and not by a plan.

    Every step is taken, also if it commits nothing or nothing is masked: the hooks may change the canvas at each.
    """

    is_adaptive = True
    revises = True  # so that blocks without a mask may stay open

    def __init__(
        self, committer: Committer, denoiser: _HookedDenoiser, shares: list[float], counts_draws: bool
    ) -> None:
        super().__init__(committer, denoiser)
        self.shares, self.counts_draws = shares, counts_draws

    @property
    @override
    def is_random(self) -> bool:
        return self.committer.is_random or self.counts_draws

    @property
    @override
    def patience(self) -> int:
        return len(self.shares)

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Commit:
        step = int(slots.step.max())
        if step >= len(self.shares):
            raise NapDecodeError(
                f"generation_tokens_hook_func left masks after step {step - 1}, the last of steps={len(self.shares)}; "
                "mask slots earlier, or ask for more steps"
            )
        share = torch.tensor(self.shares[step])
        if self.counts_draws:
            quota = slots.count(slots.open & (slots.uniform(SCHEDULE_STREAM) < share))
        else:
            quota = (slots.count(slots.open).float() * share).long()
        commit = super().__call__(replace(slots, quota=quota), predict)
        return replace(commit, unsettled=torch.full_like(quota, step + 1 < len(self.shares), dtype=torch.bool))
