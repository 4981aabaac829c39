from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import MASK, TableModel, Words

from nap_decode import (
    Denoiser,
    ModelFamily,
    NapDecodeError,
    Sampler,
    chain_log_likelihood,
    decoders,
    log_likelihood_bound,
)

V, P, L = 4, 1, 5
PROMPT, COMPLETION = [2], [3, 0, 2, 2, 3]


@pytest.fixture
def table():
    return TableModel(V, P + L, seed=3, scale=2.0)


@pytest.fixture
def denoiser(table):
    return Denoiser(table, mask_token_id=MASK)


def log_prob(table, masked, place, shift=False, prompt=PROMPT, completion=COMPLETION):
    """log p(completion[place] | the rest, where the places in ``masked`` are hidden), one row at a time."""
    row = torch.tensor(prompt + [MASK if i in masked else token for i, token in enumerate(completion)])
    logits = table(row[None], torch.ones(1, len(row)))[0]
    return float(logits[len(prompt) + place - shift].log_softmax(0)[completion[place]])


def enumerated_bound(table, shift=False, completion=COMPLETION):
    length = len(completion)
    total = 0.0
    for count in range(1, length + 1):
        masks = list(itertools.combinations(range(length), count))
        scores = [sum(log_prob(table, mask, i, shift, completion=completion) for i in mask) for mask in masks]
        total += length / count * sum(scores) / len(masks) / length
    return total


@pytest.mark.parametrize("shift", [False, True])
def test_the_bound_of_a_short_completion_is_the_enumerated_one(table, shift):
    denoiser = Denoiser(table, mask_token_id=MASK, family=ModelFamily(name="table", shift=shift))
    found = log_likelihood_bound(denoiser, [PROMPT], [COMPLETION], samples=2**L)
    assert found.value.item() == pytest.approx(enumerated_bound(table, shift), rel=1e-12)
    assert found.standard_error.tolist() == [0]
    assert found.forward_passes == math.ceil((2**L - 1) / 16)


@pytest.mark.parametrize("samples", [2, 8, 30])
def test_the_estimate_agrees_within_its_standard_error(table, denoiser, samples):
    exact, repeats = enumerated_bound(table), 400
    found = log_likelihood_bound(
        denoiser, [PROMPT] * repeats, [COMPLETION] * repeats, samples=samples, batch_size=4096, seed=11
    )
    error = found.value - exact
    # Unbiased: the mean of all is within 4 of its own standard errors, a false alarm in 16,000.
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(repeats)
    # And the stated errors are of the right size: their squares estimate the variance without bias.
    assert found.standard_error.square().mean() == pytest.approx(float(error.square().mean()), rel=0.25)
    assert (found.standard_error > 0).float().mean() > 0.9


def test_numbers_of_masks_are_spread_evenly():
    counts: list[int] = []

    def counting(input_ids, attention_mask):
        counts.extend((input_ids == MASK).sum(1).tolist())
        return torch.zeros(*input_ids.shape, V)

    log_likelihood_bound(Denoiser(counting, mask_token_id=MASK), [PROMPT], [[2] * 12], samples=24)
    # Two of every number; of equal masks, one.
    assert all(1 <= counts.count(number) <= 2 for number in range(1, 13))
    assert len(counts) >= 20


def test_more_samples_are_more_precise(denoiser):
    errors = [
        log_likelihood_bound(
            denoiser, [PROMPT] * 50, [COMPLETION] * 50, samples=n, batch_size=4096
        ).standard_error.mean()
        for n in (4, 16)
    ]
    assert errors[1] < 0.65 * errors[0]


@pytest.mark.parametrize("shift", [False, True])
def test_the_chain_is_the_product_of_its_conditionals(table, shift):
    denoiser = Denoiser(table, mask_token_id=MASK, family=ModelFamily(name="table", shift=shift))
    found = chain_log_likelihood(denoiser, [PROMPT], [COMPLETION])
    wanted = sum(log_prob(table, range(i, L), i, shift) for i in range(L))
    assert found.value.item() == pytest.approx(wanted, rel=1e-12)
    assert found.forward_passes == 1


def test_the_bound_is_the_mean_over_all_orders(table):
    """The chain of any order is a distribution, and the bound their mean: what a masked-diffusion model is."""
    found = log_likelihood_bound(Denoiser(table, mask_token_id=MASK), [PROMPT], [COMPLETION], samples=128).value.item()
    chains = [
        sum(log_prob(table, order[step:], place) for step, place in enumerate(order))
        for order in itertools.permutations(range(L))
    ]
    assert found == pytest.approx(sum(chains) / len(chains), rel=1e-12)


def test_greedy_is_what_left_to_right_decoding_gives(tiny):
    denoiser = Denoiser(tiny, Words())
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    sampler = Sampler(denoiser, decoder=decoders.make("left_to_right"))
    decoded = [sampler(prompt, max_new_tokens=6).sequences[0, -6:].tolist() for prompt in prompts]
    assert chain_log_likelihood(denoiser, prompts, decoded).is_greedy.tolist() == [True] * 3
    changed = [[*row[:-1], (row[-1] + 1 - 4) % 16 + 4] for row in decoded]
    assert chain_log_likelihood(denoiser, prompts, changed).is_greedy.tolist() == [False] * 3


def test_guidance_masks_the_prompt_alone(table):
    scale = 1.5
    found = chain_log_likelihood(Denoiser(table, mask_token_id=MASK, cfg_scale=scale), [PROMPT], [COMPLETION])
    total = 0.0
    for i in range(L):
        row = torch.tensor([PROMPT + COMPLETION[:i] + [MASK] * (L - i)] * 2)
        row[1, :P] = MASK
        own, free = table(row, torch.ones(2, P + L))[:, P + i]
        total += float((free + (scale + 1) * (own - free)).log_softmax(0)[COMPLETION[i]])
    assert found.value.item() == pytest.approx(total, rel=1e-12)


def test_rows_do_not_depend_on_their_batch(tiny):
    denoiser = Denoiser(tiny, Words())
    prompts = [[5, 6, 7], [], [9, 10, 11, 12], [5]]
    completions = [[4, 5, 6, 7, 8, 9, 10], [11], [4, 4, 5, 5, 6, 6], [5, 6]]
    seeds = [3, 1, 4, 1]
    for function, options in ((log_likelihood_bound, {"samples": 12}), (chain_log_likelihood, {})):
        seeded = {"row_seeds": seeds} if function is log_likelihood_bound else {}
        whole = function(denoiser, prompts, completions, batch_size=100, **options, **seeded)
        for batch_size in (1, 3):
            other = function(denoiser, prompts, completions, batch_size=batch_size, **options, **seeded)
            torch.testing.assert_close(other.value, whole.value, rtol=1e-10, atol=1e-10)
        for row in (2, 0):
            seeded = {"row_seeds": [seeds[row]]} if seeded else {}
            alone = function(denoiser, [prompts[row]], [completions[row]], **options, **seeded)
            torch.testing.assert_close(alone.value[0], whole.value[row], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(alone.standard_error[0], whole.standard_error[row], rtol=1e-8, atol=1e-10)


def test_seeds(denoiser):
    def value(**options):
        return log_likelihood_bound(denoiser, [PROMPT] * 2, [COMPLETION] * 2, samples=4, **options).value.tolist()

    assert value(seed=1) == value(seed=1)
    assert value(seed=1) != value(seed=2)
    assert len(set(value(seed=1))) == 2
    assert len(set(value(row_seeds=[5, 5]))) == 1


def test_text_and_single_rows(tiny):
    denoiser = Denoiser(tiny, Words())
    text = chain_log_likelihood(denoiser, "5 6", "7 8")
    ids = chain_log_likelihood(denoiser, [[3, 5, 6]], [torch.tensor([7, 8])])
    assert text.value.tolist() == ids.value.tolist()


def test_equal_masks_take_one_pass(denoiser, table):
    rows = []

    def counting(input_ids, attention_mask):
        rows.extend(map(tuple, input_ids.tolist()))
        return table(input_ids, attention_mask)

    log_likelihood_bound(Denoiser(counting, mask_token_id=MASK), [PROMPT], [COMPLETION], samples=30)
    assert len(rows) == len(set(rows)) < 30


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        ([[2]], [[]], {}, "completion 0 is empty"),
        ([[2]], [[3, MASK]], {}, "mask token in row 0"),
        ([[MASK]], [[3]], {}, "mask token in row 0"),
        ([[2], [2]], [[3]], {}, "2 prompts and 1"),
        ([[2], [2]], "3", {}, "2 prompts and one text"),
        ([[2]], [[3.5]], {}, "a token id of completion 0 must be a whole number"),
        ([[2]], [[99]], {}, "token id 99 is out of range"),
        ([[2, 3, 2], [99]], [[3, 2], [2]], {}, "token id 99 is out of range"),
        ([[2]], [[-3]], {}, "a token id of completion 0 must be a whole number of at least 0, but is -3"),
        ([[2, 3, 2], [-3]], [[3, 2], [2]], {}, "token id -3 is out of range"),
        ([[2]], [5], {}, "completion 0 must be a list of token ids"),
        ([[2]], [[3]], {"batch_size": 0}, "batch_size must be"),
        ([[2]], [[3]], {"samples": 3}, "samples must be even"),
        ([[2]], [[3]], {"samples": 0}, "samples must be"),
        ([[2]], [[3]], {"row_seeds": [1, 2]}, "one seed for every row"),
    ],
)
def test_bad_input_is_refused(tiny, prompts, completions, options, message):
    with pytest.raises(NapDecodeError, match=message):
        log_likelihood_bound(Denoiser(tiny, Words()), prompts, completions, **options)


def test_nan_is_refused():
    def broken(input_ids, attention_mask):
        return torch.full((*input_ids.shape, 4), torch.nan)

    with pytest.raises(NapDecodeError, match="logits were nan"):
        chain_log_likelihood(Denoiser(broken, mask_token_id=MASK), [[2]], [[3]])
