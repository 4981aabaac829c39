from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nap_decode

SOURCE = Path(nap_decode.__file__).parent
CONSTRAINTS = Path(__file__).parents[1] / ".ci" / "constraints.txt"

# The parts, and those that each may import; every one may import what its imports may.
LAYERS = [
    {"errors", "foreign", "lazy"},
    {"attention", "chats", "compiling", "cost", "distribution", "families", "heads", "keeping"},
    {"loading", "randomness", "schedules"},
    {"token_texts", "trace"},
    {"watching"},
    {"arness", "calling", "canvas", "parallelism", "prediction"},
    {"rows", "schedulers"},
    {"reuse", "slots"},
    {"passes"},
    {"probing"},
    {"confidence", "denoiser", "state"},
    {"capturing", "credit", "likelihood", "selections"},
    {"revisers"},
    {"committers"},
    {"decoding", "lookahead"},
    {"html", "saving"},
    {"viz"},
    {"output"},
    {"live"},
    {"sampler"},
    {"bench", "bulk", "demo", "presets"},
    {"integrations"},
    {"cli"},
]


EXCEPTIONS = {("sampler", "integrations"), ("trace", "viz"), ("capturing", "decoding")}
"""``Sampler.custom_generate`` is a door to its integration, which is imported when somebody goes through, and so is
``DecodeTrace.plot``; and what captures steps names the type of their inputs, for the type checker alone."""


@pytest.mark.parametrize("name", nap_decode.__all__)
def test_every_public_object_has_an_example(name):
    assert ">>>" in getattr(nap_decode, name).__doc__


def test_imports_point_one_way():
    place = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] != "nap_decode":
                continue
            others = node.module.split(".")[1:2] or [alias.name for alias in node.names if alias.name in place]
            for other in others:
                allowed = other == part or place[other] < place[part] or (part, other) in EXCEPTIONS
                assert allowed, f"{path.name} imports {other}"


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
