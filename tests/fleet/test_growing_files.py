"""DownloadResult and Generate follow growing files at any coordinator, and send each byte once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest

from common.state.connection import connect
from common.state.presence import Presence
from common.state.records import ResultFile
from common.state.requests import RequestStore
from common.state.result_items import StoredItem
from coordinator_fleet import FakeFleet, Gate, Stub, error_of, run_on_fleet, submission
from fleet.v1 import generation_pb2 as pb
from redis_servers import running_server
from services.coordinator.coordinator import Coordinator

MIB = 1 << 20
SUCCEEDED, FAILED = pb.REQUEST_STATE_SUCCEEDED, pb.REQUEST_STATE_FAILED
CANCELLED = pb.REQUEST_STATE_CANCELLED


@pytest.fixture(scope="module")
def unsynced_url() -> Iterator[str]:
    with running_server("valkey", "--appendfsync", "no") as server:
        yield server.url


class Owner:
    """A fake coordinator that runs one request; the test delivers the items of its result."""

    def __init__(self, store: RequestStore) -> None:
        self.store = store
        self.request_id = secrets.token_hex(8)
        self.items: list[StoredItem] = []
        self.files: dict[int, bytes] = {}
        self.count = 1

    async def admit(self, count: int = 1, output_format: pb.OutputFormat.ValueType = pb.OUTPUT_FORMAT_MP4) -> None:
        self.count = count
        record = pb.RequestRecord(request_id=self.request_id, model="emoji")
        record.parameters.output_format = output_format
        await self.store.admit(record)

    async def deliver(self, data: bytes, file: int = 0) -> None:
        before = self.files.get(file, b"")
        item = pb.ResultItem(
            item_index=len(self.items),
            file_index=file,
            file_count=self.count,
            offset=len(before),
            byte_size=len(data),
            num_frames=4,
            content_type="video/mp4",
        )
        stored = StoredItem(item, 1)
        await self.store.items.save(self.request_id, stored, [data])
        assert await self.store.append(self.request_id, [pb.Event(item=item)], number=len(self.items))
        self.items.append(stored)
        self.files[file] = before + data

    async def end(self, state: pb.RequestState.ValueType = SUCCEEDED, error: pb.Error | None = None) -> None:
        headers = [
            pb.FileHeader(
                index=index,
                count=self.count,
                content_type="video/mp4",
                byte_size=len(data),
                num_items=sum(each.item.file_index == index for each in self.items),
            )
            for index, data in sorted(self.files.items())
        ]
        files = [ResultFile(header, ()) for header in headers] if state == SUCCEEDED else []
        assert await self.store.finish(self.request_id, state, error=error, files=files, items=self.items)


class Follower:
    """Reads a download into files, and checks that each byte is received once and in order."""

    def __init__(self, responses: AsyncIterator[pb.DownloadResultResponse], offset: int = 0) -> None:
        self._responses = responses
        self._offset = offset
        self.headers: list[pb.FileHeader] = []
        self.files: dict[int, bytes] = {}

    async def receive(self, file: int, size: int) -> None:
        """Read until `size` bytes of a file are received."""
        while len(self.files.get(file, b"")) < size:
            self._take(await anext(self._responses))

    async def rest(self) -> None:
        async for response in self._responses:
            self._take(response)

    def _take(self, response: pb.DownloadResultResponse) -> None:
        if response.HasField("file"):
            self.headers.append(response.file)
            return
        part = response.file_data
        assert 0 < len(part.data) <= MIB
        before = self.files.get(part.index, b"")
        assert part.offset == self._offset + len(before)
        assert part.index in {header.index for header in self.headers}
        self.files[part.index] = before + part.data


Scenario = Callable[[Owner, Stub, Coordinator], Awaitable[None]]


def run_with_owner(url: str, scenario: Scenario) -> None:
    """Run a test with a coordinator and an Owner, which the store lists as the coordinator "elsewhere"."""

    async def test(fleet: FakeFleet) -> None:
        coordinator, stub = await fleet.add_coordinator()
        async with connect(url) as redis:
            presence = Presence(redis, "elsewhere")
            await presence.start()
            await scenario(Owner(RequestStore(redis, owner="elsewhere")), stub, coordinator)
            await presence.stop()

    run_on_fleet(url, test)


def follow(stub: Stub, owner: Owner, index: int | None = None, offset: int = 0) -> Follower:
    request = pb.DownloadResultRequest(request_id=owner.request_id, index=index, offset=offset, follow=True)
    return Follower(aiter(stub.DownloadResult(request)), offset)


async def refused(stub: Stub, request: pb.DownloadResultRequest) -> tuple[str, str, str]:
    """Code, field and text of a download's error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [each async for each in stub.DownloadResult(request)]
    return (*error_of(caught.value), caught.value.details() or "")


def test_files_are_followed_as_they_grow(unsynced_url: str) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        await owner.admit(count=2)
        follower = follow(stub, owner)
        big = secrets.token_bytes(2 * MIB + 77)
        await owner.deliver(b"first")
        await follower.receive(0, 5)
        await owner.deliver(big, file=1)
        await follower.receive(1, len(big))
        await owner.deliver(b"second")
        await follower.receive(0, 11)
        await owner.end()
        await follower.rest()
        assert follower.files == owner.files
        assert [(each.index, each.is_growing, each.byte_size, each.num_items) for each in follower.headers] == [
            (0, True, 0, 0),
            (1, True, 0, 0),
            (0, False, 11, 2),
            (1, False, len(big), 1),
        ]
        whole = [each async for each in stub.DownloadResult(pb.DownloadResultRequest(request_id=owner.request_id))]
        assert b"".join(each.data for each in whole) == b"firstsecond" + big
        assert [each.file.byte_size for each in whole if each.HasField("file")] == [11, len(big)]
        assert not [each for each in whole if each.HasField("file_data")]

    run_with_owner(unsynced_url, scenario)


@pytest.mark.parametrize("is_ended", [False, True])
@pytest.mark.parametrize("offset", [0, 3, MIB - 1, MIB, MIB + 4, MIB + 5, 2 * MIB + 15])
def test_download_continues_at_any_offset(unsynced_url: str, offset: int, is_ended: bool) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        await owner.admit(count=2)
        parts = [secrets.token_bytes(MIB + 4), b"other", secrets.token_bytes(MIB + 11)]
        for number, part in enumerate(parts):
            await owner.deliver(part, file=number % 2)
        if is_ended:
            await owner.end()
        follower = follow(stub, owner, 0, offset)
        expected = owner.files[0][offset:]
        await follower.receive(0, len(expected))
        if not is_ended:
            await owner.end()
        await follower.rest()
        assert follower.files == ({0: expected} if expected else {})
        assert follower.headers[-1].byte_size == 2 * MIB + 15
        request = pb.DownloadResultRequest(request_id=owner.request_id, index=0, offset=offset)
        assert b"".join([each.data async for each in stub.DownloadResult(request)]) == expected

    run_with_owner(unsynced_url, scenario)


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
def test_download_of_an_unsuccessful_request_fails(unsynced_url: str, state: pb.RequestState.ValueType) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        await owner.admit()
        follower = follow(stub, owner)
        await owner.deliver(b"first")
        await follower.receive(0, 5)
        await owner.end(state, pb.Error(code="INTERNAL", message="a defect"))
        with pytest.raises(grpc.aio.AioRpcError, match=r"a defect\); only a request that SUCCEEDED") as caught:
            await follower.rest()
        assert error_of(caught.value)[0] == "FAILED_PRECONDITION"

    run_with_owner(unsynced_url, scenario)


def test_invalid_downloads_are_refused(unsynced_url: str) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        name = owner.request_id
        unknown = pb.DownloadResultRequest(request_id="nothing", follow=True)
        assert (await refused(stub, unknown))[0] == "NOT_FOUND"
        await owner.admit()
        no_index = pb.DownloadResultRequest(request_id=name, offset=3, follow=True)
        code, field, text = await refused(stub, no_index)
        assert (code, field) == ("INVALID_ARGUMENT", "index")
        assert "index: it is missing, although offset is 3" in text
        early = pb.DownloadResultRequest(request_id=name)
        assert (await refused(stub, early))[0] == "FAILED_PRECONDITION"
        await owner.deliver(b"first")
        beyond_files = pb.DownloadResultRequest(request_id=name, index=1, follow=True)
        assert (await refused(stub, beyond_files))[:2] == ("INVALID_ARGUMENT", "index")
        beyond_bytes = pb.DownloadResultRequest(request_id=name, index=0, offset=6, follow=True)
        waiting = asyncio.create_task(refused(stub, beyond_bytes))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # the file may still grow to this offset
        await owner.end()
        for code, field, text in (await waiting, await refused(stub, beyond_bytes)):
            assert (code, field) == ("INVALID_ARGUMENT", "offset")
            assert "offset: 6 is not at most 5" in text
        assert (await refused(stub, beyond_files))[:2] == ("INVALID_ARGUMENT", "index")

    run_with_owner(unsynced_url, scenario)


def test_download_does_not_wait_for_a_raw_result(unsynced_url: str) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        await owner.admit(output_format=pb.OUTPUT_FORMAT_SAFETENSORS)
        request = pb.DownloadResultRequest(request_id=owner.request_id, follow=True)
        code, _field, text = await refused(stub, request)
        assert code == "FAILED_PRECONDITION"
        assert "never stored" in text

    run_with_owner(unsynced_url, scenario)


def test_shutdown_of_a_coordinator_ends_its_downloads(unsynced_url: str) -> None:
    async def scenario(owner: Owner, stub: Stub, coordinator: Coordinator) -> None:
        await owner.admit()
        follower = follow(stub, owner)
        await owner.deliver(b"first")
        await follower.receive(0, 5)
        stopping = asyncio.create_task(coordinator.stop(5))
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await follower.rest()
        assert error_of(caught.value)[0] == "UNAVAILABLE"
        await stopping

    run_with_owner(unsynced_url, scenario)


def test_result_that_is_not_streamed_is_sent_when_complete(unsynced_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        fleet.scripts["decoding"].result_bytes = MIB + 10
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        accepted = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        request = pb.DownloadResultRequest(request_id=accepted, index=0, offset=4, follow=True)
        follower = Follower(aiter(stub.DownloadResult(request)), 4)
        receiving = asyncio.create_task(follower.rest())
        await asyncio.sleep(0.1)
        assert not receiving.done()
        gate.opened.set()
        await receiving
        assert follower.files == {0: b"\x07" * (MIB + 6)}
        assert [(each.is_growing, each.byte_size, each.num_items) for each in follower.headers] == [
            (False, MIB + 10, 0)
        ]
        raw = pb.OUTPUT_FORMAT_SAFETENSORS  # raw results are sent from memory
        for parameters in (pb.GenerationParameters(), pb.GenerationParameters(output_format=raw)):
            given = submission()
            given.parameters.MergeFrom(parameters)
            replies = [each async for each in stub.Generate(pb.GenerateRequest(request=given, follow=True))]
            assert [each.WhichOneof("payload") for each in replies][-3:] == ["file", "file_data", "file_data"]
            assert b"".join(each.file_data.data for each in replies) == b"\x07" * (MIB + 10)

    run_on_fleet(unsynced_url, scenario)


def test_generate_with_a_known_idempotency_key_follows_a_request_of_another_coordinator(unsynced_url: str) -> None:
    async def scenario(owner: Owner, stub: Stub, _: Coordinator) -> None:
        record = pb.RequestRecord(request_id=owner.request_id, model="emoji")
        await owner.store.admit(record, idempotency_key="order-7")
        await owner.deliver(b"first")
        given = submission(idempotency_key="order-7")
        replies = aiter(stub.Generate(pb.GenerateRequest(request=given, follow=True)))
        received = b""
        while received != b"first":
            received += (await anext(replies)).file_data.data
        await owner.deliver(b"second")
        await owner.end()
        rest = [each async for each in replies]
        assert b"".join(each.file_data.data for each in rest) == b"second"
        assert rest[-1].file.byte_size == 11
        not_following = [each async for each in stub.Generate(pb.GenerateRequest(request=given))]
        assert [each.WhichOneof("payload") for each in not_following][-3:] == ["file", "data", "data"]
        assert b"".join(each.data for each in not_following) == b"firstsecond"

    run_with_owner(unsynced_url, scenario)
