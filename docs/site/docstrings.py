"""Docstrings are written for ``help()``; here they learn what the site wants."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_LITERAL = re.compile(r"::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Roles become links, ``Example:`` the section that is highlighted."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = _LITERAL.sub(":\n", text)
            obj.docstring.value = _ROLE.sub(lambda match: _link(obj, match[2], short=bool(match[1])), text)


def _link(obj: griffe.Object, name: str, *, short: bool) -> str:
    first, *rest = name.split(".")
    try:
        target = name if first == "nap_decode" else ".".join([obj.resolve(first), *rest])
    except griffe.NameResolutionError:
        target = name
    text = name.rpartition(".")[2] if short else name
    # Optional: what is private, or of another package, has no entry.
    return f'<autoref optional identifier="{target}"><code>{text}</code></autoref>'
