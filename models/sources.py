"""A digest of the code that computes: two workers whose code differs may compute other bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import configs
import models


@cache
def own_digest() -> str:
    """Digest of the Python files of `models` and `configs`, as hexadecimal text; read once a process."""
    return sources_digest(Path(path) for package in (models, configs) for path in package.__path__)


def sources_digest(directories: Iterable[Path]) -> str:
    """Digest of the Python files under directories, in order: of their contents and their paths within each.

    Where a directory lies, and when its files were written, makes no difference. Raises OSError for one that cannot be
    read.
    """
    digest = hashlib.sha256()
    for directory in directories:
        digest.update(b"directory\0")
        for path in sorted(directory.rglob("*.py")):
            contents = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()}\0{len(contents)}\0".encode())
            digest.update(contents)
    return digest.hexdigest()
