"""A short run of an autoscaled fleet of real processes, and tests that its checks find violations.

A longer run: python tests/fleet/chaos/run_autoscale.py --requests 200 --scale-ins 100
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import run_autoscale as program
from autoscaled_fleet import ScaleIn, ScalingHistory
from run_autoscale import Image, Load, Report, run_autoscale

LOAD = Load(requests=10, scale_ins=3, steps=3)


def test_requests_succeed_in_a_burst_from_zero_and_during_scale_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy host may start the first worker late; only run_autoscale.py itself applies the limit of 1 s.
    monkeypatch.setattr(program, "_PUSH_SECONDS", 10.0)
    directory = Path(tempfile.mkdtemp(prefix="scale-"))  # paths of Unix sockets must be short
    report = run_autoscale(LOAD, directory)
    assert not report.history.findings, "\n".join((*report.history.notes, *report.history.findings, str(directory)))
    assert report.answered >= LOAD.requests + len(LOAD.wave)
    assert report.history.most["denoising"] == 4
    assert report.history.during_requests >= LOAD.scale_ins
    assert len(report.history.scale_ins) == report.history.scale_outs
    shutil.rmtree(directory)


def test_image_that_differs_from_its_reference_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "make_references", lambda load: dict.fromkeys((*load.burst, *load.wave), b"other"))
    directory = Path(tempfile.mkdtemp(prefix="scale-"))
    report = run_autoscale(replace(LOAD, requests=1), directory)
    assert any("has other bytes than its reference" in finding for finding in report.history.findings)
    assert report.answered == 0
    shutil.rmtree(directory)


def test_load_repeats_its_images() -> None:
    assert LOAD.burst[8:] == LOAD.burst[:2] == [Image(0, 3), Image(1, 3)]
    assert [image.steps for image in LOAD.wave] == [36, 36, 3, 3, 3, 3, 3, 3]


def test_table_counts_scale_ins_by_running_requests() -> None:
    scale_ins = [ScaleIn("a", ("r",), 2), ScaleIn("b", (), 1), ScaleIn("c", (), 0)]
    table = Report(ScalingHistory(scale_ins=scale_ins), 5, 0, 1.0, 2.0, 0.25).table()
    figures = {line[:60].strip(): line[60:] for line in table.splitlines()}
    assert figures["scale-ins"] == "3"
    assert figures["scale-ins while requests ran"] == "2"
    assert figures["scale-ins of workers that ran a request"] == "1"
    assert figures["seconds from the first request to the first worker's start"] == "0.25"
