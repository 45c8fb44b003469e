"""Digest of the source code: workers with different code may compute different bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import configs
import models


@cache
def own_digest() -> str:
    """SHA-256 of the Python files of `models` and `configs`, in hexadecimal; computed once per process."""
    return sources_digest(Path(path) for package in (models, configs) for path in package.__path__)


def sources_digest(directories: Iterable[Path]) -> str:
    """SHA-256 of the contents and relative paths of the Python files under directories, in hexadecimal.

    Independent of the location of the directories and of file times. Raises OSError for an unreadable directory.
    """
    digest = hashlib.sha256()
    for directory in directories:
        digest.update(b"directory\0")
        for path in sorted(directory.rglob("*.py")):
            contents = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()}\0{len(contents)}\0".encode())
            digest.update(contents)
    return digest.hexdigest()
