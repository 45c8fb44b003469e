"""`fleet doctor`: checks of OTEL_ variables, trace export and the collector."""

from __future__ import annotations

import os
import sys

import pytest

from doctor_lines import lines
from otlp_receiver import receiving
from services.cli.doctor_traces import check_traces

CLOSED_PORT = "127.0.0.1:1"  # no process listens on this port


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove OTEL_ variables from the environment."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def report_line(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Output line of the check. Names in `variables` omit the prefix OTEL_."""
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    (line,) = lines(check_traces())
    return line


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "none of OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER is set"),
        (
            {"EXPORTER_OTLP_ENDPOINT": f"http://{CLOSED_PORT}", "SDK_DISABLED": "true"},
            "OTEL_SDK_DISABLED disables traces",
        ),
        ({"TRACES_EXPORTER": "none"}, "OTEL_TRACES_EXPORTER disables traces"),
    ],
)
def test_disabled_traces_are_accepted(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str) -> None:
    assert report_line(monkeypatch, **variables) == f"ok traces: not exported: {reason}"


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin' -> otlp and none are supported"),
        ({"EXPORTER_OTLP_TIMEOUT": "soon"}, "an OTEL_ variable is invalid: "),
        ({"EXPORTER_OTLP_CERTIFICATE": "/none.pem"}, "an OTEL_ variable is invalid: OTEL_EXPORTER_OTLP_CERTIFICATE: /"),
    ],
)
def test_invalid_variables_are_warnings(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str) -> None:
    line = report_line(monkeypatch, EXPORTER_OTLP_ENDPOINT=f"http://{CLOSED_PORT}", **variables)
    assert line.startswith(f"warning traces: not exported: {text}")


def test_variables_without_the_tracing_extra_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "common.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    assert report_line(monkeypatch, EXPORTER_OTLP_ENDPOINT=f"http://{CLOSED_PORT}") == (
        "warning traces: not exported: opentelemetry.context is not installed -> "
        "pip install 'diffusion-fleet[tracing]', or unset OTEL_EXPORTER_OTLP_ENDPOINT"
    )


def test_a_reachable_collector_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        line = report_line(monkeypatch, EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
        assert line == f"ok traces: the collector at {receiver.endpoint} accepts spans"
        assert receiver.raw == [b""], "the request must have no spans"


def test_an_unreachable_collector_is_a_warning_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.doctor_traces.COLLECTOR_SECONDS", 1)
    line = report_line(monkeypatch, EXPORTER_OTLP_TRACES_ENDPOINT=f"http://me:secret@{CLOSED_PORT}")
    assert line.startswith(
        f"warning traces: the collector at http://***@{CLOSED_PORT} accepts no spans: services run, but "
    )
