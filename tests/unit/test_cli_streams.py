"""`fleet generate` of growing files across lost connections, and `fleet watch` of result items."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import InternalError, Unavailable
from common.rpc.status import to_status
from fleet.v1 import generation_pb2 as pb
from services.cli.__main__ import main
from services.cli.client import RETRIES
from services.cli.output import ResultFiles

PARTS = {0: [b"first", b"second", b"third"], 1: [b"other", b"last"]}
"""Parts of each growing file, by file index."""
Context = grpc.ServicerContext


def header(index: int, *, is_growing: bool) -> pb.FileHeader:
    size = 0 if is_growing else len(b"".join(PARTS[index]))
    return pb.FileHeader(
        index=index, count=2, content_type="video/mp4", byte_size=size, is_growing=is_growing, num_items=2
    )


class FakeCoordinator:
    """A fake coordinator that serves one request with two growing files and records the calls.

    Generate aborts after `breaks_after` parts. While `broken_calls` is above 0, Watch aborts after one event, and
    DownloadResult after two bytes. With `is_silent`, Watch and DownloadResult abort before they send anything.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.follows: list[bool] = []
        self.downloads: list[tuple[int, int]] = []
        self.watches: list[str] = []
        self.breaks_after = 99
        self.broken_calls = 0
        self.is_silent = False
        self.ending = pb.REQUEST_STATE_SUCCEEDED
        self.after_part: Callable[[], None] = lambda: None

    def _break(self, context: Context) -> None:
        """Abort a call with the status of a coordinator that shuts down."""
        code, details, metadata = to_status(Unavailable("this coordinator is shutting down"))
        context.set_trailing_metadata(metadata)
        context.abort(code, details)

    def generate(self, request: pb.GenerateRequest, context: Context) -> Iterator[pb.GenerateResponse]:
        """Send the parts of two files, interleaved with item events."""
        self.follows.append(request.follow)
        self.keys.append(request.request.idempotency_key)
        yield pb.GenerateResponse(accepted=pb.RequestRecord(request_id="r1"))
        sent, offsets = 0, [0, 0]
        for number in range(3):
            for index in (0, 1):
                if number >= len(PARTS[index]):
                    continue
                if sent == self.breaks_after:
                    self._break(context)
                data = PARTS[index][number]
                item = pb.ResultItem(item_index=sent, file_index=index, num_frames=4)
                yield pb.GenerateResponse(event=pb.Event(event_id=f"{sent + 1}-0", item=item))
                if not number:
                    yield pb.GenerateResponse(file=header(index, is_growing=True))
                yield pb.GenerateResponse(file_data=pb.FileData(index=index, offset=offsets[index], data=data))
                offsets[index] += len(data)
                sent += 1
                self.after_part()
        if sent == self.breaks_after:
            self._break(context)
        yield pb.GenerateResponse(event=self._last())
        if self.ending == pb.REQUEST_STATE_SUCCEEDED:
            for index in (0, 1):
                yield pb.GenerateResponse(file=header(index, is_growing=False))

    def _last(self) -> pb.Event:
        return pb.Event(event_id="9-0", state_change=pb.StateChange(state=self.ending))

    def watch(self, request: pb.WatchRequest, context: Context) -> Iterator[pb.WatchResponse]:
        """Send an item event, and the last event if `broken_calls` is 0."""
        self.watches.append(request.after_event_id)
        if self.is_silent:
            self._break(context)
        yield pb.WatchResponse(event=pb.Event(event_id="1-0", item=pb.ResultItem(num_frames=4, byte_size=5)))
        if self.broken_calls:
            self._break(context)
        yield pb.WatchResponse(event=self._last())

    def download(self, request: pb.DownloadResultRequest, context: Context) -> Iterator[pb.DownloadResultResponse]:
        """Send a file from an offset; only two bytes per call while `broken_calls` is above 0."""
        assert request.follow
        self.downloads.append((request.index, request.offset))
        if self.is_silent:
            self._break(context)
        data = b"".join(PARTS[request.index])[request.offset :]
        yield pb.DownloadResultResponse(file=header(request.index, is_growing=True))
        if self.broken_calls:
            self.broken_calls -= 1
            part = pb.FileData(index=request.index, offset=request.offset, data=data[:2])
            yield pb.DownloadResultResponse(file_data=part)
            self._break(context)
        if self.ending != pb.REQUEST_STATE_SUCCEEDED:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "request r1 is FAILED")
        if data:
            part = pb.FileData(index=request.index, offset=request.offset, data=data)
            yield pb.DownloadResultResponse(file_data=part)
        yield pb.DownloadResultResponse(file=header(request.index, is_growing=False))

    def record(self, request: pb.GetRequestRequest, _: Context) -> pb.GetRequestResponse:
        """Return the record of the request."""
        return pb.GetRequestResponse(request=pb.RequestRecord(request_id=request.request_id))


def _stream(call: Any, request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_stream_rpc_method_handler(call, request.FromString, lambda message: message.SerializeToString())


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCoordinator]:
    """A fake coordinator on a free port; FLEET_ENDPOINT has its address. Retries follow without a pause."""

    async def no_pause(_: int) -> None:
        return None

    monkeypatch.setattr("services.cli.client.pause", no_pause)
    before = signal.getsignal(signal.SIGTERM)
    servicer = FakeCoordinator()
    server = grpc.server(ThreadPoolExecutor(4))
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": _stream(servicer.generate, pb.GenerateRequest),
        "Watch": _stream(servicer.watch, pb.WatchRequest),
        "DownloadResult": _stream(servicer.download, pb.DownloadResultRequest),
        "GetRequest": grpc.unary_unary_rpc_method_handler(
            servicer.record, pb.GetRequestRequest.FromString, lambda message: message.SerializeToString()
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fleet.v1.GenerationService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("FLEET_ENDPOINT", f"127.0.0.1:{port}")
    yield servicer
    server.stop(None).wait()
    signal.signal(signal.SIGTERM, before)


def generate(output: Path, *more: str) -> int:
    return main(["generate", "p", "--output", str(output), "--endpoint", os.environ["FLEET_ENDPOINT"], *more])


def test_a_growing_video_is_written_to_its_final_path(
    coordinator: FakeCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bytes] = []
    paths = [tmp_path / "x-0.mp4", tmp_path / "x-1.mp4"]
    paths[0].write_bytes(b"an older file")

    def wait_for_part() -> None:
        expected = b"".join(PARTS[0][: len(seen) // 2 + 1])
        for _ in range(2_000):
            if paths[0].read_bytes() == expected:
                break
            threading.Event().wait(0.005)
        seen.append(paths[0].read_bytes())

    coordinator.after_part = wait_for_part
    assert generate(tmp_path / "x.mp4") == 0
    assert seen == [b"first", b"first", b"firstsecond", b"firstsecond", b"firstsecondthird"]
    assert [path.read_bytes() for path in paths] == [b"firstsecondthird", b"otherlast"]
    written = capsys.readouterr()
    assert written.out == "".join(f"{path}\n" for path in paths)
    assert "20 frames after" in written.err
    assert sorted(tmp_path.iterdir()) == paths
    assert (coordinator.follows, coordinator.keys, coordinator.downloads) == ([True], [""], [])


@pytest.mark.parametrize("breaks_after", range(6))
@pytest.mark.parametrize("broken_calls", [0, 3])
def test_each_byte_is_written_once_across_lost_connections(
    coordinator: FakeCoordinator,
    breaks_after: int,
    broken_calls: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinator.breaks_after, coordinator.broken_calls = breaks_after, broken_calls
    assert generate(tmp_path / "x.mp4", "--idempotency-key", "k") == 0
    paths = [tmp_path / "x-0.mp4", tmp_path / "x-1.mp4"]
    assert [path.read_bytes() for path in paths] == [b"firstsecondthird", b"otherlast"]
    assert sorted(tmp_path.iterdir()) == paths
    assert coordinator.keys == ["k"]
    written = capsys.readouterr()
    assert "request r1 continues; the connection was lost" in written.err
    received = [len(b"".join(PARTS[0][: (breaks_after + 1) // 2])), len(b"".join(PARTS[1][: breaks_after // 2]))]
    assert coordinator.downloads[0] == (0, 16 if breaks_after == 5 else received[0])
    assert coordinator.downloads[-1][0] == 1
    assert coordinator.watches[0] == (f"{breaks_after}-0" if breaks_after else "")


@pytest.mark.usefixtures("coordinator")
def test_an_image_is_requested_without_follow(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    generate(tmp_path / "x.png")
    assert coordinator.follows == [False]


def test_a_request_that_fails_after_a_lost_connection_leaves_no_file(
    coordinator: FakeCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.breaks_after, coordinator.ending = 3, pb.REQUEST_STATE_FAILED
    assert generate(tmp_path / "x.mp4") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "fleet generate: request r1 failed"
    assert not list(tmp_path.iterdir())


def test_a_cancelled_request_leaves_no_growing_file(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.ending = pb.REQUEST_STATE_CANCELLED
    assert generate(tmp_path / "x.mp4") == 1
    assert not list(tmp_path.iterdir())


def test_attempts_without_progress_are_bounded(
    coordinator: FakeCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.breaks_after, coordinator.is_silent = 3, True
    assert generate(tmp_path / "x.mp4") == 1
    assert coordinator.downloads == [(0, 11)] * (RETRIES + 1)
    assert capsys.readouterr().err.endswith("this coordinator is shutting down\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_no_growing_file(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    file_existed: list[bool] = []

    def interrupt() -> None:
        if not file_existed:
            path = tmp_path / "x-0.mp4"
            for _ in range(2_000):
                if path.exists():
                    break
                threading.Event().wait(0.005)
            file_existed.append(path.exists())
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)

    coordinator.after_part = interrupt
    assert generate(tmp_path / "x.mp4") == 130
    assert file_existed == [True]
    assert not list(tmp_path.iterdir())


def test_an_idempotency_key_needs_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "p", "--output", str(tmp_path / "x.mp4"), "--idempotency-key", "k"]) == 2
    assert "--idempotency-key needs --endpoint" in capsys.readouterr().err


@pytest.mark.usefixtures("coordinator")
def test_watch_prints_items(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "r1"]) == 0
    assert "item 0: 4 frames, bytes 0 to 5 of file 0" in capsys.readouterr().out


def test_growing_files_refuse_inconsistent_offsets_and_sizes(tmp_path: Path) -> None:
    with ResultFiles(tmp_path / "x.mp4") as files:
        with pytest.raises(InternalError, match="before a file's header"):
            files.write(b"x")
        with pytest.raises(InternalError, match="file 0 of the result has bytes before its header"):
            files.write_at(0, 0, b"x")
        files.begin(0, 1, None)
        files.write_at(0, 0, b"abc")
        with pytest.raises(InternalError, match="received byte 2 of file 0; expected byte 3"):
            files.write_at(0, 2, b"c")
        with pytest.raises(InternalError, match=r"x\.mp4 ended before its size was sent"):
            files.check_complete()
        files.begin(0, 1, 4)
        with pytest.raises(InternalError, match=r"x\.mp4 ended 1 bytes before its size"):
            files.check_complete()
        with pytest.raises(InternalError, match="more bytes than its header states"):
            files.begin(0, 1, 2)
    assert not list(tmp_path.iterdir())
