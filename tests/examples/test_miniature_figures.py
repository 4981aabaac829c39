import pytest
from study_results import make_all_results, make_result

from examples.miniature import figures
from examples.miniature.study import Estimate, Study

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that are drawn, as they are saved."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    pyplot.switch_backend("Agg")
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args))[1])
    return saved


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (figures.draw_layouts, {"three paths and a summary", "short chain alone", "long chain, own recipe"}),
        (figures.draw_decoders, {"any-order", "parallel-forced, three thirds", "one path after the other"}),
    ],
)
def test_curves(draw, names, drawn, tmp_path):
    draw(Study(make_all_results()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    (figure,) = drawn
    assert names <= {text.get_text() for text in figure.legends[0].get_texts()}
    for ax in figure.axes:
        assert ax.get_xlabel() in ("tokens per step", "forward passes")
        low, high = ax.get_ylim()
        assert low == 0  # an axis that begins higher makes differences look larger
        assert high >= 100


def test_a_curve_is_where_the_results_are(drawn, tmp_path):
    results = [make_result(kind="paths_best", value=value, correct=value) for value in (1, 8)]
    figures.draw_decoders(Study(results), tmp_path / "figure.png")
    line = drawn[0].axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [0, 3]  # doublings
    assert line.get_ydata().tolist() == [1, 8]
    (_, _, (bars,)) = drawn[0].axes[0].containers[0]
    errors = [Estimate.of([result]).error for result in results]
    ends = [(float(bar[0, 1]), float(bar[1, 1])) for bar in bars.get_segments()]
    assert ends == [pytest.approx((y - e, y + e)) for y, e in zip((1, 8), errors, strict=True)]


def test_the_cost_of_a_layout_is_its_forward_passes(drawn, tmp_path):
    results = [make_result(value=8, forward_passes=4.0, split=split) for split in ("tune", "test")]
    figures.draw_layouts(Study(results), tmp_path / "figure.png")
    by_tokens, by_passes = (ax.containers[0].lines[0].get_xdata().tolist() for ax in drawn[0].axes)
    assert (by_tokens, by_passes) == ([3], [2])


def test_arness(drawn, tmp_path):
    results = [make_result(kind="chain_best", value=1, arness_global=0.75, arness_local=0.5)]
    figures.draw_arness(Study(results), tmp_path / "figure.png")
    ax = drawn[0].axes[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["any-order"]
    assert [container.lines[0].get_xdata()[0] for container in ax.containers] == [0.75, 0.5]


def test_orders(drawn, tmp_path):
    figures.draw_orders(tmp_path / "figure.png")
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles[:2] == ["paths: any-order", "paths: parallel-forced"]
    assert len(titles) == 10
    for ax in drawn[0].axes:  # one token at each step
        assert sorted(int(step) for points in ax.collections for step in points.get_offsets()[:, 1]) == list(range(35))
