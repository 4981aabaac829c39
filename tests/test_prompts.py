from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nap_decode import AnyOrderScheduler, CanvasTemplate, Decoder, Denoiser, NapDecodeError, Sampler
from nap_decode.bulk import BulkDecoder
from nap_decode.measure.likelihood import chain_log_likelihood
from nap_decode.prompts import encode_prompts, render_chat

MARKS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 57)
"""Whether transformers marks where a message is to be continued, too."""
TEMPLATES = {
    "plain": "<{{ m['role'] }}> {{ m['content'] }} <end> ",
    "trimming": "<{{ m['role'] }}>\n{{ m['content'] | trim }}<end>\n",
    "parts": "<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ p['text'] }}{% endfor %}{% endif %}<end>",
}
USER = {"role": "user", "content": "2+2?"}


def tokenizer_of(template: str | None, extra: str = "") -> PreTrainedTokenizerFast:
    """Words, each a token, with a <bos> before every text."""
    words = ["<pad>", "<mask>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>", "<system>", "<end>"]
    words += ["2+2?", "The", "answer", "is", "4", "e"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "mask", "eos", "bos", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    if template is not None:
        start, stop = "{{ bos_token }} {% for m in messages %}", "{% endfor %}"
        answer = "{% if add_generation_prompt %}<assistant>{% endif %}"
        tokenizer.chat_template = start + template + stop + answer + extra
    return tokenizer


def says(text):
    return {"role": "assistant", "content": text}


class TestContinued:
    @pytest.mark.parametrize("template", TEMPLATES)
    @pytest.mark.parametrize("text", ["The answer is", "The answer is ", " The answer", "e", "<end>", "2+2?", "", "\n"])
    def test_the_last_message_is_left_open(self, template, text):
        tokenizer = tokenizer_of(TEMPLATES[template])
        rendered = render_chat([USER, says(text)], tokenizer)
        closed = tokenizer.apply_chat_template([USER, says(text)], tokenize=False)
        assert closed.startswith(rendered)
        assert closed[len(rendered) :].strip() == "<end>"
        assert rendered.endswith(text.strip() if template == "trimming" else text)
        if MARKS:
            theirs = tokenizer.apply_chat_template([USER, says(text)], tokenize=False, continue_final_message=True)
            assert rendered == theirs

    def test_a_message_of_parts(self):
        parts = [
            {"type": "text", "text": "The answer"},
            {"type": "text", "text": " is"},
            {"type": "image", "text": None},
        ]
        tokenizer = tokenizer_of(TEMPLATES["parts"].replace("p['text']", "p['text'] or ''"))
        assert render_chat([USER, says(parts)], tokenizer).endswith("<assistant>The answer is")
        assert parts[1]["text"] == " is"  # what was given is left as it was

    @pytest.mark.parametrize("role", ["user", "system", "tool"])
    def test_any_other_is_answered(self, role):
        tokenizer = tokenizer_of(TEMPLATES["plain"])
        rendered = render_chat([{"role": role, "content": "2+2?"}], tokenizer)
        assert rendered == f"<bos> <{role}> 2+2? <end> <assistant>"

    @pytest.mark.parametrize(
        ("options", "ends"),
        [
            ({}, "<assistant> 4"),
            ({"add_generation_prompt": True}, "4 <end> <assistant>"),
            ({"continue_final_message": False}, "4 <end> <assistant>"),
            ({"add_generation_prompt": False, "continue_final_message": False}, "4 <end> "),
            ({"add_generation_prompt": False}, "<assistant> 4"),
        ],
    )
    def test_how_it_goes_on_can_be_said(self, options, ends):
        assert render_chat({"messages": [USER, says("4")]} | options, tokenizer_of(TEMPLATES["plain"])).endswith(ends)

    @pytest.mark.parametrize("content", [None, [], [{"type": "image"}], 4])
    def test_nothing_to_continue(self, content):
        with pytest.raises(NapDecodeError, match=r"has no text to be continued.*add_generation_prompt=True"):
            render_chat([USER, says(content)], tokenizer_of(TEMPLATES["plain"]))

    def test_a_template_that_hides_it(self):
        with pytest.raises(NapDecodeError, match="the template does not write its end just once"):
            render_chat([USER, says("4")], tokenizer_of("{{ m['role'] }}"))


class TestOptions:
    TEMPLATE = TEMPLATES["plain"]
    EXTRA = (
        "{% if enable_thinking is defined and not enable_thinking %}|empty thought{% endif %}"
        "{% for t in tools or [] %}|{{ t['function']['name'] }}{% endfor %}"
        "{% for d in documents or [] %}|{{ d['title'] }}{% endfor %}"
    )

    @pytest.mark.parametrize(
        ("options", "ends"),
        [
            ({}, "<assistant>"),
            ({"enable_thinking": True}, "<assistant>"),
            ({"enable_thinking": False}, "|empty thought"),
            ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "|add"),
            ({"documents": [{"title": "sums", "text": "1 + 1"}]}, "|sums"),
            ({"tools": None, "documents": None}, "<assistant>"),
            ({"chat_template": "{{ messages[0]['content'] }}!"}, "2+2?!"),
        ],
    )
    def test_reach_the_template(self, options, ends):
        chat = {"messages": [USER]} | options
        tokenizer = tokenizer_of(self.TEMPLATE, self.EXTRA)
        assert render_chat(chat, tokenizer).endswith(ends)
        assert encode_prompts([chat, "4"], tokenizer)[0][0] == encode_prompts(chat, tokenizer)[0][0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"enable_thinkin": False}, "has no option 'enable_thinkin'"),
            ({"thinking": False}, "has no option 'thinking'"),
            ({"tokenize": True}, "tokenize cannot be given with a chat"),
            ({"return_tensors": "pt"}, "return_tensors cannot be given with a chat"),
            ({"add_generation_prompt": True, "continue_final_message": True}, "either continued .* or answered"),
            ({"tools": [7]}, "does not render"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(NapDecodeError, match=message):
            render_chat({"messages": [USER]} | options, tokenizer_of(self.TEMPLATE, self.EXTRA))

    def test_tools_that_the_template_would_drop(self):
        with pytest.raises(NapDecodeError, match="has no option 'tools'"):
            render_chat({"messages": [USER], "tools": []}, tokenizer_of(self.TEMPLATE))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages of a chat must be a list of at least one"),
        ("2+2?", "messages of a chat must be a list of at least one"),
        (None, "messages of a chat must be a list of at least one"),
        ([USER, "4"], "a chat message must be a mapping"),
        ([{"content": "4"}], "a chat message must be a mapping"),
    ],
)
def test_no_messages(messages, message):
    with pytest.raises(NapDecodeError, match=message):
        render_chat({"messages": messages}, tokenizer_of(TEMPLATES["plain"]))


def test_without_a_template():
    with pytest.raises(NapDecodeError, match="the tokenizer has no chat template"):
        render_chat([USER], tokenizer_of(None))


@pytest.mark.parametrize("template", ["{{ raise_exception('no system message') }}", "{{ m.content + m.missing }}"])
def test_a_template_that_refuses(template):
    with pytest.raises(NapDecodeError, match=r"chat template does not render.*(no system message|missing)"):
        render_chat([USER], tokenizer_of(template))


def test_one_beginning():
    """Which the template writes, and the tokenizer would, too."""
    assert encode_prompts([USER], tokenizer_of(TEMPLATES["plain"]))[0] == [[3, 5, 9, 8, 6]]


PLACES = {
    "call": lambda sampler, chat, _: sampler(chat).sequences[0, :-1],
    "batch": lambda sampler, chat, _: sampler([chat, "4"]).sequences[0, :-1],
    "stream": lambda sampler, chat, _: next(sampler.stream([chat], max_batch=1)).sequences[0, :-1],
    "infill": lambda sampler, chat, _: sampler.infill(chat).sequences[0],
    "bulk": lambda sampler, chat, path: BulkDecoder(sampler, path)([{"id": 1, "prompt": chat}])["tokens"],
    "likelihood": lambda sampler, chat, _: chain_log_likelihood(sampler.denoiser, [chat], [[13]]),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_chats_go_in(place, tmp_path):
    if place == "bulk":
        pytest.importorskip("pyarrow")
    seen = []

    def model(ids, mask):
        seen.append(ids[0].tolist())
        return torch.zeros(*ids.shape, 15)

    tokenizer = tokenizer_of(TEMPLATES["plain"], TestOptions.EXTRA.replace("|", " "))
    denoiser = Denoiser(model, tokenizer)
    sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler()), template=CanvasTemplate.plain(1))
    text = "The <mask>" if place == "infill" else "The answer is"
    seen.clear()
    PLACES[place](sampler, {"messages": [USER, says(text)], "enable_thinking": True}, tmp_path)
    prompt = [3, 5, 9, 8, 6, 10, 11, 12]
    assert any(row[: len(prompt)] == ([*prompt[:-2], 1] if place == "infill" else prompt) for row in seen)
    assert not any(8 in row[5:] for row in seen)
