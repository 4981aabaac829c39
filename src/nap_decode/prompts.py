"""Prompts as token ids: texts, chats, ids, and batches of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Sequence[int] | Tensor"
"""One prompt: text, chat messages, ``{"messages": [...]}`` with options of the chat template (``tools``,
``enable_thinking``, ...) beside them, token ids, a 1-D tensor of token ids, or what a tokenizer returns."""
Prompts: TypeAlias = "Prompt | Sequence[Prompt]"
"""One prompt or a batch of them; a 2-D tensor is a batch of rows of equal length."""

_FORMS = frozenset({"messages", "input_ids"})  # of a prompt that is a mapping

_MARK = "NAP_DECODE_CONTINUES_HERE"
_TOKENIZING = frozenset({
    "conversation", "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
})  # fmt: skip
"""Arguments of ``apply_chat_template`` that are no options of a template."""


def encode_prompts(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None, attention_mask: Any = None
) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of a batch.

    Args:
        prompts: see :data:`Prompts`.  Chats go through the tokenizer's chat template, see :func:`render_chat`.
        tokenizer: needed for anything but ids.
        attention_mask: 0 for ids to drop, wherever they are; in the shape of the ids.

    Returns:
        One list of ids per row, and whether it was a single prompt.

    Raises:
        NapDecodeError: an empty batch, an unknown form of prompt, text without a tokenizer, or a chat that the
            template does not render.
    """
    if isinstance(prompts, Mapping) and _form(prompts) == "input_ids":
        encoded: Mapping[Any, Any] = prompts
        prompts, attention_mask = encoded["input_ids"], encoded.get("attention_mask", attention_mask)
    prompts = _plain(prompts)
    if isinstance(prompts, str | Mapping):
        return [_encode_prompt(prompts, tokenizer)], True
    if not isinstance(prompts, Sequence):
        raise NapDecodeError(f"prompts must be text, chat messages, token ids, or a list of these, not {prompts!r:.80}")
    if len(prompts) == 0:
        raise NapDecodeError("the batch of prompts is empty")
    single = is_part(prompts[0])
    rows = [_encode_prompt(prompt, tokenizer) for prompt in ([prompts] if single else prompts)]
    if attention_mask is not None:
        mask = _plain(attention_mask)
        mask = [mask] if single or not isinstance(mask, Sequence) else mask
        shapes = list(map(len, rows)), [len(row) if isinstance(row, list) else row for row in mask]
        if shapes[0] != shapes[1]:
            raise NapDecodeError(
                f"attention_mask and input_ids must have one shape, but their rows have lengths {shapes[1]} and "
                f"{shapes[0]}; leave the canvas out of the mask"
            )
        rows = [[t for t, keep in zip(row, keeps, strict=True) if keep] for row, keeps in zip(rows, mask, strict=True)]
    return rows, single


def is_part(prompt: Any) -> bool:
    """Whether this is a token id or a message, of which prompts are made, and no prompt."""
    return isinstance(prompt, Real) or (isinstance(prompt, Mapping) and _FORMS.isdisjoint(prompt))


def _form(prompt: Mapping[Any, Any]) -> str:
    forms = _FORMS.intersection(prompt)
    if len(forms) != 1:
        raise NapDecodeError(
            f"a mapping as prompt must have either messages or input_ids, but has {list(prompt)}; put chat messages in "
            "a list"
        )
    return next(iter(forms))


def _plain(values: Any) -> Any:
    """Tensors and arrays as (nested) lists; everything else as it is."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def _encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    prompt = _plain(prompt)
    if isinstance(prompt, Mapping) and _form(prompt) == "input_ids":
        rows, _ = encode_prompts(prompt, tokenizer)
        if len(rows) > 1:
            raise NapDecodeError(f"the input_ids of a single prompt must be one row, but are {len(rows)}")
        return rows[0]
    is_chat = isinstance(prompt[0] if isinstance(prompt, Sequence) and prompt else prompt, Mapping)
    if isinstance(prompt, str) or is_chat:
        if tokenizer is None:
            raise NapDecodeError("a prompt that is text or chat messages needs a tokenizer; pass one, or token ids")
        # Templates write their own special tokens, so the tokenizer must not add a second <bos>.
        text, options = (render_chat(prompt, tokenizer), {"add_special_tokens": False}) if is_chat else (prompt, {})
        return list(tokenizer(text, **options)["input_ids"])
    if isinstance(prompt, Sequence) and all(map(is_whole, prompt)):
        return [int(t) for t in prompt]
    raise NapDecodeError(
        f"a prompt must be text, chat messages, or a list or 1-D tensor of token ids, but is {prompt!r:.80}"
    )


def render_chat(chat: Sequence[Any] | Mapping[str, Any], tokenizer: Any) -> str:
    """A chat by the tokenizer's template; a last message of the assistant's is left open, others are to be answered.

    Args:
        chat: messages, or a mapping of ``messages`` and options of the template.  Of these, ``add_generation_prompt``
            and ``continue_final_message`` say otherwise how the chat goes on, if at all.
        tokenizer: has ``apply_chat_template``.

    Example:
        >>> from nap_decode import demo
        >>> tokenizer = demo.load()[1]
        >>> tokenizer.chat_template = "{% for m in messages %}({{ m.role }}) {{ m.content }}. {% endfor %}"
        >>> render_chat([{"role": "user", "content": "1 2 ="}, {"role": "assistant", "content": "3"}], tokenizer)
        '(user) 1 2 =. (assistant) 3'
    """
    from jinja2 import TemplateError

    given = dict(chat) if isinstance(chat, Mapping) else {"messages": chat}
    options = {name: value for name, value in given.items() if value is not None}
    messages = _check_messages(options.pop("messages", None))
    is_answered, is_continued = options.pop("add_generation_prompt", None), options.pop("continue_final_message", None)
    if is_continued is None:
        is_continued = not is_answered and messages[-1]["role"] == "assistant"
    if is_answered is None:
        is_answered = not is_continued
    if is_answered and is_continued:
        raise NapDecodeError("a chat is either continued (continue_final_message) or answered (add_generation_prompt)")
    _check_options(options, tokenizer)
    if is_continued:
        messages[-1] = _mark_end(messages[-1])
    try:
        options |= {"tokenize": False, "add_generation_prompt": is_answered}
        text = str(tokenizer.apply_chat_template(messages, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise NapDecodeError(f"the tokenizer's chat template does not render {given!r:.160}: {error}") from error
    if not is_continued:
        return text
    before, mark, behind = text.rpartition(_MARK)
    if not mark or _MARK.lower() in before.lower():
        raise NapDecodeError(
            f"the chat cannot be continued, because the template does not write its end just once: {given!r:.160}"
        )
    # A template that trims messages would have trimmed the end of this one, too.
    return before if behind.startswith(" ") else before.rstrip()


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise NapDecodeError(f"messages of a chat must be a list of at least one, but are {messages!r:.80}")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise NapDecodeError(
                f"a chat message must be a mapping such as {{'role': 'user', 'content': '...'}}, but is {message!r:.80}"
            )
    return [dict(message) for message in messages]


def _check_options(options: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise unless the template mentions every option: it would pass over others without a word."""
    templates = getattr(tokenizer, "chat_template", None), options.get("chat_template")
    if templates == (None, None):
        raise NapDecodeError("the prompt is chat messages, but the tokenizer has no chat template; pass text or ids")
    for name in options:
        if name in _TOKENIZING:
            raise NapDecodeError(f"{name} cannot be given with a chat, which is rendered as text, then tokenized")
        if name != "chat_template" and not re.search(rf"\b{re.escape(str(name))}\b", str(templates)):
            raise NapDecodeError(f"the tokenizer's chat template has no option {name!r}; leave it out")


def _mark_end(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with a mark where it is to be continued, as transformers itself does since 4.57.

    Releases before look for the text itself, which may stand in the template, too, and lose spaces at its end.
    """
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}{_MARK} "}
    parts = [*content] if isinstance(content, Sequence) else []
    for number, part in reversed([*enumerate(parts)]):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[number] = {**part, "text": f"{part['text']}{_MARK} "}
            return {**message, "content": parts}
    raise NapDecodeError(
        f"the chat's last message has no text to be continued: {message!r:.80}; add the message that is to be "
        "answered, or add_generation_prompt=True beside the messages"
    )
