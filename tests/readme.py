"""Reads code blocks from the README, so that tests run the documented code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(language: str) -> list[str]:
    """The README's fenced code blocks in a language, in order. Raises LookupError if there is none."""
    blocks = [
        match["code"] for match in _BLOCK.finditer((ROOT / "README.md").read_text()) if match["language"] == language
    ]
    if not blocks:
        raise LookupError(f"README.md has no {language} block")
    return blocks
