r"""How likely is a completion after a prompt?

A masked-diffusion model has no cheap exact likelihood.  There are two numbers, of a completion x of L tokens:

*The bound.*  The evidence lower bound of log p(x | prompt) is an expectation over masks: k uniform on 1, ..., L, and
exactly k of the L tokens masked, all sets alike::

    ELBO = E  L / k * sum  log p(x_i | prompt, what is not masked)
           k,M      i in M

This is LLaDA's estimate (arXiv 2502.09992, section 2.4 and appendix B.5; ML-GSAI/LLaDA, ``get_log_likelihood.py`` at
b7e6c35), but the numbers k are drawn in pairs from equal parts of 1, ..., L, so that the standard error can be told,
draws belong to the row, whatever its batch, and of equal masks one is forwarded.

*The chain.*  With one token revealed after the other from left to right, the conditionals multiply to a distribution
that is normalised: the law of left-to-right decoding at temperature 1.  It takes L forward passes, and says whether
left-to-right greedy decoding gives x.  Other orders give other numbers; the bound is the average over all of them.

Both are sums over the model's whole vocabulary, the mask included, as in LLaDA; guidance and logits processors of the
:class:`Denoiser` count as they do in decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from nap_decode.base.errors import NapDecodeError, check_ids, check_integer, check_seed
from nap_decode.base.random import SCHEDULE_STREAM, SELECTION_STREAM, uniform
from nap_decode.base.random import row_seeds as seeds_of_rows
from nap_decode.canvas import Canvas
from nap_decode.model.denoiser import Denoiser
from nap_decode.prompts import Prompts, encode_prompts

Completions: TypeAlias = "str | Sequence[int] | Sequence[str | Sequence[int] | Tensor]"
"""One completion or a list of them: text, tokenized without special tokens, or token ids."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-likelihoods in nats, of N completions.

    Args:
        value: ``(N,)`` float64.
        standard_error: ``(N,)`` float64, of an estimate; 0 where the value is exact.
        is_greedy: ``(N,)`` bool, whether left-to-right greedy decoding gives the completion; None of the bound.
        forward_passes: forward passes of all batches.

    Example:
        >>> LogLikelihood(torch.tensor([-1.5]), torch.tensor([0.0]), torch.tensor([True]), 3).value.exp()
        tensor([0.2231])
    """

    value: Tensor
    standard_error: Tensor
    is_greedy: Tensor | None
    forward_passes: int


def log_likelihood_bound(
    denoiser: Denoiser,
    prompts: Prompts,
    completions: Completions,
    *,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
) -> LogLikelihood:
    """An unbiased estimate of the evidence lower bound; see this module.

    Args:
        denoiser: the model.
        prompts: one prompt or a list; may be empty token lists.
        completions: as many completions.
        samples: masks drawn for each completion, an even number; if there are no more, the bound is exact.
        batch_size: rows of a forward pass.
        seed: the seed that row seeds derive from, with each row's index.
        row_seeds: a seed for every row instead.  With one seed, completions of one length get the same masks, which
            makes their difference less noisy.

    Raises:
        NapDecodeError: numbers of prompts and completions that differ, an empty completion, a mask token in the text,
            ids or lengths that the model does not have, or options out of range.

    Example:
        >>> from nap_decode import demo
        >>> denoiser = Denoiser(*demo.load())
        >>> prompt = "6 0 6 4 6 2 1 2 4 7 0 6 = <think 1>"
        >>> right, wrong = "6 0 4 2 0 1 3 7 0 0 6", "6 0 4 2 0 5 3 7 0 0 6"
        >>> found = log_likelihood_bound(denoiser, [prompt, prompt], [right, wrong], row_seeds=[0, 0])
        >>> bool(found.value[0] > found.value[1] + 3 * found.standard_error.norm())
        True
    """
    check_samples(samples)
    texts = _encode(denoiser, prompts, completions, batch_size)
    if row_seeds is not None and len(row_seeds) != len(texts):
        raise NapDecodeError(f"row_seeds must be one seed for every row, but are {len(row_seeds)} for {len(texts)}")
    seeds = (
        seeds_of_rows(seed, range(len(texts)))
        if row_seeds is None
        else torch.tensor([check_seed(one) for one in row_seeds], dtype=torch.int64, device="cpu")
    )
    drawn = [_masks(text.length, samples, one) for text, one in zip(texts, seeds, strict=True)]
    rows = [_Row(text, mask, mask) for text, (masks, _, _) in zip(texts, drawn, strict=True) for mask in masks]
    scores, _, passes = _score(denoiser, rows, batch_size)
    value, error = torch.zeros(2, len(texts), dtype=torch.float64, device="cpu")
    parts = torch.split(scores, [len(masks) for masks, _, _ in drawn])
    for n, (part, (_, weights, places)) in enumerate(zip(parts, drawn, strict=True)):
        if places is None:
            value[n] = (part * weights).sum()
        else:
            each = (part * weights)[places]
            value[n] = each.mean()
            error[n] = (each[::2] - each[1::2]).norm() / samples  # of two draws from every part
    return LogLikelihood(value, error, None, passes)


def check_samples(samples: int) -> None:
    """Raise unless so many masks can be drawn."""
    check_integer("samples", samples, 2)
    if samples % 2:
        raise NapDecodeError(f"samples must be even, as they are drawn in pairs, but is {samples}")


def chain_log_likelihood(
    denoiser: Denoiser, prompts: Prompts, completions: Completions, *, batch_size: int = 16
) -> LogLikelihood:
    """The product of the conditionals from left to right, and whether every token is the most likely; see this module.

    Ids that are never emitted (the mask, and what the tokenizer does not have) are not considered as the most likely.
    Arguments and errors are those of :func:`log_likelihood_bound`; a completion of L tokens takes L rows.

    Example:
        >>> from nap_decode import demo
        >>> prompt = "6 0 6 4 6 2 1 2 4 7 0 6 = <think 1>"
        >>> completions = ["6 0 4 2 0 1 3 7 0 0 6", "6 0 4 1"]
        >>> found = chain_log_likelihood(Denoiser(*demo.load()), [prompt, prompt], completions)
        >>> found.is_greedy.tolist(), found.forward_passes
        ([True, False], 1)
    """
    texts = _encode(denoiser, prompts, completions, batch_size)
    rows = []
    for text in texts:
        later = torch.ones(text.length, text.length, dtype=torch.bool, device="cpu").triu()
        # From the i-th token on, all are masked when it is predicted.
        rows += [_Row(text, *two) for two in zip(later, later & later.T, strict=True)]
    scores, best, passes = _score(denoiser, rows, batch_size)
    lengths = [text.length for text in texts]
    value = torch.stack([part.sum() for part in torch.split(scores, lengths)])
    is_greedy = torch.stack([part.all() for part in torch.split(best, lengths)])
    return LogLikelihood(value, torch.zeros_like(value), is_greedy, passes)


def _masks(length: int, samples: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Masks ``(R, L)`` bool, no two of them alike, their weights ``(R,)``, and which each sample has ``(samples,)``.

    The last is None if they are all there are; the weights then sum the scores up to their expectation.
    """
    if length < 62 and 2**length - 1 <= samples:
        numbers = torch.arange(1, 2**length, device="cpu")[:, None]
        rows = numbers >> torch.arange(length, device="cpu") & 1 == 1
        counts = [int(count) for count in rows.sum(1)]
        weights = [1 / (count * math.comb(length, count)) for count in counts]
        return rows, torch.tensor(weights, dtype=torch.float64, device="cpu"), None
    sample, place = torch.arange(samples, device="cpu"), torch.arange(length, device="cpu").expand(samples, -1)
    seeds = seed.expand(samples)
    one = uniform(seeds, sample, SCHEDULE_STREAM, torch.zeros_like(sample)[:, None])[:, 0].double()
    count = ((sample // 2 + one) * 2 * length / samples).long().clamp(max=length - 1) + 1  # two in each of equal parts
    order = uniform(seeds, sample, SELECTION_STREAM, place).argsort(dim=1)
    rank = torch.empty_like(order).scatter_(1, order, place)
    rows, places = torch.unique(rank < count[:, None], dim=0, return_inverse=True)
    return rows, length / rows.sum(1).double(), places


class _Text(NamedTuple):
    tokens: Tensor  # (P + L,) int64, prompt and completion
    start: int  # P

    @property
    def length(self) -> int:
        return len(self.tokens) - self.start


class _Row(NamedTuple):
    text: _Text
    masked: Tensor  # (L,) bool, tokens of the completion that are masked
    asked: Tensor  # (L,) bool, those that are asked for


def _encode(denoiser: Denoiser, prompts: Prompts, completions: Completions, batch_size: int) -> list[_Text]:
    check_integer("batch_size", batch_size, 1)
    rows, is_single = encode_prompts(prompts, denoiser.tokenizer)
    several: Any = [completions] if is_single else completions
    if isinstance(several, str) or len(several) != len(rows):
        raise NapDecodeError(
            f"there must be a completion for every prompt, but there are {len(rows)} prompts and "
            f"{'one text' if isinstance(several, str) else len(several)}"
        )
    size, texts = denoiser.call.num_embeddings, []
    for row, (prompt, completion) in enumerate(zip(rows, several, strict=True)):
        if not isinstance(completion, str):
            ids = check_ids(f"completion {row}", completion)
        elif denoiser.tokenizer is None:
            raise NapDecodeError("a completion that is text needs a tokenizer; pass token ids")
        else:
            ids = list(denoiser.tokenizer(completion, add_special_tokens=False)["input_ids"])
        if not ids:
            raise NapDecodeError(f"completion {row} is empty; there is nothing to score")
        whole = [*prompt, *ids]
        if denoiser.mask_token_id in whole:
            raise NapDecodeError(f"there is a mask token in row {row}; a likelihood is that of ordinary tokens")
        wrong = [token for token in whole if not 0 <= token < (size or token + 1)]
        if wrong:
            known = f"from 0 to {size - 1}" if size else "from 0"
            raise NapDecodeError(f"token id {wrong[0]} is out of range: the model has ids {known}. Wrong tokenizer?")
        texts.append(_Text(torch.tensor(whole, dtype=torch.int64, device="cpu"), len(prompt)))
    longest = max(texts, key=lambda text: len(text.tokens))
    every = torch.ones(longest.length, dtype=torch.bool, device="cpu")
    denoiser.check(_canvas(denoiser, [_Row(longest, every, every)]))
    return texts


def _score(denoiser: Denoiser, rows: Sequence[_Row], batch_size: int) -> tuple[Tensor, Tensor, int]:
    """What the model says of some tokens when others are masked.

    Returns:
        ``(R,)`` float64, sums of the log-probabilities of what is asked for; ``(R,)`` bool, whether all of it is the
        most likely of what may be emitted; and the number of forward passes.
    """
    scores = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    best = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    # Rows of similar length together, the longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].text.tokens))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in batches:
        scores[batch], best[batch] = _score_batch(denoiser, [rows[row] for row in batch])
    if bool(scores.isnan().any()):
        raise NapDecodeError(
            "the model's logits were nan in places; try another precision (bfloat16 instead of float16) or "
            "attention implementation, and look at the logits processors"
        )
    return scores, best, len(batches)


@torch.no_grad()
def _score_batch(denoiser: Denoiser, batch: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    canvas, asked = _canvas(denoiser, batch), _padded([pad(row.asked, (row.text.start, 0)) for row in batch])
    wanted = asked.long().argsort(dim=1, descending=True, stable=True)[:, : int(asked.sum(1).max())]
    target, is_asked = _padded([row.text.tokens for row in batch]).gather(1, wanted), asked.gather(1, wanted)
    device = canvas.tokens.device
    flat, places = target.flatten().to(device), is_asked.flatten().nonzero()[:, 0].to(device)
    prediction = denoiser.predict(canvas.rows, canvas.tokens, wanted.to(device), places)
    log_prob = torch.zeros(target.shape, dtype=torch.float64, device="cpu")
    is_best = torch.ones(target.shape, dtype=torch.bool, device="cpu")
    for part, raw in prediction.chunks():
        own = places[part]
        # float32 at least: a softmax over a large vocabulary in bfloat16 has two digits.
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        ids = flat[own][:, None]
        log_prob.view(-1)[own.cpu()] = (logits.gather(1, ids)[:, 0] - logits.logsumexp(1)).double().cpu()
        modes = logits.index_fill(1, prediction.banned, -torch.inf).argmax(1)
        is_best.view(-1)[own.cpu()] = (modes == ids[:, 0]).cpu()
        del raw, logits  # before the next part is made
    return log_prob.sum(1), is_best.all(1)


def _canvas(denoiser: Denoiser, rows: Sequence[_Row]) -> Canvas:
    """Rows of which some tokens of the completion are masked; the prompt is what guidance masks."""
    texts, device = [row.text for row in rows], denoiser.device
    tokens = _padded([text.tokens for text in texts], denoiser.pad_token_id)
    masked = _padded([pad(row.masked, (row.text.start, 0)) for row in rows])
    starts = torch.tensor([text.start for text in texts], device="cpu")[:, None]
    return Canvas(
        tokens=tokens.masked_fill(masked, denoiser.mask_token_id).to(device),
        block=(masked.long() - 1).to(device),
        attention_mask=_padded([torch.ones_like(text.tokens) for text in texts]).to(device),
        prompt=(torch.arange(tokens.shape[1], device="cpu") < starts).to(device),
        block_names=("completion",),
        held=(False,),
        is_infill=True,
    )


def _padded(rows: Sequence[Tensor], fill: int = 0) -> Tensor:
    """``(R, W)`` of rows of any length, filled up behind."""
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)
