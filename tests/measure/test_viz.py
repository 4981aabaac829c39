from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MASK

from nap_decode import ARnessMeter, Canvas, CanvasTemplate, DecodeTrace, NapDecodeError, SamplerOutput
from nap_decode.measure import viz


@pytest.fixture(scope="module")
def plt():
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra viz")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@pytest.fixture
def ax(plt):
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def trace(*rows, block=None, confidence=None, names=("completion",), closed=None, tokens=None):
    step = torch.tensor(rows)
    return DecodeTrace(
        tokens=torch.full_like(step, 9) if tokens is None else torch.tensor(tokens),
        block=torch.where(step >= 0, 0, -1) if block is None else torch.tensor(block),
        step=step,
        confidence=torch.full(step.shape, 0.5) if confidence is None else torch.tensor(confidence),
        forward_passes=step.amax(1) + 1,
        block_names=names,
        mask_token_id=MASK,
        closed=None if closed is None else torch.tensor(closed),
    )


TWO = trace(
    [-1, 2, 0, -1, 1, 2, 0],
    [-1, 0, 1, -1, 2, 3, 4],
    block=[[-1, 0, 0, -1, 1, 1, 1]] * 2,
    confidence=[[math.nan, 0.1, 0.2, math.nan, 0.3, math.nan, 0.5]] * 2,
    names=("first", "second"),
)


def output(record):
    canvas = Canvas(
        torch.where(record.block >= 0, MASK, record.tokens),
        record.block,
        torch.ones_like(record.tokens),
        torch.arange(record.tokens.shape[1]).expand(record.tokens.shape) == 0,
        record.block_names,
        (False,) * len(record.block_names),
    )
    return SamplerOutput(record.tokens, canvas, record, 3, 1.0)


def points(ax):
    """All points of all scatters, as {position: step}."""
    pairs = [tuple(map(float, pair)) for part in ax.collections for pair in part.get_offsets()]
    assert len(set(pairs)) == len(pairs)
    return dict(pairs)


class TestOrder:
    def test_a_point_for_every_commit(self, ax):
        assert viz.plot_order(TWO, ax=ax) is ax
        assert points(ax) == {0: 2, 1: 0, 2: 1, 3: 2, 4: 0}

    def test_another_row(self, ax):
        viz.plot_order(TWO, 1, ax=ax)
        assert points(ax) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}

    def test_blocks_are_shaded_named_and_coloured(self, ax):
        viz.plot_order(TWO, ax=ax)
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        assert spans == [(-0.5, 1.5), (1.5, 4.5)]
        (top,) = ax.child_axes
        names = {tick: label.get_text() for tick, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True)}
        assert names == {0.5: "first", 3.0: "second"}
        colours = [part.get_facecolors()[0].tolist() for part in ax.collections]
        assert len(colours) == 2
        assert colours[0] != colours[1]

    def test_left_to_right_lies_on_the_diagonal(self, ax):
        viz.plot_order(TWO, 1, ax=ax)
        (line,) = ax.get_lines()
        x, y = line.get_data()
        assert all(np.interp(position, x, y) == step for position, step in points(ax).items())

    def test_by_confidence(self, ax):
        viz.plot_order(TWO, ax=ax, color_by="confidence")
        (part,) = ax.collections
        values = part.get_array()
        assert np.ma.getmaskarray(values).tolist() == [False, False, False, True, False]
        assert values.compressed().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5])
        assert [other.get_ylabel() for other in ax.figure.axes] == ["step", "confidence"]

    def test_masks_that_are_left_and_slots_that_were_filled(self, ax):
        record = trace([0, -1, 1, 1], block=[[0] * 4], closed=[[False, False, False, True]])
        viz.plot_order(record, ax=ax)
        decoded, filled = (part.get_offsets().tolist() for part in ax.collections)
        assert decoded == [[0, 0], [2, 1]]
        assert filled == [[3, 1]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["filled, not decoded"]

    def test_a_dollar_in_a_name_and_many_blocks(self, ax):
        record = trace([0, 1, 2], block=[[0, 1, 2]], names=("$\\frac", "$x$", "b"))
        viz.plot_order(record, ax=ax)
        ax.figure.canvas.draw()
        count = 400
        crowd = trace(list(range(count)), block=[list(range(count))], names=tuple(map(str, range(count))))
        ax.figure.clear()
        other = viz.plot_order(crowd, ax=ax.figure.add_subplot())
        assert not other.child_axes  # names would cover each other

    def test_names_that_would_touch_are_aslant(self, plt, ax):
        block = [[0] * 30 + [1] * 2 + [2] * 2]
        record = trace(list(range(34)), block=block, names=("a long name", "another one", "and one more"))
        viz.plot_order(record, ax=ax)
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in ax.child_axes[0].get_xticklabels()]
        assert {label.get_rotation() for label in ax.child_axes[0].get_xticklabels()} == {35}
        assert len(boxes) == 3

    def test_nothing_was_committed(self, ax):
        viz.plot_order(trace([-1, -1], block=[[0, 0]]), ax=ax)
        assert points(ax) == {}

    def test_from_an_output_or_a_trace_in_axes_of_its_own(self, plt):
        for drawn in (viz.plot_order(TWO, 1), viz.plot_order(output(TWO), 1)):
            assert points(drawn) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
            plt.close(drawn.figure)

    def test_errors(self, ax):
        with pytest.raises(NapDecodeError, match="row must be below 2, the number of rows, but is 2"):
            viz.plot_order(TWO, 2, ax=ax)
        with pytest.raises(NapDecodeError, match=r"no way to colour 'confidenc'. Did you mean 'confidence'"):
            viz.plot_order(TWO, ax=ax, color_by="confidenc")
        with pytest.raises(NapDecodeError, match="a picture needs a SamplerOutput or a DecodeTrace, but got 5"):
            viz.plot_order(5, ax=ax)


class TestRunningARness:
    def test_by_hand(self):
        # position     0    1    2    3      order 2 0 | 3 1
        # step         0    1    0    1      masked below: 2, 0, 1, 0
        # confidence  .5   .6   .9   .9
        got = viz.running_arness(trace([0, 1, 0, 1], confidence=[[0.5, 0.6, 0.9, 0.9]]), ks=(1, 2))
        assert got.steps.tolist() == [1, 2]
        assert got.global_at[1].tolist() == [1 / 2, 2 / 4]
        assert got.global_at[2].tolist() == [1 / 2, 3 / 4]
        assert got.local_at[1].tolist() == [0, 0]
        assert got.local_at[2].tolist()[1:] == [0]
        assert math.isnan(got.local_at[2][0])

    def test_left_to_right(self):
        got = viz.running_arness(trace(list(range(9))), ks=(3,))
        assert got.global_at[3].tolist() == [1.0] * 9
        assert np.isnan(got.local_at[3]).tolist() == [True] * 3 + [False] * 6
        assert got.local_at[3][3:].tolist() == [1.0] * 6

    def test_a_shorter_row_keeps_its_value(self):
        got = viz.running_arness(trace([0, 1, 2, 3], [1, 0, 0, 0]))
        assert got.global_at[1].tolist() == pytest.approx([(1 + 0) / 2, *[(1 + 1 / 4) / 2] * 3])
        assert got.local_at[1].tolist() == pytest.approx([1, (1 + 2 / 3) / 2, (1 + 2 / 3) / 2, (1 + 2 / 3) / 2])

    @settings(max_examples=100)
    @given(st.data())
    def test_it_ends_where_the_meter_does(self, data):
        rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 12))
        table = st.lists(st.lists(st.integers(0, 5), min_size=length, max_size=length), min_size=rows, max_size=rows)
        steps, blocks = data.draw(table), [[j % 4 // 2 for j in range(length)]] * rows
        levels = [[level / 5 for level in row] for row in data.draw(table)]
        record = trace(*steps, block=blocks, confidence=levels, names=("a", "b"))
        meter = ARnessMeter(ks=(1, 2))
        meter.update(record)
        expected = meter.compute()
        for block, part in ((None, expected), ("b", expected.blocks["b"])):
            got = viz.running_arness(record, ks=(1, 2), block=block)
            for k in (1, 2):
                assert got.global_at[k][-1] == pytest.approx(part.global_at[k])
                assert got.local_at[k][-1] == pytest.approx(part.local_at[k], nan_ok=True)

    def test_what_was_filled_or_is_masked_does_not_count(self):
        record = trace([0, 1, -1, 9], block=[[0] * 4], closed=[[False] * 3 + [True]])
        got = viz.running_arness(record)
        assert got.steps.tolist() == [1, 2]
        assert got.global_at[1].tolist() == [1, 1]

    def test_errors(self):
        with pytest.raises(NapDecodeError, match="k must be a whole number of at least 1, but is 0"):
            viz.running_arness(TWO, ks=(0,))
        with pytest.raises(NapDecodeError, match=r"there is no block 'secnd'. Did you mean 'second'"):
            viz.running_arness(TWO, block="secnd")
        with pytest.raises(NapDecodeError, match="nothing was decoded there"):
            viz.running_arness(trace([-1, -1], block=[[0, 0]]))


class TestPlotARness:
    def test_lines_are_the_measures(self, ax):
        viz.plot_arness(TWO, ks=(1, 2), block="second", ax=ax)
        expected = viz.running_arness(TWO, ks=(1, 2), block="second")
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert list(lines) == ["Global@1", "Local@1", "Global@2", "Local@2"]
        for k in (1, 2):
            np.testing.assert_array_equal(lines[f"Global@{k}"].get_xdata(), expected.steps)
            np.testing.assert_array_equal(lines[f"Global@{k}"].get_ydata(), expected.global_at[k])
            np.testing.assert_array_equal(lines[f"Local@{k}"].get_ydata(), expected.local_at[k])
            assert lines[f"Local@{k}"].get_color() == lines[f"Global@{k}"].get_color()
            assert lines[f"Local@{k}"].get_linestyle() != lines[f"Global@{k}"].get_linestyle()
        assert ax.get_ylabel() == "AR-ness so far, second"

    def test_several_decoders(self, ax):
        viz.plot_arness({"$one$": TWO, "two": output(TWO)}, ks=(1, 2), ax=ax)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[:2] == ["$one$, Global@1", "$one$, Local@1"]
        assert len(labels) == 8
        assert len({line.get_color() for line in ax.get_lines()}) == 2
        assert len({line.get_marker() for line in ax.get_lines()}) == 2
        ax.figure.canvas.draw()

    def test_errors(self, ax):
        with pytest.raises(NapDecodeError, match="nothing to draw"):
            viz.plot_arness({}, ax=ax)


class TestFrontier:
    def test_lines_labels_and_errors(self, ax):
        viz.plot_frontier({"a": [(4, 70), (1, 80), (2, 80, 1.5)], "b": [(3, 90)]}, ax=ax)
        curve, lost, other, none = ax.get_lines()[:4] if len(ax.get_lines()) == 4 else _without_bars(ax)
        assert np.column_stack(curve.get_data()).tolist() == [[1, 80], [2, 80], [4, 70]]
        assert np.column_stack(lost.get_data()).tolist() == [[4, 70]]
        assert np.column_stack(other.get_data()).tolist() == [[3, 90]]
        assert len(none.get_xdata()) == 0
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        a = 80 + 80 * math.exp(-3 * (1 - 80 / 90))  # measured against the best of all, which is b's
        assert labels == [f"a (AUP {a:.0f})", "b (AUP 270)"]
        (bars,) = ax.containers
        segments = bars.lines[2][0].get_segments()
        assert [segment[:, 1].tolist() for segment in segments] == [[80, 80], [78.5, 81.5], [70, 70]]

    def test_the_best_may_be_given(self, ax):
        viz.plot_frontier({"a": [(1, 80), (2, 80)]}, best=100, ax=ax)
        label = ax.get_legend().get_texts()[0].get_text()
        assert label == f"a (AUP {80 + 80 * math.exp(-0.6):.0f})"

    def test_errors(self, ax):
        with pytest.raises(NapDecodeError, match="nothing to draw"):
            viz.plot_frontier({}, ax=ax)
        with pytest.raises(NapDecodeError, match=r"must be in percent, but the highest is 0.5"):
            viz.plot_frontier({"a": [(1, 0.5)]}, ax=ax)


def _without_bars(ax):
    caps = {id(line) for bars in ax.containers for line in bars.lines[1]}
    return [line for line in ax.get_lines() if id(line) not in caps]


class TestAnimation:
    def test_html_needs_no_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        animation = viz.animate(TWO, 1, seconds_per_step=0.5)
        assert animation._repr_html_() == animation.to_html()
        assert ">step 5 of 5<" in animation.to_html()
        animation.save(tmp_path / "a.html")
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert animation.to_html() in page
        with pytest.raises(NapDecodeError, match=r"needs matplotlib.*pip install 'nap_decode\[viz\]'"):
            animation.save(tmp_path / "a.gif")
        with pytest.raises(NapDecodeError, match=r"needs matplotlib.*pip install 'nap_decode\[viz\]'"):
            viz.plot_order(TWO)

    def test_it_has_the_texts_of_the_output(self):
        class Letters:
            def decode(self, ids, skip_special_tokens=False):
                return "".join(chr(97 + i) for i in ids)

        assert ">j</span>" in viz.animate(TWO, tokenizer=Letters()).to_html()
        assert ">9</span>" in viz.animate(output(TWO), seconds_per_step=1).to_html()

    def test_a_gif_has_a_frame_for_every_step(self, plt, tmp_path):
        image = pytest.importorskip("PIL.Image")
        viz.animate(TWO, 1, seconds_per_step=0.2).save(tmp_path / "a.gif", dpi=50)
        with image.open(tmp_path / "a.gif") as gif:
            durations = []
            for frame in range(gif.n_frames):
                gif.seek(frame)
                durations.append(gif.info["duration"])
        assert durations[:5] == [200] * 5  # nothing yet, and what four steps committed
        assert sum(durations[5:]) == 200 + 1600  # the end, for a while
        assert not plt.get_fignums()

    def test_frames(self, plt):
        from nap_decode.measure.viz.animation import _MASKED, _Drawing
        from nap_decode.results.html import lay_out

        drawing = _Drawing(lay_out(TWO, 1))
        faces = []
        for done in range(6):
            drawing.show(max(done - 1, 0), done, 5)
            faces.append([tuple(face[:3]) for face in drawing.cells.get_facecolors()])
            assert [text.get_visible() for text in drawing.texts] == [step < done for step in range(5)]
            fresh = [tuple(edge[:3]) == (0, 0, 0) for edge in drawing.cells.get_edgecolors()]
            assert fresh == [step == done - 1 and done < 5 for step in range(5)]
            assert drawing.title.get_text() == f"step {done} of 5"
        assert faces[0] == [_MASKED] * 5
        assert _MASKED not in faces[5]
        assert len(set(faces[5])) == 5

    def test_a_frame_marks_what_is_new_since_the_one_before(self, plt, tmp_path, monkeypatch):
        from nap_decode.measure.viz.animation import _Drawing

        calls, show = [], _Drawing.show
        monkeypatch.setattr(_Drawing, "show", lambda self, *steps: (calls.append(steps), show(self, *steps)))
        viz.animate(TWO, 1, seconds_per_step=1).save(tmp_path / "a.gif", dpi=20)
        assert calls == [(0, 0, 5), (0, 1, 5), (1, 2, 5), (2, 3, 5), (3, 4, 5), (4, 5, 5), (5, 5, 5), (5, 5, 5)]

    def test_a_long_decode_has_few_frames_and_no_texts(self, plt, tmp_path):
        image = pytest.importorskip("PIL.Image")
        record = trace(list(range(500)))
        viz.animate(record, seconds_per_step=0.02).save(tmp_path / "a.gif", dpi=20)
        with image.open(tmp_path / "a.gif") as gif:
            assert gif.n_frames <= 41

    def test_letters_that_the_font_lacks_give_no_warning(self, plt, tmp_path):
        class Chinese:
            def decode(self, ids, skip_special_tokens=False):
                return "$\\frac 中\n" * len(ids)

        viz.animate(TWO, tokenizer=Chinese()).save(tmp_path / "a.gif", dpi=30)

    def test_errors(self, tmp_path):
        with pytest.raises(NapDecodeError, match=r"saved as .gif or .html, but the path is '.*a.mp4'"):
            viz.animate(TWO).save(tmp_path / "a.mp4")
        with pytest.raises(NapDecodeError, match="row must be below 2"):
            viz.animate(TWO, 2)
        with pytest.raises(NapDecodeError, match=r"seconds_per_step must be a number from 0.02 to 60, but is 0"):
            viz.animate(TWO, seconds_per_step=0)


def test_a_plain_template_has_one_block(ax):
    canvas = Canvas.from_prompts([[5, 6]], CanvasTemplate.plain(3), mask_token_id=MASK)
    record = trace([-1, -1, 0, 1, 2], block=canvas.block.tolist(), names=canvas.block_names)
    viz.plot_order(record, ax=ax)
    assert points(ax) == {0: 0, 1: 1, 2: 2}


def test_meters_and_pictures_are_imported_without_what_draws_or_loads():
    code = "import sys; from nap_decode.measure import viz; print({'matplotlib', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
