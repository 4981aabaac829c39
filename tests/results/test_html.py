from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK, Words

from nap_decode import Canvas, CanvasTemplate, DecodeTrace, NapDecodeError, SamplerOutput
from nap_decode.measure.viz import animate
from nap_decode.results.html import lay_out, render, step_colour, to_page
from nap_decode.results.texts import make_visible

END = 2
ALLOWED = {"div", "style", "p", "b", "span", "wbr"}
PLAYER = ALLOWED | {"button", "input", "output", "script"}


class Page(HTMLParser):
    """Every element with its attributes and the text directly inside."""

    def __init__(self, page):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(page)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in ("br", "wbr", "input", "meta"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1]["text"] += data

    @property
    def slots(self):
        return [element for element in self.elements if "title" in element]

    def texts(self, kind):
        return [element["text"] for element in self.elements if kind in element.get("class", "").split()]


class Texts:
    """A tokenizer of given texts."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.texts[i] for i in ids)


def trace(step, block=None, tokens=None, names=("completion",), closed=None, ends=(), confidence=0.5):
    step = torch.tensor(step)
    return DecodeTrace(
        tokens=torch.full_like(step, 9) if tokens is None else torch.tensor(tokens),
        block=torch.where(step >= 0, 0, -1) if block is None else torch.tensor(block),
        step=step,
        confidence=torch.full(step.shape, confidence),
        forward_passes=(step.amax(1) + 1).clamp(min=0),
        block_names=names,
        mask_token_id=MASK,
        end_token_ids=ends,
        closed=None if closed is None else torch.tensor(closed),
    )


def nap_output(tokenizer=None):
    template = CanvasTemplate.nap(
        2, path_length=3, summary_length=2, path_header=["10", "11 12"], summary_header="13", summary_footer="14"
    )
    canvas = Canvas.from_prompts([[5, 6], [5]], template, mask_token_id=MASK, tokenizer=Words())
    tokens = torch.tensor(
        [[5, 6, 10, 7, 8, 2, 11, 12, 8, 2, 9, 13, 9, 2, 14], [5, 10, 7, 7, 7, 11, 12, 8, 8, 8, 13, 9, 9, 14, 0]]
    )
    step = torch.where(canvas.decodable, canvas.decodable.cumsum(1) - 1, -1)
    confidence = torch.where(canvas.decodable, 0.25, torch.nan)
    passes = torch.tensor([8, 8])
    record = DecodeTrace(tokens, canvas.block, step, confidence, passes, canvas.block_names, MASK, (END,))
    return SamplerOutput(tokens, canvas, record, 8, 1.0, None, tokenizer)


def test_an_output_with_texts():
    out = nap_output(Words())
    page = Page(out._repr_html_())
    assert {element["tag"] for element in page.elements} == ALLOWED
    assert page.texts("nap-prompt") == ["5 6", "5"]  # no padding
    assert page.texts("nap-name") == ["path 1", "path 2", "summary"] * 2
    assert page.texts("nap-given") == ["10", "11 12", "13", "14"] * 2
    assert [slot["text"] for slot in page.slots] == list("7828299277788899")
    assert page.slots[0]["title"] == "step 0, confidence 0.25, position 3, id 7"
    assert page.slots[8]["title"] == "step 0, confidence 0.25, position 2, id 7"
    assert [slot["text"] for slot in page.slots if slot.get("class") == "nap-behind"] == ["2", "2", "9", "2"]
    lines = [element["text"] for element in page.elements if element["tag"] == "p"]
    assert lines[0] == "SamplerOutput(2 rows, 8 forward passes, 1 s)"
    assert lines[1].startswith(": 8 forward passes, 0.50 tokens per forward pass, 4 of 8 slots before an end token.")
    assert [e["text"] for e in page.elements if e["tag"] == "b"] == ["row 0", "row 1"]
    assert page.texts("nap-key") == list("01234567") * 2


def test_it_says_the_same_tokens_per_forward_as_the_output():
    out = nap_output(Words())
    page = out._repr_html_()
    for value in out.tokens_per_forward:
        assert f"{value:.2f} tokens per forward pass" in page


def test_without_a_tokenizer_there_are_ids():
    page = Page(nap_output()._repr_html_())
    assert page.texts("nap-prompt") == ["5 6", "5"]
    assert [slot["text"] for slot in page.slots][:3] == ["7", "8", "2"]


def test_a_trace_alone():
    page = Page(render(trace([[-1, 1, 0]], confidence=torch.nan)))
    assert page.texts("nap-prompt") == ["9"]
    assert [slot["title"] for slot in page.slots] == [
        "step 1, no confidence, position 1, id 9",
        "step 0, no confidence, position 2, id 9",
    ]


def test_colours_are_those_of_the_steps():
    page = Page(render(trace([[3, 0, 1, 1, 2]])))
    styles = [slot["style"] for slot in page.slots]
    assert styles[2] == styles[3]
    assert len(set(styles)) == 4
    red, green, blue = step_colour(3, 4)
    assert styles[0] == f"background:rgba({red},{green},{blue},.5)"
    keys = {e["text"]: e["style"] for e in page.elements if e.get("class") == "nap-key"}
    assert keys == {"3": styles[0], "0": styles[1], "1": styles[2], "2": styles[4]}


@given(st.integers(1, 150))
def test_every_step_of_a_decode_has_a_colour(num_steps):
    colours = [step_colour(step, num_steps) for step in range(num_steps)]
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    assert len(set(colours)) == len(colours)


def test_masks_that_are_left_and_slots_that_were_filled():
    page = Page(
        render(trace([[0, -1, 1]], [[0, 0, 0]], [[9, MASK, 0]], closed=[[False, False, True]]), tokenizer=Words())
    )
    first, masked, filled = page.slots
    assert (masked["class"], masked["title"]) == ("nap-mask", "still masked, position 1, id 1")
    assert "style" not in masked
    assert filled["title"] == "filled at step 1, not decoded, position 2, id 0"
    assert "1 still masked" in next(e["text"] for e in page.elements if e["tag"] == "p")
    assert first["title"].startswith("step 0")


def test_nothing_committed_at_all():
    page = Page(animate(trace([[-1, -1]], [[0, 0]])).to_html())
    assert [slot["class"] for slot in page.slots] == ["nap-mask"] * 2


def test_infill_has_its_holes_in_line():
    canvas = Canvas.from_infill([[5, MASK, 7, MASK]], mask_token_id=MASK)
    record = trace([[-1, 0, -1, 1]], canvas.block.tolist(), [[5, 6, 7, 8]], canvas.block_names)
    page = Page(render(record, canvas=canvas, tokenizer=Words()))
    assert page.texts("nap-prompt") == ["5", "7"]
    assert page.texts("nap-name") == ["hole 1", "hole 2"]
    assert sum("nap-hole" in e.get("class", "") for e in page.elements) == 2
    assert "nap-hole" not in render(record)[render(record).index("</style>") :]


class TestBounds:
    def test_rows(self):
        record = trace([[0, 1]] * 6)
        page = render(record)
        assert page.count("<b>row") == 4
        assert "2 more rows are left out; nap_decode.results.html.render(rows=...) shows them" in page
        chosen = render(record, rows=[5, 1])
        assert re.findall("<b>row (.)", chosen) == ["5", "1"]
        assert "left out" not in chosen

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 80))
    def test_slots(self, lengths, most):
        block = [j for j, length in enumerate(lengths) for _ in range(length)]
        record = trace([list(range(len(block)))], [block], names=tuple(map(str, range(len(lengths)))))
        runs = lay_out(record, max_slots=most)
        assert sum(len(run.slots) for run in runs) <= most
        assert [len(run.slots) + run.left_out for run in runs] == lengths
        if len(block) <= most:
            assert not any(run.left_out for run in runs)
        else:
            assert f"… {runs[-1].left_out} more slots are not shown" in render(record, max_slots=most)

    def test_a_long_prompt_keeps_its_end(self):
        record = trace([[-1] * 1000 + [0]], tokens=[[*range(1000), 5]])
        page = Page(render(record, max_prompt=3))
        assert page.texts("nap-prompt") == ["997 998 999"]
        assert page.texts("nap-note") == [" … 997 tokens before are not shown "]

    def test_the_papers_canvas_is_shown_whole_and_a_huge_batch_stays_small(self):
        assert len(Page(render(trace([list(range(1022))]))).slots) == 1022
        assert len(render(trace([list(range(5000))] * 50))) < 700_000

    def test_errors(self):
        record = trace([[0, 1]])
        with pytest.raises(NapDecodeError, match="row must be below 1, the number of rows, but is 1"):
            render(record, rows=[1])
        with pytest.raises(NapDecodeError, match="row must be a whole number of at least 0, but is -1"):
            lay_out(record, -1)
        with pytest.raises(NapDecodeError, match="max_slots must be a whole number of at least 1"):
            render(record, max_slots=0)
        with pytest.raises(NapDecodeError, match="max_prompt must be a whole number of at least 1"):
            render(record, max_prompt=0)


@settings(max_examples=60)
@given(
    st.lists(st.text(st.characters(), max_size=8), min_size=4, max_size=4),
    st.text(st.characters(), min_size=1, max_size=8),
)
def test_no_text_gets_out_of_its_element(texts, name):
    tokenizer = Texts("", "", *texts)
    record = trace([[-1, 0, 1, -1, 2]], tokens=[[2, 3, 4, 5, 4]], names=(name,), block=[[-1, 0, 0, -1, 0]])
    for page, allowed in (
        (render(record, tokenizer=tokenizer), ALLOWED),
        (animate(record, tokenizer=tokenizer).to_html(), PLAYER),
    ):
        page.encode()
        parsed = Page(page)
        assert {element["tag"] for element in parsed.elements} - {"br"} == allowed - {"b"}  # which is for batches
        attributes = {key for element in parsed.elements for key in element}
        known = {"tag", "text", "class", "style", "title", "data-step", "data-nap-player"}
        assert attributes <= known | {"type", "min", "max", "value", "aria-label", "hidden"}
        expected = [make_visible(text) or f"[{i}]" for i, text in ((3, texts[1]), (4, texts[2]), (4, texts[2]))]
        assert [slot["text"] for slot in parsed.slots] == [text.removesuffix("\n") for text in expected]
        assert page.count("<br>") == sum(text.endswith("\n") for text in expected)


def test_nasty_texts():
    nasty = "</style></script><img src=x onerror=alert(1)>&amp;\"'$x$"
    record = trace([[-1, 0]], tokens=[[2, 2]], names=(nasty,))
    for page in (
        render(record, tokenizer=Texts("", "", nasty), heading=nasty),
        animate(record, tokenizer=Texts("", "", nasty)).to_html(),
    ):
        assert "<img" not in page
        parsed = Page(page)
        assert parsed.slots[0]["text"] == nasty
        assert parsed.texts("nap-name") == [nasty]
        assert parsed.texts("nap-prompt") == [nasty]
        assert any(
            "mathjax_ignore" in element.get("class", "") for element in parsed.elements
        )  # or notebooks would typeset $x$


class TestPlayer:
    def test_slots_know_their_steps(self):
        page = Page(animate(trace([[-1, 2, 0, 1, 1]]), seconds_per_step=0.25).to_html())
        assert [slot["data-step"] for slot in page.slots] == ["2", "0", "1", "1"]
        bar = next(e for e in page.elements if e["tag"] == "input")
        assert (bar["min"], bar["max"], bar["value"]) == ("0", "3", "3")
        script = next(e for e in page.elements if e["tag"] == "script")["text"]
        assert "steps=3," in script
        assert "},250)}" in script
        assert f'"{page.elements[0]["data-nap-player"]}"' in script

    def test_nothing_is_loaded(self):
        page = to_page(animate(trace([[0, 1]])).to_html(), "a <title>")
        assert not re.search(r"https?:|//|src=|@import|url\(", page)
        assert "<title>a &lt;title&gt;</title>" in page

    def test_the_name_depends_on_the_contents_alone(self):
        one, again, other = (animate(trace([[0, step]])).to_html() for step in (1, 1, 2))
        assert one == again
        names = {re.search('data-nap-player="(.*?)"', page)[1] for page in (one, other)}
        assert len(names) == 2

    def test_a_row_of_a_batch(self):
        page = Page(animate(nap_output(), 1).to_html())
        assert [slot["text"] for slot in page.slots] == list("77788899")
        with pytest.raises(NapDecodeError, match="row must be below 2"):
            animate(nap_output(), 2)
