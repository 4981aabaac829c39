"""Every code block of README.md and docs/ is run, or says what it needs.

The rule for a fenced block:

* ``python`` with ``>>>`` is a doctest, which pytest collects.
* ``bash`` is run here, if all it calls is ``nap-decode``.
* What cannot be run stands behind a comment that says what it needs: one of :data:`NEEDS` or ``extra NAME``, or
  several with commas between::

      <!-- needs: gpu checkpoint -->

  It is not run, but the commands, options, names and keywords in it must exist.
* ``text``, ``json`` and ``yaml`` are data.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nap_decode
from nap_decode import NapDecodeError, cli, decoders

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NEEDS = {"gpu checkpoint", "checkpoint", "network", "minutes", "a cluster", "other code"}
PROGRAMS = {
    "cp",
    "nap-decode",
    "accelerate",
    "cd",
    "export",
    "jupyter",
    "mkdocs",
    "pip",
    "python",
    "python3",
    "ray",
    "source",
}
FENCE = re.compile(r"(?:^<!-- needs: ([^\n]*) -->\n\s*)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    page: Path
    line: int
    language: str
    code: str
    needs: tuple[str, ...]

    @property
    def is_doctest(self) -> bool:
        return self.language == "python" and ">>> " in self.code

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(text: str, page: Path = ROOT / "README.md") -> list[CodeBlock]:
    return [
        CodeBlock(
            page,
            line=text.count("\n", 0, match.start(2)) + 1,
            language=match[3],
            code=inspect.cleandoc("\n" + match[4]),
            needs=tuple(match[1].split(", ")) if match[1] else (),
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), page)]


def blocks(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def extras() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def commands_of(code: str) -> Iterator[list[str]]:
    """The commands of a bash block, each as its words, without comments and assignments."""
    for line in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def our_arguments(command: list[str]) -> list[str] | None:
    """What ``nap-decode`` is called with, also if another program (``accelerate launch``) calls it."""
    for i, word in enumerate(command):
        if word.rpartition("/")[2] == "nap-decode":
            return command[i + 1 :]
        if word == "-m" and command[i + 1] in ("nap_decode", "nap_decode.cli"):
            return command[i + 2 :]
    return None


def check_commands(code: str) -> None:
    for command in commands_of(code):
        program = command[0].rpartition("/")[2]
        assert program in PROGRAMS, f"unknown program {program!r}"
        arguments = our_arguments(command)
        if arguments is not None:
            check_our_arguments(arguments)
        for before, word in itertools.pairwise(command):
            if program in ("python", "python3") and re.fullmatch(r"[\w/]+\.py|\.ci/\w+", word):
                assert (ROOT / word).exists(), f"there is no {word}"
            if program == "pip" and before in ("-c", "-r"):
                assert (ROOT / word).exists(), f"there is no {word}"
            for group in re.findall(r"^(?:\.|nap_decode)\[([\w,-]+)\]", word):
                assert set(group.split(",")) <= extras(), f"no such extra: {word}"


def check_our_arguments(arguments: list[str]) -> None:
    try:
        parsed = cli._parser().parse_args(arguments)
    except SystemExit as ended:
        if ended.code == 0:  # --help and --version
            return
        known = cli._parser()._subparsers._group_actions[0].choices.get(arguments[0])
        left_out = known is not None and "..." in arguments  # then the options that are there must exist
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        if not (left_out and all(option in known._option_string_actions for option in options)):
            raise AssertionError(f"nap-decode {shlex.join(arguments)}") from ended
        return
    if arguments[0] == "generate":
        cli._decoder(parsed)  # knows the decoders and their options


def check_python(code: str, names: dict[str, Any]) -> None:
    """Whatever is imported from the package exists, and takes the keywords that it is called with."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nap_decode":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if alias.name == "*":
                    continue
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        called = find(node.func, names) if isinstance(node, ast.Call) else None
        if called is None:
            continue
        parameters = inspect.signature(called).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            for keyword in node.keywords:
                assert keyword.arg is None or keyword.arg in parameters, (
                    f"{ast.unparse(node.func)} has no {keyword.arg}="
                )


def find(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = find(node.value, names)
        return None if owner is None else getattr(owner, node.attr)
    return None


def is_ours(block: CodeBlock) -> bool:
    return block.language == "bash" and all(command[0] == "nap-decode" for command in commands_of(block.code))


def test_every_block_is_run_or_says_what_it_needs():
    known = NEEDS | {f"extra {name}" for name in extras()}
    unknown = {block.place: need for block in BLOCKS for need in block.needs if need not in known}
    assert not unknown, f"known are {sorted(known)}"
    data = ("text", "json", "yaml")
    unmarked = [b.place for b in BLOCKS if not (b.needs or b.is_doctest or is_ours(b) or b.language in data)]
    assert not unmarked, "make them doctests, or say <!-- needs: gpu checkpoint -->"


@blocks("bash")
def test_commands_exist(block):
    check_commands(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    names = {name: getattr(nap_decode, name) for name in nap_decode.__all__}  # of an import of everything
    for block in BLOCKS:
        if block.page == page and block.language == "python" and not block.is_doctest:
            check_python(block.code, names)


@blocks("json")
def test_data_are_valid(block):
    for line in block.code.splitlines() if "\n{" in block.code else [block.code]:
        json.loads(line)


RUN = [block for block in BLOCKS if is_ours(block) and not block.needs]


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in RUN:
        if block.page == page:
            for command in commands_of(block.code):
                assert cli.main(command[1:]) == 0, block.place


MEASURED = {
    "docs/study.md": "examples/miniature/report.py",
    "docs/explanation.md": "examples/miniature/report.py",
    "docs/decoders.md": "examples/compare_decoders.py",
    "docs/reuse.md": "examples/study_reuse.py",
    "docs/evaluation.md": "tests/integrations/test_lm_eval.py",
    "docs/compared.md": "tests/integrations/test_model_precision.py",  # what is run here; the rest ran others' code
    "docs/benchmarks.md": "examples/study_speed.py",
}
"""What writes or checks the numbers in the tables of a page."""
FACTS = [DOCS / "families.md", *(DOCS / "models").glob("*.md")]  # numbers in the families' own code, and versions


def has_measured(text: str) -> bool:
    """Whether there is a table with a number that is no whole one, or with several of them in a row."""
    rows = re.findall(r"^ *\|(.*)\| *$", text, re.MULTILINE)
    number = r" *~?\d+(\.\d+)?( ?%|x| of \d+)? *"
    cells = [[cell for cell in row.split("|") if re.fullmatch(number, cell)] for row in rows]
    return any(len(row) > 1 or any(re.search(r"\.|%|x|of", cell) for cell in row) for row in cells)


@pytest.mark.parametrize("page", sorted({*PAGES} - {*FACTS}), ids=lambda page: str(page.relative_to(ROOT)))
def test_numbers_come_from_scripts(page):
    name = str(page.relative_to(ROOT))
    assert has_measured(page.read_text()) == (name in MEASURED), "say in MEASURED what writes or checks the numbers"
    if name in MEASURED:
        script = (ROOT / MEASURED[name]).read_text()
        assert page.name in script or name == "docs/benchmarks.md"


def anchors_of(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}#{anchor}"


def test_every_page_is_in_the_navigation():
    config = (DOCS / "site" / "mkdocs.yml").read_text()
    listed = re.findall(r"^ *- (?:.*: )?(\S+\.md)$", config, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents)


def test_every_public_name_is_in_the_reference():
    listed = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    for name in nap_decode.__all__:
        assert f"::: nap_decode.{name}\n" in listed, name
    commands = cli._parser()._subparsers._group_actions[0].choices
    assert set(re.findall(r"<!-- help: (\S+) -->", listed)) == set(commands)


def test_every_decoder_is_in_the_table():
    table, _ = (DOCS / "decoders.md").read_text().split("## On the embedded model")
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == list(decoders.DECODERS)
    assert f"[{len(named)} decoders]" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "needs", "is_doctest"),
    [
        ("<!-- needs: gpu checkpoint -->\n```python\nx\n```\n", ("gpu checkpoint",), False),
        ("<!-- needs: network, extra viz -->\n\n```bash\nx\n```\n", ("network", "extra viz"), False),
        ("<!-- needs: network -->\nwords\n\n```python\n>>> x\n```\n", (), True),
        ("* item\n\n  ```python\n  >>> x\n  ```\n", (), True),
    ],
)
def test_the_mark_belongs_to_the_block_behind_it(text, needs, is_doctest):
    (block,) = blocks_of(text)
    assert (block.needs, block.is_doctest) == (needs, is_doctest)


@pytest.mark.parametrize(
    "code",
    [
        "nap-decode generate --model PATH --prompt x --nosuch 1",
        "nap-decode nosuch",
        "nap-decode generate ... --nosuch",
        "accelerate launch -m nap_decode.cli arness",  # the file is missing
        "nap-decode generate --model PATH --prompt x --decoder klass --set nosuch=1",
        "cd x && nap_decode arness x",
        "python examples/nosuch.py",
        "python .ci/nosuch",
        "pip install 'nap_decode[nosuch]'",
        "pip install -c .ci/nosuch.txt .",
    ],
)
def test_bad_commands_are_found(code):
    with pytest.raises((AssertionError, NapDecodeError)):
        check_commands(code)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("from nap_decode import NoSuch", ImportError),
        ("Sampler(model, nosuch=1)", AssertionError),
        ("from nap_decode import decoders as d\nd.klass(nosuch=1)", AssertionError),
        ("CanvasTemplate.nosuch()", AttributeError),
    ],
)
def test_bad_names_are_found(code, error):
    names = {name: getattr(nap_decode, name) for name in nap_decode.__all__}
    with pytest.raises(error):
        check_python(code, names)
