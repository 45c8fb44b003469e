"""Documents of the tree, and their code blocks, so that tests run the documented code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "common", "configs", "k8s", "models", "proto", "services", "tests")
SKIPPED = frozenset({"golden", "node_modules"})
"""Directories of files of a release and of installed packages."""
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
    if not SKIPPED.intersection(path.parts)
)
"""Paths of all Markdown files, relative to the root."""

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(language: str, document: str = "README.md") -> list[str]:
    """The fenced code blocks of a document in a language, in order. Raises LookupError if there is none."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = [match["code"] for match in _BLOCK.finditer(text) if match["language"] == language]
    if not blocks:
        raise LookupError(f"{document} has no {language} block")
    return blocks
