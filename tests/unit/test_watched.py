"""Files that change while a process runs: valid content takes effect, invalid content does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import InvalidInput
from common.watched import WatchedFiles


def reader_of(*paths: Path) -> Callable[[], str]:
    def read() -> str:
        text = "+".join(path.read_text() for path in paths if path.exists())
        if "wrong" in text or not text:
            raise InvalidInput(f"{text!r} cannot be understood")
        return text

    return read


def replace(path: Path, text: str) -> None:
    """Replace a file as tools do, by renaming another file."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.rename(path)


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("one")
    watched = WatchedFiles([path], reader_of(path), check_seconds=0, name="keys")
    assert watched.versioned() == (1, "one")
    replace(path, "two")
    with caplog.at_level(logging.INFO):
        assert watched.versioned() == watched.versioned() == (2, "two")
    assert len(caplog.records) == 1
    path.write_text("three")
    assert watched.value == "three"


def test_after_invalid_content_the_previous_content_is_used_and_one_error_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("one")
    watched = WatchedFiles([path], reader_of(path), check_seconds=0, name="api_keys")
    for bad in ("wrong", None):
        caplog.clear()
        path.unlink() if bad is None else replace(path, bad)
        assert watched.versioned() == watched.versioned() == (1, "one")
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage().startswith(
            "changed files are invalid, the previous content is used setting=api_keys error="
        )
    path.write_text("two")
    assert watched.versioned() == (2, "two")


def test_two_files_of_a_pair_take_effect_together(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("a")
    key.write_text("a")

    def read() -> str:
        if cert.read_text() != key.read_text():
            raise InvalidInput("not a pair")
        return cert.read_text()

    watched = WatchedFiles([cert, key], read, check_seconds=0, name="tls")
    replace(cert, "b")
    assert watched.value == "a"
    replace(key, "b")
    assert watched.value == "b"


def test_a_link_with_a_new_target_is_a_change(tmp_path: Path) -> None:
    """Kubernetes mounts secrets through such links."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(name)
        os.utime(tmp_path / name / "keys", (1, 1))
    (tmp_path / "data").symlink_to("first")
    path = tmp_path / "data" / "keys"
    watched = WatchedFiles([path], reader_of(path), check_seconds=0, name="keys")
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").rename(tmp_path / "data")
    assert watched.value == "second"


def test_files_are_checked_at_most_once_per_interval(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one")
    now = [100.0]
    watched = WatchedFiles([path], reader_of(path), check_seconds=2, name="keys", clock=lambda: now[0])
    replace(path, "two")
    assert watched.value == "one"
    now[0] = 101.9
    assert watched.value == "one"
    now[0] = 102.0
    assert watched.value == "two"


def test_invalid_content_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        WatchedFiles([tmp_path / "none"], reader_of(tmp_path / "none"), check_seconds=0, name="keys")
