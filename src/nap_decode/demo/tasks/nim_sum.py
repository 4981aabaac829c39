"""Held-out problems for lm-evaluation-harness, and how their file was written.

``python -m nap_decode.demo.tasks.nim_sum`` writes ``nim_sum.jsonl`` again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nap_decode.demo.problems import running_totals, sample_problems

SEED = 20_261_122
"""Training uses seeds below 1000, the demo's table 20261121."""
FILE = Path(__file__).with_suffix(".jsonl")


def make(count: int = 200, seed: int = SEED) -> list[dict[str, Any]]:
    """Problems: their question and answer, two paths, and four ways to write the third, one of them right.

    A wrong one has another digit in one place.

    Example:
        >>> problem = make(1)[0]
        >>> problem["question"], problem["answer"], problem["choices"][problem["label"]][-1]
        ('1 0 3 4 6 7 4 4 1 0 4 4 =', '6', '6')
    """
    generator = np.random.default_rng(seed)
    problems = []
    for problem in sample_problems(count, seed):
        first, second, third = running_totals(np.array([problem.digits]))[0]
        wrong = np.tile(third, (3, 1))
        places = generator.choice(len(third), 3, replace=False)
        wrong[range(3), places] = (wrong[range(3), places] + generator.integers(1, 8, 3)) % 8
        label = int(generator.integers(4))
        problems.append(
            {
                "question": problem.prompt,
                "answer": str(problem.answer),
                "paths": f"<think 1> {_text(first)} <think 2> {_text(second)} <think 3>",
                "choices": [_text(path) for path in np.insert(wrong, label, third, axis=0)],
                "label": label,
            }
        )
    return problems


def load(**_: Any) -> dict[str, Any]:
    """The splits, as a task file's ``custom_dataset`` gives them; it is called with the task's metadata."""
    import datasets  # comes with the harness

    return {"test": datasets.Dataset.from_list([json.loads(line) for line in FILE.read_text().splitlines()])}


def _text(path: Any) -> str:
    return " ".join(map(str, path))


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(problem) + "\n" for problem in make()))
