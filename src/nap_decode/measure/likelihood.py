r"""How likely is a completion after a prompt?

A masked-diffusion model has no cheap exact likelihood.  There are two numbers, of a completion x of L tokens:

*The bound.*  The evidence lower bound of log p(x | prompt) is an expectation over masks: k uniform on 1, ..., L, and
exactly k of the L tokens masked, all sets alike::

    ELBO = E  L / k * sum  log p(x_i | prompt, what is not masked)
           k,M      i in M

This is LLaDA's estimate (arXiv 2502.09992, section 2.4 and appendix B.5; ML-GSAI/LLaDA, ``get_log_likelihood.py`` at
b7e6c35).  What differs: the numbers k are drawn in pairs from equal parts of 1, ..., L, instead of one offset for
every batch, so that the standard error can be told; draws belong to the row, whatever its batch; and a mask that is
drawn twice, or all of them if there are no more than draws, takes one forward pass.

*The chain.*  With one token revealed after the other from left to right, the conditionals multiply to a distribution
that is normalised: the law of left-to-right decoding at temperature 1.  It takes L forward passes, and says whether
left-to-right greedy decoding gives x.  Other orders give other numbers; the bound is the average over all of them.

Both are sums over the model's whole vocabulary, the mask included, as in LLaDA; guidance and logits processors of the
:class:`Denoiser` count as they do in decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nap_decode.base.batching import host_tensor
from nap_decode.base.errors import NapDecodeError, check_integer, is_whole
from nap_decode.base.random import SCHEDULE_STREAM, SELECTION_STREAM, uniform, wrap
from nap_decode.base.random import row_seeds as seeds_of_rows
from nap_decode.canvas import Canvas
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.rows import Rows
from nap_decode.prompts import Prompts, encode_prompts

__all__ = ["LogLikelihood", "chain_log_likelihood", "log_likelihood_bound"]

Completions: TypeAlias = "str | Sequence[int] | Sequence[str | Sequence[int] | Tensor]"
"""One completion or a list of them: text, tokenized without special tokens, or token ids."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-likelihoods in nats, of N completions.

    Args:
        value: ``(N,)`` float64.
        standard_error: ``(N,)`` float64, of an estimate; 0 where the value is exact.
        is_greedy: ``(N,)`` bool, whether left-to-right greedy decoding gives the completion; None if that was not
            asked.
        forward_passes: forward passes of all batches.

    Example:
        >>> LogLikelihood(torch.tensor([-1.5]), torch.tensor([0.0]), torch.tensor([True]), 3)
        LogLikelihood(value=[-1.5], standard_error=[0.0], is_greedy=[True], 3 forward passes)
    """

    value: Tensor
    standard_error: Tensor
    is_greedy: Tensor | None
    forward_passes: int

    def __repr__(self) -> str:
        greedy = None if self.is_greedy is None else self.is_greedy.tolist()
        return (
            f"LogLikelihood(value={self.value.tolist()}, standard_error={self.standard_error.tolist()}, "
            f"is_greedy={greedy}, {self.forward_passes} forward passes)"
        )


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
        prompts: one prompt or a list, see :data:`~nap_decode.canvas.Prompts`; may be empty token lists.
        completions: as many completions.
        samples: masks drawn for each completion, an even number.  One of at most ``log2(samples + 1)`` tokens has no
            more masks than that: all are looked at, and its bound is exact.
        batch_size: rows of a forward pass.
        seed: the seed that row seeds derive from, with each row's index.
        row_seeds: a seed for every row instead.  Completions of one length and seed are looked at through the same
            masks, which makes their difference less noisy.

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
    texts = _Texts.of(denoiser, prompts, completions, batch_size)
    if row_seeds is not None and len(row_seeds) != len(texts):
        raise NapDecodeError(f"row_seeds must be one seed for every row, but are {len(row_seeds)} for {len(texts)}")
    seeds = (
        seeds_of_rows(seed, range(len(texts)))
        if row_seeds is None
        else torch.tensor([wrap(one) for one in row_seeds], dtype=torch.int64, device="cpu")
    )
    drawn = [_masks(len(ids), samples, one) for ids, one in zip(texts.completions, seeds, strict=True)]
    scores, _, passes = texts.score([(n, row, row) for n, (rows, _, _) in enumerate(drawn) for row in rows])
    value, error = torch.zeros(2, len(texts), dtype=torch.float64, device="cpu")
    parts = torch.split(scores, [len(rows) for rows, _, _ in drawn])
    for n, (part, (_, weights, places)) in enumerate(zip(parts, drawn, strict=True)):
        weighted = part * weights
        if places is None:
            value[n] = weighted.sum()
            continue
        each = weighted[places]
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

    Args:
        denoiser: the model.
        prompts: see :func:`log_likelihood_bound`.
        completions: see :func:`log_likelihood_bound`.
        batch_size: rows of a forward pass; a completion of L tokens has L.

    Raises:
        NapDecodeError: see :func:`log_likelihood_bound`.

    Example:
        >>> from nap_decode import demo
        >>> denoiser = Denoiser(*demo.load())
        >>> prompt = "6 0 6 4 6 2 1 2 4 7 0 6 = <think 1>"
        >>> found = chain_log_likelihood(denoiser, [prompt, prompt], ["6 0 4 2 0 1 3 7 0 0 6", "6 0 4 1"])
        >>> found.is_greedy.tolist(), found.forward_passes
        ([True, False], 1)
    """
    texts = _Texts.of(denoiser, prompts, completions, batch_size)
    rows = []
    for n, ids in enumerate(texts.completions):
        # Row i: what is masked when i is predicted.
        later = torch.ones(len(ids), len(ids), dtype=torch.bool, device="cpu").triu()
        rows += [(n, hidden, wanted) for hidden, wanted in zip(later, later & later.T, strict=True)]
    scores, best, passes = texts.score(rows)
    lengths = [len(ids) for ids in texts.completions]
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


@dataclass(frozen=True, eq=False)
class _Texts:
    """Prompts and completions as token ids, that can be scored."""

    denoiser: Denoiser
    prompts: list[list[int]]
    completions: list[list[int]]
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, denoiser: Denoiser, prompts: Prompts, completions: Completions, batch_size: int) -> _Texts:
        check_integer("batch_size", batch_size, 1)
        rows, is_single = encode_prompts(prompts, denoiser.tokenizer)
        several: Any = [completions] if is_single else completions
        if isinstance(several, str) or len(several) != len(rows):
            raise NapDecodeError(
                f"there must be a completion for every prompt, but there are {len(rows)} prompts and "
                f"{'one text' if isinstance(several, str) else len(several)}"
            )
        encoded = [_encode(completion, row, denoiser) for row, completion in enumerate(several)]
        texts = cls(denoiser, rows, encoded, batch_size)
        texts._check()
        return texts

    def _check(self) -> None:
        """Raise unless every row can be forwarded."""
        whole = [prompt + ids for prompt, ids in zip(self.prompts, self.completions, strict=True)]
        for row, completion in enumerate(self.completions):
            if not completion:
                raise NapDecodeError(f"completion {row} is empty; there is nothing to score")
            if self.denoiser.mask_token_id in whole[row]:
                raise NapDecodeError(f"there is a mask token in row {row}; a likelihood is that of ordinary tokens")
        lowest, highest, size = min(map(min, whole)), max(map(max, whole)), self.denoiser.num_embeddings
        if lowest < 0 or highest >= (size or highest + 1):
            wrong = lowest if lowest < 0 else highest
            ids = f"from 0 to {size - 1}" if size else "from 0"
            raise NapDecodeError(f"token id {wrong} is out of range: the model has ids {ids}. Wrong tokenizer?")
        longest = max(range(len(self)), key=lambda row: len(whole[row]))
        everything = torch.ones(len(self.completions[longest]), dtype=torch.bool, device="cpu")
        self.denoiser.check(self._canvas([(longest, everything)]))

    def score(self, rows: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
        """What the model says of some tokens when others are masked.

        Args:
            rows: the number of a text, ``(L,)`` bool, which tokens of its completion are masked, and ``(L,)`` bool,
                which of these are asked for.

        Returns:
            ``(R,)`` float64, sums of log-probabilities of those; ``(R,)`` bool, whether all of them are the most
            likely of what may be emitted; and the number of forward passes.
        """
        scores = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        best = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        lengths = [len(self.prompts[n]) + len(self.completions[n]) for n, _, _ in rows]
        # Rows of similar length together, the longest first: what does not fit into memory fails at once.
        order = iter(sorted(range(len(rows)), key=lambda row: -lengths[row]))
        passes = 0
        while batch := list(islice(order, self.batch_size)):
            passes += 1
            scores[batch], best[batch] = self._score([rows[row] for row in batch])
        if bool(scores.isnan().any()):
            raise NapDecodeError(
                "the model's logits were nan in places; try another precision (bfloat16 instead of float16) or "
                "attention implementation, and look at the logits processors"
            )
        return scores, best, passes

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of one forward pass."""
        canvas = self._canvas([(n, hidden) for n, hidden, _ in batch])
        rows = Rows.of(canvas)
        tokens = canvas.tokens
        asked = [asked.nonzero()[:, 0].tolist() for _, _, asked in batch]
        width = max(map(len, asked))
        wanted, target, is_asked = torch.zeros(3, len(batch), width, dtype=torch.int64, device="cpu")
        for i, ((n, _, _), places) in enumerate(zip(batch, asked, strict=True)):
            wanted[i, : len(places)] = torch.tensor(places, device="cpu") + len(self.prompts[n])
            target[i, : len(places)] = torch.tensor([self.completions[n][place] for place in places], device="cpu")
            is_asked[i, : len(places)] = 1
        device = tokens.device
        flat, places = target.flatten().to(device), is_asked.flatten().nonzero()[:, 0].to(device)
        prediction = self.denoiser.predict(rows, tokens, wanted.to(device), places)
        log_prob = torch.zeros(len(flat), dtype=torch.float64, device="cpu")
        is_best = torch.ones(len(flat), dtype=torch.bool, device="cpu")
        for own, chances, modes in self._chunks(prediction.chunks(), places, flat, prediction.banned):
            log_prob[own], is_best[own] = chances, modes
        return log_prob.view_as(target).sum(1), is_best.view_as(target).all(1)

    @staticmethod
    def _chunks(
        chunks: Iterator[tuple[slice, Tensor]], places: Tensor, target: Tensor, banned: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Places on the host, log-probabilities of their targets, and whether these are the most likely."""
        for part, raw in chunks:
            own = places[part]
            # float32 at least: a softmax over a large vocabulary in bfloat16 has two digits.
            logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
            ids = target[own][:, None]
            chances = (logits.gather(1, ids)[:, 0] - logits.logsumexp(1)).double()
            modes = logits.index_fill(1, banned, -torch.inf).argmax(1) == ids[:, 0]
            yield own.cpu(), chances.cpu(), modes.cpu()

    def _canvas(self, rows: Sequence[tuple[int, Tensor]]) -> Canvas:
        """Texts of which some tokens of the completion are masked; the prompt is what guidance masks."""
        mask, pad, device = self.denoiser.mask_token_id, self.denoiser.pad_token_id, self.denoiser.device
        longest = max(len(self.prompts[n]) + len(self.completions[n]) for n, _ in rows)
        tokens = torch.full((len(rows), longest), pad, device="cpu")
        hidden, present, prompt = torch.zeros(3, len(rows), longest, dtype=torch.bool, device="cpu")
        for row, (n, where) in enumerate(rows):
            start, end = len(self.prompts[n]), len(self.prompts[n]) + len(self.completions[n])
            tokens[row, :start] = host_tensor(self.prompts[n], tokens.device)
            tokens[row, start:end] = torch.where(where, mask, host_tensor(self.completions[n], tokens.device))
            hidden[row, start:end], present[row, :end], prompt[row, :start] = where, True, True
        return Canvas(
            tokens=tokens.to(device),
            block=torch.where(hidden, 0, -1).to(device),
            attention_mask=present.long().to(device),
            prompt=prompt.to(device),
            block_names=("completion",),
            held=(False,),
            is_infill=True,
        )


def _encode(completion: Any, row: int, denoiser: Denoiser) -> list[int]:
    if isinstance(completion, str):
        if denoiser.tokenizer is None:
            raise NapDecodeError("a completion that is text needs a tokenizer; pass token ids")
        return list(denoiser.tokenizer(completion, add_special_tokens=False)["input_ids"])
    ids = completion.tolist() if isinstance(completion, Tensor) else completion
    if not isinstance(ids, Sequence) or not all(map(is_whole, ids)):
        raise NapDecodeError(f"completion {row} must be text or token ids, not {completion!r:.80}")
    return [int(token) for token in ids]
