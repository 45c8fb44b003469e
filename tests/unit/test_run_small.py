"""The list of benchmark programs that CI runs at a small scale."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import run_small


def test_every_benchmark_program_has_a_small_run_or_a_reason_for_none() -> None:
    assert run_small.COMMANDS.keys() | run_small.NOT_RUN.keys() == run_small.programs()
    assert not run_small.COMMANDS.keys() & run_small.NOT_RUN.keys()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the programs that run() starts."""
    monkeypatch.setattr(run_small, "FOLDER", tmp_path)
    return tmp_path


def test_a_program_that_fails_is_reported_with_its_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.py").write_text("import sys\nprint(sys.argv[1])\nsys.exit(3)\n")
    (folder / "works.py").write_text("")
    assert run_small.run("works", "") == ""
    assert run_small.run("broken", "--tiny") == "exit code 3\n--tiny\n"

    monkeypatch.setattr(run_small, "COMMANDS", {"broken": ("--tiny",)})
    monkeypatch.setattr(sys, "argv", ["run_small.py"])
    with pytest.raises(SystemExit) as ended:
        run_small.main()
    assert ended.value.code == 1


def test_a_program_that_exceeds_the_limit_fails_and_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_small, "LIMIT", 0.2)
    (folder / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    assert run_small.run("hangs", "") == "did not end within 0.2 s"
