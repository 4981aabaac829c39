from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import nap_decode

SOURCE = Path(nap_decode.__file__).parent
CONSTRAINTS = Path(__file__).parents[1] / ".ci" / "constraints.txt"
LAYERS = [
    {"base"},
    {"canvas", "prompts", "checkpoints"},
    {"model"},
    {"parts"},
    {"speed"},
    {"results"},
    {"run"},
    {"decoders"},
    {"nap"},
    {"measure"},
    {"bulk", "demo", "bench"},
    {"integrations"},
    {"cli"},
]
"""Folders and files; each imports only itself and what stands before it.  The package's own face imports any."""
FILES = {
    ".".join(("nap_decode", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
FACES = {name for name, path in FILES.items() if path.stem == "__init__"}


@cache
def imports(name):
    """Files of the package that a file imports, wherever in it, for whatever reason."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by a relative path"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in FILES else node.module for one in whole}
    return sorted(found & set(FILES))


@cache
def levels(name):
    """The longest chain of imports below a file, faces not counted, from the file on; raises in a circle."""
    return max(map(levels, imports(name)), key=len, default=()) + (() if name in FACES else (name,))


def arrows_upward():
    place = {f"nap_decode.{name}": i for i, layer in enumerate(LAYERS) for name in layer}
    folder = {name: ".".join(name.split(".")[:2]) for name in FILES}
    for name in sorted(FILES.keys() - {"nap_decode"}):
        for other in imports(name):
            if other == "nap_decode" or (folder[other] != folder[name] and place[folder[other]] >= place[folder[name]]):
                yield f"{name} -> {other}"


def circles():
    """Files that can be reached from themselves."""
    for start in sorted(FILES):
        seen, coming = set(), set(imports(start))
        while coming:
            seen |= coming
            coming = {other for name in coming for other in imports(name)} - seen
        if start in seen:
            yield start


def test_imports_point_one_way():
    assert [*arrows_upward()] == []


def test_no_circle_of_imports():
    assert [*circles()] == []


@pytest.mark.parametrize(("below", "most"), [("run", 7), ("", 11)], ids=["kernel", "all"])
def test_levels_of_imports(below, most):
    """Whoever reads the loop has few files below it."""
    longest = max((levels(name) for name in FILES if name.startswith(f"nap_decode.{below}".rstrip("."))), key=len)
    assert len(longest) <= most, " <- ".join(longest)


@pytest.mark.parametrize("name", nap_decode.__all__)
def test_every_public_object_has_an_example(name):
    assert ">>>" in getattr(nap_decode, name).__doc__


def test_importing_runs_nothing_heavy():
    code = "import sys, nap_decode; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "nap_decode.run.sampler" in loaded
    for heavy in ("transformers", "matplotlib", "nap_decode.demo", "nap_decode.cli"):
        assert heavy not in loaded


def test_everything_that_is_required_is_held_to_a_version():
    """So that the README's commands do the same everywhere."""
    held = re.findall(r"^([\w-]+)==", CONSTRAINTS.read_text(), re.MULTILINE)
    required = {re.match(r"[\w-]+", line)[0] for line in importlib.metadata.requires("nap_decode")}
    assert {name.replace("_", "-").lower() for name in required - {"nap_decode", "nap-decode"}} <= set(held)


def test_version():
    assert importlib.metadata.version("nap_decode") == nap_decode.__version__
