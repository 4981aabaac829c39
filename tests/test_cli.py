from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from nap_decode import CanvasTemplate, DecodeTrace, Denoiser, NapDecodeError, Sampler, decoders, demo
from nap_decode.cli import _make_sampler, _parser, main
from nap_decode.integrations.ray import BULK
from nap_decode.run.loop import Loop

MODEL = ["--model", str(demo.CHECKPOINT)]
PROMPT = ["--prompt", "6 0 6 4 6 2 1 2 4 7 0 6 ="]
PLACES = ["--path-length", "11", "--summary-length", "2"]


def run(capsys, *arguments):
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_and_arness(capsys, tmp_path):
    file = str(tmp_path / "trace")
    status, out, _ = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, "--trace", file)
    assert status == 0
    assert out.splitlines()[4] == "<summary> 6"
    assert "9 forward passes, 3.78 tokens per forward pass" in out
    assert DecodeTrace.load(file).step.max() == 8
    status, out, _ = run(capsys, "arness", file, "--k", "1", "2")
    assert status == 0
    assert "Global@2" in out
    status, out, _ = run(capsys, "arness", file, "--json")
    measured = json.loads(out)
    assert measured["blocks"]["path 1"]["sequences"] == 1
    assert measured["blocks"]["summary"]["kendall_tau"] is None  # one step, and JSON has no nan
    assert measured["before_end"]["tokens_per_forward"] == measured["tokens_per_forward"]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (["--scheduler", "any-order", "--steps", "7"], 7),
        (["--scheduler", "semi-autoregressive", "--set", "block_length=5", "--tokens-per-step", "5"], 7),
        (["--set", "hold_until=0", "--tokens-per-step", "5"], 7),
        (["--set", "tokens_per_step=5", "--temperature", "0.5", "--set", "top_k=3", "--seed", "3"], 7),
        (["--tokens-per-step", "7", "--set", "confidence=margin", "--cfg-scale", "0.5"], 5),
        (["--decoder", "fast_dllm_threshold", "--scheduler", "macro-parallel", "--set", "threshold=0"], 2),
        (["--tokens-per-step", "12", "--set", "share_last_step=true"], 3),
    ],
)
def test_options_of_generate(capsys, options, passes):
    status, out, _ = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, *options)
    assert status == 0
    assert f"# {passes} forward passes" in out


def test_other_canvases(capsys):
    status, out, _ = run(capsys, "generate", *MODEL, *PROMPT, "--max-new-tokens", "8", "--tokens-per-step", "4")
    assert (status, "# 2 forward passes" in out) == (0, True)
    arguments = ["--prompt", "6 <mask> 6", "--prompt", "1 1 <mask> <mask>", "--infill", "--scheduler", "any-order"]
    status, out, _ = run(capsys, "generate", *MODEL, *arguments)
    assert status == 0
    texts = out.splitlines()
    assert texts[1].startswith("6 ")
    assert texts[1].endswith(" 6")
    assert texts[5].startswith("1 1")
    status, out, _ = run(
        capsys, "generate", *MODEL, *PROMPT, "--total-length", "35", "--summary-length", "2", "--summary-only"
    )
    assert out.splitlines()[1] == "6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLACES, "--steps", "0"], "steps must be a whole number of at least 1"),
        ([*PLACES, "--steps", "99"], "steps=99 is more than the 35 tokens"),
        ([*PLACES, "--set", "block_length=4"], "there is no option of parallel_forced 'block_length'"),
        (
            [*PLACES, "--scheduler", "any-order", "--set", "share_last_step=true"],
            "no option of this decoder 'share_last",
        ),
        ([*PLACES, "--set", "top_k=4"], "top_k=4 would have no effect: nothing is drawn at temp"),
        (["--infill", "--max-new-tokens", "4"], "--max-new-tokens does not go with --infill"),
        (["--infill", "--num-paths", "4"], "--num-paths does not go with --infill"),
        (["--max-new-tokens", "4", "--path-length", "4"], "--path-length does not go with --max-new-tokens"),
        (["--max-new-tokens", "4", "--summary-only"], "--summary-only does not go with --max-new-tokens"),
        ([*PLACES, "--decoder", "klass", "--steps", "4"], "steps=4 would have no effect"),
        ([*PLACES, "--cfg-scale", "-1"], "--cfg-scale must be a finite number of at least 0"),
        ([*PLACES, "--chat"], "the tokenizer has no chat template"),
    ],
)
def test_bad_input(capsys, arguments, message):
    status, out, err = run(capsys, "generate", *MODEL, *PROMPT, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("nap-decode: error: ")
    import re

    assert re.search(message, err)


def test_decoders_and_files(capsys, tmp_path, embedded):
    decoder = ["--decoder", "fast_dllm_threshold", "--set", "threshold=0.8", "--set", "block_length=null"]
    status, out, _ = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, *decoder)
    assert status == 0
    template = CanvasTemplate.nap(3, path_length=11, summary_length=2)
    own = decoders.fast_dllm_threshold(threshold=0.8, block_length=None)
    sampler = Sampler(*embedded, own, template=template)
    expected = sampler(PROMPT[1])
    assert expected.text in out
    assert f"# {expected.forward_passes} forward passes" in out

    file = tmp_path / "sampler.json"
    sampler.save(file)
    assert run(capsys, "generate", *MODEL, *PROMPT, "--decoder", str(file))[1] == out
    status, other, _ = run(capsys, "generate", *MODEL, *PROMPT, "--decoder", str(file), "--max-new-tokens", "8")
    assert status == 0
    assert "<summary>" not in other
    status, surer, _ = run(capsys, "generate", *MODEL, *PROMPT, "--decoder", str(file), "--set", "threshold=2")
    assert (status, "# 35 forward passes" in surer) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decoder", "clas"], "there is no decoder 'clas'. Did you mean 'klass'"),
        (["--decoder", "klass", "--set", "treshold=0.8"], "no option of klass 'treshold'. Did you mean 'threshold'"),
        (["--decoder", "klass", "--set", "threshold=high"], "threshold must be a number, but is 'high'"),
        (["--decoder", "pc_sampler"], "pc_sampler needs frequencies; give it among its options"),
        (["--decoder", "none.json"], "No such file"),
    ],
)
def test_bad_compositions(capsys, arguments, message):
    status, out, err = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_files_that_are_not_there(capsys, tmp_path):
    status, _, err = run(capsys, "arness", str(tmp_path / "none"))
    assert status == 2
    assert "No such file" in err
    status, _, err = run(capsys, "demo", "--problems", "0")
    assert status == 2
    assert "--problems must be a whole number of at least 1" in err


def test_unknown_options(capsys):
    with pytest.raises(SystemExit):
        main(["generate", *MODEL, *PROMPT, "--scheduler", "any"])
    assert "any-order" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_streaming(capsys):
    status, out, _ = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, "--stream")
    assert status == 0
    assert out.splitlines()[0] == "# 6 0 6 4 6 2 1 2 4 7 0 6 ="
    assert out.splitlines()[1].startswith("<think 1> 6 0 4 2")
    assert out.count("<think 1>") == 1
    for wrong in (PROMPT, ["--summary-only"]):
        status, _, err = run(capsys, "generate", *MODEL, *PROMPT, *PLACES, "--stream", *wrong)
        assert status == 2
        assert "--stream shows the whole text of one prompt" in err


def test_ctrl_c_prints_what_there_is(capsys, monkeypatch):
    steps = []
    take_step = Loop.step

    def pressing(self, *args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, *args)

    monkeypatch.setattr(Loop, "step", pressing)
    status, out, err = run(capsys, "generate", *MODEL, *PROMPT, *PLACES)
    assert status == 130
    assert "[...]" in out
    assert "# 3 forward passes" in out
    assert err.splitlines()[-1] == "nap-decode: interrupted"


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from nap_decode.cli import main; print('x' * 10**6); sys.exit(main(['demo', '--problems', '1']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert "nap-decode: error" not in error


# What each option is for; None if a falsy value has no meaning, and is refused by the option's name.
REACHES = {
    "--mask-token-id": lambda sampler, args: args.mask_token_id,
    "--prompt": lambda sampler, args: args.prompt[-1],
    "--summary-length": lambda sampler, args: sum(block.held for block in sampler.template.blocks),
    "--temperature": lambda sampler, args: sampler.decoder.committer.temperature,
    "--cfg-scale": lambda sampler, args: sampler.denoiser.cfg_scale,
    "--seed": lambda sampler, args: args.seed,
}
GIVEN = {
    "--refresh-every": ["--reuse", "prompt"],
    "--set": ["--decoder", "klass"],
}


def options_of_generate():
    """All that take a value that is no choice among names, with whatever is falsy."""
    (commands,) = (action for action in _parser()._actions if hasattr(action, "choices") and not action.option_strings)
    for action in commands.choices["generate"]._actions:
        if action.option_strings and action.nargs is None and action.choices is None:
            for value in {int: ("0",), float: ("0", "0.0", "-0.0")}.get(action.type, ("",)):
                yield pytest.param(action.option_strings[0], value, id=f"{action.option_strings[0]} {value!r}")


@pytest.mark.parametrize(("option", "value"), list(options_of_generate()))
def test_a_falsy_value_reaches_its_part_or_is_refused_by_name(capsys, monkeypatch, option, value):
    """With a decoder, and in bulk."""
    made = []
    monkeypatch.setattr("nap_decode.cli.load_named", lambda args: (lambda input_ids: None, None))
    monkeypatch.setattr("nap_decode.cli.ray.run_bulk", lambda args, make: made.append((make(args), args)))
    make = _make_sampler

    def keep(args):
        made.append((make(args), args))
        raise NapDecodeError("enough")

    monkeypatch.setattr("nap_decode.cli._make_sampler", keep)
    model = [] if option == "--mask-token-id" else ["--mask-token-id", "1"]
    if option != "--model":
        model += ["--model", "somewhere"]
    arguments = ["generate", *PROMPT, *model, *GIVEN.get(option, ()), option, value]
    _, _, err = run(capsys, *arguments)
    if option in REACHES:
        assert (err, len(made)) == ("nap-decode: error: enough\n", 1)
        found = REACHES[option](*made[0])
        assert found == type(found)(value or "")
    else:
        assert not made
        names = option, option[2:].replace("-", "_"), f"{option[2:]} of "
        assert any(name in err for name in names) or option == "--set", err


def test_options_of_bulk_are_those_of_the_parser():
    (commands,) = (action for action in _parser()._actions if hasattr(action, "choices") and not action.option_strings)
    (group,) = (g for g in commands.choices["generate"]._action_groups if g.title.startswith("bulk"))
    assert sorted(action.dest for action in group._group_actions) == sorted([*BULK, "input"])


@pytest.mark.parametrize(("given", "found"), [(None, 1.5), ("0", 0.0)])
def test_guidance_of_zero_is_not_that_of_a_file(monkeypatch, capsys, tmp_path, embedded, given, found):
    file = tmp_path / "sampler.json"
    Sampler(Denoiser(*embedded, cfg_scale=1.5), decoder=decoders.klass()).save(file)
    args = _parser().parse_args(
        ["generate", *MODEL, *PROMPT, "--decoder", str(file), *([] if given is None else ["--cfg-scale", given])]
    )
    assert _make_sampler(args).denoiser.cfg_scale == found


@pytest.mark.parametrize("name", BULK)
def test_options_of_bulk_need_prompts_from_a_file(capsys, name):
    option = f"--{name.replace('_', '-')}"
    status, _, err = run(capsys, "generate", *MODEL, *PROMPT, option, "0")
    assert status == 2
    assert f"{option} is for prompts from a file" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "threshold"], "--set must be written as OPTION=VALUE, but is 'threshold'"),
        (["--set", "block_length=False"], "block_length must be a whole number of at least 1, but is False"),
    ],
)
def test_values_of_set(capsys, arguments, message):
    status, _, err = run(capsys, "generate", *MODEL, *PROMPT, "--decoder", "klass", *arguments)
    assert status == 2
    assert message in err


def test_a_checkpoint_without_its_weights(capsys, tmp_path):
    shutil.copytree(demo.CHECKPOINT, tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    save_file({name + ".old": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    status, out, err = run(capsys, "generate", "--model", str(tmp_path / "model"), *PROMPT, *PLACES)
    assert (status, out) == (2, "")
    assert "are not in the checkpoint" in err
