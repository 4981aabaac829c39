from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nap_decode.results.texts import TokenTexts, make_visible


def byte_level():
    """A tokenizer of bytes and two words, as GPT-2, Llama 3, Qwen and LLaDA have."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    vocabulary |= {"Ġt": 256, "ĊĊ": 257}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def sentence_piece():
    """A tokenizer with SentencePiece's spaces and bytes, as Llama 2 and Gemma have."""
    pieces = ["<unk>", "▁the", "re", "▁", "<0xE2>", "<0x0A>"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)


class TestTokenTexts:
    def test_byte_level(self):
        tokenizer = byte_level()
        texts = TokenTexts(tokenizer)
        ids = tokenizer("a t\n\n\t€")["input_ids"]
        assert [texts(i) for i in ids] == ["a", " t", "⏎⏎\n", "⇥", r"\xe2", r"\x82", r"\xac"]
        assert texts(tokenizer.eos_token_id) == "<|end|>"
        assert texts.join(ids) == "a t\n\n\\t€"

    def test_sentence_piece(self):
        texts = TokenTexts(sentence_piece())
        assert [texts(i) for i in range(6)] == ["<unk>", " the", "re", "·", r"\xe2", "⏎\n"]

    def test_an_id_that_the_tokenizer_does_not_have(self):
        assert TokenTexts(byte_level())(5000) == "[5000]"

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (" the", " the"),
            ("   ", "···"),
            ("a\r\n", "a\\r⏎\n"),
            ("\x1b[31m", "\\x1b[31m"),
            ("\u202eabc", "\\u202eabc"),
            ("\xa0", "\\xa0"),
            ("\u0301", "◌\u0301"),
            ("e\u0301", "e\u0301"),
            ("\ud800", "\\ud800"),
            ("中文 émoji 🙂", "中文 émoji 🙂"),
            ("", ""),
        ],
    )
    def test_what_is_invisible_becomes_visible(self, text, shown):
        assert make_visible(text) == shown

    @given(st.text(st.characters(), min_size=1))  # surrogates, too
    def test_every_text_can_be_seen_and_written(self, text):
        shown = make_visible(text)
        assert shown.strip()
        shown.encode()
