"""The setting kernel_cache: cache directories of kernel compilers, and refused directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import triton

from services.worker import run_service
from services.worker_settings import DecodingSettings

FLASH_ATTENTION_4_PREFIX = "FLASH_ATTENTION_CUTE_DSL_CACHE"
FLAGS = ("--model", "emoji", "--redis", "unix:///x", "--kernel-cache")


def test_compilers_use_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = (
        "TRITON_CACHE_DIR",
        "QUACK_CACHE_DIR",
        f"{FLASH_ATTENTION_4_PREFIX}_ENABLED",
        f"{FLASH_ATTENTION_4_PREFIX}_DIR",
    )
    for name in variables:
        monkeypatch.setenv(name, "elsewhere")  # monkeypatch restores the variables after the test
    directories: list[str] = []

    def run(*_: object) -> int:
        directories.extend((triton.knobs.cache.dir, *(os.environ[name] for name in variables[1:])))
        return 0

    directory = tmp_path / "new" / "kernels"
    assert run_service("decoding", DecodingSettings, run, [*FLAGS, str(directory)]) == 0
    assert directories == [str(directory), str(directory / "quack"), "1", str(directory / "flash_attn")]


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")

    def run(*_: object) -> int:
        raise AssertionError("the service was started")

    assert run_service("decoding", DecodingSettings, run, [*FLAGS, str(tmp_path / "file")]) == 2
    assert f"fleet serve decoding: kernel_cache: {tmp_path / 'file'} is not writable" in capsys.readouterr().err
