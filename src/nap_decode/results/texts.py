"""Single tokens as people can read them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GPT-2's alphabet: printable bytes are themselves, the others follow from 256 on.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _SHOWN}
_BYTES |= {chr(256 + place): byte for place, byte in enumerate(b for b in range(256) if b not in _SHOWN)}


class TokenTexts:
    r"""Single tokens as people can read them.

    A space before a word stays; spaces alone are dots, a line break is ``⏎`` and a break, what has no shape is its
    code point, and bytes that are part of a character are themselves.

    Args:
        tokenizer: None to show ids.

    Example:
        >>> from nap_decode import demo
        >>> text = TokenTexts(demo.load()[1])
        >>> text(10), TokenTexts(None)(10)
        ('0', '10')
        >>> make_visible("  "), make_visible(" and\n\n"), make_visible("\u200b")
        ('··', ' and⏎⏎\n', '\\u200b')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """The text of one id."""
        if self.tokenizer is None:
            return str(token)
        if token not in self._known:
            self._known[token] = make_visible(self._read(token)) or f"[{token}]"
        return self._known[token]

    def join(self, tokens: Sequence[int]) -> str:
        """The text of many ids, with its line breaks."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return _escape_shapeless(str(self.tokenizer.decode(list(tokens), skip_special_tokens=False)))

    def _read(self, token: int) -> str:
        text = str(self.tokenizer.decode([token], skip_special_tokens=False))  # type: ignore[union-attr]
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        written = convert([token])[0] if convert else None
        if not isinstance(written, str):
            return text
        if "\ufffd" in text and "\ufffd" not in written:  # part of a character
            byte = re.fullmatch("<0x([0-9A-F]{2})>", written)
            if byte or all(letter in _BYTES for letter in written):
                whole = [int(byte[1], 16)] if byte else [_BYTES[letter] for letter in written]
                return bytes(whole).decode("utf-8", "backslashreplace")
            return text
        # Decoded alone, a token of SentencePiece loses the space before it.
        starts_word = written[:1] in ("▁", "Ġ") and not text[:1].isspace()
        return " " + text if starts_word and text != written else text


def make_visible(text: str) -> str:
    """Show what cannot be seen; see :class:`TokenTexts`."""
    if text and not text.strip(" "):
        return "·" * len(text)
    return re.sub("\n+", lambda breaks: "⏎" * len(breaks[0]) + "\n", _escape_shapeless(text.replace("\t", "⇥")))


def _escape_shapeless(text: str) -> str:
    def shown(letter: str) -> str:
        category = unicodedata.category(letter)
        if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or (category == "Zs" and letter != " "):
            return letter.encode("unicode_escape", "surrogatepass").decode()
        return letter

    lines = ("".join(map(shown, line)) for line in text.split("\n"))
    # A mark that combines with the letter before needs one.
    return "\n".join("◌" + line if line and unicodedata.category(line[0]).startswith("M") else line for line in lines)
