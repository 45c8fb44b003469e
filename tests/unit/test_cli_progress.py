"""Progress output of commands: lines without a terminal, bars on a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fleet.v1 import artifacts_pb2, generation_pb2
from services.cli.progress import BarReporter, LineReporter, terminal_reporter

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(service: str, done: int, total: int) -> generation_pb2.StageProgress:
    """A message that `done` of `total` steps are completed."""
    return generation_pb2.StageProgress(service=service, step=done, total_steps=total)


def test_progress_prints_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_reporter() as report:
        assert isinstance(report, LineReporter)
        report.progress(step("denoising", 2, 20))
        report.progress(step("decoding", 0, 0))
        report.warning(artifacts_pb2.Warning(field="height", message="100 became 96"))
        report.warning(artifacts_pb2.Warning(message="slow"))
        report.finish()
    assert capsys.readouterr().err.splitlines() == [
        "denoising 2/20",
        "decoding",
        "warning: height: 100 became 96",
        "warning: slow",
    ]


def test_progress_draws_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with terminal_reporter() as report:
        assert isinstance(report, BarReporter)
        report.progress(step("denoising", 1, 20))
        report.progress(step("denoising", 19, 20))
        report.progress(step("decoding", 0, 0))
        report.note("a [bracketed] note")
        report.finish()
    text = _ESCAPES.sub("", terminal.getvalue())
    assert "a [bracketed] note" in text
    last = text.rsplit("denoising", 1)[1]
    assert "20/20" in last
    assert "1/1" in last.rsplit("decoding", 1)[1]
