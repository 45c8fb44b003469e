"""Reads files of a checkpoint; every failure is a CheckpointError that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError for an unreadable file and for any other JSON."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds {type(value).__name__}")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """The same for a file that has at least one entry: every library replaces `{}` by defaults of another model."""
    value = read_json(path)
    if not value:
        raise CheckpointError(f"{path} is an empty JSON object, so it sets nothing; download it again")
    return value


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises CheckpointError."""
    check_link(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def is_listed(path: Path) -> bool:
    """Whether the folder lists a file of this name. A link without target counts: reading it names the target."""
    return path.is_symlink() or path.is_file()


def check_link(path: Path) -> None:
    """Refuse a link whose target does not exist. Raises CheckpointError that names the target."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist; download it again")
