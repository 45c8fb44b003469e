"""Reads files of a checkpoint. Every failure raises CheckpointError with the path of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError for an unreadable file and for any other JSON value."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: a JSON value of type {type(value).__name__} is not an object; download the file again"
        )
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Return a non-empty JSON object. Libraries would replace `{}` by the defaults of another model.

    Raises the errors of read_json(), and CheckpointError for an empty object.
    """
    value = read_json(path)
    if not value:
        raise CheckpointError(f"{path} is an empty JSON object; download it again")
    return value


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises CheckpointError."""
    check_link(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def is_listed(path: Path) -> bool:
    """Return whether a file or symbolic link exists. A dangling link counts, so that reading it reports the target."""
    return path.is_symlink() or path.is_file()


def check_link(path: Path) -> None:
    """Raise CheckpointError, with the target, for a dangling symbolic link."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist; download it again")
