"""Compiled kernels are kept where the setting says, or the service says in a line why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from services.worker import run_service
from services.worker_settings import WorkerSettings

FLAGS = ("--model", "emoji", "--redis", "unix:///x", "--kernel-cache")


def test_triton_keeps_its_kernels_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")  # Put back afterwards.
    kept: list[str] = []

    def run(*_: object) -> int:
        kept.append(triton.knobs.cache.dir)
        return 0

    assert run_service("decoding", WorkerSettings, run, [*FLAGS, str(tmp_path / "new" / "kernels")]) == 0
    assert kept == [str(tmp_path / "new" / "kernels")]


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")

    def run(*_: object) -> int:
        raise AssertionError("something was started")

    assert run_service("decoding", WorkerSettings, run, [*FLAGS, str(tmp_path / "file")]) == 2
    assert f"fleet serve decoding: kernel_cache {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err
