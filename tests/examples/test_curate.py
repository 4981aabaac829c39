from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from nap_decode import CanvasTemplate, Denoiser, NapDecodeError, ParallelForcedSampler, demo

ROOT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, *map(str, range(8)), "=", "user:", "teacher:", "solve", "why"]
STUDENT = transformers.AutoTokenizer.from_pretrained(demo.CHECKPOINT)
END, PAD, MASK = STUDENT.eos_token_id, STUDENT.pad_token_id, STUDENT.mask_token_id
PROBLEMS = demo.sample_problems(6, seed=2026)
QUESTIONS = [{"id": n, "prompt": problem.prompt, "answer": problem.answer} for n, problem in enumerate(PROBLEMS)]
OPTIONS = {"samples": 6, "path_length": 11, "summary_length": 4, "summary": "= {answer}", "separator": "="}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("curate", ROOT / "examples" / "curate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A causal model with random weights, in float64, which ends a trajectory after some ten tokens."""
    directory = tmp_path_factory.mktemp("teacher")
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=12,  # no words of chats
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.float64).save_pretrained(directory)
    return directory


@pytest.fixture
def run(example, teacher, tmp_path):
    """Runs the script; returns the rows it wrote and its report."""

    def run(questions=QUESTIONS, output="out", **options):
        options = {"teacher": teacher, "student": demo.CHECKPOINT, "max_new_tokens": 30} | OPTIONS | options
        directory = tmp_path / output
        directory.mkdir(exist_ok=True)
        file = directory / "questions.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        words = ["--input", str(file), "--output", str(directory)]
        for name, value in options.items():
            if value is not False:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        example.main(words)
        name = options.get("format", "nap")
        lines = (directory / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads((directory / f"{name}_report.json").read_text())

    return run


@pytest.fixture
def lay_out(run, tmp_path):
    """The second stage alone, on trajectories that are given: a text, or ``(text, False)`` if it has no end."""

    def lay_out(*trajectories, answer="7", output="out", written=None, **options):
        (tmp_path / output / "traces").mkdir(parents=True, exist_ok=True)
        pairs = [one if isinstance(one, tuple) else (one, True) for one in trajectories]
        trace = {"id": 1, "trajectories": [{"text": text, "finished": finished} for text, finished in pairs]}
        trace |= {"summary": written} if written else {}
        (tmp_path / output / "traces" / "part-given.jsonl").write_text(json.dumps(trace))
        question = {"id": "1", "prompt": "1 2 =", "answer": answer}
        options = {"teacher": "is not needed", "samples": len(trajectories), "num_paths": 2} | options
        return run([question], output, **options)

    return lay_out


def block_of(row, number):
    return [token for token, block in zip(row["input_ids"], row["block"], strict=True) if block == number]


def words(ids):
    return " ".join(STUDENT.convert_ids_to_tokens(ids))


# --------------------------------------------------------------------------------------------- the canvas


def test_the_canvas_is_that_of_the_decoder(run, embedded):
    rows, report = run(too_long="truncate", num_paths=2)
    assert [row["id"] for row in rows] == [str(n) for n in range(6)]
    for row in rows:
        sampler = ParallelForcedSampler(*embedded, num_paths=2, path_length=11, summary_length=4, tokens_per_step=13)
        canvas = sampler(row["prompt"]).canvas
        assert row["block"] == canvas.block[0].tolist()
        assert row["loss_mask"] == canvas.decodable[0].int().tolist()
        assert len(row["input_ids"]) == canvas.tokens.shape[1]
        for token, given, decoded in zip(row["input_ids"], canvas.tokens[0].tolist(), row["loss_mask"], strict=True):
            assert given == (MASK if decoded else token)
            assert token != MASK
        assert report["blocks"] == list(canvas.block_names)
        assert report["held"] == list(canvas.held) == [False, False, True]
    assert (report["mask_token_id"], report["end_token_id"], report["pad_token_id"]) == (MASK, END, PAD)


def test_blocks_hold_the_texts_their_end_and_padding(lay_out):
    (row,), report = lay_out("1 2 3 7", "4 5 6 4 5 6 4 5 6 4 5", answer=5)
    assert row["paths"] == ["1 2 3 7", "4 5 6 4 5 6 4 5 6 4 5"]
    assert row["correct"] == [False, True]
    assert (row["answer"], row["summary"]) == ("5", "= 5")
    assert words(row["input_ids"][:5]) == "<bos> 1 2 = <think 1>"
    assert words(block_of(row, 0)) == "1 2 3 7 <eos>" + " <pad>" * 6
    assert words(block_of(row, 1)) == "4 5 6 4 5 6 4 5 6 4 5"  # full to its last slot
    assert words(block_of(row, 2)) == "= 5 <eos> <pad>"
    assert report["counts"] == {"questions": 1, "written": 1}


def test_closing_texts_are_decoded_inside_the_blocks(lay_out):
    (row,), _ = lay_out("1 2", "3", path_closing="= {}", summary_closing="=")
    assert words(block_of(row, 0)[:6]) == "1 2 = 1 <eos> <pad>"
    assert words(block_of(row, 1)[:5]) == "3 = 2 <eos> <pad>"
    assert words(block_of(row, 2)) == "= 7 = <eos>"
    assert row["paths"] == ["1 2", "3"]
    (row,), _ = lay_out("1 2 3", "4", path_closing="= {}", path_length=4, too_long="truncate", output="cut")
    assert words(block_of(row, 0)) == "1 2 = 1"
    with pytest.raises(SystemExit, match="a closing text takes 2 tokens of a block of 2"):
        lay_out("1", "2", path_closing="= {}", path_length=2)


def test_headers_are_clamped(lay_out):
    (row,), _ = lay_out("1", "2", path_header="= {}", summary_header="= =")
    template = CanvasTemplate.nap(2, path_length=11, summary_length=4, path_header="= {}", summary_header="= =")
    ids, block = template.encode(STUDENT, MASK)
    assert row["block"][4:] == block
    assert [token for token, b in zip(row["input_ids"][4:], block, strict=True) if b < 0] == [
        token for token in ids if token != MASK
    ]


# ------------------------------------------------------------------------------------- what is left out, and why


@pytest.mark.parametrize(
    ("trajectories", "too_long", "paths", "counts"),
    [
        (["1", "2 " * 12], "drop", None, {"trajectories too long": 1}),
        (["1", "2 " * 12], "truncate", ["1", ("2 " * 11).strip()], {"trajectories too long": 1}),
        (["1", "2 " * 12, "3"], "drop", ["1", "3"], {"trajectories too long": 1}),
        ([("1 2", False), "2", "3"], "drop", ["2", "3"], {"trajectories without an end": 1}),
        ([("1 2", False), "2", "3"], "truncate", ["1 2", "2"], {"trajectories without an end": 1}),
        (["", "2", "3"], "truncate", ["2", "3"], {"trajectories without text": 1}),
        (["<mask>", "2", "3"], "truncate", ["2", "3"], {"trajectories with special tokens": 1}),
        (["1 <eos> 2", "2", "why"], "drop", None, {"trajectories with special tokens": 2}),
        (["1", "2", "3 " * 12], "drop", ["1", "2"], {}),  # not looked at
    ],
)
def test_what_does_not_fit_is_counted(lay_out, tmp_path, trajectories, too_long, paths, counts):
    counts = {"questions": 1, "written": int(paths is not None)} | counts
    if paths is None:
        with pytest.raises(SystemExit, match=r"no question is left: 1 questions, 0 written, \d trajectories"):
            lay_out(*trajectories, too_long=too_long)
        report = json.loads((tmp_path / "out" / "nap_report.json").read_text())
        assert report["counts"] == counts | {"questions with too few paths": 1}
        return
    (row,), report = lay_out(*trajectories, too_long=too_long)
    assert row["paths"] == paths
    assert report["counts"] == counts


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_summary_is_never_cut(lay_out, too_long):
    with pytest.raises(SystemExit, match="1 summaries too long, 1 questions without a summary"):
        lay_out("1", "2", summary="= = = = {answer}", too_long=too_long)


@pytest.mark.parametrize(
    ("answer", "text", "regex", "is_correct"),
    [
        ("7", "1 2 7", None, True),
        ("7", "7 2 1", None, False),
        ("7", "1 2 7", r"\d", True),
        ("7", "7 = 1", r"(\d) =", True),
        ("7", "= =", None, False),
        ("= 7", "1 2 = 7", r"= 7", True),
    ],
)
def test_answers_are_compared(lay_out, answer, text, regex, is_correct):
    options = {} if regex is None else {"answer_regex": regex}
    (row,), _ = lay_out(text, text, answer=answer, **options)
    assert row["correct"] == [is_correct] * 2


def test_numbers_and_texts_are_compared(example):
    last = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
    assert example.is_same(example.final_answer("so 12, no: $1,234.50.", last), "1234.5")
    assert example.is_same(example.final_answer("A, or rather (B)", re.compile(r"\(([A-D])\)")), "B")
    assert example.is_same("7", "7.0")
    assert not example.is_same(example.final_answer("nothing", last), "0")
    assert example.final_answer("1", re.compile("(2)?1")) == ""


@pytest.mark.parametrize(("least", "is_kept"), [(0, True), (1, True), (2, False)])
def test_questions_can_be_filtered_by_their_answers(lay_out, least, is_kept):
    if is_kept:
        assert lay_out("1 7", "2", min_correct=least)[0][0]["correct"] == [True, False]
    else:
        with pytest.raises(SystemExit, match="1 questions with too few correct paths"):
            lay_out("1 7", "2", min_correct=least)


# -------------------------------------------------------------------------------------------------- the chain


def test_a_chain_is_the_same_paths_in_a_row(lay_out):
    (nap,), _ = lay_out("1 2", "3")
    (row,), report = lay_out("1 2", "3", format="chain")
    assert {name: row[name] for name in ("paths", "summary", "correct")} == {
        name: nap[name] for name in ("paths", "summary", "correct")
    }
    assert words(block_of(row, 0)) == "1 2 = 3 = = 7 <eos>" + " <pad>" * 18
    assert sum(row["loss_mask"]) == sum(nap["loss_mask"]) == 26
    assert (report["blocks"], report["held"]) == (["completion"], [False])


def test_a_chain_that_is_too_long(lay_out):
    paths = ["1 " * 11, "2 " * 11]  # with their separators and the summary they take two tokens more than there are
    with pytest.raises(SystemExit, match="1 chains too long, 1 questions with too long a chain"):
        lay_out(*paths, format="chain", summary="= = = {answer}")
    (row,), report = lay_out(*paths, format="chain", summary="= = = {answer}", too_long="truncate")
    assert words(block_of(row, 0)) == "1 " * 11 + "= " + "2 " * 10 + "= = = 7"
    assert report["counts"]["chains too long"] == 1


# ------------------------------------------------------------------------------------------------ the teacher


def test_draws_follow_the_scores(example):
    scores = torch.tensor([0.5, 2.0, -1.0, -torch.inf]).expand(20_000, -1)
    noise = example.Gumbel(torch.arange(20_000), width=3)
    drawn = noise(torch.zeros(1, 5), scores).argmax(1)
    expected = scores[0].softmax(0)
    frequency = drawn.bincount(minlength=4) / len(drawn)
    assert (frequency - expected).abs().max() < 5 * (expected * (1 - expected) / len(drawn)).sqrt().max()
    assert frequency[3] == 0
    assert not torch.equal(drawn, noise(torch.zeros(1, 6), scores).argmax(1))  # another step


def greedy(teacher, prompt, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    row = model.generate(ids, do_sample=False, max_new_tokens=tokens, attention_mask=torch.ones_like(ids))[0]
    return tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)


def test_trajectories_are_samples_of_the_teacher(run, teacher, tmp_path):
    run(too_long="truncate", output="free")
    traces = traces_of(tmp_path / "free")
    texts = {one["text"] for trace in traces.values() for one in trace["trajectories"]}
    assert len(texts) > 20  # of 36
    assert {one["finished"] for trace in traces.values() for one in trace["trajectories"]} == {True, False}
    for output, option in (("nucleus", {"top_p": 0.001}), ("cold", {"temperature": 0.001})):
        run(too_long="truncate", output=output, **option)
        for trace in traces_of(tmp_path / output).values():
            expected = greedy(teacher, trace["prompt"], 30)
            assert [one["text"] for one in trace["trajectories"]] == [expected] * 6


def traces_of(output):
    lines = [line for file in (output / "traces").glob("*.jsonl") for line in file.read_text().splitlines()]
    traces = [json.loads(line) for line in lines]
    assert len({trace["id"] for trace in traces}) == len(traces)
    return {trace["id"]: trace for trace in traces}


def test_trajectories_do_not_depend_on_batches_and_parts(run, tmp_path):
    questions = [question | {"prompt": question["prompt"][4 * n :]} for n, question in enumerate(QUESTIONS)]
    run(questions, "a", too_long="truncate", batch_size=1)
    run(questions[::-1], "b", too_long="truncate", batch_size=7, questions_per_part=4)
    run(questions[2:3], "c", too_long="truncate")
    a, b, c = (traces_of(tmp_path / name) for name in "abc")
    assert a == b
    assert c == {"2": a["2"]}
    run(questions, "d", too_long="truncate", seed=1)
    assert all(trace["trajectories"] != a[name]["trajectories"] for name, trace in traces_of(tmp_path / "d").items())


@pytest.fixture
def ask(example, teacher):
    """Makes the script's teacher."""

    def ask(*words):
        words = ("--teacher", str(teacher), "--student", "-", "--input", "-", "--output", "-", *words)
        args = example.make_parser().parse_args(words)
        example.check(args)
        return example.Teacher(args, [])

    return ask


def test_any_of_several_end_tokens_ends_a_trajectory(ask):
    asked = ask("--max-new-tokens", "30")
    asked.ends = asked.model.generation_config.eos_token_id = [1, WORDS.index("=")]
    results = asked.sample([[3, 4, 5]] * 20, list(range(20)), 1.0)
    assert not any("=" in one["text"] for one in results)
    assert any(one["finished"] and len(one["text"].split()) > 1 for one in results)


def test_chats_and_instructions(ask):
    asked = ask("--max-new-tokens", "9")

    def encode(prompt, instruction, template):
        asked.tokenizer.chat_template = template
        return asked.tokenizer.decode(asked.encode({"id": "a", "prompt": prompt}, instruction, answer="7"))

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}teacher:"
    assert encode("1 2 =", "solve {prompt} {nothing}", None) == "solve 1 2 = <unk>"
    assert encode("1 2 =", "solve {prompt} why {answer}", template) == "user: solve 1 2 = why 7 teacher:"
    chat = [{"role": "user", "content": "3"}, {"role": "user", "content": "{answer}"}]  # a value is not looked into
    assert encode(chat, "solve {prompt}", template) == "user: 3 user: solve <unk> teacher:"
    with pytest.raises(NapDecodeError, match="no chat template"):
        encode(chat, "solve {prompt}", None)


def test_the_teacher_may_write_the_summary(ask, lay_out, teacher):
    asked = ask("--max-new-tokens", "20", "--write-summary", "{paths} = {answer} = {prompt}")
    questions = [{"id": str(n), "prompt": p.prompt, "answer": str(p.answer), "seed": n} for n, p in enumerate(PROBLEMS)]
    for trace in asked.trace(questions):
        texts = " ".join(f"Attempt {j + 1}: {one['text']}" for j, one in enumerate(trace["trajectories"]))
        request = f"{texts} = {trace['answer']} = {trace['prompt']}"
        assert trace["summary"]["text"] == greedy(teacher, request, 20)
    (row,), _ = lay_out("1", "2", written={"text": "4 5", "finished": True})
    assert row["summary"] == "4 5"
    assert words(block_of(row, 2)) == "4 5 <eos> <pad>"
    with pytest.raises(SystemExit, match="1 summaries without an end, 1 questions without a summary"):
        lay_out("1", "2", written={"text": "4 5", "finished": False}, too_long="truncate")


# ------------------------------------------------------------------------------------------------- restarts


def test_a_run_that_was_interrupted_continues(run, example, tmp_path, monkeypatch, capsys):
    options = {"too_long": "truncate", "questions_per_part": 2}
    whole = run(output="whole", **options)
    trace, calls = example.Teacher.trace, []

    def interrupted(self, questions):
        calls.append([question["id"] for question in questions])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trace(self, questions)

    monkeypatch.setattr(example.Teacher, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    assert not (tmp_path / "out" / "nap.jsonl").exists()
    assert list(traces_of(tmp_path / "out")) == ["0", "1"]
    capsys.readouterr()
    again = run(**options)
    assert calls == [["0", "1"], ["2", "3"], ["2", "3"], ["4", "5"]]
    assert again[0] == whole[0]
    assert "sampled 2 of 4 questions" in capsys.readouterr().err
    files = [sorted((tmp_path / name / "traces").iterdir()) for name in ("whole", "out")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    files[1][1].unlink()  # a part is lost
    assert run(**options)[0] == whole[0]
    assert len(calls) == 5


def test_more_questions_and_other_canvases_ask_for_nothing_twice(run, example, monkeypatch):
    few, _ = run(QUESTIONS[:3], too_long="truncate", questions_per_part=2)
    rows, _ = run(too_long="truncate", questions_per_part=2)
    assert rows[:3] == few
    assert len(rows) == 6
    monkeypatch.setattr(example, "Teacher", None)
    assert [row["paths"] for row in run(too_long="truncate", format="chain")[0]] == [row["paths"] for row in rows]
    assert run(too_long="truncate", path_length=2)[0][0]["paths"] == [
        " ".join(path.split()[:2]) for path in rows[0]["paths"]
    ]
    assert run(too_long="truncate")[0] == rows


def test_files_are_written_at_once(example, tmp_path):
    def lines():
        yield "new"
        raise KeyboardInterrupt

    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        example.write_at_once(file, lines())
    assert file.read_text() == "old"
    assert example.write_at_once(file, ["a", "b"]) == 2
    assert file.read_text() == "a\nb\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "--seed 0 instead of 1"),
        ({"temperature": 0.7}, "--temperature 1.0 instead of 0.7"),
        ({"top_p": 0.9}, "--top-p"),
        ({"samples": 4}, "--samples 6 instead of 4"),
        ({"samples": 7}, "--samples 6 instead of 7"),
        ({"max_new_tokens": 31}, "--max-new-tokens"),
        ({"instruction": "solve {prompt}"}, "--instruction"),
        ({"write_summary": True, "num_paths": 6}, "--write-summary None instead of"),
        ({"dtype": "float32"}, "--dtype"),
        ({"teacher": "another"}, "--teacher"),
    ],
)
def test_a_directory_belongs_to_one_teacher(run, options, message):
    run(QUESTIONS[:2], too_long="truncate")
    with pytest.raises(SystemExit, match=f"traces of another run, with {message}"):
        run(too_long="truncate", **options)


@pytest.mark.parametrize("change", [{"prompt": "1 ="}, {"answer": 9}, {"seed": 3}])
def test_an_id_belongs_to_one_question(run, change):
    run(QUESTIONS[:2], too_long="truncate")
    with pytest.raises(SystemExit, match=f"question '1' is in .* with {next(iter(change))} "):
        run([QUESTIONS[0], QUESTIONS[1] | change], too_long="truncate")


def test_traces_from_elsewhere_are_checked(run, tmp_path):
    (tmp_path / "out" / "traces").mkdir(parents=True)
    (tmp_path / "out" / "traces" / "part-mine.jsonl").write_text('{"id": 0, "texts": []}')
    with pytest.raises(
        SystemExit, match=r"part-mine.jsonl: a trace has an id and trajectories, but this one id, texts"
    ):
        run()


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ({"answer": None}, {}, "question '0' has no answer; its columns are id, prompt, answer"),
        ({"answer": " "}, {}, "has no answer"),
        ({"prompt": None}, {}, "either prompt, messages or input_ids"),
        ({"prompt": None, "input_ids": [5]}, {}, "must be text"),
        ({"prompt": None, "messages": [{"role": "user", "content": "1"}]}, {}, "no chat template"),
        ({}, {"chat": True}, "no chat template"),
        ({"prompt": "1 <mask>"}, {}, "mask token of the student"),
        ({}, {"path_length": 80}, "prompt of 14 tokens and 248 more do not fit into the 256 that the student"),
        ({}, {"max_new_tokens": 116}, "prompt of 13 tokens and 116 more do not fit into the 128 that the teacher"),
        ({}, {"max_new_tokens": 29, "samples": 3, "write_summary": True}, "prompt of 13 tokens and 116 more"),
        ({}, {"teacher": demo.CHECKPOINT}, "is not causal"),
        ({}, {"samples": 2}, "--samples must be a whole number of at least 3"),
        ({}, {"min_correct": 4}, "--min-correct must be a number from 0 to 3"),
        ({}, {"temperature": 0}, "--temperature must be"),
        ({}, {"top_p": 1.5}, "--top-p must be"),
        ({}, {"batch_size": 0}, "--batch-size must be"),
        ({}, {"summary": "none"}, "--summary must have {answer} in it, but is 'none'"),
        ({}, {"instruction": "solve"}, "--instruction must have {prompt}"),
        ({}, {"write_summary": True}, "of --samples 6 there are only --num-paths 3 in a canvas; make them equal"),
        ({}, {"student": "/nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_the_teacher_is_loaded(
    run, example, tmp_path, monkeypatch, question, options, message
):
    monkeypatch.setattr(example, "load_checkpoint", None)
    with pytest.raises(SystemExit, match=message):
        run([QUESTIONS[0] | question, QUESTIONS[1]], **options)
    assert not (tmp_path / "out" / "_run.json").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pad", "no pad_token_id, .* set it in the files"),
        ("mask", "no mask_token_id, .* pass --mask-token-id"),
    ],
)
def test_the_student_needs_its_tokens(run, tmp_path, missing, message):
    student = tmp_path / "student"
    student.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = json.loads((demo.CHECKPOINT / file).read_text())
        content.pop(f"{missing}_token", None)
        content.pop(f"{missing}_token_id", None)
        (student / file).write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        run(student=student)
    if missing == "mask":
        rows, report = run(student=student, mask_token_id=MASK, too_long="truncate")
        assert (len(rows), report["mask_token_id"]) == (6, MASK)


def test_ids_are_those_of_the_decoder(example, embedded):
    model, tokenizer = embedded
    words = ("--student", str(demo.CHECKPOINT), "--teacher", "-", "--input", "-", "--output", "-")
    layout = example.Layout(example.make_parser().parse_args(words))
    denoiser = Denoiser(model, tokenizer)
    assert layout.mask_token_id == denoiser.mask_token_id
    assert layout.pad_token_id == denoiser.pad_token_id
    assert (layout.end_token_id,) == denoiser.end_token_ids
    layout.config.eos_token_id = [9, 10]  # goes before the tokenizer's, and a block has but one end
    assert layout._find("eos", None, None) == 9


def test_a_teacher_without_padding_will_do(run, teacher, tmp_path):
    other = tmp_path / "unpadded"
    other.mkdir()
    for file in teacher.iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            content = json.loads(content)
            content.pop("pad_token", None)
            content.pop("pad_token_id", None)
            content = json.dumps(content).encode()
        (other / file.name).write_bytes(content)
    questions = [question | {"prompt": question["prompt"][4 * n :]} for n, question in enumerate(QUESTIONS)]
    assert run(questions, "a", too_long="truncate")[0] == run(questions, "b", too_long="truncate", teacher=other)[0]


def test_parquet_has_the_same_rows(run, example, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows, _ = run(parquet=True, too_long="truncate")
    assert parquet.read_table(tmp_path / "out" / "nap.parquet").to_pylist() == rows
    run(too_long="truncate", path_length=5)
    assert not (tmp_path / "out" / "nap.parquet").exists()  # it would not be that of nap.jsonl
    # Texts stay texts, whatever they look like, and chats stay chats.
    odd = rows[0] | {"id": "2020-01-01", "answer": "2020-01-02", "summary": "2020-01-03", "paths": ["2020-01-04"]}
    odd["prompt"] = [{"role": "user", "content": "a"}]
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    example.write_parquet(tmp_path / "odd.jsonl", tmp_path / "odd.parquet")
    assert parquet.read_table(tmp_path / "odd.parquet").to_pylist() == [odd]


def test_parquet_is_refused_without_pyarrow(run, example, monkeypatch):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"--parquet needs pyarrow; run pip install 'nap_decode\[ray\]'"):
        run(parquet=True)
