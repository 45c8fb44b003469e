"""Client commands of a running fleet, against a fake coordinator."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from fleet.v1 import artifacts_pb2, generation_pb2, worker_pb2
from services.cli.__main__ import main

RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    generation_pb2.REQUEST_STATE_RUNNING,
    generation_pb2.REQUEST_STATE_SUCCEEDED,
    generation_pb2.REQUEST_STATE_FAILED,
    generation_pb2.REQUEST_STATE_CANCELLED,
)
Context = grpc.ServicerContext


def changed(event_id: str, state: generation_pb2.RequestState.ValueType, error: str = "") -> generation_pb2.Event:
    """An event that reports a state change."""
    change = generation_pb2.StateChange(state=state)
    if error:
        change.error.MergeFrom(generation_pb2.Error(code="INTERNAL", message=error))
    return generation_pb2.Event(event_id=event_id, state_change=change)


def stepped(event_id: str, step: int) -> generation_pb2.Event:
    """An event that reports a denoising step."""
    progress = generation_pb2.StageProgress(service="denoising", step=step, total_steps=2)
    return generation_pb2.Event(event_id=event_id, progress=progress)


class FakeCoordinator:
    """A coordinator whose replies depend on its attributes. It records the requests."""

    def __init__(self) -> None:
        self.requests: list[generation_pb2.SubmitRequest] = []
        self.watched_after: list[str] = []
        self.ending = SUCCEEDED
        self.break_after_first_event = False
        self.files = [b"first", b"second"]

    def generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> Iterator[generation_pb2.GenerateResponse]:
        """Send the accepted record, events, and each file in two parts."""
        self.requests.append(request.request)
        if request.request.model == "unknown":
            context.abort(grpc.StatusCode.NOT_FOUND, "model 'unknown' is not served; served are emoji")
        warning = artifacts_pb2.Warning(field="prompt", message="the prompt was truncated")
        record = generation_pb2.RequestRecord(request_id="r1", warnings=[warning])
        record.parameters.seed = 7
        yield generation_pb2.GenerateResponse(accepted=record)
        yield generation_pb2.GenerateResponse(event=generation_pb2.Event(event_id="0", warning=warning))
        yield generation_pb2.GenerateResponse(event=stepped("1", 1))
        error = "out of memory" if self.ending == FAILED else ""
        yield generation_pb2.GenerateResponse(event=changed("2", self.ending, error))
        for index, data in enumerate(self.files):
            header = generation_pb2.FileHeader(index=index, count=len(self.files), byte_size=len(data))
            yield generation_pb2.GenerateResponse(file=header)
            yield generation_pb2.GenerateResponse(data=data[:2])
            yield generation_pb2.GenerateResponse(data=data[2:])

    def watch(self, request: generation_pb2.WatchRequest, context: Context) -> Iterator[generation_pb2.WatchResponse]:
        """Send the events after `after_event_id`; the request has three events."""
        if request.request_id != "r1":
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no request {request.request_id!r}")
        self.watched_after.append(request.after_event_id)
        last = changed("3", self.ending)
        last.state_change.steps_saved = int(self.ending == CANCELLED)
        for event in (changed("1", RUNNING), stepped("2", 1), last):
            if event.event_id > request.after_event_id:
                yield generation_pb2.WatchResponse(event=event)
                if self.break_after_first_event:
                    self.break_after_first_event = False
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is shutting down")

    def get_request(self, request: generation_pb2.GetRequestRequest, _: Context) -> generation_pb2.GetRequestResponse:
        """Return a record with one file."""
        header = generation_pb2.FileHeader(content_type="image/png", byte_size=5)
        record = generation_pb2.RequestRecord(request_id=request.request_id, files=[header])
        return generation_pb2.GetRequestResponse(request=record)

    def cancel_request(
        self, request: generation_pb2.CancelRequestRequest, _: Context
    ) -> generation_pb2.CancelRequestResponse:
        """Return a record in the state `ending`."""
        record = generation_pb2.RequestRecord(request_id=request.request_id, state=self.ending)
        return generation_pb2.CancelRequestResponse(request=record)

    def list_requests(self, _: generation_pb2.ListRequestsRequest, __: Context) -> generation_pb2.ListRequestsResponse:
        """Return one request."""
        record = generation_pb2.RequestRecord(request_id="r1", state=RUNNING, model="emoji")
        record.parameters.prompt = "a\nred apple " + "very " * 30
        return generation_pb2.ListRequestsResponse(requests=[record])

    def list_models(self, _: generation_pb2.ListModelsRequest, __: Context) -> generation_pb2.ListModelsResponse:
        """Return one model."""
        steps = generation_pb2.Parameter(name="num_inference_steps", type="int", description="Steps.")
        steps.default_value.int_value = 20
        groups = [worker_pb2.Degrees(tp=2, ulysses=1, ring=1, cfg=2)] * 2
        kernels = [
            worker_pb2.KernelPackage(name="fa3-fwd", version="0.0.3", error="OSError: a\nb", replacement="cuDNN"),
            worker_pb2.KernelPackage(name="triton", version="3.6.0"),
        ]
        services = [
            generation_pb2.ServiceStatus(
                service="denoising",
                workers=2,
                capacity=2,
                busy=1,
                queued=3,
                queued_seconds=12.5,
                unmeasured=True,
                groups=groups,
                kernels=kernels,
            ),
            generation_pb2.ServiceStatus(service="decoding", workers=1, capacity=1),
        ]
        model = generation_pb2.Model(
            name="emoji", pipeline_name="FluxPipeline", fingerprint="f" * 64, parameters=[steps], services=services
        )
        return generation_pb2.ListModelsResponse(models=[model])


def serialize(message: Message) -> bytes:
    """Serialize a message, as generated servicers do."""
    return message.SerializeToString()


def handlers(coordinator: FakeCoordinator) -> grpc.GenericRpcHandler:
    """Handlers of GenerationService that call the fake coordinator."""
    unary: dict[str, tuple[Callable[..., Any], Any]] = {
        "GetRequest": (coordinator.get_request, generation_pb2.GetRequestRequest),
        "CancelRequest": (coordinator.cancel_request, generation_pb2.CancelRequestRequest),
        "ListRequests": (coordinator.list_requests, generation_pb2.ListRequestsRequest),
        "ListModels": (coordinator.list_models, generation_pb2.ListModelsRequest),
    }
    streams: dict[str, tuple[Callable[..., Any], Any]] = {
        "Generate": (coordinator.generate, generation_pb2.GenerateRequest),
        "Watch": (coordinator.watch, generation_pb2.WatchRequest),
    }
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(call, kind.FromString, serialize)
        for name, (call, kind) in unary.items()
    }
    for name, (call, kind) in streams.items():
        methods[name] = grpc.unary_stream_rpc_method_handler(call, kind.FromString, serialize)
    return grpc.method_handlers_generic_handler("fleet.v1.GenerationService", methods)


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCoordinator]:
    """A fake coordinator on a free port; FLEET_ENDPOINT has its address."""
    before = signal.getsignal(signal.SIGTERM)
    servicer = FakeCoordinator()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handlers(servicer),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("FLEET_ENDPOINT", f"127.0.0.1:{port}")
    yield servicer
    server.stop(None).wait()
    signal.signal(signal.SIGTERM, before)


def endpoint() -> list[str]:
    """Command line flag with the address of the fake coordinator."""
    return ["--endpoint", os.environ["FLEET_ENDPOINT"]]


def test_generate_writes_the_files_and_reports_their_paths(
    coordinator: FakeCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "p", "--seed", "7", "--model", "emoji", "--output", str(tmp_path / "x.png"), *endpoint()]
    assert main(argv) == 0
    captured = capsys.readouterr()
    paths = [tmp_path / "x-0.png", tmp_path / "x-1.png"]
    assert captured.out == "".join(f"{path}\n" for path in paths)
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]
    assert "denoising 1/2" in captured.err
    assert captured.err.count("warning: prompt: the prompt was truncated") == 1
    assert "request r1, seed 7" in captured.err
    (sent,) = coordinator.requests
    assert sent.model == "emoji"
    assert sent.parameters.seed == 7
    assert not sent.idempotency_key


@pytest.mark.parametrize(
    ("ending", "message"),
    [(FAILED, "request r1 failed: INTERNAL: out of memory"), (CANCELLED, "request r1 was cancelled")],
)
def test_generate_exits_1_if_the_request_fails_or_is_cancelled(
    coordinator: FakeCoordinator,
    ending: generation_pb2.RequestState.ValueType,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinator.ending = ending
    assert main(["generate", "p", "--output", str(tmp_path / "x.png"), *endpoint()]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"fleet generate: {message}"
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_generate_exits_1_without_a_result(
    coordinator: FakeCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.files = []
    assert main(["generate", "p", "--output", str(tmp_path / "x.png"), *endpoint()]) == 1
    assert "ended without a result" in capsys.readouterr().err


@pytest.mark.usefixtures("coordinator")
def test_generate_exits_2_for_an_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "p", "--model", "unknown", "--output", str(tmp_path / "x.png"), *endpoint()]) == 2
    assert capsys.readouterr().err == "fleet generate: model 'unknown' is not served; served are emoji\n"


def test_status_reports_an_unreachable_fleet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FLEET_ENDPOINT", f"unix:{tmp_path}/missing.sock")
    assert main(["status"]) == 1
    error = capsys.readouterr().err
    assert f"no fleet answers at unix:{tmp_path}/missing.sock" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("coordinator")
def test_status_shows_services_and_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["emoji", "denoising", "2", "1/2", "3", "~12.5", "2", "of", "tp=2", "cfg=2"]
    assert lines[2].split() == ["emoji", "decoding", "1", "0/1", "0", "0.0"]
    assert lines[4].split() == ["MODEL", "SERVICE", "KERNELS", "VERSION", "STATE"]
    assert lines[5].split(maxsplit=4)[2:] == ["fa3-fwd", "0.0.3", "unusable, cuDNN is used: OSError: a b"]
    assert lines[6].split() == ["emoji", "denoising", "triton", "3.6.0", "in", "use"]
    assert lines[-1].startswith("r1")
    assert "RUNNING" in lines[-1]
    assert lines[-1].endswith("…")


@pytest.mark.usefixtures("coordinator")
def test_models_shows_parameters_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    head, parameter = capsys.readouterr().out.splitlines()
    assert head == "emoji (FluxPipeline), checkpoint ffffffffffff"
    assert parameter.split() == ["num_inference_steps:", "int", "=", "20", "Steps."]


def test_watch_resumes_after_a_shutdown_of_the_coordinator(
    coordinator: FakeCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.break_after_first_event = True
    assert main(["watch", "r1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:3]] == ["RUNNING", "denoising 1/2", "SUCCEEDED"]
    assert lines[3] == "  file 0: image/png, 5 bytes"
    assert coordinator.watched_after == ["", "1"]


def test_watch_exits_1_for_a_cancelled_request(
    coordinator: FakeCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.ending = CANCELLED
    assert main(["watch", "r1"]) == 1
    written = capsys.readouterr()
    assert written.err == "fleet watch: request r1 was cancelled\n"
    assert written.out.splitlines()[-1].endswith(" CANCELLED, steps saved: 1")


@pytest.mark.usefixtures("coordinator")
def test_watch_exits_2_for_an_unknown_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "r2"]) == 2
    assert capsys.readouterr().err == "fleet watch: there is no request 'r2'\n"
    assert main(["watch", "\udcff"]) == 2
    assert "is not the ID of a request" in capsys.readouterr().err


@pytest.mark.parametrize(("ending", "code"), [(CANCELLED, 0), (RUNNING, 0), (SUCCEEDED, 1)])
def test_cancel_reports_the_state_and_exits_1_if_the_request_succeeded(
    coordinator: FakeCoordinator,
    ending: generation_pb2.RequestState.ValueType,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinator.ending = ending
    assert main(["cancel", "r1"]) == code
    assert capsys.readouterr().out.startswith("r1 ")
