"""Committed stubs match the protos; buf refuses breaking changes of the public API."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import stubs
from release import PROTOS

FIRST = stubs.ROOT / "tests" / "golden" / "fleet-v1.binpb"
"""Descriptors of the protos before the first release."""
BASELINES = {"first": FIRST, "release": PROTOS}


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(stubs.SUFFIXES)
    }


def _buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([stubs.script("buf"), *map(str, arguments)], capture_output=True, text=True, check=False)


def _edited(folder: Path, old: str, new: str) -> Path:
    """A copy of the protos with one edit in generation.proto."""
    copy = folder / "proto"
    shutil.copytree(stubs.PROTO, copy, ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"))
    path = copy / "fleet" / "v1" / "generation.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return copy


def test_committed_stubs_match_the_protos(tmp_path: Path) -> None:
    stubs.generate(tmp_path)
    generated, committed = _files(tmp_path), _files(stubs.PROTO)
    assert generated.keys() == committed.keys()
    stale = [name for name, data in generated.items() if committed[name] != data]
    assert not stale, f"run `poe stubs`: {stale}"


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
def test_protos_have_no_breaking_change(baseline: Path) -> None:
    result = _buf("breaking", stubs.PROTO, "--against", baseline)
    assert result.returncode == 0, result.stdout


def test_lint_compares_with_all_baselines() -> None:
    tasks = tomllib.loads((stubs.ROOT / "pyproject.toml").read_text())["tool"]["poe"]["tasks"]
    against = [path for path in BASELINES.values() if str(path.relative_to(stubs.ROOT)) in str(tasks["lint"])]
    assert against == list(BASELINES.values())


def test_renaming_a_field_is_a_breaking_change(tmp_path: Path) -> None:
    proto = _edited(tmp_path, "string request_id = 1;", "string request_key = 1;")
    result = _buf("breaking", proto, "--against", PROTOS)
    assert result.returncode != 0
    assert "request_id" in result.stdout


def test_adding_a_field_is_not_a_breaking_change(tmp_path: Path) -> None:
    new = "string request_id = 1;\n  // New.\n  string added_later = 1000;"
    result = _buf("breaking", _edited(tmp_path, "string request_id = 1;", new), "--against", PROTOS)
    assert result.returncode == 0, result.stdout


def test_a_field_without_a_comment_is_refused(tmp_path: Path) -> None:
    proto = _edited(tmp_path, "string request_id = 1;", "string request_id = 1;\n  string added_later = 1000;")
    result = _buf("lint", proto)
    assert result.returncode != 0
    assert "added_later" in result.stdout
