"""Trace export by OTEL_ variables: spans, samplers, exemplars, and errors of variables and collectors."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY

from async_tests import HANG_SECONDS
from certificates import Authority
from common import tracing
from common.rpc.client import open_channel
from coordinator_fleet import FakeFleet, Gate, Stub, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from otlp_receiver import ReceivedSpan, Receiver, receiving

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
UNREACHABLE = "http://127.0.0.1:1"  # no server listens on this port
# A sitecustomize module that writes the names of all imported modules to a file at exit.
_NOTE_MODULES = """
import atexit, os, sys
def note():
    with open(os.environ["NOTED_MODULES"], "w") as file:
        file.write(" ".join(sys.modules))
atexit.register(note)
"""


@contextmanager
def exporting(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[Receiver]:
    """Export the spans of this process, including its coordinators and workers."""
    with receiving() as receiver:
        for name, value in {
            "EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "BSP_SCHEDULE_DELAY": "20",
            **variables,
        }.items():
            monkeypatch.setenv(f"OTEL_{name}", value)
        with tracing.exporting("test"):
            yield receiver


def roots(receiver: Receiver, count: int) -> list[ReceivedSpan]:
    """Wait for `count` root spans; returns them in order of their start."""
    spans = receiver.wait_until(lambda spans: sum(each.name == "request" for each in spans) == count)
    return sorted((each for each in spans if each.name == "request"), key=lambda each: each.start)


def test_root_span_has_the_terminal_state_or_the_error_code(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(max_open_requests=1)
        request_id = (await stub.Submit(submission(idempotency_key="k"))).request.request_id
        await gate.wait_reached()
        assert (await stub.Submit(submission(idempotency_key="k"))).replayed
        for request, code in ((submission(), "RESOURCE_EXHAUSTED"), (submission(priority=999), "INVALID_ARGUMENT")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Submit(request)
            assert caught.value.code().name == code
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))
        await terminal(stub, request_id)
        fleet.scripts["denoising"].work = fail
        failed = (await stub.Submit(submission())).request.request_id
        await terminal(stub, failed)
        cancelled, replayed, full, invalid, failure = await asyncio.to_thread(roots, receiver, 5)
        assert (cancelled.attributes["fleet.state"], cancelled.error) == ("CANCELLED", "")
        assert (replayed.attributes["fleet.replayed"], replayed.error) == (request_id, "")
        assert (full.error, invalid.error) == ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
        assert (failure.attributes["fleet.state"], failure.error) == ("FAILED", "INTERNAL")
        assert not [raw for raw in receiver.raw if b"secret" in raw or b"apple" in raw]
        spans = [each for each in receiver.spans if each.trace_id == failure.trace_id]
        (attempt,) = [each for each in spans if each.name == "attempt denoising"]
        assert attempt.error == "InternalError"

    with exporting(monkeypatch) as receiver:
        run_on_fleet(store_url, scenario)


def fail(_: object) -> None:
    raise RuntimeError("a secret of the prompt")


def exemplar(method: str, series: str) -> str:
    """Trace id of the latest exemplar of a served method's histogram; empty if there is none."""
    found = [
        (sample.exemplar.timestamp or 0.0, sample.exemplar.labels["trace_id"])
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == f"{series}_bucket" and sample.exemplar is not None
        if sample.labels["grpc_method"] == f"fleet.v1.GenerationService/{method}"
    ]
    return max(found, default=(0.0, ""))[1]


@pytest.mark.parametrize("method", ["Submit", "Generate"])
def test_calls_without_traceparent_have_exemplars(store_url: str, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        if method == "Submit":
            record = (await stub.Submit(submission())).request
        else:
            replies = [reply async for reply in stub.Generate(pb.GenerateRequest(request=submission()))]
            record = replies[0].accepted
        await terminal(stub, record.request_id)
        trace_id = record.trace.traceparent.split("-")[1]
        for series in ("duration_seconds", "sent_total_compressed_message_size_bytes"):
            await asyncio.to_thread(wait_for_exemplar, method, f"grpc_server_call_{series}", trace_id)

    with exporting(monkeypatch):
        run_on_fleet(store_url, scenario)


def wait_for_exemplar(method: str, series: str, trace_id: str) -> None:
    """Poll for the exemplar, as a call is measured after its caller has the status. Raises AssertionError."""
    give_up = time.monotonic() + HANG_SECONDS
    while exemplar(method, series) != trace_id:
        assert time.monotonic() < give_up, (exemplar(method, series), trace_id)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("variables", "parent", "sampled"),
    [
        ({"TRACES_SAMPLER": "always_off"}, "", False),
        ({"TRACES_SAMPLER": "parentbased_always_off"}, "", False),
        ({"TRACES_SAMPLER": "parentbased_always_off"}, PARENT, True),
        ({"TRACES_SAMPLER": "traceidratio", "TRACES_SAMPLER_ARG": "0"}, PARENT, False),
        ({}, PARENT[:-1] + "0", False),
        ({}, "", True),
    ],
)
def test_sampler_selects_exported_traces(
    store_url: str, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], parent: str, sampled: bool
) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        metadata = (("traceparent", parent),) if parent else ()
        record = (await stub.Submit(submission(), metadata=metadata)).request
        await terminal(stub, record.request_id)
        assert record.trace.traceparent[-1] in ("13" if sampled else "02")
        assert record.trace.client_traceparent == parent
        if sampled:
            (root,) = await asyncio.to_thread(roots, receiver, 1)
            assert root.span_id in record.trace.traceparent

    with exporting(monkeypatch, **variables) as receiver:
        run_on_fleet(store_url, scenario)
    assert bool(receiver.spans) == sampled


def test_otel_variables_set_certificates_and_service_name(
    store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("127.0.0.1")
    credentials = grpc.ssl_server_credentials([(own.key.read_bytes(), own.cert.read_bytes())])

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        await terminal(stub, (await stub.Submit(submission())).request.request_id)

    with receiving(credentials) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(authority.ca))
        monkeypatch.setenv("OTEL_SERVICE_NAME", "drawings")
        with tracing.exporting("test"):
            run_on_fleet(store_url, scenario)
        (root,) = roots(receiver, 1)
    assert root.service == "drawings"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'\" advice=\"otlp and none are supported"),
        (
            {"EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'\" advice=\"grpc is supported",
        ),
        ({"EXPORTER_OTLP_TIMEOUT": "soon"}, "an OTEL_ variable is invalid: .*soon"),
        ({"EXPORTER_OTLP_COMPRESSION": "zstd"}, "an OTEL_ variable is invalid: .*zstd"),
        (
            {"EXPORTER_OTLP_CERTIFICATE": "/none.pem"},
            "an OTEL_ variable is invalid: OTEL_EXPORTER_OTLP_CERTIFICATE: /none.pem cannot be read",
        ),
    ],
)
def test_invalid_variable_logs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: Mapping[str, str], reason: str
) -> None:
    with exporting(monkeypatch, **variables):
        assert tracing.tracer() is None
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].name == "common.tracing"
    assert re.match(f'no traces are exported reason="{reason}', warnings[0].getMessage())


@pytest.mark.parametrize("variables", [{"SDK_DISABLED": "true"}, {"TRACES_EXPORTER": "none"}])
def test_tracing_can_be_disabled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: Mapping[str, str]
) -> None:
    with exporting(monkeypatch, **variables):
        assert tracing.tracer() is None
    assert not caplog.records


def test_client_context_survives_a_coordinator_without_exporter(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator with an exporter takes over; the root span is a child of the client's span."""

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            traced = (await stub.Submit(submission(), metadata=(("traceparent", PARENT),))).request
            untraced = (await stub.Submit(submission())).request
            assert traced.trace == pb.TraceContext(client_traceparent=PARENT)
            assert not untraced.HasField("trace")
            await gate.wait_reached()
            process.kill()
            await process.wait()
        with exporting(monkeypatch) as receiver:
            gate.opened.set()
            _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
            for record in (traced, untraced):
                await terminal(other, record.request_id)
            found = {each.attributes["fleet.request_id"]: each for each in await asyncio.to_thread(roots, receiver, 2)}
            root = found[traced.request_id]
            assert (root.trace_id, root.parent_id) == ("a" * 32, "b" * 16)
            assert found[untraced.request_id].parent_id == ""
            assert root.start == traced.created_at.ToNanoseconds()

    run_on_fleet(store_url, scenario)


async def run_service(arguments: Sequence[str], is_ready: bytes) -> None:
    """Start a service, and stop it with SIGTERM after it has logged `is_ready`."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", *arguments, stderr=PIPE)
    assert process.stderr is not None
    output = b""
    while is_ready not in output:
        line = await process.stderr.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGTERM)
    output += await process.stderr.read()
    assert await process.wait() == 0, output


SERVICES = {"coordinator": b"listens address=", "latent_preparation": b"serves stage=latent_preparation"}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("endpoint", ["", UNREACHABLE])
def test_opentelemetry_is_imported_only_with_an_endpoint(
    store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, service: str, endpoint: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NOTE_MODULES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("NOTED_MODULES", str(tmp_path / "modules"))
    if endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    options = ("--model", "emoji", "--redis", store_url, "--allow-data-loss", "--listen", f"unix:{tmp_path}/s.sock")
    asyncio.run(run_service(("services.cli", "serve", service, *options), SERVICES[service]))
    modules = (tmp_path / "modules").read_text().split()
    assert "common.tracing" in modules
    assert any(name.startswith("opentelemetry") for name in modules) == bool(endpoint)


def warnings_of_a_coordinator(url: str) -> list[str]:
    """The warnings of a coordinator process that serves two requests, one second apart."""
    warnings: list[str] = []

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        flags = ("--listen", listen, "--redis", url, "--allow-data-loss", "--log-level", "WARNING")
        command = (sys.executable, "-m", "services.coordinator", *flags)
        process = await asyncio.create_subprocess_exec(*command, stderr=PIPE)
        assert process.stderr is not None
        while b"listens address=" not in (line := await process.stderr.readline()):
            assert line, warnings
            warnings.append(line.decode())
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for _ in range(2):
                request_id = (await stub.Submit(submission())).request.request_id
                assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
                await asyncio.sleep(1)
        process.send_signal(signal.SIGTERM)
        warnings.extend((await process.stderr.read()).decode().splitlines())
        assert await process.wait() == 0

    run_on_fleet(url, scenario)
    return warnings


def test_password_of_a_collector_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with exporting(monkeypatch, EXPORTER_OTLP_ENDPOINT="http://user:secret@127.0.0.1:1"):
        vars(tracing.tracer())["_exporter"].warn()
    assert [each for each in caplog.messages if "is unavailable endpoint=http://***@127.0.0.1:1" in each]
    assert "secret" not in caplog.text


def test_unreachable_collector_logs_one_warning(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", UNREACHABLE)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    (warning,) = warnings_of_a_coordinator(store_url)
    assert f"spans are dropped while the trace collector is unavailable endpoint={UNREACHABLE}" in warning


def test_missing_opentelemetry_package_logs_one_warning(
    store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'opentelemetry'\", name='opentelemetry')\n"
    (tmp_path / "opentelemetry.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", UNREACHABLE)
    (warning,) = warnings_of_a_coordinator(store_url)
    assert 'reason="opentelemetry is not installed"' in warning
    assert "pip install 'diffusion-fleet[tracing]', or unset OTEL_EXPORTER_OTLP_ENDPOINT" in warning
