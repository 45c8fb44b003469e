"""Reads code out of the README, so that what it shows is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(language: str) -> list[str]:
    """The README's fenced blocks of that language, in order. Raises LookupError when there is none."""
    blocks = [
        match["code"] for match in _BLOCK.finditer((ROOT / "README.md").read_text()) if match["language"] == language
    ]
    if not blocks:
        raise LookupError(f"README.md has no {language} block")
    return blocks
