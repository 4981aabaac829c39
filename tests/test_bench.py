from __future__ import annotations

import argparse
import copy
import json
import re
import warnings

import pytest
import torch
from models import needs_is_causal
from torch import nn

from nap_decode import Denoiser, ModelFamily, NapDecodeError
from nap_decode.bench import (
    SHAPES,
    BenchmarkResult,
    LadderResult,
    Loop,
    Shape,
    Workload,
    add_arguments,
    benchmark,
    environment,
    ladder,
    run,
)
from nap_decode.bench.growth import fit_growth
from nap_decode.bench.loops import add_gumbel_noise, make_loops
from nap_decode.bench.observation import count_syncs, extra_memory, syncs_per_step

CPU = torch.device("cpu")
IN_TURN = "semi-autoregressive"
SMALL = "hidden=32,layers=2,heads=2,intermediate=48,vocab=300"


def decode_both(workload, **shape):
    denoiser = Denoiser(Shape.parse(SMALL).build(dtype=torch.float64, **shape))
    canvas = workload.canvas(denoiser)
    loops = make_loops(denoiser, canvas, workload, False)
    return canvas, loops["textbook"](), loops["ours"]()


# ---------------------------------------------------------------------------------------------------- the loops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 1},
        {"steps": 24},
        {"batch_size": 3},
        {"batch_size": 3, "ragged": True},
        {"blocks": 5},
        {"blocks": 5, "batch_size": 2, "ragged": True, "steps": 9},
        {"blocks": 3, "scheduler": "semi-autoregressive", "batch_size": 2},
    ],
    ids=str,
)
def test_textbook_and_ours_decode_the_same(options):
    workload = Workload(**{"prompt_length": 9, "new_tokens": 24, "steps": 7, "seed": 3} | options)
    canvas, theirs, ours = decode_both(workload)
    assert torch.equal(theirs, ours.sequences)
    assert ours.forward_passes == workload.steps
    assert torch.equal(theirs[~canvas.decodable], canvas.tokens[~canvas.decodable])
    if options.get("ragged"):
        assert canvas.is_padded


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"steps": 24}])
def test_the_textbook_with_a_cache_decodes_the_same_and_forwards_what_ours_does(options):
    shape = Shape.parse(SMALL + ",block_size=8")
    workload = Workload(**{"prompt_length": 16, "new_tokens": 24, "blocks": 3, "steps": 7} | options, scheduler=IN_TURN)
    denoiser = Denoiser(shape.build(dtype=torch.float64), family=shape.family)
    loops = make_loops(denoiser, workload.canvas(denoiser), workload, False)
    assert list(loops) == ["bare", "full", "textbook", "ours", "cached"]
    ours, called = loops["ours"](), []
    mlp = denoiser.model.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda _, given, __: called.append(given[0].shape[:2].numel()))
    theirs = loops["cached"]()
    handle.remove()
    assert torch.equal(theirs, ours.sequences)
    # Theirs forwards the prompt and closed blocks by themselves, ours with the next block: the same positions.
    assert sum(called) == sum(ours.positions_forwarded)


@pytest.mark.parametrize("options", [{"prompt_length": 15}, {"blocks": 4}, {"scheduler": "macro-parallel"}])
def test_no_textbook_with_a_cache_for_other_blocks(options):
    shape = Shape.parse(SMALL + ",block_size=8")
    workload = Workload(
        **{"prompt_length": 16, "new_tokens": 24, "blocks": 3, "steps": 7, "scheduler": IN_TURN} | options
    )
    denoiser = Denoiser(shape.build(), family=shape.family)
    assert "cached" not in make_loops(denoiser, workload.canvas(denoiser), workload, False)


def test_textbook_draws():
    workload = Workload(prompt_length=4, new_tokens=12, steps=3, temperature=1.0)
    _, first, ours = decode_both(workload)
    _, second, again = decode_both(workload)
    assert not torch.equal(first, second)  # torch's global generator
    assert torch.equal(ours.sequences, again.sequences)
    assert int((first == 299).sum()) == 0  # the mask


def test_gumbel_noise_draws_from_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20000, 3)
    counts = add_gumbel_noise(logits, 1.0).argmax(1).bincount(minlength=3) / 20000
    assert torch.allclose(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.015)
    assert add_gumbel_noise(logits, 0.0) is logits


def test_quotas_and_widths():
    workload = Workload(new_tokens=7, steps=3, blocks=2)
    assert workload.lengths().tolist() == [[4, 3]]
    assert workload.quotas().sum(0).tolist() == [[4, 3]]
    assert workload.widths() == [7, 4, 2]
    one_by_one = Workload(new_tokens=8, steps=4, blocks=2, scheduler="semi-autoregressive")
    assert one_by_one.widths() == [4, 2, 4, 2]


def test_bare_passes_see_the_wanted_rows_only():
    workload = Workload(prompt_length=3, new_tokens=7, steps=3, batch_size=2)
    model = Shape.parse(SMALL).build()
    denoiser = Denoiser(model)
    loops = make_loops(denoiser, workload.canvas(denoiser), workload, False)
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    loops["bare"]()
    assert shapes == [(2, width, 32) for width in workload.widths()]
    shapes.clear()
    loops["full"]()
    assert shapes == [(2, 10, 32)] * 3


def test_models_that_are_more_than_body_and_output_layer(tiny):
    class Scaled(type(tiny)):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            output.logits = 2 * output.logits
            return output

    scaled = Scaled(tiny.config).double().eval()
    scaled.load_state_dict(tiny.state_dict())
    workload = Workload(prompt_length=4, new_tokens=6, steps=2)
    result = benchmark(scaled, workload, mask_token_id=1, repeats=1)
    assert "bare" not in result.loops
    assert "bare is the full forward" in str(result)
    assert result.ratios["attainable"] == [result.loops["textbook"].seconds[0] / result.loops["full"].seconds[0]]


@needs_is_causal
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("own", [{"attention": "4d"}, {"attention": "additive"}, {"attention": "4d", "block_size": 4}])
def test_models_are_told_who_sees_whom_in_their_own_way(tiny, own, ragged):
    denoiser = Denoiser(tiny, mask_token_id=1, family=ModelFamily(name="Own", **own))
    workload = Workload(prompt_length=6, new_tokens=6, steps=2, batch_size=2, ragged=ragged)
    canvas = workload.canvas(denoiser)
    loops = make_loops(denoiser, canvas, workload, False)
    assert "bare" in loops
    assert torch.equal(loops["textbook"](), loops["ours"]().sequences)


def test_functions_cannot_be_measured():
    def model(input_ids, attention_mask):
        return nn.functional.one_hot(input_ids, 9).float()

    with pytest.raises(NapDecodeError, match="needs a transformers model"):
        benchmark(model, mask_token_id=1)


# ---------------------------------------------------------------------------------------------------- observing


def test_memory_of_known_allocations():
    kept = []

    def work():
        kept.append(torch.zeros(1000, 1000))
        for _ in range(3):
            torch.zeros(2000, 1000)

    assert extra_memory(work, CPU) == pytest.approx(12e6, rel=0.01)

    def let_go():
        kept.clear()
        torch.zeros(500, 1000)

    assert extra_memory(let_go, CPU) == 0  # less than before


def test_memory_inside_an_operation():
    values = torch.zeros(1000, 1000)
    # It makes its exponentials, and returns their sums.
    assert extra_memory(lambda: values.logsumexp(1), CPU) == pytest.approx(4e6, rel=0.01)


def test_synchronisations_of_the_loop_are_told_from_those_around_it(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)

    def wait():
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # as torch does
        warnings.warn("something else", stacklevel=1)

    def loop():
        wait()
        for _ in range(4):
            layer(x)
            wait()
            wait()

    assert syncs_per_step(loop, layer) == 2.0
    assert modes == ["default", "warn", "default"]
    assert not layer._forward_pre_hooks
    assert syncs_per_step(wait, layer) is None  # no pass is seen
    with count_syncs() as count:
        loop()
    assert count() == 9


# ---------------------------------------------------------------------------------------------------- results


def result_of(bare, full, textbook, ours):
    times = {"bare": bare, "full": full, "textbook": textbook, "ours": ours}
    extra = {"textbook": 100, "ours": 10}
    loops = {name: Loop(seconds, None, extra.get(name, 0), None) for name, seconds in times.items()}
    model = {"name": "M", "parameters": 5e7, "vocabulary": 9, "dtype": "float32", "device": "cpu", "compile": False}
    return BenchmarkResult(Workload(), model, loops, (30, 60), (1.0, 4.0), 1.0, environment("cpu"))


def test_ratios_are_taken_in_each_repetition():
    result = result_of([1.0, 2.0], [1.5, 3.0], [3.0, 6.0], [1.25, 2.0])
    assert result.ratios["overhead"] == [0.25, 0.0]
    assert result.ratios["speedup"] == [2.4, 3.0]
    assert result.ratios["attainable"] == [3.0, 3.0]
    assert result.least == {"overhead": 0.25, "speedup": 2.4, "attainable": 3.0}
    assert result.memory_ratio == 0.1
    assert re.search(r"overhead over the bare forward +12.5% \(0 to 25\); 25%", str(result))
    assert re.search(r"positions forwarded +30 of 60\n.*FLOPs.* 0.25\n", str(result))
    assert result.to_dict()["median_ratios"]["speedup"] == pytest.approx(2.7)


def test_benchmark_of_a_model():
    workload = Workload(prompt_length=5, new_tokens=12, steps=3, batch_size=2, ragged=True)
    lines = []
    result = benchmark(Shape.parse(SMALL).build(), workload, repeats=2, progress=lines.append)
    assert list(result.loops) == ["bare", "full", "textbook", "ours"]
    assert all(len(loop.seconds) == 2 and loop.extra_bytes > 0 for loop in result.loops.values())
    assert result.loops["ours"].tokens == result.loops["textbook"].tokens == 24
    assert lines[-1].startswith("repetition 2 of 2: ")
    assert "2 rows, ragged, prompt 5, 12 new tokens, 3 steps, temperature 0; medians of 2" in str(result)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["workload"]["steps"] == 3
    assert plain["loops"]["ours"]["seconds"] == result.loops["ours"].seconds
    assert plain["environment"]["versions"]["torch"] == torch.__version__


def test_tokens_are_counted_up_to_the_end(tiny):
    model = copy.deepcopy(tiny)
    workload = Workload(prompt_length=4, new_tokens=24, steps=2)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    whole = benchmark(model, workload, mask_token_id=1, repeats=1)
    assert whole.loops["ours"].tokens == whole.loops["textbook"].tokens == 24
    model.generation_config.eos_token_id = list(range(0, 24, 2))  # every other id ends a text
    cut = benchmark(model, workload, mask_token_id=1, repeats=1)
    assert cut.loops["ours"].tokens == cut.loops["textbook"].tokens < 24


# ---------------------------------------------------------------------------------------------------- the ladder


def test_fits_recover_known_laws():
    sizes = [128, 256, 1024, 4096]
    line = fit_growth(sizes, [3 + 0.5 * size for size in sizes])
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((3, 0.5, 1))
    square = fit_growth(sizes, [7 * size**2 for size in sizes])
    assert square.exponent == pytest.approx(2)
    assert square.r_squared < 1
    flat = fit_growth(sizes, [2.0] * 4)
    assert flat.slope == pytest.approx(0)
    assert fit_growth(sizes, [1, -1, 2, 3]).exponent is None


def test_ladder():
    sizes = {"canvas": (80, 96), "batch": (2, 1), "blocks": (1, 4), "vocabulary": (100, 200)}
    result = ladder(Shape.parse(SMALL), sizes, repeats=2)
    assert [list(points) for points in result.seconds.values()] == [[80, 96], [1, 2], [1, 4], [100, 200]]
    assert set(result.fits("batch")) == {"bare", "ours", "overhead"}
    plain = json.loads(json.dumps(result.to_dict()))
    assert len(plain["seconds"]["blocks"]["4"]["ours"]) == 2
    assert re.search(r"^blocks +bare +ours +overhead$", str(result), re.MULTILINE)
    assert re.search(r"^ours: .* x blocks \(R² .*\); exponent ", str(result), re.MULTILINE)


def test_ladder_of_a_block_causal_shape():
    shape = Shape.parse(SMALL + ",block_size=16")
    result = ladder(shape, {"canvas": (96, 128), "batch": (1, 2)}, repeats=1)
    assert list(result.seconds["canvas"]) == [96, 128]
    with pytest.raises(NapDecodeError, match=r"block_size=16 must divide .* takes the place of the dimension blocks"):
        ladder(shape, {"blocks": (1, 2)})
    with pytest.raises(NapDecodeError, match="block_size=48 must divide the ladder's prompt of 64"):
        ladder(Shape.parse(SMALL + ",block_size=48"), {"canvas": (96,)})


def test_ladder_skips_what_takes_too_long():
    result = ladder(Shape.parse(SMALL), {"batch": (1, 2)}, repeats=1, limit=0.0)
    assert result.skipped == {"batch": [1, 2]}
    assert result.fits("batch") == {}
    assert "skipped, over the limit: 1, 2" in str(result)


def test_costs_of_a_ladder():
    points = {1: {"bare": [1.0, 2.0, 9.0], "ours": [2.0, 3.0, 9.5]}, 2: {"bare": [1.0] * 3, "ours": [2.2, 3.3, 9.5]}}
    result = LadderResult(Shape(), {"blocks": points}, {"blocks": []}, environment("cpu"))
    assert result.costs("blocks")["bare"] == [2.0, 1.0]
    assert result.costs("blocks")["overhead"] == [1.0, pytest.approx(2.3)]


# ---------------------------------------------------------------------------------------------------- bad input


def test_shapes():
    assert Shape.parse("dream-7b") is SHAPES["dream-7b"]
    assert Shape.parse("layers=3, vocab=50") == Shape(layers=3, vocab=50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lada-8b", "there is no shape 'lada-8b'. Did you mean 'llada-8b'"),
        ("layer=3", "there is no size of a shape 'layer'. Did you mean 'layers'"),
        ("layers=three", "layers must be a whole number, but is 'three'"),
        ("layers=0", "layers must be a whole number of at least 1"),
        ("hidden=20,heads=3", "must be an even multiple of heads=3"),
    ],
)
def test_bad_shapes(text, message):
    with pytest.raises(NapDecodeError, match=message):
        Shape.parse(text)


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(arguments))  # a model "x" would not be found: options are checked before it is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be a whole number of at least 1"),
        (["--steps", "300"], "steps=300 is more than the 256 tokens"),
        (["--blocks", "300"], "256 new tokens cannot be cut into 300 blocks"),
        (["--blocks", "8", "--scheduler", "semi-autoregressive", "--steps", "4"], "8 phases of at least one step"),
        (["--temperature", "-1"], "temperature must be a finite number of at least 0"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--seed", "-1"], "seed must be"),
        (["--repeats", "0"], "--repeats must be"),
        (["--threads", "0"], "--threads must be"),
        (["--model", "x", "--shape", "small"], "--model does not go with --shape"),
        (["--model", "x", "--ladder"], "--model does not go with --shape or --ladder"),
        (["--ladder", "--steps", "4"], "--steps does not go with --ladder"),
        (["--ladder", "--ladder-limit", "-1"], "limit must be"),
        (["--shape", "huge"], "there is no shape 'huge'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(NapDecodeError, match=message):
        run_command(*arguments)


def test_bad_sizes():
    with pytest.raises(NapDecodeError, match=r"no dimension of the ladder 'block'\. Did you mean 'blocks'"):
        ladder(sizes={"block": (1,)})


def test_command(capsys, tmp_path):
    file = tmp_path / "bench.json"
    few = ["--prompt-length", "4", "--new-tokens", "8", "--steps", "2"]
    run_command("--shape", SMALL, *few, "--repeats", "1", "--json", str(file))
    captured = capsys.readouterr()
    assert re.search("tokens, beside the textbook's +identical", captured.out)
    assert "repetition 1 of 1" in captured.err
    written = json.loads(file.read_text())
    assert written["options"]["shape"] == SMALL
    assert written["identical"] == 1
