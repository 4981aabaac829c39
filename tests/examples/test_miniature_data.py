import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.miniature.data import (
    CLOCK,
    LAYOUTS,
    NIM_SUM,
    TASKS,
    make_batch,
    make_slips,
    structured_noise,
    uniform_noise,
)
from nap_decode import Canvas, demo

DIGITS = (6, 0, 6, 4, 6, 2, 1, 2, 4, 7, 0, 6)
PATHS = ["6 0 4 2 0 1 3 7 0 0 6", "4 5 7 3 4 4 2 4 4 2 6", "3 3 5 3 3 5 1 7 5 4 6"]


def words_of(layout, task=NIM_SUM, operands=DIGITS):
    ids = LAYOUTS[layout].write(task, np.array([operands]))[0]
    return " ".join(task.words[token] for token in ids)


def test_the_layouts_by_hand():
    assert words_of("paths") == words_of("joined") == " ".join([*PATHS, "6 <eos>"])
    assert words_of("identical") == " ".join([PATHS[0]] * 3 + ["6 <eos>"])
    assert words_of("short") == PATHS[0] + " 6" + " <eos>" * 23
    assert words_of("terse") == PATHS[0] + " 6 <eos>"
    assert words_of("chain") == (
        "6 0 6 6 6 0 0 4 4 4 6 2 2 2 0 0 1 1 1 2 3 3 4 7 7 7 0 0 0 0 0 6 6 6 <eos>"
    )  # 6^0=6, 6^6=0, 0^4=4, ...


def test_the_clock_by_hand():
    hours = (7, 1, 11, 4, 0, 2, 1, 2, 4, 3, 0, 5)
    assert CLOCK.prompt(np.array(hours)) == "7 +1 +11 +4 +0 +2 +1 +2 +4 +3 +0 +5 ="
    assert words_of("terse", CLOCK, hours) == "8 7 11 11 1 2 4 8 11 11 4 4 <eos>"
    assert words_of("paths", CLOCK, hours).split()[11:14] == ["2", "3", "5"]  # 0+2, +1, +2
    assert words_of("chain", CLOCK, hours).startswith("7 +1 8 8 +11 7 7 +4 11 11 +0 11")


@given(st.sampled_from(sorted(TASKS)), st.sampled_from(sorted(LAYOUTS)), st.data())
def test_every_solution_ends_in_the_answer(task, layout, data):
    task, layout = TASKS[task], LAYOUTS[layout]
    operands = data.draw(st.lists(st.integers(0, task.order - 1), min_size=12, max_size=12))
    total = 0
    for operand in operands:
        total = int(total ^ operand if task is NIM_SUM else (total + operand) % 12)
    slots = layout.write(task, np.array([operands]))[0]
    assert len(slots) == sum(block.length for block in layout.template.blocks)
    assert len(slots) == (13 if layout.name == "terse" else 35)
    for slot in (layout.answer_slot, *layout.path_ends):
        assert task.words[slots[slot]] == task.states[total]
    assert task.words[slots[layout.answer_slot + 1]] == "<eos>"


def test_the_problems_are_those_of_the_package():
    ours = NIM_SUM.sample(np.random.default_rng(3), 20)
    theirs = demo.sample_problems(20, seed=3)
    assert [tuple(row) for row in ours.tolist()] == [problem.digits for problem in theirs]
    assert [NIM_SUM.prompt(row) for row in ours] == [problem.prompt for problem in theirs]
    assert NIM_SUM.answer(ours).tolist() == [problem.answer for problem in theirs]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_what_is_trained_on_is_what_is_decoded(task, layout):
    batch = make_batch(np.random.default_rng(0), task, layout, 3)
    operands = task.sample(np.random.default_rng(0), 3)
    tokenizer = task.make_tokenizer()
    rows = [tokenizer(task.prompt(row))["input_ids"] for row in operands]
    canvas = Canvas.from_prompts(rows, layout.template, tokenizer=tokenizer, mask_token_id=tokenizer.mask_token_id)
    slots = canvas.decodable
    assert torch.equal(canvas.tokens[~slots], torch.from_numpy(batch.tokens)[~slots])
    assert not batch.learnt[~slots.numpy()].any()
    assert (batch.noised[~slots.numpy()] == batch.tokens[~slots.numpy()]).all()
    assert (canvas.tokens[slots] == tokenizer.mask_token_id).all()
    assert (batch.tokens[slots.numpy()].reshape(3, -1) == layout.write(task, operands)).all()


def test_a_batch():
    batch = make_batch(np.random.default_rng(5), NIM_SUM, LAYOUTS["chain"], 64)
    again = make_batch(np.random.default_rng(5), NIM_SUM, LAYOUTS["chain"], 64)
    masked = batch.noised == NIM_SUM.ids["<mask>"]
    assert (masked == batch.learnt).all()
    assert (batch.noised[~masked] == batch.tokens[~masked]).all()
    assert (batch.noised == again.noised).all()


def test_thinned_problems():
    operands = NIM_SUM.sample(np.random.default_rng(0), 20_000, neutral=0.5)
    zeros = (operands == 0).mean()
    assert zeros == pytest.approx(0.5 / 8 + 0.5 * (0.6 + 0.4 / 8), abs=0.01)


BLOCK = np.array([-1, 0, 0, 1, 1, -1, 2, 2, 2])
COUNT = 400_000


def test_uniform_noise():
    masked = uniform_noise(np.random.default_rng(0), BLOCK, COUNT)
    assert not masked[:, BLOCK < 0].any()
    assert masked[:, BLOCK >= 0].mean(0) == pytest.approx(0.5, abs=0.004)
    # One rate for a row: E[t^2] for two slots, which independent rates would mask together a quarter of the time.
    assert (masked[:, 1] & masked[:, 8]).mean() == pytest.approx(1 / 3, abs=0.004)


@pytest.mark.parametrize("max_rate", [0.9, 1.0])
def test_structured_noise(max_rate):
    masked = structured_noise(np.random.default_rng(0), BLOCK, COUNT, max_rate)
    assert not masked[:, BLOCK < 0].any()
    assert masked[:, [1, 2, 3, 4]].mean(0) == pytest.approx(max_rate / 2, abs=0.004)
    # 0.8 of the rows hold the summary back; in the others it is masked with E[r (1 + z)], t going from 0 to 0.2.
    for slot, z in ((6, 0.0), (7, 0.5), (8, 1.0)):
        assert masked[:, slot].mean() == pytest.approx(0.8 + max_rate * 0.02 * (1 + z), abs=0.003)
    # Where three of four path tokens are masked, t is above 0.2 nearly always.
    assert masked[masked[:, 1:5].sum(1) >= 3][:, 6:].mean() > 0.98
    assert masked[:, 6:].all(1).mean() == pytest.approx(0.8, abs=0.005)


def test_slips():
    added, wrong = make_slips(np.random.default_rng(1), 8, 50_000, share=0.4)
    paths_wrong = wrong.any(2).sum(1)
    assert set(paths_wrong.tolist()) == {0, 1}
    assert paths_wrong.mean() == pytest.approx(0.4, abs=0.01)
    assert ((added != 0) == wrong).all()
    assert (np.diff(wrong.astype(int), axis=2) >= 0).all()  # once wrong, wrong to the end
    assert wrong.any(2).mean(0) == pytest.approx(0.4 / 3, abs=0.01)
    lengths = wrong.sum(2)[wrong.any(2)]
    assert np.bincount(lengths, minlength=12)[1:] / len(lengths) == pytest.approx(np.full(11, 1 / 11), abs=0.01)


def test_a_batch_with_slips():
    batch = make_batch(np.random.default_rng(2), NIM_SUM, LAYOUTS["paths"], 500, noise="structured", slips=1.0)
    operands = NIM_SUM.sample(np.random.default_rng(2), 500)
    right = LAYOUTS["paths"].write(NIM_SUM, operands)
    slots = np.array([i for i in range(batch.tokens.shape[1]) if i >= 14 and i not in (14, 26, 38, 50)])
    written, learnt = batch.tokens[:, slots], batch.learnt[:, slots]
    masked = batch.noised[:, slots] == NIM_SUM.ids["<mask>"]
    wrong = written != right
    assert wrong.any(1).all()
    assert not wrong[:, 33:].any()
    assert (learnt == (masked & ~wrong)).all()
    ends = wrong[:, [10, 21, 32]]
    assert (ends.sum(1) == 1).all()  # the majority is right
    # A wrong path goes on from its wrong state.
    states, operand = written - NIM_SUM.ids["0"], np.concatenate([operands, operands], axis=1)
    for row in range(500):
        path = int(ends[row].argmax())
        mine = states[row, 11 * path : 11 * path + 11]
        steps = mine[1:] ^ mine[:-1]
        expected = operand[row, 4 * path + 2 : 4 * path + 12]
        assert (steps != expected).sum() <= 1


def test_some_batches_are_cut_short():
    layout, widths = LAYOUTS["paths"], []
    for seed in range(400):
        batch = make_batch(np.random.default_rng(seed), NIM_SUM, layout, 3, cut=0.25)
        whole = make_batch(np.random.default_rng(seed), NIM_SUM, layout, 3)
        widths.append(batch.tokens.shape[1])
        for part, all_of_it in zip(vars(batch).values(), vars(whole).values(), strict=True):
            assert (part == all_of_it[:, : widths[-1]]).all()
    short = [width for width in widths if width < 53]
    assert 60 < len(short) < 140
    assert min(short) >= 14 + 5
    assert len(set(short)) > 20


def test_what_does_not_go_together():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="need paths and a summary; the layout is 'chain'"):
        make_batch(rng, NIM_SUM, LAYOUTS["chain"], 2, noise="structured")
    with pytest.raises(ValueError, match="need paths and a summary; the layout is 'joined'"):
        make_batch(rng, NIM_SUM, LAYOUTS["joined"], 2, slips=0.1)
    with pytest.raises(ValueError, match="'uniform' or 'structured', got 'cosine'"):
        make_batch(rng, NIM_SUM, LAYOUTS["paths"], 2, noise="cosine")
