"""Metrics over HTTP, exemplars of traces, and the trace context of work on another thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST

from common import telemetry
from common.errors import FailedPrecondition, InvalidInput
from common.log_context import current_log_context, log_scope
from common.trace_context import Span, TraceContext, current_trace_id, entered
from services import stage_services
from services.coordinator.__main__ import main as coordinator_main

SPAN_ID = "00f067aa0ba902b7"


def _scrape(accept: str) -> str:
    server = telemetry.start_metrics(0, "127.0.0.1")
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request) as reply:
            return str(reply.read().decode())
    finally:
        server.stop()


def test_metrics_are_served_over_http() -> None:
    with telemetry.stage_timer("decoding", "emoji", "DecodingStage"):
        pass
    text = _scrape("text/plain")
    assert 'fleet_stage_seconds_count{model="emoji",service="decoding",stage="DecodingStage"}' in text


def test_an_observation_has_its_trace_as_exemplar() -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    with entered(Span(TraceContext(trace_id, SPAN_ID))), telemetry.stage_timer("decoding", "traced", "DecodingStage"):
        pass
    exemplar = f'# {{trace_id="{trace_id}"}}'
    buckets = [line for line in _scrape(CONTENT_TYPE_LATEST).splitlines() if 'model="traced"' in line]
    assert [line for line in buckets if exemplar in line]
    assert exemplar not in _scrape("text/plain")


def test_an_observation_outside_of_a_recorded_trace_has_no_exemplar() -> None:
    assert current_trace_id() is None
    with telemetry.stage_timer("decoding", "untraced", "DecodingStage"):
        pass
    with entered(Span(TraceContext("4" * 32, SPAN_ID, flags=0))):
        assert current_trace_id() is None, "the trace is not sampled"
    lines = [line for line in _scrape(CONTENT_TYPE_LATEST).splitlines() if 'model="untraced"' in line]
    assert lines
    assert not [line for line in lines if "#" in line]


def test_work_on_another_thread_belongs_to_the_same_trace_and_request() -> None:
    found: list[str | None] = []
    with log_scope(request_id="r-1"), entered(Span(TraceContext("1", SPAN_ID))):
        work = telemetry.in_current_context(
            lambda: found.extend((current_trace_id(), current_log_context().request_id))
        )
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["1", "r-1"]


@contextlib.contextmanager
def _port_in_use() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_in_use_is_an_error() -> None:
    with _port_in_use() as port, pytest.raises(FailedPrecondition, match=f"metrics_port: {port} cannot") as caught:
        telemetry.start_metrics(port)
    assert caught.value.field == "metrics_port"


def test_an_invalid_port_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="metrics_port: 65536 is not from 0 to 65535"):
        telemetry.start_metrics(65_536)


@pytest.mark.parametrize("main", [coordinator_main, partial(stage_services.main, "latent_preparation")])
def test_a_service_whose_metrics_port_is_in_use_does_not_start(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with _port_in_use() as port:
        code = main(["--redis", "redis://127.0.0.1:1", "--listen", "127.0.0.1:0", "--metrics-port", str(port)])
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"metrics_port: {port} cannot be bound: Address already in use; choose a free port" in last
