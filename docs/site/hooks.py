"""What the site does to the pages, which are written so that they read well in the repository, too."""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any
from unittest.mock import patch

_FENCE = re.compile(r"^( *)```python\n(?= *>>> )", re.MULTILINE)
_HELP = re.compile(r"^<!-- help:(.*)-->$", re.MULTILINE)
_CODE_LINK = re.compile(r"\[`([\w.]+)`\]\((?:\.\./)+src/(nap_decode(?:/\w+)*)\.py\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|src|tests|README|CHANGELOG)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Sessions are highlighted as such, sources become reference, and commands print their help."""
    markdown = _FENCE.sub(r"\1```pycon\n", markdown)
    markdown = _CODE_LINK.sub(lambda match: _link(match[1], match[2].replace("/", ".")), markdown)
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return _HELP.sub(lambda match: f"```text\n{_help(match[1].split())}```", markdown)


def _link(name: str, module: str) -> str:
    target = name if name.startswith("nap_decode.") else f"{module}.{name}"
    # Optional: what has no entry in the reference stays as it is.
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'


def _help(command: list[str]) -> str:
    from nap_decode.cli import main

    printed = io.StringIO()
    with (
        patch.dict(os.environ, COLUMNS="88"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return printed.getvalue()
