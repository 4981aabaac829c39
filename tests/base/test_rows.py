from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nap_decode import Canvas, CanvasTemplate
from nap_decode.base.rows import Rows


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_what_is_known_of_rows(lengths):
    prompts = [list(range(5, 5 + n)) for n in lengths]
    canvas = Canvas.from_prompts(prompts, CanvasTemplate.plain(2), mask_token_id=1)
    rows = canvas.rows
    width = max(lengths) + 2
    assert rows.lengths == tuple(n + 2 for n in lengths)
    assert rows.width == width
    assert rows.is_padded == (len(set(lengths)) > 1)
    assert rows.present.tolist() == [[column < n + 2 for column in range(width)] for n in lengths]
    assert rows.prompt.tolist() == [[column < n for column in range(width)] for n in lengths]
    groups = {length: index.tolist() for index, length in rows.groups}
    assert len(groups) == len(rows.groups)
    assert groups == {n: [i for i, m in enumerate(rows.lengths) if m == n] for n in rows.lengths}


def test_rows_may_be_narrower_than_the_batch():
    """Another row made it as wide as it is, and has left."""
    rows = Rows((2, 2), torch.zeros(2, 4, dtype=torch.bool))
    assert rows.is_padded
    assert rows.present.long().tolist() == [[1, 1, 0, 0]] * 2


def test_a_mask_that_is_there_is_not_made_again():
    mask = torch.tensor([[True, True], [True, False]])
    assert Rows((2, 1), mask, mask).present is mask
    made = Rows((2, 1), mask).present
    assert torch.equal(made, mask)
