from __future__ import annotations

import pytest
import torch
from models import MASK, Words

from nap_decode import Block, Canvas, CanvasTemplate, DecodeTrace, NapDecodeError, SamplerOutput

WORDS = Words()
TEMPLATE = CanvasTemplate.nap(
    2, path_length=3, summary_length=2, path_header=["10", "11 12"], summary_header="13", summary_footer="14"
)


def output(tokens, prompts, template=TEMPLATE, single=False, tokenizer=WORDS, canvas=None, passes=4):
    canvas = canvas or Canvas.from_prompts(prompts, template, mask_token_id=MASK, tokenizer=WORDS, is_single=single)
    tokens = torch.tensor(tokens)
    trace = DecodeTrace(
        tokens=tokens,
        block=canvas.block,
        step=torch.where(canvas.decodable, 0, -1),
        confidence=torch.zeros(tokens.shape),
        forward_passes=torch.full((len(tokens),), passes),
        block_names=canvas.block_names,
        mask_token_id=MASK,
        end_token_ids=(2,),
    )
    return SamplerOutput(tokens, canvas, trace, passes, 1.0, None, tokenizer)


ROW = [5, 6, 10, 7, 7, 2, 11, 12, 8, 2, 9, 13, 9, 2, 14]
SHORT = [0, 5, 10, 7, 7, 7, 11, 12, 8, 8, 8, 13, 9, 9, 14]


def test_texts_of_a_single_prompt():
    out = output([ROW], [[5, 6]], single=True)
    assert out.text == "10 7 7\n11 12 8\n13 9\n14"
    assert out.paths == ["7 7", "8"]
    assert out.summary == "9"
    assert out.blocks == {"path 1": "7 7", "path 2": "8", "summary": "9"}


def test_texts_of_a_batch():
    out = output([ROW, SHORT], [[5, 6], [5]])
    assert out.text == ["10 7 7\n11 12 8\n13 9\n14", "10 7 7 7\n11 12 8 8 8\n13 9 9\n14"]
    assert out.paths == [["7 7", "8"], ["7 7 7", "8 8 8"]]
    assert out.summary == ["9", "9 9"]
    assert out.finish_reason == ["end", "length"]
    assert out.tokens_per_forward == [4 / 4, 8 / 4]


def test_a_plain_completion():
    out = output([[5, 6, 7, 8, 2, 2]], [[5, 6]], CanvasTemplate.plain(4), single=True)
    assert out.text == "7 8"
    assert out.paths == ["7 8"]
    with pytest.raises(NapDecodeError, match=r"the canvas has no summary; its blocks are \['completion'\]"):
        _ = out.summary


def test_infill_gives_the_whole_text():
    for text, tokens in (([5, MASK, 7, MASK], [5, 6, 7, 8]), ([5, 6, MASK, MASK], [5, 6, 7, 8])):
        canvas = Canvas.from_infill([text], mask_token_id=MASK, is_single=True)
        assert output([tokens], None, canvas=canvas).text == "5 6 7 8"


def test_the_last_hole_of_a_row_decides_how_it_finished():
    canvas = Canvas.from_infill([[5, MASK, 6, MASK], [MASK, 5], [5, MASK]], mask_token_id=MASK)
    assert output([[5, 9, 6, 2], [0, 0, 2, 5], [0, 0, 5, 9]], None, canvas=canvas).finish_reason == [
        "end",
        "end",
        "length",
    ]


def test_white_space_is_kept():
    class Spaces(Words):
        def decode(self, ids, skip_special_tokens=False):
            return "    " + super().decode(ids, skip_special_tokens) + "\n"

    out = output([[5, 6, 7, 8, 2, 2]], [[5, 6]], CanvasTemplate.plain(4), single=True, tokenizer=Spaces())
    assert out.text == out.blocks["completion"] == "    7 8\n"


def test_blocks_side_by_side_have_lines_of_their_own():
    template = CanvasTemplate((Block("a", 2), Block("b", 1), "10", Block("c", 1)))
    assert output([[5, 7, 8, 9, 10, 9]], [[5]], template, single=True).text == "7 8\n9\n10 9"


def test_texts_need_a_tokenizer():
    out = output([ROW], [[5, 6]], tokenizer=None)
    with pytest.raises(NapDecodeError, match=r"texts need a tokenizer; pass one to the sampler, or read .sequences"):
        _ = out.text
    assert out.finish_reason == ["end"]


def test_repr_is_short():
    assert repr(output([ROW], [[5, 6]])) == "SamplerOutput(1 row, 4 forward passes, 1 s)"
