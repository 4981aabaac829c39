from __future__ import annotations

import json

from nap_decode.demo import NimSum
from nap_decode.demo.show import HELD_OUT_SEED
from nap_decode.demo.tasks import nim_sum


def test_the_file_is_what_its_module_writes():
    assert [json.loads(line) for line in nim_sum.FILE.read_text().splitlines()] == nim_sum.make()


def test_problems():
    assert nim_sum.SEED not in (*range(1000), HELD_OUT_SEED)
    for problem in nim_sum.make(20):
        digits = tuple(map(int, problem["question"].split()[:-1]))
        assert str(NimSum(digits).answer) == problem["answer"]
        right = problem["choices"][problem["label"]].split()
        assert right[-1] == problem["paths"].split()[-3] == problem["answer"]
        for number, choice in enumerate(problem["choices"]):
            differ = sum(one != other for one, other in zip(right, choice.split(), strict=True))
            assert differ == (number != problem["label"])
        assert len(set(problem["choices"])) == 4
