"""A missing or unreadable weights volume ends a service with one line that names the path."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.worker import main_for
from services.worker_settings import WorkerSettings

EMOJI = Path(__file__).resolve().parents[2] / "models" / "checkpoints" / "emoji"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NOBODY_UID = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run without root's permission to read every file."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY_UID)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def volume() -> Iterator[Path]:
    """A world-readable directory with a copy of a model."""
    with tempfile.TemporaryDirectory(prefix="volume-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        shutil.copytree(EMOJI, path / "emoji")
        yield path
        if (path / "emoji").exists():
            (path / "emoji").chmod(0o755)


def remove_volume(model: Path) -> str:
    shutil.rmtree(model)
    return f"{model} is not a directory"


def empty_volume(model: Path) -> str:
    remove_volume(model)
    model.mkdir()
    return f"{model} has no model_index.json"


def forbid_volume(model: Path) -> str:
    model.chmod(0)
    return f"{model}"


def forbid_weights(model: Path) -> str:
    (model / WEIGHTS).chmod(0)
    return f"{model / WEIGHTS} cannot be read: Permission denied"


def remove_weights(model: Path) -> str:
    (model / WEIGHTS).unlink()
    return f"{model / 'transformer'} contains no weights"


def break_link(model: Path) -> str:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model / "blob")
    return f"{model / WEIGHTS}"


DAMAGE = (remove_volume, empty_volume, forbid_volume, forbid_weights, remove_weights, break_link)
"""Functions that damage a model directory and return the text that the error line must contain."""


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_error_line_names_the_path(
    volume: Path,
    damage: Callable[[Path], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    expected = damage(volume / "emoji")
    with unprivileged():
        code = main_for("denoising", WorkerSettings)(["--model", f"emoji={volume / 'emoji'}", "--redis", "unix:///x"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    assert error.startswith("fleet serve denoising: ")
    assert expected in error
