from __future__ import annotations

import numpy as np
import pytest
import torch
from models import MASK, PAD, Words
from transformers import BatchEncoding

from nap_decode import Block, Canvas, CanvasTemplate, NapDecodeError
from nap_decode.canvas import count_blocks
from nap_decode.prompts import encode_prompts

TEMPLATE = CanvasTemplate(((7,), Block("a", 2), (8, 9), Block("b", 1, held=True)))


def test_rows_begin_in_column_0_and_are_padded_behind():
    canvas = Canvas.from_prompts([[5, 6, 4], [5]], TEMPLATE, mask_token_id=MASK, pad_token_id=PAD)
    assert canvas.tokens.tolist() == [[5, 6, 4, 7, 1, 1, 8, 9, 1], [5, 7, 1, 1, 8, 9, 1, 0, 0]]
    assert canvas.block.tolist() == [[-1, -1, -1, -1, 0, 0, -1, -1, 1], [-1, -1, 0, 0, -1, -1, 1, -1, -1]]
    assert canvas.attention_mask.tolist() == [[1] * 9, [1] * 7 + [0, 0]]
    assert canvas.row_lengths.tolist() == [9, 7]
    assert canvas.prompt.tolist() == [[True] * 3 + [False] * 6, [True] + [False] * 8]
    assert canvas.lengths.tolist() == [[2, 1]] * 2
    assert canvas.block_names == ("a", "b")
    assert canvas.held == (False, True)
    assert canvas.is_padded
    assert not Canvas.from_prompts([[5]], TEMPLATE, mask_token_id=MASK).is_padded


def test_infill_numbers_the_holes_of_each_row():
    canvas = Canvas.from_infill([[1, 5, 1, 1], [6, 1]], mask_token_id=MASK, pad_token_id=PAD)
    assert canvas.block.tolist() == [[0, -1, 1, 1], [-1, 0, -1, -1]]
    assert canvas.lengths.tolist() == [[1, 2], [1, 0]]
    assert canvas.prompt.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_padding_with_the_mask_id_is_not_a_hole():
    canvas = Canvas.from_infill([[5, 1, 1], [1]], mask_token_id=MASK, pad_token_id=MASK)
    assert canvas.block.tolist() == [[-1, 0, 0], [0, -1, -1]]


def test_nap_template():
    template = CanvasTemplate.nap(2, path_length=3, summary_length=1)
    assert template.parts == (
        "<think 1>", Block("path 1", 3), "<think 2>", Block("path 2", 3), "<summary>", Block("summary", 1, held=True),
    )  # fmt: skip
    template = CanvasTemplate.nap(
        2,
        path_length=[2, 1],
        summary_length=1,
        path_header="Attempt {}:",
        path_footer=[(4,), "end"],
        summary_header=(6, 7),
        summary_footer="done",
    )
    assert template.parts == (
        "Attempt 1:", Block("path 1", 2), (4,), "Attempt 2:", Block("path 2", 1), "end",
        (6, 7), Block("summary", 1, held=True), "done",
    )  # fmt: skip
    assert len(CanvasTemplate.nap(2, path_length=3, summary_length=0).blocks) == 2


@pytest.mark.parametrize(("total", "paths", "lengths"), [(12, 3, [4, 3, 3, 2]), (1022, 3, [330, 330, 330, 32])])
def test_lengths_are_derived_from_a_total(total, paths, lengths):
    template = CanvasTemplate.nap(paths, total_length=total, summary_length=lengths[-1])
    assert [b.length for b in template.blocks] == lengths


def test_text_of_a_template_is_tokenized_without_special_tokens():
    assert CanvasTemplate(("5 6", Block("a", 2))).encode(Words(), MASK) == ([5, 6, 1, 1], [-1, -1, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CanvasTemplate(("text",)), "a template needs at least one Block"),
        (lambda: CanvasTemplate((Block("a", 1), Block("a", 1))), r"different names, but are called \['a', 'a'\]"),
        (lambda: Block("a", 0), "the length of block 'a' must be a whole number of at least 1, but is 0"),
        (lambda: CanvasTemplate(Block("a", 1)), "parts of a template must be a tuple of texts and Blocks"),
        (lambda: CanvasTemplate.plain(-1), "the length of block 'completion' must be"),
        (lambda: CanvasTemplate.nap(0), "num_paths must be a whole number of at least 1"),
        (lambda: CanvasTemplate.nap(3, path_length=[4, 4]), "path_length names 2 lengths for num_paths=3"),
        (lambda: CanvasTemplate.nap(3, path_header=["a"]), "path_header lists 1 texts for num_paths=3"),
        (
            lambda: CanvasTemplate.nap(2, path_length=4, summary_length=2, total_length=12),
            r"do not add up: paths \[4, 4\] and a summary of 2 make 10, but total_length is 12",
        ),
        (lambda: CanvasTemplate.nap(3, total_length=10), "total_length must be a whole number of at least 35"),
        (lambda: CanvasTemplate.nap().encode(None, MASK), "the template's text '<think 1>' needs a tokenizer"),
        (lambda: CanvasTemplate.nap(3, path_header=5), "path_header is 5, not a list of texts, for num_paths=3"),
        (lambda: CanvasTemplate.nap(path_footer=5), "path_footer is 5, not a list of texts, for num_paths=3"),
        (lambda: CanvasTemplate.nap(1, path_header=[5]), "path_header must be a list of token ids, but is 5"),
        (lambda: CanvasTemplate.nap(1, path_footer=[None]), "path_footer must be a list of token ids, but is None"),
        (lambda: CanvasTemplate.nap(summary_header=5), "summary_header must be a list of token ids, but is 5"),
        (lambda: CanvasTemplate.nap(summary_footer=[0.5]), "a token id of summary_footer must be a whole number"),
        (lambda: CanvasTemplate((None, Block("a", 1))), "a template's text must be a list of token ids, but is None"),
        (lambda: CanvasTemplate(((5, (6,)), Block("a", 1))), r"a token id of a template's text .* but is \(6,\)"),
        (lambda: Block(1, 1), "the name of a block must be a text, but is 1"),
        (lambda: Block("a", 1, held="no"), "held of block 'a' must be True or False, but is 'no'"),
        (lambda: CanvasTemplate(((5, 1), Block("a", 1))).encode(None, MASK), r"a mask token \(1\) in .*\(5, 1\)"),
        (lambda: CanvasTemplate(("5 _", Block("a", 1))).encode(Words(), MASK), "a mask token .* text '5 _', which"),
    ],
)
def test_bad_templates(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()


WRONG_IDS = [[1.9], [5.0], [True], [-1], ["5"], [None], [float("nan")], np.array([1.9]), torch.tensor([5.0]), "5", 5]


@pytest.mark.parametrize("ids", WRONG_IDS, ids=repr)
def test_ids_are_whole_numbers(ids):
    """They become tensors of whole numbers in the end, which would round them."""
    makers = {
        "a template's text": lambda: CanvasTemplate((ids, Block("a", 1))),
        "a prompt": lambda: Canvas.from_prompts([ids], TEMPLATE, mask_token_id=MASK),
        "a text": lambda: Canvas.from_infill([ids], mask_token_id=MASK),
    }
    for what, make in makers.items():
        if what == "a template's text" and ids == "5":
            continue  # which is text
        with pytest.raises(NapDecodeError, match=f"{what} must be a"):
            make()
    for text in () if isinstance(ids, str) else (CanvasTemplate.nap, lambda **o: CanvasTemplate.nap(1, **o)):
        with pytest.raises(NapDecodeError, match="summary_header must be a"):
            text(summary_header=ids)
    with pytest.raises(NapDecodeError, match="mask_token_id must be a whole number"):
        TEMPLATE.encode(None, 1.0)


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6], np.int32), torch.tensor([5, 6])], ids=repr)
def test_ids_of_every_kind(ids):
    template = CanvasTemplate((ids, Block("a", 1)))
    assert template == CanvasTemplate(((5, 6), Block("a", 1)))
    assert all(type(token) is int for token in template.parts[0])
    assert CanvasTemplate.nap(1, path_length=1, path_header=[ids], summary_length=0).parts == (
        (5, 6),
        Block("path 1", 1),
    )
    assert Canvas.from_prompts([ids], TEMPLATE, mask_token_id=MASK).tokens[0, :2].tolist() == [5, 6]


def test_bad_canvases():
    ids = torch.tensor([[5, 1]])
    good = {
        "tokens": ids,
        "block": torch.tensor([[-1, 0]]),
        "attention_mask": torch.ones_like(ids),
        "prompt": torch.tensor([[True, False]]),
        "block_names": ("a",),
        "held": (False,),
    }
    Canvas(**good)
    for change, message in (
        ({"tokens": ids[0]}, r"must be \(B, L\)"),
        ({"block": ids[:, :1]}, r"block of a canvas must be torch.int64 \(1, 2\), but is torch.int64 \(1, 1\)"),
        ({"block": torch.tensor([[0, 1]])}, "block index 1 needs 2 block names and held flags"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padding of a canvas cannot be decoded"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "must be 1 from column 0 on, then 0 for padding"),
        ({"block": torch.tensor([[-1, -1]])}, "no slot of the canvas is to be decoded"),
        ({"attention_mask": torch.tensor([[1, 2]])}, "must be 1 from column 0 on, then 0 for padding"),
        ({"tokens": ids.double()}, r"tokens of a canvas must be torch.int64 \(1, 2\), but is torch.float64"),
        ({"block": ids.int() * 0}, "block of a canvas must be torch.int64"),
        ({"attention_mask": torch.ones_like(ids).bool()}, "attention_mask of a canvas must be torch.int64"),
        ({"prompt": ids}, "prompt of a canvas must be torch.bool"),
        ({"prompt": [[1, 0]]}, r"prompt of a canvas must be torch.bool \(1, 2\), but is \[\[1, 0\]\]"),
    ):
        with pytest.raises(NapDecodeError, match=message):
            Canvas(**(good | change))


def test_count_blocks():
    block = torch.tensor([[0, 0, 2, -1], [1, 1, 1, 2]])
    assert count_blocks(block, 3).tolist() == [[2, 0, 1], [0, 3, 1]]
    where = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert count_blocks(block, 3, where).tolist() == [[1, 0, 1], [0, 2, 0]]


@pytest.mark.parametrize(
    ("prompts", "rows", "single"),
    [
        ("5 6", [[3, 5, 6]], True),
        (["5 6", "7"], [[3, 5, 6], [3, 7]], False),
        ([{"role": "user", "content": "6"}], [[4, 6, 5]], True),
        ([[{"role": "user", "content": "6"}], "7"], [[4, 6, 5], [3, 7]], False),
        ([5, 6], [[5, 6]], True),
        ([[5, 6], [7]], [[5, 6], [7]], False),
        (torch.tensor([5, 6]), [[5, 6]], True),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]], False),
        ([torch.tensor([5, 6]), torch.tensor([7])], [[5, 6], [7]], False),
        (list(np.array([5, 6])), [[5, 6]], True),
        (np.array([5, 6]), [[5, 6]], True),
        (np.array([[5, 6]]), [[5, 6]], False),
        ({"input_ids": [5, 6], "attention_mask": [0, 1]}, [[6]], True),
        (BatchEncoding({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}), [[5, 6], [7]], False),
        (BatchEncoding({"input_ids": torch.tensor([[0, 6]]), "attention_mask": torch.tensor([[0, 1]])}), [[6]], False),
        ([[]], [[]], False),
        ("", [[3]], True),
        (({"role": "user", "content": "6"},), [[4, 6, 5]], True),
        ([({"role": "user", "content": "6"},), "7"], [[4, 6, 5], [3, 7]], False),
        ([{"role": "system", "content": "6"}], [[4, 6, 5]], True),
        ({"messages": [{"role": "user", "content": "6"}]}, [[4, 6, 5]], True),
        ([{"messages": [{"role": "user", "content": "6"}]}, "7"], [[4, 6, 5], [3, 7]], False),
        ([BatchEncoding({"input_ids": [5, 6], "attention_mask": [0, 1]}), {"input_ids": [[7]]}], [[6], [7]], False),
    ],
)
def test_prompts_of_every_form(prompts, rows, single):
    assert encode_prompts(prompts, Words()) == (rows, single)


def test_an_attention_mask_removes_padding_wherever_it_is():
    ids, mask = torch.tensor([[0, 5, 6], [7, 0, 8]]), torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert encode_prompts(ids, None, mask) == ([[5, 6], [7, 8]], False)
    assert encode_prompts(ids[0], None, mask[0]) == ([[5, 6]], True)


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([], None, "the batch of prompts is empty"),
        (torch.tensor([1.0]), None, "a prompt must be text"),
        (torch.tensor([[[1]]]), None, "a prompt must be text"),
        (
            torch.tensor([[5]]),
            torch.tensor([[1, 1]]),
            r"but their rows have lengths \[2\] and \[1\]",
        ),
        (None, None, "prompts must be text, chat messages, token ids, or a list of these, not None"),
        (5, None, "prompts must be text"),
        (
            {"role": "user", "content": "6"},
            None,
            "either messages or input_ids, but has .*; put chat messages in a list",
        ),
        ({"messages": [], "input_ids": [5]}, None, "either messages or input_ids, but has"),
        ([{"input_ids": [[5], [6]]}], None, "the input_ids of a single prompt must be one row, but are 2"),
        ([{"role": "user", "content": "6"}, "7"], None, "a chat message must be a mapping such as .*, but is '7'"),
        ([None], None, "a prompt must be text"),
    ],
)
def test_bad_prompts(prompts, mask, message):
    with pytest.raises(NapDecodeError, match=message):
        encode_prompts(prompts, Words(), mask)


def test_text_needs_a_tokenizer():
    with pytest.raises(NapDecodeError, match="text or chat messages needs a tokenizer"):
        encode_prompts("5", None)
