"""Numerics fingerprints depend on the sources, and origins of step checkpoints on their format."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import models
from common import artifacts
from models import loader, sources
from models.loader import numerics_fingerprint
from models.sources import own_digest, sources_digest
from services.coordinator import resume
from services.coordinator.resume import origin_of

CPU = torch.device("cpu")
PACKAGE = Path(next(iter(models.__path__))) / "stages"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a source package in another directory, with new modification times."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "copy", copy_function=shutil.copyfile))


def test_equal_sources_have_equal_digests_in_any_directory(copy: Path) -> None:
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "denoising.cpython-311.pyc").write_bytes(b"compiled")
    (copy / "notes.md").write_text("no code")
    assert sources_digest([copy]) == sources_digest([PACKAGE])


def test_each_change_of_a_file_changes_the_digest(copy: Path) -> None:
    seen = {sources_digest([copy])}
    file = copy / "denoising.py"
    changes = (
        lambda: file.write_bytes(file.read_bytes() + b" "),
        lambda: file.rename(copy / "other.py"),
        lambda: (copy / "new.py").touch(),
        lambda: (copy / "new.py").rename(copy / "model_specific_stages" / "new.py"),
        (copy / "other.py").unlink,
    )
    (copy / "model_specific_stages").mkdir(exist_ok=True)
    for change in changes:
        change()
        digest = sources_digest([copy])
        assert digest not in seen
        seen.add(digest)


def test_the_numerics_fingerprint_depends_on_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = numerics_fingerprint(CPU, torch.float32)
    assert before == numerics_fingerprint(CPU, torch.float32)
    monkeypatch.setattr(loader, "own_digest", lambda: "of another version")
    assert numerics_fingerprint(CPU, torch.float32) != before


def test_the_numerics_fingerprint_depends_on_plugins(copy: Path) -> None:
    without = numerics_fingerprint(CPU, torch.float32)
    before = numerics_fingerprint(CPU, torch.float32, plugins=[copy])
    assert before != without
    assert before == numerics_fingerprint(CPU, torch.float32, plugins=[PACKAGE])
    (copy / "new.py").write_text("x = 1\n")
    assert numerics_fingerprint(CPU, torch.float32, plugins=[copy]) != before


def test_the_digest_covers_models_and_configs_but_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def record_directories(directories: Iterable[Path]) -> str:
        read.extend(directories)
        return ""

    monkeypatch.setattr(sources, "sources_digest", record_directories)
    own_digest.cache_clear()
    own_digest()
    own_digest.cache_clear()
    assert [path.name for path in read] == ["models", "configs"]


def test_a_step_checkpoint_of_another_format_has_another_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    before = origin_of("numerics", {})
    assert before == origin_of("numerics", {})
    monkeypatch.setattr(resume, "STEP_CHECKPOINT_FORMAT", artifacts.STEP_CHECKPOINT_FORMAT + 1)
    assert origin_of("numerics", {}) != before
