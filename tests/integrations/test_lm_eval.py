from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file

from nap_decode import (
    ARnessMeter,
    CanvasTemplate,
    Denoiser,
    MicroConfidenceCommitter,
    NapDecodeError,
    ParallelForcedSampler,
    Sampler,
    decoders,
    demo,
)
from nap_decode.demo import NimSum
from nap_decode.demo.tasks import nim_sum
from nap_decode.integrations.evaluation import add_arguments, run
from nap_decode.integrations.lm_eval import (
    TASKS,
    DecodeCost,
    Generation,
    add_costs,
    harness_model,
    parse_options,
)
from nap_decode.measure.likelihood import chain_log_likelihood, log_likelihood_bound

has_harness = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not has_harness, reason="lm_eval is not installed")

CANVAS = "path_length=11,summary_length=2"
PROBLEMS = nim_sum.make(24)


def arguments(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--model", str(demo.CHECKPOINT), *map(str, given)])


@pytest.fixture
def make(embedded):
    """Makes a model for the harness, of the embedded one."""
    if not has_harness:
        pytest.skip("lm_eval is not installed")
    model, tokenizer = embedded

    def made(**options):
        return harness_model()(model, tokenizer=tokenizer, **{"batch_size": 8, "device": "cpu"} | options)

    return made


def requests(contexts, repeats=1, **generation):
    from lm_eval.api.instance import Instance

    instances = [
        Instance("generate_until", {}, (context, generation), 0, ("task", number, repeats))
        for number, context in enumerate(contexts)
    ]
    return [instance for instance in instances for _ in range(repeats)]


QUESTIONS = [problem["question"] for problem in PROBLEMS]


# ------------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The command, run once."""
    if not has_harness:
        pytest.skip("lm_eval is not installed")
    pytest.importorskip("transformers", minversion="5")
    output = tmp_path_factory.mktemp("eval") / "results"
    options = ["--sampler-args", CANVAS + ",tokens_per_step=12", "--limit", len(PROBLEMS), "--batch-size", 7]
    options += ["--tasks", "nim_sum,nim_sum_path", "--samples", 16, "--log-samples", "--output", output]
    cache = output.parent / "cache"
    run(arguments(*options, "--use-cache", cache, "--device", "cpu"))
    return output, cache, options


def test_accuracy_is_that_of_direct_evaluation(evaluated, embedded):
    output, _, _ = evaluated
    results = json.loads((output / "results.json").read_text())["results"]["nim_sum"]
    sampler = ParallelForcedSampler(*embedded, path_length=11, summary_length=2, tokens_per_step=12)
    out = sampler(QUESTIONS)
    problems = [NimSum(tuple(map(int, question.split()[:-1]))) for question in QUESTIONS]
    correct = [problem.is_correct(text) for problem, text in zip(problems, out.summary, strict=True)]
    assert 0 < sum(correct) < len(correct)  # or the comparison says little
    assert results["exact_match,last-digit"] == pytest.approx(sum(correct) / len(correct))
    meter = ARnessMeter()
    meter.update(out.trace)
    assert results["forward_passes,none"] == out.forward_passes
    assert results["tokens_per_forward,none"] == pytest.approx(sum(out.tokens_per_forward) / len(correct))
    assert results["arness_global,none"] == pytest.approx(meter.compute().global_at[1])
    assert results["arness_local,none"] == pytest.approx(meter.compute().local_at[1])
    samples = [json.loads(line) for line in (output / "samples_nim_sum.jsonl").read_text().splitlines()]
    assert [sample["resps"][0][0] for sample in samples] == out.summary
    assert [sample["exact_match"] for sample in samples] == correct
    assert {sample["forward_passes"] for sample in samples} == {out.forward_passes}


def test_scores_are_those_of_the_likelihood(evaluated, embedded):
    output, _, _ = evaluated
    results = json.loads((output / "results.json").read_text())
    assert results["results"]["nim_sum_path"]["acc,none"] == 1  # of 24; by chance it would be a quarter
    assert "forward_passes,none" not in results["results"]["nim_sum_path"]
    assert "MacroParallelScheduler" in results["config"]["sampler"]


def test_what_is_cached_is_not_done_again(evaluated, monkeypatch, capsys):
    output, cache, options = evaluated
    with pytest.raises(NapDecodeError, match="has results already"):
        run(arguments(*options))
    monkeypatch.setattr(Denoiser, "predict", None)  # would fail
    again = [*options[:-1], output.parent / "again", "--use-cache", cache]
    run(arguments(*again, "--device", "cpu"))
    first, second = (json.loads((path / "results.json").read_text())["results"] for path in (output, again[-3]))
    assert first == second  # costs included
    table = capsys.readouterr().out
    assert "exact_match" in table
    assert "tokens_per_forward" in table


def test_two_processes_give_what_one_gives(evaluated, tmp_path):
    output, _, _ = evaluated
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import argparse\n"
        "from nap_decode.integrations.evaluation import add_arguments, run\n"
        "parser = argparse.ArgumentParser()\n"
        "add_arguments(parser)\n"
        "run(parser.parse_args())\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ["--model", demo.CHECKPOINT, "--sampler-args", CANVAS + ",tokens_per_step=12", "--limit", 9]
    options += ["--batch-size", 3, "--tasks", "nim_sum", "--log-samples", "--output", tmp_path / "results"]
    subprocess.run(
        [sys.executable, *launch, str(script), *map(str, options)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    own, other = (
        {
            sample["doc_id"]: sample
            for sample in map(json.loads, (path / "samples_nim_sum.jsonl").read_text().splitlines())
        }
        for path in (output, tmp_path / "results")
    )
    assert sorted(other) == list(range(9))  # an odd number: one process has more than the other
    for number, sample in other.items():
        assert sample["resps"][0][0] == own[number]["resps"][0][0]
        for name in ("exact_match", "forward_passes", "tokens_per_forward", "arness_global"):
            assert sample[name] == pytest.approx(own[number][name]), (number, name)


def test_other_samplers_have_other_caches(make):
    prints = [
        make(sampler_args=CANVAS + extra, **options).fingerprint
        for extra, options in (
            ("", {}),
            (",tokens_per_step=2", {}),
            (",num_paths=2", {}),
            ("", {"seed": 1}),
            ("", {"likelihood": "chain"}),
            ("", {"samples": 64}),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert make(sampler_args=CANVAS).fingerprint == prints[0]


# ------------------------------------------------------------------------------------ generating


def test_a_plain_canvas_is_as_long_as_the_task_says(make, embedded):
    lm = make(sampler="left_to_right")
    texts = lm.generate_until(requests(QUESTIONS[:3], max_gen_toks=6, until=[]), disable_tqdm=True)
    out = Sampler(*embedded, decoders.left_to_right())(QUESTIONS[:3], max_new_tokens=6)
    assert texts == [text.lstrip() for text in out.text]  # as the harness has it, without the space before it
    assert [text.cost.forward_passes for text in texts] == [6, 6, 6]
    with pytest.raises(NapDecodeError, match="max_gen_toks=256 leaves no room"):
        lm.generate_until(requests(QUESTIONS[:1]), disable_tqdm=True)


def test_stop_strings_cut_and_what_is_behind_counts_for_nothing(make, embedded):
    lm = make(sampler="left_to_right")
    (whole,) = lm.generate_until(requests(QUESTIONS[:1], max_gen_toks=8), disable_tqdm=True)
    words = whole.split()
    assert len(words) == 8
    stop = next(number for number in range(1, 8) if words[number] not in words[:number])
    (cut,) = lm.generate_until(requests(QUESTIONS[:1], max_gen_toks=8, until=[words[stop]]), disable_tqdm=True)
    assert cut.split() == words[:stop]
    assert cut.cost.forward_passes == whole.cost.forward_passes == 8
    assert whole.cost.tokens_per_forward == 1
    assert cut.cost.tokens_per_forward == stop / 8


@pytest.mark.parametrize("name", ["lopa", "fast_dllm_threshold", "klass"])
def test_every_kind_of_sampler(make, embedded, name):
    lm = make(sampler=name, sampler_args=CANVAS)
    texts = lm.generate_until(requests(QUESTIONS[:3]), disable_tqdm=True)
    template = CanvasTemplate.nap(path_length=11, summary_length=2)
    assert texts == Sampler(*embedded, decoders.make(name), template=template)(QUESTIONS[:3]).summary


def test_a_sampler_of_ones_own_and_a_saved_one(make, embedded, tmp_path):
    template = CanvasTemplate.nap(path_length=11, summary_length=2)
    sampler = Sampler(*embedded, decoders.fast_dllm_threshold(threshold=0.8), template=template)
    sampler.save(tmp_path / "mine.json")
    wanted = sampler(QUESTIONS[:4])
    for given, args in ((sampler, None), (str(tmp_path / "mine.json"), None), (sampler.decoder, CANVAS)):
        texts = make(sampler=given, sampler_args=args).generate_until(requests(QUESTIONS[:4]), disable_tqdm=True)
        assert texts == wanted.summary
        assert [text.cost.forward_passes for text in texts] == wanted.trace.forward_passes.tolist()
    with pytest.raises(NapDecodeError, match="made already"):
        make(sampler=sampler, sampler_args="steps=3")
    with pytest.raises(NapDecodeError, match="Denoiser has its own"):
        make(sampler=sampler, cfg_scale=1.0)
    with pytest.raises(NapDecodeError, match=r"mine.json says how to decode"):
        make(sampler=str(tmp_path / "mine.json"), sampler_args="steps=3")
    with pytest.raises(NapDecodeError, match="the file has a template"):
        make(sampler=str(tmp_path / "mine.json"), sampler_args=CANVAS)
    with pytest.raises(NapDecodeError, match=r"made already|Denoiser has its own"):
        make(sampler=sampler, cfg_scale=0.0)
    sampler.over(sampler.denoiser.replace(cfg_scale=0.5)).save(tmp_path / "guided.json")
    assert make(sampler=str(tmp_path / "guided.json")).denoiser.cfg_scale == 0.5
    for other in (0.0, 1.0):
        with pytest.raises(NapDecodeError, match=rf"guided.json has cfg_scale 0.5, but {other} is asked for"):
            make(sampler=str(tmp_path / "guided.json"), cfg_scale=other)


def test_draws_belong_to_the_request(make):
    drawn = {"do_sample": True, "temperature": 1.5}
    options = {"sampler_args": CANVAS + ",tokens_per_step=12"}
    texts = make(**options).generate_until(requests(QUESTIONS, **drawn), disable_tqdm=True)
    greedy = make(**options).generate_until(requests(QUESTIONS), disable_tqdm=True)
    assert texts != greedy
    own = make(sampler_args=CANVAS + ",tokens_per_step=12,temperature=1.5")
    assert own.generate_until(requests(QUESTIONS), disable_tqdm=True) == texts
    for batch_size in (1, 5):
        other = make(**options, batch_size=batch_size)
        assert other.generate_until(requests(QUESTIONS[::-1], **drawn), disable_tqdm=True) == texts[::-1]
    assert make(**options, seed=1).generate_until(requests(QUESTIONS, **drawn), disable_tqdm=True) != texts
    cold = requests(QUESTIONS, **drawn | {"top_p": 0.0001})
    assert make(**options).generate_until(cold, disable_tqdm=True) == greedy
    cold = requests(QUESTIONS, **drawn | {"top_k": 1})
    assert make(**options).generate_until(cold, disable_tqdm=True) == greedy


def test_texts_have_seeds_of_their_own(make, monkeypatch):
    given = []
    stream = Sampler.stream

    def watch(self, *args, row_seeds, **options):
        given.extend(row_seeds)
        return stream(self, *args, row_seeds=row_seeds, **options)

    monkeypatch.setattr(Sampler, "stream", watch)
    make(sampler_args=CANVAS).generate_until(requests(QUESTIONS), disable_tqdm=True)
    assert len(set(given)) == len(QUESTIONS) > 1


def test_repeats_of_a_text_differ(make):
    lm = make(sampler_args=CANVAS + ",tokens_per_step=12")
    drawn = {"do_sample": True, "temperature": 1.5}
    texts = lm.generate_until(requests(QUESTIONS[:4], repeats=3, **drawn), disable_tqdm=True)
    assert any(len(set(texts[start : start + 3])) > 1 for start in range(0, 12, 3))
    once = lm.generate_until(requests(QUESTIONS[:4], **drawn), disable_tqdm=True)
    assert texts[::3] == once
    # The harness repeats the last request of a process to have as many in all; it gets the same text.
    several = requests(QUESTIONS[:4], **drawn)
    assert lm.generate_until([*several, *several[-1:] * 9], disable_tqdm=True) == [*once, *once[-1:] * 9]


@pytest.mark.parametrize(
    ("sampler", "generation", "message"),
    [
        (CANVAS, {"num_beams": 4}, "num_beams=4 would have no effect"),
        (CANVAS, {"repetition_penalty": 1.2}, "repetition_penalty=1.2 would have no effect"),
        (CANVAS, {"temprature": 1.0}, "Did you mean 'temperature'"),
        (CANVAS, {"max_gen_toks": 1}, r"max_gen_toks=1, .* 2 slots for the text \(summary\)"),
        (CANVAS, {"max_gen_toks": 0}, "max_gen_toks must be"),
        (CANVAS, {"max_length": 99}, "honours 'max_length'"),
        (CANVAS, {"do_sample": True}, "neither it nor the sampler has a temperature"),
        (CANVAS + ",temperature=0.5", {"do_sample": False}, "asks for greedy decoding .* draws at temperature 0.5"),
        (CANVAS + ",temperature=0.5", {"temperature": 0.0}, "asks for greedy decoding .* draws at temperature 0.5"),
        (CANVAS + ",temperature=0.5", {"temperature": 0.7}, "asks for temperature 0.7, .* draws at temperature 0.5"),
        (CANVAS, {"do_sample": True, "temperature": 1.0, "top_p": 1.5}, "top_p must be"),
        (CANVAS, {"do_sample": True, "temperature": 1.0, "top_p": True}, "top_p must be .* but is True"),
        (CANVAS, {"do_sample": True, "temperature": 1.0, "top_k": 2.7}, "top_k must be .* but is 2.7"),
        (CANVAS, {"do_sample": True, "temperature": 1.0, "top_k": False}, "top_k must be .* but is False"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, sampler, generation, message, monkeypatch):
    lm = make(sampler_args=sampler)
    monkeypatch.setattr(Denoiser, "predict", None)  # before the first forward pass
    with pytest.raises(NapDecodeError, match=message):
        lm.generate_until(requests(QUESTIONS[:1], **generation), disable_tqdm=True)


def test_what_asks_for_nothing_is_let_through(make):
    lm = make(sampler_args=CANVAS)
    plain = lm.generate_until(requests(QUESTIONS[:3]), disable_tqdm=True)
    neutral = {"num_beams": 1, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "do_sample": False}
    for generation in (neutral, {"temperature": 0.0, "top_p": 0.95}, {"until": "\n", "max_new_tokens": 9}):
        assert lm.generate_until(requests(QUESTIONS[:3], **generation), disable_tqdm=True) == plain


def test_requests_without_metadata(make, tmp_path):
    """As in unit tests of others and in scripts: nothing says how often a text is wanted."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    bare = [Instance("generate_until", {}, (question, {"until": ["x"]}), 0) for question in QUESTIONS[:3]]
    lm = make(sampler_args=CANVAS + ",temperature=1.0")
    texts = lm.generate_until(requests(QUESTIONS[:3], until=["x"]), disable_tqdm=True)
    assert lm.generate_until(bare, disable_tqdm=True) == texts
    assert CachingLM(lm, str(tmp_path / "cache.db")).generate_until(bare) == texts


def test_cached_repeats_of_a_drawing_sampler_are_refused(make, tmp_path):
    from lm_eval.api.model import CachingLM

    lm = CachingLM(make(sampler_args=CANVAS + ",temperature=1.0"), str(tmp_path / "cache.db"))
    with pytest.raises(NapDecodeError, match="wants 2 samples of each text"):
        lm.generate_until(requests(QUESTIONS[:2], repeats=2))
    texts = lm.generate_until(requests(QUESTIONS[:2]))
    assert lm.generate_until(requests(QUESTIONS[:2])) == texts


# ------------------------------------------------------------------------------------ scoring


def pairs(prompts, completions):
    from lm_eval.api.instance import Instance

    both = zip(prompts, completions, strict=True)
    return [Instance("loglikelihood", {}, pair, 0, ("task", number, 1)) for number, pair in enumerate(both)]


@pytest.mark.parametrize("likelihood", ["bound", "chain"])
def test_loglikelihood(make, embedded, likelihood):
    problem = PROBLEMS[0]
    places = range(len(problem["choices"][0]))
    alike = next(i for i in places if len({choice[i] for choice in problem["choices"]}) > 1)  # before that, they are
    start = problem["choices"][0][:alike].strip()
    prompts = [f"{problem['question']} {problem['paths']} {start}".strip()] * 5
    completions = [*(choice[alike : alike + 11] for choice in problem["choices"]), "1"]  # of six tokens, and of one
    lm = make(likelihood=likelihood, samples=62, batch_size=5)  # one mask of six tokens less than there are
    found = lm.loglikelihood(pairs(prompts, [" " + text for text in completions]), disable_tqdm=True)
    denoiser = Denoiser(*embedded)
    chain = chain_log_likelihood(denoiser, prompts, completions)
    assert [greedy for _, greedy in found] == chain.is_greedy.tolist()
    assert [greedy for _, greedy in found].index(True) == problem["label"]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    if likelihood == "chain":
        torch.testing.assert_close(values, chain.value, rtol=1e-4, atol=1e-4)
    else:
        exact = log_likelihood_bound(denoiser, prompts, completions, samples=64)
        one = log_likelihood_bound(denoiser, prompts, completions, samples=62)
        assert exact.standard_error.tolist() == [0] * 5
        assert bool(((values - exact.value).abs() < 5 * one.standard_error + 1e-4).all())
        assert bool((values != exact.value)[:4].all())
    again = make(likelihood=likelihood, samples=62, batch_size=2)
    swapped = again.loglikelihood(pairs(prompts, [" " + text for text in completions[::-1]]), disable_tqdm=True)
    assert [value for value, _ in swapped[::-1]] == pytest.approx(values.tolist(), abs=1e-3)


def test_rolling_takes_windows_that_fit(make, embedded, monkeypatch):
    from lm_eval.api.instance import Instance

    lm = make(likelihood="chain", max_length=12, batch_size=16)
    text = QUESTIONS[0] + " " + QUESTIONS[1]
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))])
    ids = embedded[1](text)["input_ids"]
    start, total = 0, 0.0
    prefix = [embedded[1].bos_token_id]
    denoiser = Denoiser(*embedded)
    while start < len(ids):  # each window is of 11 tokens and one before it; the last has as much in front as fits
        stop = min(start + 11, len(ids))
        before = (prefix + ids)[max(0, stop + 1 - 12) : start + 1]
        total += chain_log_likelihood(denoiser, [before], [ids[start:stop]]).value.item()
        start = stop
    assert found == pytest.approx(total, rel=1e-4)

    def unasked(*_, **__):
        raise AssertionError("a sum over windows is not asked whether it is greedy")

    monkeypatch.setattr("nap_decode.integrations.lm_eval.chain_log_likelihood", unasked)
    (short,) = make(likelihood="bound", max_length=6).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("1 2 3 4 5 6 7",), 0, ("task", 0, 1))]
    )
    ids = embedded[1]("1 2 3 4 5 6 7")["input_ids"]  # windows of few enough tokens for the exact bound
    wanted = log_likelihood_bound(denoiser, [prefix, ids[2:5]], [ids[:5], ids[5:]]).value.sum().item()
    assert short == pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------------------------ options


@needs_harness
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "paralel_forced"}, "there is no decoder 'paralel_forced'. Did you mean 'parallel_forced'"),
        ({"sampler_args": "token_per_step=4"}, "Did you mean 'tokens_per_step'"),
        ({"sampler_args": "steps=0"}, "steps must be"),
        ({"sampler_args": "steps"}, "must be written as name=value"),
        ({"sampler": "nowhere.json"}, "nowhere.json"),
        ({"batch_sise": 3}, "there is no option of the model 'batch_sise'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"softmax_dtype": "float32"}, "softmax_dtype='float32' would have no effect"),
        ({"logits_cache": False}, "logits_cache=False would have no effect"),
        ({"likelihood": "exact"}, "there is no likelihood 'exact'"),
        ({"samples": 1}, "samples must be"),
        ({"samples": 63}, "samples must be even"),
        ({"cfg_scale": -1.0}, "cfg_scale must be"),
        ({"seed": 2.7}, "a seed must be a whole number, but is 2.7"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises((NapDecodeError, OSError), match=message):
        harness_model()(str(demo.CHECKPOINT), device="cpu", **options)


@needs_harness
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "nim_sums"], "there is no task 'nim_sums'. Did you mean 'nim_sum'"),
        (["--tasks", "nim_sum", "--include-path", "nowhere"], "nowhere is no directory"),
        (["--tasks", "nim_sum", "--limit", "1.5"], "--limit must be"),
        (["--tasks", "nim_sum", "--limit", "0"], "--limit must be"),
        (["--tasks", "nim_sum", "--log-samples"], "--output DIR"),
        (["--tasks", "nim_sum", "--model-args", "device=cpu"], "has an option of its own: --device"),
    ],
)
def test_bad_commands(given, message, monkeypatch):
    from lm_eval import tasks

    # The harness's own tasks are in thousands of files.
    own = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: own(**options | {"include_defaults": False}))
    with pytest.raises(NapDecodeError, match=message):
        run(arguments(*given))


@needs_harness
def test_the_harness_makes_it_from_a_text(embedded):
    from lm_eval.api.registry import get_model

    harness_model()
    text = f"pretrained={demo.CHECKPOINT},sampler=klass,sampler_args=threshold:0.8;path_length:11;summary_length:2"
    lm = get_model("nap_decode").create_from_arg_string(
        text, {"batch_size": 3, "max_batch_size": None, "device": "cpu"}
    )
    assert lm.batch_size == 3
    assert lm.sampler.decoder == decoders.klass(threshold=0.8)
    assert lm.max_gen_toks == 2


@needs_harness
def test_encoders_and_decoders_are_loaded_by_their_kind(tmp_path, embedded):
    import transformers

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    embedded[1].save_pretrained(tmp_path)
    lm = harness_model()(str(tmp_path), device="cpu", sampler="left_to_right")
    assert type(lm.model).__name__ == "BertForMaskedLM"
    assert len(lm.generate_until(requests(["1 2"], max_gen_toks=3), disable_tqdm=True)) == 1
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "dense" not in name}, file, {"format": "pt"})
    with pytest.raises(NapDecodeError, match="weights of BertForMaskedLM are not in the checkpoint"):
        harness_model()(str(tmp_path), device="cpu", sampler="left_to_right")
    tiny_model(is_causal=True, vocab_size=20).save_pretrained(tmp_path / "decoder")
    embedded[1].save_pretrained(tmp_path / "decoder")
    with pytest.raises(NapDecodeError, match="ignores the future"):
        harness_model()(str(tmp_path / "decoder"), device="cpu", sampler="left_to_right")
    harness_model()(str(tmp_path / "decoder"), device="cpu", sampler="left_to_right", bidirectional=True)


@pytest.mark.skipif(has_harness, reason="lm_eval is installed")
def test_its_absence_is_explained():
    with pytest.raises(NapDecodeError, match=r"nap_decode\[eval\]"):
        run(arguments("--tasks", "nim_sum"))


def test_options_as_text():
    assert parse_options('a=1, b=[1,2],c={"x":1},d=True,e=null,f=word,') == {
        "a": 1,
        "b": [1, 2],
        "c": {"x": 1},
        "d": True,
        "e": None,
        "f": "word",
    }
    with pytest.raises(NapDecodeError, match="a bracket is open"):
        parse_options("a=[1,2")


def test_closing_and_canvas_options(make):
    sampler = make(sampler_args={"path_length": 11, "close_on": "end"}).sampler
    assert sampler.decoder.close_on == "end"
    assert [block.length for block in sampler.template.blocks] == [11, 11, 11, 32]
    assert sampler.decoder.committer == MicroConfidenceCommitter()


def test_costs_survive_pickling():
    cost = DecodeCost(3, 2.0, 0.5, 0.25)
    again = pickle.loads(pickle.dumps(Generation("text", cost)))
    assert (again, again.cost) == ("text", cost)


def test_costs_of_repeats_and_filters():
    def sample(number, *costs):
        return {"doc_id": number, "resps": [[Generation("", DecodeCost(*cost)) for cost in costs]]}

    nan = float("nan")
    samples = [sample(0, (2, 1.0, 0.5, nan), (4, 3.0, 0.5, nan)), sample(1, (5, 1.0, 1.0, nan))]
    results = {
        "results": {"a": {}, "b": {}},
        "samples": {"a": samples * 2, "b": [{"doc_id": 0, "resps": [[(0.1, True)]]}]},
    }
    add_costs(results)
    assert results["results"]["b"] == {}
    assert results["results"]["a"]["forward_passes,none"] == 4
    assert results["results"]["a"]["forward_passes_stderr,none"] == pytest.approx(1)
    assert "arness_local,none" not in results["results"]["a"]
    assert samples[0]["tokens_per_forward"] == 2
    assert samples[0]["arness_local"] is None
    with pytest.raises(NapDecodeError, match="log_samples=True"):
        add_costs({"results": {}})


def test_task_files_are_there():
    assert {path.name for path in TASKS.glob("nim_sum*")} == {
        "nim_sum.py",
        "nim_sum.yaml",
        "nim_sum_path.yaml",
        "nim_sum.jsonl",
    }


@needs_harness
def test_the_page_shows_what_the_command_prints(capsys):
    """``docs/evaluation.md``, to the last digit but for what another processor rounds."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    command, shown = re.search(
        r"\nnap-decode eval (--model \"\$model\".*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL
    ).groups()
    given = shlex.split(command.replace("$model", str(demo.CHECKPOINT)).replace("\\\n", " "))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(given))
    printed = capsys.readouterr().out
    number = r"\d+\.\d+"
    assert re.sub(number, "", shown).split() == re.sub(number, "", printed).split()
    want, got = ([float(found) for found in re.findall(number, text)] for text in (shown, printed))
    assert got == pytest.approx(want, abs=0.02)
