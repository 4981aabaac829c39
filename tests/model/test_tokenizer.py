from __future__ import annotations

import warnings

import pytest
from models import Words

from nap_decode import NapDecodeError
from nap_decode.model.denoiser import _check_tokenizer


class Tokenizer:
    """One of ids 0 to ``size - 1``, of which the last ``added`` were added to it."""

    def __init__(self, size, added=0):
        self.words = {f"word {i}": i for i in range(size)}
        self.added = {f"word {i}": i for i in range(size - added, size)}

    def get_vocab(self):
        return self.words

    def get_added_vocab(self):
        return self.added


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        (None, 10),
        (Words(), None),
        (Words(), 24),
        (Tokenizer(100), 100),
        (Tokenizer(101, added=1), 100),  # a token that a recipe of training added, and no text has
        (Tokenizer(126349), 126464),  # LLaDA
        (Tokenizer(151670), 151936),  # Qwen2.5
        (Tokenizer(33), 64),  # ESM-C: a small vocabulary, padded
        (Tokenizer(12), 512),
        (Tokenizer(126349), 134656),  # MMaDA: ids of images behind those of texts
    ],
)
def test_tokenizers_that_fit(tokenizer, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_tokenizer(tokenizer, rows)


def test_a_tokenizer_with_ids_that_the_model_lacks():
    with pytest.raises(NapDecodeError, match="the tokenizer has ids up to 100, but the model has 100, from 0 to 99"):
        _check_tokenizer(Tokenizer(101), 100)
    with pytest.raises(NapDecodeError, match="ids up to 100"):
        _check_tokenizer(Tokenizer(105, added=4), 100)
    with pytest.raises(NapDecodeError, match="ids up to 19"):
        _check_tokenizer(Words(), 10)


@pytest.mark.parametrize(("size", "rows"), [(5, 591), (30522, 126464), (33, 50257)])
def test_a_far_smaller_tokenizer(size, rows):
    with pytest.warns(UserWarning, match=f"the tokenizer has {size} ids, but the model {rows}; only those of the"):
        _check_tokenizer(Tokenizer(size), rows)
