"""Slow, obvious decoders to compare with: one row at a time, plain Python, no shared code."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch


def softmax(values):
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def score(name, logits, token, position):
    """Confidence of a proposed token, from the logits of its position."""
    p = softmax(logits)
    if name == "probability":
        return p[token]
    if name == "margin":
        rest = p[:token] + p[token + 1 :]
        return p[token] - max(rest)
    if name == "negative_entropy":
        return sum(q * math.log(q) for q in p)
    assert name == "leftmost"
    return -position


def decode_row(model, tokens, block, quotas, *, confidence, banned, shift=False):
    """Greedy decoding of one unpadded row.

    Args:
        model: ``(input_ids, attention_mask) -> logits``.
        tokens: ids of the row, masks included.
        block: block of every slot, -1 for clamped ones.
        quotas: for every step the number of tokens of every block.
        confidence: name of the confidence.
        banned: ids that are not emitted.
        shift: whether the logits at p - 1 predict p.

    Returns:
        Tokens, and for every position the step that committed it (-1: none).
    """
    tokens, open_slots = list(tokens), {p for p, b in enumerate(block) if b >= 0}
    steps = [-1] * len(tokens)
    for step, quota in enumerate(quotas):
        ids = torch.tensor([tokens])
        logits = model(ids, torch.ones_like(ids))[0].tolist()
        proposals = []
        for position in open_slots:
            row = logits[max(position - 1, 0) if shift else position]
            allowed = [i for i in range(len(row)) if i not in banned]
            token = max(allowed, key=lambda i: row[i])
            proposals.append((-score(confidence, row, token, position), position, token))
        for b, count in enumerate(quota):
            best = sorted(p for p in proposals if block[p[1]] == b)[:count]
            assert len(best) == count
            for _, position, token in best:
                tokens[position], steps[position] = token, step
                open_slots.remove(position)
    assert not open_slots
    return tokens, steps


def law(model, length, mask, quotas, *, random_positions=False, temperature=1.0):
    """Exact distribution of the decoded row, by enumeration of every draw.

    One block of ``length`` slots, no prompt.  At each step a token is drawn independently at every
    masked slot; the ``quotas[step]`` slots with the most probable tokens are committed (or, with
    ``random_positions``, any with equal chance).
    """
    outcomes: Counter = Counter()

    def advance(row, step, chance):
        masked = [p for p in range(length) if row[p] == mask]
        if not masked:
            outcomes[row] += chance
            return
        ids = torch.tensor([row])
        logits = model(ids, torch.ones_like(ids))[0].tolist()
        full = {p: softmax(logits[p]) for p in masked}
        allowed = [i for i in range(len(logits[0])) if i != mask]
        drawn_from = {p: softmax([logits[p][i] / temperature for i in allowed]) for p in masked}
        for draw in itertools.product(range(len(allowed)), repeat=len(masked)):
            weight = math.prod(drawn_from[p][d] for p, d in zip(masked, draw, strict=True))
            tokens = {p: allowed[d] for p, d in zip(masked, draw, strict=True)}
            if random_positions:
                choices = list(itertools.combinations(masked, quotas[step]))
            else:
                choices = [sorted(masked, key=lambda p: (-full[p][tokens[p]], p))[: quotas[step]]]
            for choice in choices:
                after = tuple(tokens[p] if p in choice else t for p, t in enumerate(row))
                advance(after, step + 1, chance * weight / len(choices))

    advance((mask,) * length, 0, 1.0)
    return outcomes


def order_measures(positions, k):
    """Global@k and Local@k of an order of commits, from the definitions."""
    masked, hits = set(positions), 0
    for position in positions:
        hits += position in sorted(masked)[:k]
        masked.remove(position)
    runs = 0
    for c in range(k, len(positions)):
        window = positions[c - k : c + 1]
        runs += all(b == a + 1 for a, b in itertools.pairwise(window))
    return hits / len(positions), runs / (len(positions) - k) if len(positions) > k else math.nan


def kendall_tau_b(x, y):
    """Tau-b from its definition."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    sign = [((x[i] > x[j]) - (x[i] < x[j])) * ((y[i] > y[j]) - (y[i] < y[j])) for i, j in pairs]
    untied_x = sum(x[i] != x[j] for i, j in pairs)
    untied_y = sum(y[i] != y[j] for i, j in pairs)
    return sum(sign) / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan
