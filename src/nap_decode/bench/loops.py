"""The loops that are measured: bare and full forward passes, the textbook loop, and ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nap_decode.bench.workload import Workload
from nap_decode.canvas import Canvas
from nap_decode.model.call import additive
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.foreign import parameters_of
from nap_decode.run.sampler import Sampler
from nap_decode.speed.kv import cache_argument


@torch.no_grad()
def make_loops(
    denoiser: Denoiser, canvas: Canvas, workload: Workload, compile: str | bool
) -> dict[str, Callable[[], Any]]:
    """The loops by name, each to be called without arguments.

    There is no ``"bare"`` if body and output layer do not make the model: something stands between or behind them.
    Of block-causal models whose blocks are those of the canvas it keeps closed blocks, and so does ``"cached"``.
    """
    model, head = cast(Any, denoiser.model), denoiser.call.head.layer
    tokens, options = canvas.tokens, denoiser.call.options(canvas.rows, canvas.tokens)
    quotas, widths = workload.quotas(), workload.widths()

    def full_pass(tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, V)
        logits: Tensor = model(input_ids=tokens, **options).logits
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if denoiser.family.shift else logits

    def body(tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, H)
        return model.base_model(input_ids=tokens, **options)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def bare() -> None:
        assert head is not None
        for width in widths:
            head(body(tokens)[:, -width:])  # which positions they are makes no difference in cost

    @torch.no_grad()
    def full() -> None:
        for _ in widths:
            full_pass(tokens)

    logits = model(input_ids=tokens, **options).logits
    textbook = partial(
        textbook_loop,
        full_pass,
        tokens,
        canvas.block,
        quotas,
        mask_token_id=denoiser.mask_token_id,
        banned=denoiser.banned(logits.shape[-1], tokens.device),
        temperature=workload.temperature,
    )
    sampler = Sampler(denoiser, decoder=workload.decoder(), compile=compile)
    ours = partial(sampler.decode, canvas, seed=workload.seed, progress=False)
    loops: dict[str, Callable[[], Any]] = {"full": full, "textbook": textbook, "ours": ours}
    if isinstance(head, nn.Linear) and model.base_model is not model:
        hidden = body(tokens)
        rounding = 64 * torch.finfo(logits.dtype).eps * logits.abs().max()
        if hidden.shape[-1] == head.in_features and (head(hidden) - logits).abs().max() <= rounding:
            if _is_by_blocks(denoiser, canvas, workload):
                cached = partial(_cached_loop, model.base_model, head, canvas, workload, denoiser.mask_token_id)
                banned = denoiser.banned(logits.shape[-1], tokens.device)
                return {"bare": partial(cached, None), **loops, "cached": partial(cached, banned)}
            return {"bare": bare} | loops
    return loops


def _is_by_blocks(denoiser: Denoiser, canvas: Canvas, workload: Workload) -> bool:
    """Whether blocks are decoded in turn, each of them one of a block-causal model's."""
    size = denoiser.family.block_size
    return (
        size is not None
        and not canvas.is_padded
        and workload.temperature == 0
        and workload.scheduler == "semi-autoregressive"
        and workload.prompt_length % size == 0
        and workload.new_tokens == workload.blocks * size
    )


@torch.no_grad()
def _cached_loop(
    body: Any, head: nn.Module, canvas: Canvas, workload: Workload, mask_token_id: int, banned: Tensor | None
) -> Tensor:
    """The textbook's loop with a cache: the prompt once, the open block at each step, and once more when it is closed.

    So do SDAR, LLaDA2 and Fast-dLLM v2 generate.  With ``banned`` None it only calls the model, and fills in nothing.
    """
    from transformers import DynamicCache

    tokens, start, size = canvas.tokens.clone(), workload.prompt_length, workload.new_tokens // workload.blocks
    dtype, device = next(body.parameters()).dtype, tokens.device
    cache, name = DynamicCache(), cache_argument(parameters_of(body) or {}) or "past_key_values"
    positions = torch.arange(tokens.shape[1], device=device)

    def forward(first: int, last: int) -> Tensor:  # -> (B, last - first, H)
        seen = (positions[:last] // size)[None] <= (positions[first:last] // size)[:, None]
        mask = additive(seen[None, None], dtype).expand(len(tokens), -1, -1, -1)
        options = {"attention_mask": mask, "position_ids": positions[None, first:last], "use_cache": True, name: cache}
        return body(input_ids=tokens[:, first:last], **options)[0]  # type: ignore[no-any-return]

    forward(0, start)
    quotas = iter(workload.quotas().sum(2)[:, 0].tolist())
    for first in range(start, tokens.shape[1], size):
        left, block = size, tokens[:, first : first + size]
        while left:
            hidden, quota = forward(first, first + size), next(quotas)
            cache.crop(-size)
            if banned is None:
                head(hidden[:, -left:])
            else:
                is_masked = block == mask_token_id
                logits = head(hidden[is_masked].view(len(tokens), left, -1)).index_fill_(2, banned, -torch.inf)
                confidence, proposed = logits.double().softmax(2).max(2)
                places = is_masked.nonzero()[:, 1].view(len(tokens), left)
                best = confidence.topk(quota, dim=1).indices
                block.scatter_(1, places.gather(1, best), proposed.gather(1, best))
            left -= quota
        if first + size < tokens.shape[1]:
            forward(first, first + size)
    return tokens


@torch.no_grad()
def textbook_loop(
    forward: Callable[[Tensor], Tensor],  # (B, L) -> (B, L, V) logits, which may be overwritten
    tokens: Tensor,  # (B, L)
    block: Tensor,  # (B, L) the block of every slot to decode, -1 elsewhere
    quotas: Tensor,  # (S, B, M) tokens that each block commits at each step, on the CPU
    *,
    mask_token_id: int,
    banned: Tensor,  # (N,) ids that are never proposed
    temperature: float = 0.0,
) -> Tensor:  # (B, L)
    """The loop that is published with LLaDA, and copied with most decoders since.

    After ``generate`` of ML-GSAI/LLaDA b7e6c3565f19, ``generate.py``: logits of the whole canvas, proposals from
    float64 noise over all of them, a softmax over all of them, and a top-k for each row, whose k is read from the
    device.  The softmax is in float64, as in LLaDA's own ``app.py`` and in Fast-dLLM (NVlabs/Fast-dLLM
    24cc59e75f20, ``llada/generate.py``); LLaDA's newest ``generate.py`` takes the model's precision.  Two things
    are added so that it decodes what :class:`Sampler` does: some ids are never proposed, and there may be a
    top-k for each of several blocks of a row, where LLaDA has one block at a time.
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


def add_gumbel_noise(logits: Tensor, temperature: float) -> Tensor:
    """What LLaDA draws a token from, by argmax: float64 noise for every logit of the batch (``generate.py``)."""
    if temperature == 0:
        return logits
    logits = logits.to(torch.float64)
    noise = torch.rand_like(logits, dtype=torch.float64)
    gumbel_noise = (-torch.log(noise)) ** temperature
    return logits.exp() / gumbel_noise
