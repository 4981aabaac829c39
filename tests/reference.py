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
    rows = {(mask,) * length: 1.0}
    for quota in quotas:
        rows, before = Counter(), rows
        for row, chance in before.items():
            masked = [p for p in range(length) if row[p] == mask]
            ids = torch.tensor([row])
            logits = model(ids, torch.ones_like(ids))[0].tolist()
            full = {p: softmax(logits[p]) for p in masked}
            allowed = [i for i in range(len(logits[0])) if i != mask]
            drawn_from = {p: softmax([logits[p][i] / temperature for i in allowed]) for p in masked}
            for draw in itertools.product(range(len(allowed)), repeat=len(masked)):
                weight = math.prod(drawn_from[p][d] for p, d in zip(masked, draw, strict=True))
                tokens = {p: allowed[d] for p, d in zip(masked, draw, strict=True)}
                if random_positions:
                    choices = list(itertools.combinations(masked, quota))
                else:
                    choices = [sorted(masked, key=lambda p: (-full[p][tokens[p]], p))[:quota]]
                for choice in choices:
                    after = tuple(tokens[p] if p in choice else t for p, t in enumerate(row))
                    rows[after] += chance * weight / len(choices)
    return rows


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


def decode_blocks(logits_of, tokens, blocks, rule, *, banned, mask):
    """Adaptive decoding of one row, block after block.

    Args:
        logits_of: tokens -> a list of logits for every position.
        tokens: ids of the row, masks included.
        blocks: positions of each block.
        rule: (proposals, memory) -> positions to commit; proposals are {position: (token, p, logits)} of the
            masked positions of the block, p the probabilities of all ids.
        banned: ids that are not emitted.
        mask: the mask id.

    Returns:
        Tokens, and the number of forward passes.
    """
    tokens, passes = list(tokens), 0
    for block in blocks:
        memory = {}
        while any(tokens[p] == mask for p in block):
            logits, passes = logits_of(tokens), passes + 1
            proposals = {p: propose(logits[p], banned) for p in block if tokens[p] == mask}
            for position in rule(proposals, memory):
                tokens[position] = memory.get("tokens", {}).get(position, proposals[position][0])
    return tokens, passes


def propose(logits, banned):
    token = max((i for i in range(len(logits)) if i not in banned), key=lambda i: logits[i])
    return token, softmax(logits), logits


def best_of(proposals, positions=None):
    positions = proposals if positions is None else positions
    return min(positions, key=lambda p: (-proposals[p][1][proposals[p][0]], p))


def confidences(proposals):
    return {p: full[token] for p, (token, full, _) in proposals.items()}


def threshold_rule(threshold):
    def rule(proposals, memory):
        c = confidences(proposals)
        return {p for p in c if c[p] >= threshold} or {best_of(proposals)}

    return rule


def factor_rule(factor):
    def rule(proposals, memory):
        c = confidences(proposals)
        ranked = sorted(c, key=lambda p: (-c[p], p))
        numbers = [n for n in range(1, len(ranked) + 1) if c[ranked[n - 1]] >= 1 - factor / (n + 1)]
        return set(ranked[: max(numbers, default=1)])

    return rule


def entropy_rule(gamma):
    def rule(proposals, memory):
        entropy = {p: -sum(q * math.log(q) for q in full) for p, (_, full, _) in proposals.items()}
        ranked = sorted(entropy, key=lambda p: (entropy[p], p))
        fits = 1
        for k in range(1, len(ranked) + 1):
            prefix = [entropy[p] for p in ranked[:k]]
            if sum(prefix) - max(prefix) <= gamma:
                fits = k
        return set(ranked[:fits])

    return rule


def stable_rule(threshold, max_divergence, history):
    def rule(proposals, memory):
        c, before, stable = confidences(proposals), memory.get("p", {}), memory.setdefault("stable", Counter())
        for p, (_, full, _) in proposals.items():
            divergence = sum(q * math.log(q / r) for q, r in zip(full, before[p], strict=True)) if p in before else 1e9
            stable[p] = stable[p] + 1 if divergence < max_divergence else 0
        memory["p"] = {p: full for p, (_, full, _) in proposals.items()}
        return {p for p in c if c[p] > threshold and stable[p] >= history} or {best_of(proposals)}

    return rule


def hierarchy_rule(threshold, low_threshold):
    def rule(proposals, memory):
        c, runs = confidences(proposals), []
        for p in sorted(c):
            if runs and runs[-1][-1] == p - 1:
                runs[-1].append(p)
            else:
                runs.append([p])
        chosen = {best_of(proposals, run) for run in runs}
        return {p for p in c if c[p] > threshold or (p in chosen and c[p] > low_threshold)} or {best_of(proposals)}

    return rule


def leap_rule(threshold, low_threshold, radius):
    def rule(proposals, memory):
        c = confidences(proposals)
        anchors = [p for p in c if c[p] >= threshold]
        near = {p for p in c if c[p] >= low_threshold and any(abs(p - a) <= radius for a in anchors)}
        return near | set(anchors) or {best_of(proposals)}

    return rule


def credit_rule(threshold, strength, decay, boost, banned):
    def rule(proposals, memory):
        credit, fused = memory.setdefault("credit", {}), {}
        for p, (_, full, logits) in proposals.items():
            own = credit.setdefault(p, [0.0] * len(full))
            own[:] = [decay * value for value in own]
            top = max(range(len(full)), key=lambda i: full[i])
            own[top] += full[top] ** boost
            fused[p] = propose([x + strength * math.log(k + 1) for x, k in zip(logits, own, strict=True)], banned)
        memory["tokens"] = {p: token for p, (token, _, _) in fused.items()}
        return threshold_rule(threshold)(fused, {})

    return rule
