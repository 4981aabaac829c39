from __future__ import annotations

import torch

from nap_decode import Canvas, CanvasTemplate, Slots
from nap_decode.randomness import row_seeds
from nap_decode.schedulers import Partition


def test_slots_are_packed_to_the_left():
    template = CanvasTemplate.nap(2, path_length=2, summary_length=1, path_header=[(7,), (7,)], summary_header=(7,))
    canvas = Canvas.from_prompts([[5, 5], [5]], template, mask_token_id=1)
    masked = canvas.decodable.clone()
    masked[0, 3] = False  # the first slot of path 1 is committed
    partition = Partition(canvas.block, canvas.lengths, canvas.held)
    is_open = torch.tensor([[True, False, True], [False, True, False]])
    quota = torch.tensor([[1, 0, 1], [0, 2, 0]])
    packed = Slots.pack(canvas, partition, canvas.tokens, masked, is_open, quota, 3, row_seeds(0, 2), step=4)
    assert packed.index.tolist() == [[4, 9, 0], [6, 7, 0]]
    assert packed.block.tolist() == [[0, 2, 3], [1, 1, 3]]
    assert packed.positions[:, :2].tolist() == [[4, 9], [5, 6]]
    spread = packed.spread(torch.tensor([[10, 20, 30], [40, 50, 60]])).masked_fill(packed.rank < 0, -1)
    assert spread.tolist() == [[-1] * 4 + [10] + [-1] * 4 + [20], [-1] * 6 + [40, 50, -1, -1]]
