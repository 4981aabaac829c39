"""The problems of the study, the ways to write their solutions, and the noises of training.

A problem is a list of twelve operands of a commutative group, and its answer is what they come to together.
Because the operation is associative and commutative, one problem has complete solutions that share no intermediate
state: running totals that begin at some operand and go round.  The same problem can so be written as

=============  ========================================================================================
``paths``      NAP's canvas: three different solutions under headers, and a summary
``joined``     the same three solutions one after the other, without headers, then the answer
``identical``  NAP's canvas with the first solution three times
``chain``      one long solution: state, operand and new state for each of the eleven operations
``short``      one short solution, the answer, and padding to the same length
``terse``      one short solution and the answer alone
=============  ========================================================================================

All but ``terse`` have 35 decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nap_decode import CanvasTemplate

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NUM_OPERANDS = 12
PROMPT_LENGTH = NUM_OPERANDS + 2  # with the beginning of text and the equals sign
NUM_PATHS = 3
PATH_LENGTH = NUM_OPERANDS - 1  # running totals; the first one is of two operands
SUMMARY_LENGTH = 2  # the answer and the end-of-text token
CANVAS_LENGTH = NUM_PATHS * PATH_LENGTH + SUMMARY_LENGTH

SPECIAL = ["<pad>", "<mask>", "<bos>", "<eos>", "<unk>"]
HEADERS = [f"<think {j + 1}>" for j in range(NUM_PATHS)] + ["<summary>"]


@dataclass(frozen=True)
class Task:
    """A commutative group, and how its elements are written.

    Args:
        name: of the task.
        order: number of elements, which are 0, the neutral one, to ``order`` - 1.
        combine: the operation, elementwise.
        states: words of the elements as states.
        operands: words of the elements as operands.
        first_is_state: write the first operand as a state ("it is 7 o'clock").

    Example:
        >>> NIM_SUM.prompt(np.array([6, 0, 6, 4, 6, 2, 1, 2, 4, 7, 0, 6]))
        '6 0 6 4 6 2 1 2 4 7 0 6 ='
        >>> CLOCK.prompt(np.array([7, 1, 11, 4, 0, 2, 1, 2, 4, 3, 0, 5]))
        '7 +1 +11 +4 +0 +2 +1 +2 +4 +3 +0 +5 ='
    """

    name: str
    order: int
    combine: Callable[[Ints, Ints], Ints]
    states: tuple[str, ...]
    operands: tuple[str, ...]
    first_is_state: bool = False

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary, in the order of the ids."""
        words = [*SPECIAL, *HEADERS, "=", *self.states]
        return words + [word for word in self.operands if word not in words]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token id of every word."""
        return {word: number for number, word in enumerate(self.words)}

    def state_ids(self, elements: Ints) -> Ints:
        """Token ids of states."""
        return np.array([self.ids[word] for word in self.states])[elements]

    def operand_ids(self, elements: Ints) -> Ints:
        """Token ids of operands."""
        return np.array([self.ids[word] for word in self.operands])[elements]

    def prompt_ids(self, operands: Ints) -> Ints:
        """``(N, 12) -> (N, 14)``: the beginning of text, the operands, an equals sign."""
        body = self.operand_ids(operands)
        if self.first_is_state:
            body[:, 0] = self.state_ids(operands[:, 0])
        ends = [np.full((len(body), 1), self.ids[word]) for word in ("<bos>", "=")]
        return np.concatenate([ends[0], body, ends[1]], axis=1)

    def prompt(self, operands: Ints) -> str:
        """One problem as text."""
        return " ".join(self.words[token] for token in self.prompt_ids(operands[None])[0, 1:])

    def running_totals(self, operands: Ints, first: int = 0) -> Ints:
        """``(N, 12) -> (N, 11)``: the states of the solution that begins at operand ``first`` and goes round."""
        rolled = np.roll(operands, -first, axis=1)
        states = [self.combine(rolled[:, 0], rolled[:, 1])]
        for column in range(2, NUM_OPERANDS):
            states.append(self.combine(states[-1], rolled[:, column]))
        return np.stack(states, axis=1)

    def answer(self, operands: Ints) -> Ints:
        """``(N, 12) -> (N,)``."""
        return self.running_totals(operands)[:, -1]

    def sample(self, rng: np.random.Generator, count: int, neutral: float = 0.0) -> Ints:
        """Draw problems.

        Args:
            rng: the source of randomness.
            count: of problems.
            neutral: share of problems in which each operand is the neutral element with probability 0.6, so that
                neighbouring states are often equal: the first signal that attention learns from.

        Returns:
            Operands, ``(count, 12)``.
        """
        operands = rng.integers(0, self.order, (count, NUM_OPERANDS))
        thinned = (rng.random((count, 1)) < neutral) & (rng.random((count, NUM_OPERANDS)) < 0.6)
        operands[thinned] = 0
        return operands

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """Words between blanks."""
        core = Tokenizer(WordLevel(self.ids, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", self.ids["<bos>"])])
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            mask_token="<mask>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            additional_special_tokens=HEADERS,
            padding_side="left",
            model_max_length=256,
        )


def _add_hours(a: Ints, b: Ints) -> Ints:
    return (a + b) % 12


_DIGITS = tuple(map(str, range(8)))
NIM_SUM = Task("nim_sum", 8, np.bitwise_xor, states=_DIGITS, operands=_DIGITS)
"""The exclusive or of octal digits."""
CLOCK = Task(
    "clock",
    12,
    _add_hours,
    states=("12", *map(str, range(1, 12))),
    operands=tuple(f"+{hours}" for hours in range(12)),
    first_is_state=True,
)
"""What time is it after so many hours, and so many more, ...?"""
TASKS = {task.name: task for task in (NIM_SUM, CLOCK)}


@dataclass(frozen=True)
class Layout:
    """A way to write solutions.

    Args:
        name: of the layout.
        template: the canvas that is decoded; the same one is trained on.
        write: from a task and operands ``(N, 12)`` to the tokens of the template's slots, ``(N, slots)``.
        answer_slot: number of the slot that holds the answer.
        path_ends: numbers of the slots that hold the last states of the solutions.
    """

    name: str
    template: CanvasTemplate
    write: Callable[[Task, Ints], Ints]
    answer_slot: int
    path_ends: tuple[int, ...]


def _with_answer(task: Task, operands: Ints, solution: Ints, length: int) -> Ints:
    """A solution, the answer, and end-of-text tokens up to a length."""
    answer = task.state_ids(task.answer(operands))[:, None]
    rest = length - solution.shape[1] - 1
    return np.concatenate([solution, answer, np.full((len(operands), rest), task.ids["<eos>"])], axis=1)


def _write_paths(task: Task, operands: Ints) -> Ints:
    shift = NUM_OPERANDS // NUM_PATHS
    paths = [task.running_totals(operands, shift * path) for path in range(NUM_PATHS)]
    return _with_answer(task, operands, task.state_ids(np.concatenate(paths, axis=1)), CANVAS_LENGTH)


def _write_identical(task: Task, operands: Ints) -> Ints:
    path = task.state_ids(task.running_totals(operands))
    return _with_answer(task, operands, np.tile(path, (1, NUM_PATHS)), CANVAS_LENGTH)


def _write_chain(task: Task, operands: Ints) -> Ints:
    new = task.running_totals(operands)
    old = np.concatenate([operands[:, :1], new[:, :-1]], axis=1)
    hops = np.stack([task.state_ids(old), task.operand_ids(operands[:, 1:]), task.state_ids(new)], axis=2)
    return _with_answer(task, operands, hops.reshape(len(operands), -1), CANVAS_LENGTH)


def _write_short(task: Task, operands: Ints) -> Ints:
    return _with_answer(task, operands, task.state_ids(task.running_totals(operands)), CANVAS_LENGTH)


def _write_terse(task: Task, operands: Ints) -> Ints:
    return _write_short(task, operands)[:, : PATH_LENGTH + SUMMARY_LENGTH]


_NAP = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
_PLAIN = CanvasTemplate.plain(CANVAS_LENGTH)
_ENDS = tuple(PATH_LENGTH * (path + 1) - 1 for path in range(NUM_PATHS))
_LAST = NUM_PATHS * PATH_LENGTH
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("paths", _NAP, _write_paths, _LAST, _ENDS),
        Layout("joined", _PLAIN, _write_paths, _LAST, _ENDS),
        Layout("identical", _NAP, _write_identical, _LAST, _ENDS),
        Layout("chain", _PLAIN, _write_chain, _LAST, (_LAST - 1,)),
        Layout("short", _PLAIN, _write_short, PATH_LENGTH, (PATH_LENGTH - 1,)),
        Layout(
            "terse",
            CanvasTemplate.plain(PATH_LENGTH + SUMMARY_LENGTH),
            _write_terse,
            PATH_LENGTH,
            (PATH_LENGTH - 1,),
        ),
    )
}


@dataclass(frozen=True)
class Batch:
    """What a training step sees, all ``(N, L)`` over prompt and canvas.

    Args:
        tokens: the solutions.
        noised: the same with masks.
        learnt: where the loss counts.
    """

    tokens: Ints
    noised: Ints
    learnt: Bools


def uniform_noise(rng: np.random.Generator, block: Ints, count: int) -> Bools:
    """Every slot of a row is masked with the same probability, t ~ U(0, 1).

    Args:
        rng: the source of randomness.
        block: ``(C,)`` number of every slot's block, -1 for what is never masked.
        count: of rows.

    Returns:
        What is masked, ``(count, C)``.
    """
    return (rng.random((count, len(block))) < rng.random((count, 1))) & (block >= 0)


def structured_noise(rng: np.random.Generator, block: Ints, count: int, max_rate: float = 0.9) -> Bools:
    """NAP's optional noise: the summary stays masked until most of the paths is there.

    With t ~ U(0, 1) and r = ``max_rate`` t, the tokens of paths are masked with probability r.  The summary is masked
    while 1 - t < 0.8, and then with probability r (1 + z), z going from 0 at its start to 1 at its end
    (``q_sample`` in pixeli99/NAP at eba0f41, src/diffllm/gen_utils.py).

    Args:
        rng: the source of randomness.
        block: ``(C,)`` number of every slot's block, -1 for what is never masked; the last block is the summary.
        count: of rows.
        max_rate: the highest rate.  The authors' 0.9 never shows the model a canvas that is masked all over,
            which is what decoding begins with; 1.0 does.

    Returns:
        What is masked, ``(count, C)``.
    """
    t = rng.random((count, 1))
    rate = max_rate * t
    summary = block == block.max()
    z = np.zeros(len(block))
    z[summary] = np.linspace(0, 1, summary.sum())
    chance = np.where(summary, np.where(1 - t < 0.8, 1.0, rate * (1 + z)), rate)
    return (rng.random((count, len(block))) < chance) & (block >= 0)


def make_slips(rng: np.random.Generator, order: int, count: int, share: float) -> tuple[Ints, Bools]:
    """Which paths go wrong, and by how much.

    In a ``share`` of the rows one path goes wrong at a random state, by something that is added to it and to all
    states behind it.

    Returns:
        What to add, ``(count, paths, states)``, 0 where all is well, and whether it is wrong.
    """
    slipped = rng.random(count) < share
    which = np.arange(NUM_PATHS)[None, :, None] == rng.integers(0, NUM_PATHS, count)[:, None, None]
    after = np.arange(PATH_LENGTH)[None, None] >= rng.integers(0, PATH_LENGTH, count)[:, None, None]
    wrong = slipped[:, None, None] & which & after
    return np.where(wrong, rng.integers(1, order, count)[:, None, None], 0), wrong


def make_batch(
    rng: np.random.Generator,
    task: Task,
    layout: Layout,
    count: int,
    *,
    noise: str = "uniform",
    max_rate: float = 0.9,
    neutral: float = 0.0,
    slips: float = 0.0,
    cut: float = 0.0,
) -> Batch:
    """Draw problems, write their solutions, mask some of the tokens.

    Args:
        rng: the source of randomness.
        task: of the problems.
        layout: of the solutions.
        count: N, rows.
        noise: ``"uniform"`` or ``"structured"``, the latter for the layouts with a summary.
        max_rate: of the structured noise.
        neutral: see :meth:`Task.sample`.
        slips: share of the rows in which one path goes wrong and stays wrong.  Its wrong states carry no loss, and
            the summary keeps the true answer, so that it learns to vote instead of copying a path.
        cut: share of the batches whose canvas is cut short somewhere, so that the model can be used on less than
            the whole canvas.

    Raises:
        ValueError: a noise or slips that do not go with the layout.
    """
    has_paths = layout.template is _NAP
    if noise not in ("uniform", "structured"):
        raise ValueError(f"noise must be 'uniform' or 'structured', got {noise!r}")
    if not has_paths and (noise == "structured" or slips):
        raise ValueError(f"structured noise and slips need paths and a summary; the layout is {layout.name!r}")
    operands = task.sample(rng, count, neutral)
    slots = layout.write(task, operands)
    learnt = np.ones_like(slots, dtype=bool)
    if slips:
        added, wrong = make_slips(rng, task.order, count, slips)
        paths = slots[:, :_LAST]
        first_id = task.ids[task.states[0]]  # states have ids in a row
        paths[:] = first_id + task.combine(paths - first_id, added.reshape(count, -1))
        learnt[:, :_LAST] = ~wrong.reshape(count, -1)

    mask = task.ids["<mask>"]
    canvas, blocks = layout.template.encode(task.make_tokenizer(), mask)
    block = np.array(blocks)
    is_slot = block >= 0
    tokens = np.tile(np.array(canvas), (count, 1))
    tokens[:, is_slot] = slots
    masked = uniform_noise(rng, block, count) if noise == "uniform" else structured_noise(rng, block, count, max_rate)
    loss = masked.copy()
    loss[:, is_slot] &= learnt

    prompt = task.prompt_ids(operands)
    none = np.zeros_like(prompt, dtype=bool)
    whole = np.concatenate([prompt, tokens], axis=1)
    end = whole.shape[1]
    if cut and rng.random() < cut:
        end = prompt.shape[1] + int(rng.integers(PATH_LENGTH // 2, len(block)))
    return Batch(
        tokens=whole[:, :end],
        noised=np.where(np.concatenate([none, masked], axis=1), mask, whole)[:, :end],
        learnt=np.concatenate([none, loss], axis=1)[:, :end],
    )
