"""The loops that are measured: bare and full forward passes, the textbook loop, and ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError
from nap_decode.bench.workload import Workload
from nap_decode.canvas import Canvas
from nap_decode.model.call import additive
from nap_decode.model.denoiser import Denoiser
from nap_decode.run.sampler import Sampler


class Parts:
    """A model called directly, whole and in two: body and output layer.

    Args:
        denoiser: the model, and what is known of its family.
        canvas: what it will be called with.

    Raises:
        NapDecodeError: the model needs an attention mask that is not made here.
    """

    def __init__(self, denoiser: Denoiser, canvas: Canvas) -> None:
        self.model = cast(Any, denoiser.model)
        family, tokens = denoiser.family, canvas.tokens
        if family.block_size is not None or (canvas.is_padded and family.attention != "2d"):
            raise NapDecodeError(
                f"{family.name} models need an attention mask ({family.attention!r}) that the benchmark does not make; "
                "it knows 2-D ones, and none for prompts of one length"
            )
        self.shift = family.shift
        self.options: dict[str, Any] = {"attention_mask": canvas.attention_mask} if canvas.is_padded else {}
        if denoiser.call.must_be_told:
            seen = canvas.attention_mask.bool()[:, None, None].expand(-1, -1, tokens.shape[1], -1)
            self.options["attention_mask"] = additive(seen, self.model.dtype)
        if "use_cache" in denoiser.call.arguments:
            self.options["use_cache"] = False
        self.head = denoiser.call.head.layer
        self.is_split = False
        """Whether body and output layer make the model: not so if something stands between or behind them."""
        with torch.no_grad():
            logits = self.model(input_ids=tokens, **self.options).logits
            self.vocab_size: int = logits.shape[-1]
            if isinstance(self.head, nn.Linear) and self.model.base_model is not self.model:
                hidden = self._body(tokens)
                rounding = 64 * torch.finfo(logits.dtype).eps * logits.abs().max()
                fits = hidden.shape[-1] == self.head.in_features
                self.is_split = fits and bool((self.head(hidden) - logits).abs().max() <= rounding)

    def full(self, tokens: Tensor) -> Tensor:
        """``(B, L) -> (B, L, V)``."""
        logits: Tensor = self.model(input_ids=tokens, **self.options).logits
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shift else logits

    def bare(self, tokens: Tensor, width: int) -> Tensor:
        """``(B, L) -> (B, width, V)``, of the last ``width`` positions: which they are makes no difference in cost."""
        assert self.head is not None
        return self.head(self._body(tokens)[:, -width:])  # type: ignore[no-any-return]

    def _body(self, tokens: Tensor) -> Tensor:
        return self.model.base_model(input_ids=tokens, **self.options)[0]  # type: ignore[no-any-return]


def add_gumbel_noise(logits: Tensor, temperature: float) -> Tensor:
    """What LLaDA draws a token from, by argmax: float64 noise for every logit of the batch (``generate.py``)."""
    if temperature == 0:
        return logits
    logits = logits.to(torch.float64)
    noise = torch.rand_like(logits, dtype=torch.float64)
    gumbel_noise = (-torch.log(noise)) ** temperature
    return logits.exp() / gumbel_noise


@torch.no_grad()
def textbook_loop(
    forward: Callable[[Tensor], Tensor],
    tokens: Tensor,
    block: Tensor,
    quotas: Tensor,
    *,
    mask_token_id: int,
    banned: Tensor,
    temperature: float = 0.0,
) -> Tensor:
    """The loop that is published with LLaDA, and copied with most decoders since.

    After ``generate`` of ML-GSAI/LLaDA b7e6c3565f19, ``generate.py``: logits of the whole canvas, proposals from
    float64 noise over all of them, a softmax over all of them, and a top-k for each row, whose k is read from the
    device.  The softmax is in float64, as in LLaDA's own ``app.py`` and in Fast-dLLM (NVlabs/Fast-dLLM
    24cc59e75f20, ``llada/generate.py``); LLaDA's newest ``generate.py`` takes the model's precision.  Two things
    are added so that it decodes what :class:`Sampler` does: some ids are never proposed, and there may be a
    top-k for each of several blocks of a row, where LLaDA has one block at a time.

    Args:
        forward: ``(B, L) -> (B, L, V)`` logits, which may be overwritten.
        tokens: ``(B, L)`` int64; not changed.
        block: ``(B, L)`` int64, the block of every slot to decode, -1 elsewhere.
        quotas: ``(S, B, M)`` int64 on the CPU, tokens that each block commits at each step.
        mask_token_id: what slots hold.
        banned: ``(N,)`` int64, ids that are never proposed.
        temperature: see :func:`add_gumbel_noise`.

    Returns:
        ``(B, L)`` int64.

    Example:
        >>> def forward(tokens):  # surer of later positions, where it proposes a larger id
        ...     return torch.diag(torch.arange(5.0)).expand(len(tokens), 5, 5).clone()
        >>> slots, block = torch.full((1, 5), 9), torch.zeros(1, 5, dtype=torch.int64)
        >>> textbook_loop(forward, slots, block, torch.tensor([[[2]]]), mask_token_id=9, banned=slots[0, :0])
        tensor([[9, 9, 9, 3, 4]])
    """
    tokens, num_transfer_tokens = tokens.clone(), quotas.to(tokens.device)
    open_blocks = [(quota > 0).any(0).nonzero()[:, 0].tolist() for quota in quotas]  # LLaDA's loop over blocks
    for step, open_now in enumerate(open_blocks):
        mask_index = tokens == mask_token_id
        logits = forward(tokens)
        model_says = logits[:, :, banned]
        logits.index_fill_(2, banned, -torch.inf)
        x0 = add_gumbel_noise(logits, temperature).argmax(dim=-1)  # (B, L)
        logits.index_copy_(2, banned, model_says)
        p = logits.to(torch.float64).softmax(dim=-1)
        x0_p = p.gather(dim=-1, index=x0.unsqueeze(-1)).squeeze(-1)
        x0 = torch.where(mask_index, x0, tokens)
        confidence = torch.where(mask_index, x0_p, -torch.inf)
        transfer_index = torch.zeros_like(x0, dtype=torch.bool)
        for row in range(len(tokens)):
            for j in open_now:
                inside = torch.where(block[row] == j, confidence[row], -torch.inf)
                _, select_index = torch.topk(inside, k=int(num_transfer_tokens[step, row, j]))
                transfer_index[row, select_index] = True
        tokens[transfer_index] = x0[transfer_index]
    return tokens


def make_loops(
    denoiser: Denoiser, canvas: Canvas, workload: Workload, mode: str | bool | None
) -> dict[str, Callable[[], Any]]:
    """The loops by name, each to be called without arguments; no ``"bare"`` if the model is not body and output layer.

    Args:
        denoiser: the model.
        canvas: what to decode.
        workload: in how many steps, and how.
        mode: ``compile=`` of :class:`Sampler`, unless it is None.
    """
    parts = Parts(denoiser, canvas)
    sampler = Sampler(denoiser, decoder=workload.decoder(), compile=False if mode is None else mode)
    quotas, widths = workload.quotas(), workload.widths()
    banned = denoiser.banned(parts.vocab_size, canvas.tokens.device)

    @torch.no_grad()
    def bare() -> None:
        for width in widths:
            parts.bare(canvas.tokens, width)

    @torch.no_grad()
    def full() -> None:
        for _ in widths:
            parts.full(canvas.tokens)

    textbook = partial(
        textbook_loop, mask_token_id=denoiser.mask_token_id, banned=banned, temperature=workload.temperature
    )
    loops: dict[str, Callable[[], Any]] = {
        "full": full,
        "textbook": partial(textbook, parts.full, canvas.tokens, canvas.block, quotas),
        "ours": partial(sampler.decode, canvas, seed=workload.seed, progress=False),
    }
    return {"bare": bare} | loops if parts.is_split else loops
