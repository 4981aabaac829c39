"""Dream's hooks, which see the tokens and all logits of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from nap_decode.canvas import Canvas
from nap_decode.committers import Committer, Predict
from nap_decode.denoiser import Denoiser
from nap_decode.errors import NapDecodeError
from nap_decode.sampler import Sampler
from nap_decode.slots import Commit, Slots
from nap_decode.state import Callback

TokensHook: TypeAlias = Callable[["int | None", Tensor, "Tensor | None"], Tensor]
"""``(step, tokens (B, L), logits (B, L, V)) -> tokens (B, L)``; step and logits are None before the first step."""
LogitsHook: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""``(step, tokens (B, L), logits (B, L, V)) -> logits (B, L, V)``, entry p predicting position p."""


def with_hooks(
    sampler: Sampler, tokens_hook: TokensHook | None, logits_hook: LogitsHook | None
) -> tuple[Sampler, Callback | None]:
    """A sampler that calls the hooks, and the callback to decode with."""
    if tokens_hook is None and logits_hook is None:
        return sampler, None
    denoiser = _HookedDenoiser(sampler.denoiser, logits_hook)
    hooked = sampler.replace(denoiser=denoiser, committer=_StepTeller(sampler.committer, denoiser))
    if tokens_hook is None:
        return hooked, None
    return hooked, lambda state: edit_tokens(tokens_hook, state.step - 1, state.tokens, denoiser.seen)


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
        self.hook, self.step = hook, 0
        self.seen: Tensor | None = None

    @override
    def __call__(self, tokens: Tensor, wanted: Tensor, canvas: Canvas, *, hidden: Tensor | None = None) -> Tensor:
        if hidden is not None or len(tokens) != len(canvas.tokens):
            raise NapDecodeError(
                "a sampler that looks at other canvases besides its own cannot show its logits to hooks"
            )
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = super().__call__(tokens, columns, canvas)  # (B, L, V)
        if self.hook is not None:
            changed = self.hook(self.step, tokens.clone(), logits)
            if not isinstance(changed, Tensor) or changed.shape != logits.shape:
                raise NapDecodeError(
                    f"generation_logits_hook_func must return logits {tuple(logits.shape)}, not {changed!r:.80}"
                )
            logits = changed
        self.seen = logits
        return logits.take_along_dim(wanted.clamp(min=0).to(logits.device)[:, :, None], dim=1)


class _StepTeller(Committer):
    """Tells a denoiser with hooks which step it is."""

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
        self.denoiser.step = slots.step
        return self.committer(slots, predict)
