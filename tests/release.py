"""The latest release in tests/golden: its source, Lua script and protos, and requests that it stored.

This module does not read git history, which CI checkouts may lack: source.tar.xz has the source that starts a fleet,
without the shipped weights and without the Lua files, which are in lua/. tests/write_release.py writes the directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tarfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from common.state.connection import Arguments, Word, script_call

VERSION = "0.1.0"
GOLDEN = Path(__file__).parent / "golden" / f"v{VERSION}"
PROTOS = GOLDEN / "protos.binpb"
REQUESTS = GOLDEN / "requests"
BUNDLE = GOLDEN / "source.tar.xz"
LUA = GOLDEN / "lua"
FACTS = GOLDEN / "release.json"
"""Commit, digest of file_lines() of the source, and order of the Lua files."""

SOURCE = ("common", "configs", "models", "proto", "services", "pyproject.toml")
TEST_SOURCE = ("tests/fleet/chaos/warm_parent.py", "tests/fleet/chaos/clock_skew.py", "tests/script_calls.py")
"""Files that start the release's processes, and that build the arguments of its script's operations."""
WEIGHTS = "models/checkpoints/"
LUA_FOLDER = "common/state/lua"


@cache
def facts() -> dict[str, Any]:
    """The contents of release.json."""
    found: dict[str, Any] = json.loads(FACTS.read_text())
    return found


def unpack_release(directory: Path) -> Path:
    """Write the release's source tree to a new directory; returns the directory."""
    with tarfile.open(BUNDLE) as bundle:
        bundle.extractall(directory, filter="data")
    shutil.copytree(LUA, directory / LUA_FOLDER)
    return directory


def file_lines(tree: Path) -> list[str]:
    """One line per file of a tree: git's blob id and the path."""
    files = (path for path in sorted(tree.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return sorted(f"{_blob_id(path.read_bytes())} {path.relative_to(tree).as_posix()}" for path in files)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def digest_of(lines: list[str]) -> str:
    """The SHA-256 of the lines, in hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def release_script() -> str:
    """The text of the release's script."""
    return "\n".join((LUA / f"{name}.lua").read_text(encoding="utf-8") for name in facts()["script_files"])


@cache
def release_sha() -> str:
    """SHA-1 by which a server identifies the release's script."""
    return hashlib.sha1(release_script().encode(), usedforsecurity=False).hexdigest()


def release_call(operation: str, arguments: Arguments) -> list[Word]:
    """The command that runs an operation of the release's script; arguments are NAME VALUE pairs."""
    return ["EVALSHA", release_sha(), *script_call(operation, arguments)[2:]]


def script_calls_of(tree: Path) -> ModuleType:
    """The release's tests/script_calls.py, which builds the arguments of its operations."""
    spec = importlib.util.spec_from_file_location("release_script_calls", tree / TEST_SOURCE[-1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
