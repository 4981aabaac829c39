from __future__ import annotations

import dataclasses

import pytest
import torch
from models import MASK, Words
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
SHORT = [5, 10, 7, 7, 7, 11, 12, 8, 8, 8, 13, 9, 9, 14, 0]


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
    assert out.text == " 7 8"  # behind "5 6"
    assert out.paths == [" 7 8"]
    assert out.blocks == {"completion": " 7 8"}
    with pytest.raises(NapDecodeError, match=r"the canvas has no summary; its blocks are \['completion'\]"):
        _ = out.summary


def test_infill_gives_the_whole_text():
    for text, tokens in (([5, MASK, 7, MASK], [5, 6, 7, 8]), ([5, 6, MASK, MASK], [5, 6, 7, 8])):
        canvas = Canvas.from_infill([text], mask_token_id=MASK, is_single=True)
        assert output([tokens], None, canvas=canvas).text == "5 6 7 8"


def test_the_last_hole_of_a_row_decides_how_it_finished():
    canvas = Canvas.from_infill([[5, MASK, 6, MASK], [MASK, 5], [5, MASK]], mask_token_id=MASK)
    assert output([[5, 9, 6, 2], [2, 5, 0, 0], [5, 9, 0, 0]], None, canvas=canvas).finish_reason == [
        "end",
        "end",
        "length",
    ]


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


# -------------------------------------------------------------------------------------------- texts of real tokenizers

SPECIAL = ["<pad>", "<mask>", "<eos>", "<unk>", "<cls>", "<turn>"]
SENTENCE = "the cats sat , don't  sit .\n    return naïve 中 €"


def wrap(inner, **options):
    # A special token that is none of the named ones and that all_special_ids of transformers 4 does not have.
    inner.add_special_tokens([AddedToken("<turn>", special=True)])
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "mask", "eos", "unk", "cls")}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named, **{"clean_up_tokenization_spaces": False} | options)


def metaspace(scheme):
    pieces = [*SPECIAL, "▁the", "▁cat", "▁sat", "▁return", "▁", *sorted(set(SENTENCE) - set(" "))]
    inner = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return wrap(inner)


def llama_2():
    """SentencePiece as Llama 2 has it: characters that it does not know are bytes."""
    pieces = [*SPECIAL, "▁", "▁t", "▁th", "▁the", "\n", *sorted(set("abcdehinorstuv',."))]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    inner = Tokenizer(bpe)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(inner)


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *letters, "Ġt", "he", "Ġthe"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return wrap(inner)


def word_piece(clean, inner_clean):
    pieces = [
        *SPECIAL,
        *["the", "cat", "##s", "sat", ",", "don", "'", "t", "sit", ".", "return", "na", "##ï", "##ve", "中"],
    ]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=inner_clean)
    return wrap(inner, clean_up_tokenization_spaces=clean)


def word_level():
    words = [*SPECIAL, *dict.fromkeys(SENTENCE.split())]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(inner)


TOKENIZERS = {
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, never": lambda: metaspace("never"),
    "Llama 2": llama_2,
    "bytes": byte_level,
    "WordPiece": lambda: word_piece(clean=False, inner_clean=False),
    "WordPiece, clean": lambda: word_piece(clean=True, inner_clean=False),
    "WordPiece, clean inside": lambda: word_piece(clean=False, inner_clean=True),
    "words": word_level,
}


def decoded(tokenizer, rows, canvas):
    return output(rows, None, canvas=canvas, tokenizer=tokenizer)


def appended(tokenizer, prompt, ids, template=None):
    canvas = Canvas.from_prompts(
        [prompt], template or CanvasTemplate.plain(len(ids)), mask_token_id=MASK, tokenizer=tokenizer, is_single=True
    )
    row = canvas.tokens[0].clone()
    row[canvas.decodable[0]] = torch.tensor(ids)
    return decoded(tokenizer, [row.tolist()], canvas)


def filled(tokenizer, row, start, stop):
    """A hole from start to stop, filled with what stands there in the row."""
    text = row[:start] + [MASK] * (stop - start) + row[stop:]
    canvas = Canvas.from_infill([text], mask_token_id=MASK, is_single=True)
    return decoded(tokenizer, [row], canvas)


@pytest.mark.parametrize("name", TOKENIZERS)
class TestTexts:
    @pytest.fixture
    def tokenizer(self, name):
        return TOKENIZERS[name]()

    @pytest.fixture
    def ids(self, tokenizer):
        ids = tokenizer(SENTENCE)["input_ids"]
        assert len(ids) >= 9
        return ids

    def test_a_completion_goes_on_where_the_prompt_ends(self, tokenizer, ids):
        """Wherever that is, even within a word."""
        whole, checked = tokenizer.decode(ids), 0
        for place in range(len(ids)):
            before, out = tokenizer.decode(ids[:place]), appended(tokenizer, ids[:place], ids[place:])
            assert out.paths == [out.text]
            if whole.startswith(before):
                assert before + out.text == whole
                checked += 1
            else:  # within a character, or where cleaning up changes what stands before: "don '", but "don't"
                assert whole.endswith(out.text)
                assert before[-1] in "\ufffd'"
        assert checked > len(ids) / 2

    def test_a_prompt_is_text(self, tokenizer):
        prompt = "the cats" if "Word" in str(type(tokenizer._tokenizer.model)) else "the cat"
        start = tokenizer(prompt)["input_ids"]
        for more in ("sat", "s sat", "  return", ", sat"):
            ids = [i for i in tokenizer(more)["input_ids"] if i >= len(SPECIAL)]
            assert tokenizer.decode(start) + appended(tokenizer, start, ids).text == tokenizer.decode(start + ids)

    def test_a_hole_is_filled(self, tokenizer, ids):
        whole = tokenizer.decode(ids)
        for start in range(len(ids)):
            for stop in range(start + 1, min(start + 4, len(ids) + 1)):
                out = filled(tokenizer, ids, start, stop)
                assert out.text == whole
                hole = out.blocks["hole 1"]
                assert hole == hole.strip()
                # A part of a character is not in the whole, and neither is a space that cleaning up takes away.
                assert hole.strip("\ufffd").replace(" ", "") in whole.replace(" ", "")

    def test_a_layout(self, tokenizer):
        """Lines, without what sets the block off from its header."""
        ids = [i for i in tokenizer("the cats sat")["input_ids"] if i >= len(SPECIAL)]
        template = CanvasTemplate(([5], Block("a", len(ids)), [5], Block("b", len(ids), held=True)))
        out = appended(tokenizer, ids, ids + ids, template)
        assert out.text == "<turn> the cats sat\n<turn> the cats sat"
        assert (out.paths, out.summary) == (["the cats sat"], "the cats sat")

    @pytest.mark.parametrize("special", ["<unk>", "<cls>", "<turn>", "<pad>"])
    def test_a_special_token_in_the_middle_is_shown(self, tokenizer, special):
        ids, token = tokenizer("the cats sat")["input_ids"], SPECIAL.index(special)
        row = [*ids[:1], token, *ids[1:]]
        shown = tokenizer.decode(row)
        assert special in shown
        assert filled(tokenizer, row, 0, len(row)).text == shown
        assert tokenizer.decode(ids[:1]) + appended(tokenizer, ids[:1], [token, *ids[1:]]).text == shown
        text = filled(tokenizer, row, 1, 2).text  # a hole of its own
        assert text == (shown if special in ("<unk>", "<cls>") else tokenizer.decode(ids))

    def test_what_ends_a_text_is_not(self, tokenizer):
        ids = tokenizer("the cats sat")["input_ids"]
        whole = tokenizer.decode(ids)
        for end in ([2], [2, 0, 0], [5, 2, ids[0]], [5], [5, 0], [0, 0, 0]):
            assert tokenizer.decode(ids[:1]) + appended(tokenizer, ids[:1], ids[1:] + end).text == whole
            assert filled(tokenizer, [4, *ids, *end, 2], 1 + len(ids), 1 + len(ids) + len(end)).text == whole
            row = [ids[0], *end, *ids[1:]]
            assert filled(tokenizer, row, 1, 1 + len(end)).text == whole
        for last in (3, 4):
            assert appended(tokenizer, ids[:1], [*ids[1:], last]).text.endswith(SPECIAL[last])

    def test_special_tokens_that_were_given(self, tokenizer):
        """They are not in the text of a completion, and make no difference to it."""
        ids = tokenizer("the cats sat")["input_ids"]
        plain = appended(tokenizer, ids, ids).text
        assert appended(tokenizer, [4, *ids, 2], ids).text == plain
        assert appended(tokenizer, [4], ids).text == tokenizer.decode(ids)
        assert filled(tokenizer, [4, *ids, 5, 3, *ids, 2], 1, 2).text == tokenizer.decode([*ids, 3, *ids])

    def test_gaps(self, tokenizer):
        ids = tokenizer("the cats sat")["input_ids"]
        canvas = Canvas.from_prompts([ids], CanvasTemplate.plain(4), mask_token_id=MASK, is_single=True)
        out = output([[*ids, MASK, MASK, ids[-1], MASK]], None, canvas=canvas, tokenizer=tokenizer)
        trace = dataclasses.replace(out.trace, step=torch.where(out.trace.tokens == MASK, -1, out.trace.step))
        out = dataclasses.replace(out, trace=trace)
        behind = tokenizer.decode([*ids, ids[-1]])[len(tokenizer.decode(ids)) :]
        assert out.text == f"[...]{behind}[...]"


def test_a_character_over_the_border_of_two_blocks():
    """It belongs to the block in which it is completed."""
    for tokenizer in (llama_2(), byte_level()):
        first, *rest = tokenizer("€", add_special_tokens=False)["input_ids"][-3:]
        template = CanvasTemplate((Block("a", 1), Block("b", 2)))
        prompt = tokenizer("the")["input_ids"]
        out = appended(tokenizer, prompt, [first, *rest], template)
        assert out.blocks == {"a": "\ufffd", "b": "€"}
        assert appended(tokenizer, [*prompt, first], rest).text == "€"
