"""Texts of a request that are valid paths are never used as paths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import FleetError
from models.catalog import open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet

SECRET = "secret-of-this-host"

_recordings: list[list[str]] = []


def _record_event(event: str, arguments: tuple[object, ...]) -> None:
    """Record audit events of files, processes, imports and evaluated code. Audit hooks cannot be removed."""
    if _recordings and event.startswith(
        ("open", "os.", "subprocess.", "import", "exec", "compile", "glob.", "shutil.")
    ):
        text = repr(arguments)
        if SECRET in text:
            _recordings[-1].append(f"{event}{text}")


sys.addaudithook(_record_event)


@contextmanager
def recorded_accesses() -> Iterator[list[str]]:
    """Record the audit events of all threads in the block whose arguments contain SECRET."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


@pytest.fixture(scope="module")
def fleet() -> Iterator[ServedFleet]:
    with served_fleet([open_model("emoji", load_registry())]) as fleet:
        yield fleet


def test_texts_of_a_request_are_never_used_as_paths(fleet: ServedFleet, tmp_path: Path) -> None:
    secret = tmp_path / f"{SECRET}.safetensors"
    secret.write_bytes(b"secret")
    small: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1}
    for text in (str(secret), f"../../../..{secret}", secret.as_uri(), f"@{secret}", f"{secret}\0.png"):
        with recorded_accesses() as found:
            fleet.generate("emoji", prompt=text, prompt_2=text, negative_prompt=text, true_cfg_scale=2.0, **small)
            for given in ({"model": text}, {"model": "emoji", "images": {text: b"x"}}, {"model": "emoji", text: text}):
                with suppress(FleetError):
                    fleet.generate(prompt="x", **{**small, **given})
        assert not found


def test_file_access_is_recorded(tmp_path: Path) -> None:
    with recorded_accesses() as found, suppress(OSError):
        (tmp_path / SECRET).read_bytes()
    assert found
