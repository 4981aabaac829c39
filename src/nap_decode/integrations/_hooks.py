"""Dream's hooks, which see the tokens and all logits of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.base.errors import NapDecodeError
from nap_decode.base.random import SCHEDULE_STREAM
from nap_decode.integrations._shared import Padded
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.prediction import Prediction
from nap_decode.model.rows import Rows
from nap_decode.parts.committer import Committer, Predict
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.needs import Needs
from nap_decode.parts.scheduler import AnyOrderScheduler
from nap_decode.parts.slots import Decision, Slots
from nap_decode.run.state import DecodeState

Hook: TypeAlias = Callable[[Any, Tensor, Any], Tensor]
"""``(step, tokens (B, L), logits (B, L, V))`` -> such tokens or logits, whichever it is for; entry p of the logits predicts
position p.  Step and logits are None before the first step."""


class HookedDenoiser(Denoiser):
    """A Denoiser that asks for all logits and lets hooks change them, and after the step the tokens."""

    def __init__(self, denoiser: Denoiser, shown: Padded, tokens_hook: Hook, logits_hook: Hook) -> None:
        vars(self).update(vars(denoiser))  # one that is set up already: nothing is probed again
        self.shown, self.tokens_hook, self.logits_hook = shown, tokens_hook, logits_hook
        self.reuse = None  # a hook wants all logits, of this step
        self.seen: Tensor | None = None
        self.history: list[Tensor] = []  # the rows after every step

    @override
    def predict(self, rows: Rows, tokens: Tensor, wanted: Tensor, places: Tensor, **options: Any) -> Prediction:
        if options.get("hidden") is not None or len(tokens) > len(rows.lengths):
            raise NapDecodeError("a decoder that looks at other canvases besides its own cannot show logits to hooks")
        every = torch.arange(tokens.numel(), device=tokens.device)
        prediction = super().predict(rows, tokens, every.view_as(tokens) % rows.width, every)
        logits = self.shown.padded(prediction.logits)  # (B, L, V)
        changed = self.logits_hook(len(self.history), self.shown.padded(tokens), logits)
        self.seen = _checked("generation_logits_hook_func must return logits", changed, logits)
        column = self.shown.order.gather(1, wanted.clamp(min=0))
        chosen = self.seen.take_along_dim(column[:, :, None], dim=1)  # (B, K, V)
        return Prediction.of(chosen, banned=prediction.banned, places=places)

    def after_step(self, state: DecodeState) -> Tensor:
        """The callback to decode with; while one looks on, no row leaves the batch."""
        tokens = edited(self.tokens_hook, len(self.history), self.shown.padded(state.tokens), self.seen)
        self.history.append(tokens.clone())
        return self.shown.to_canvas(tokens)


def edited(hook: Hook, step: int | None, tokens: Tensor, logits: Tensor | None) -> Tensor:
    """What a hook makes of the tokens."""
    return _checked("generation_tokens_hook_func must return the tokens", hook(step, tokens, logits), tokens)


def _checked(what: str, changed: Any, given: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != given.shape:
        raise NapDecodeError(f"{what} {tuple(given.shape)}, not {changed!r:.80}")
    return changed


@dataclass(frozen=True)
class Recounting(Committer):
    """Goes by the masks there are, as in Dream, and not by a plan; under an AnyOrderScheduler without steps.

    Every step is taken, also if it commits nothing or nothing is masked: the hooks may change the canvas at each.
    """

    inner: Committer
    shares: tuple[float, ...]  # of the masks that each step commits
    draws: bool  # whether each mask has that chance

    @staticmethod
    def of(decoder: Decoder) -> Decoder:
        """The same for Dream's schedules; other decoders as they are."""
        scheduler, eps = decoder.scheduler, getattr(decoder.scheduler.schedule, "eps", None)
        if eps is None or scheduler.steps is None or not isinstance(scheduler, AnyOrderScheduler):
            return decoder
        times = torch.linspace(1, eps, scheduler.steps + 1)  # in float32 as there, because rounding decides
        shares = (*(1 - times[1:-1] / times[:-2]).tolist(), 1.0)
        committer = Recounting(decoder.committer, shares, scheduler.needs.random)
        return Decoder(AnyOrderScheduler(), committer, decoder.close_on)

    @property
    @override
    def needs(self) -> Needs:  # committed, so that blocks without a mask may stay open
        return self.inner.needs | Needs(adaptive=True, committed=True, random=self.draws)

    @property
    @override
    def patience(self) -> int:
        return len(self.shares)

    @override
    def __call__(self, slots: Slots, predict: Predict) -> Decision:
        step, last = int(slots.step.max()), len(self.shares) - 1
        if step > last:
            raise NapDecodeError(
                f"generation_tokens_hook_func left masks after step {last}, the last of steps={last + 1}; mask slots "
                "earlier, or ask for more steps"
            )
        share = torch.tensor(self.shares[step])
        counted = slots.open & (slots.uniform(SCHEDULE_STREAM) < share) if self.draws else slots.open
        quota = slots.count(counted) if self.draws else (slots.count(counted).float() * share).long()
        decision = self.inner(replace(slots, quota=quota), predict)
        return replace(decision, unsettled=torch.full_like(quota, step < last, dtype=torch.bool))
