"""A streamed result is stored as items, and each item has one event, whatever fails."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from async_tests import HANG_SECONDS, wait_until
from common.errors import Aborted, InternalError, ResourceExhausted
from common.rpc.framing import Packet, Piece, checksum
from common.state.connection import connect
from common.state.leases import Leases
from common.state.presence import Presence
from common.state.requests import RequestStore
from common.state.result_items import StoredItem
from fleet.v1 import artifacts_pb2
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer, fill, running_server, unfill
from services.coordinator.events import EventLog, EventWriter
from services.coordinator.result_stream import ResultStream

MIB = 1 << 20
SUCCEEDED = pb.REQUEST_STATE_SUCCEEDED


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_server("valkey", "--appendfsync", "no") as server:
        yield server


def packet(data: bytes, file: int = 0, files: int = 1, frames: int = 4) -> Packet:
    """An item as a worker sends it. Data of more than 64 KiB is in chunks."""
    message = artifacts_pb2.MediaItem(
        content_type="video/mp4", height=16, width=32, num_frames=frames, file_index=file, file_count=files
    )
    tensor = message.data
    tensor.dtype, tensor.byte_size = artifacts_pb2.DTYPE_UINT8, len(data)
    tensor.shape.append(len(data))
    if len(data) <= 1 << 16:
        tensor.data = data
        return Packet(message)
    tensor.checksum = checksum([data])
    pieces = [Piece(data[start : start + MIB]) for start in range(0, len(data), MIB)]
    return Packet(message, {"media_items.data": pieces})


class Case:
    """A request in a store, with the result streams of its owners."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store = RequestStore(redis, owner="first")
        self.request_id = secrets.token_hex(8)
        self.log = EventLog()
        self.ended = asyncio.Event()
        self.writers: list[EventWriter] = []

    async def admit(self) -> None:
        await self.store.admit(pb.RequestRecord(request_id=self.request_id, model="emoji"))

    def stream(self, epoch: int = 1, *, max_bytes: int = 1 << 30, raw: bool = False) -> ResultStream:
        events = EventWriter(self.store, self.request_id, self.log, self.ended.set, epoch=epoch)
        self.writers.append(events)
        return ResultStream(self.store, events, self.request_id, epoch=epoch, max_bytes=max_bytes, raw=raw)

    async def take_over(self) -> int:
        """Take over the request with another coordinator. Returns the new epoch."""
        presence = Presence(self.redis, "second")
        await presence.start()
        taken, _ = await Leases(self.redis, "second").take_over("emoji")
        await presence.stop()
        return next(each.epoch for each in taken if each.record.request_id == self.request_id)

    async def delivered(self) -> list[bytes]:
        """The bytes of all items that have an event."""
        items = await self.store.delivered_items(self.request_id)
        assert [stored.item.item_index for stored in items] == list(range(len(items)))
        return [
            b"".join([chunk async for chunk in self.store.items.chunks(self.request_id, stored)]) for stored in items
        ]


def run_case(server: RedisServer, test: Callable[[Case], Awaitable[None]]) -> None:
    async def main() -> None:
        async with connect(server.url) as redis, asyncio.timeout(HANG_SECONDS):
            await redis.flushall()
            case = Case(redis)
            await case.admit()
            await test(case)
            for writer in case.writers:
                await writer.close()

    asyncio.run(main())


async def indexed(packets: Sequence[Packet]) -> AsyncIterator[tuple[int, Packet]]:
    for index, each in enumerate(packets):
        yield index, each


def test_items_of_several_files_are_stored_and_described(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        parts = [b"a" * 100, b"b" * (2 * MIB + 3), b"c" * 50, b"d" * 7]
        packets = [packet(part, file=number % 2, files=2) for number, part in enumerate(parts)]
        stream = case.stream()
        files = await stream.take(indexed(packets))
        assert await case.delivered() == parts
        items = [stored.item for stored in stream.items]
        assert [(item.file_index, item.offset, item.byte_size) for item in items] == [
            (0, 0, 100),
            (1, 0, 2 * MIB + 3),
            (0, 100, 50),
            (1, 2 * MIB + 3, 7),
        ]
        assert [file.header for file in files] == [
            pb.FileHeader(
                index=index,
                count=2,
                content_type="video/mp4",
                byte_size=size,
                height=16,
                width=32,
                num_frames=8,
                num_items=2,
            )
            for index, size in enumerate((150, 2 * MIB + 10))
        ]
        assert await case.store.finish(case.request_id, SUCCEEDED, files=files, items=stream.items)
        events = [event async for event in case.store.events(case.request_id)]
        assert [event.item.item_index for event in events if event.HasField("item")] == [0, 1, 2, 3]

    run_case(server, test)


def test_an_item_is_read_only_once_the_previous_item_is_stored(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        async def items() -> AsyncIterator[tuple[int, Packet]]:
            for index in range(3):
                assert len(await case.delivered()) == index
                yield index, packet(b"%d" % index)

        await case.stream().take(items())
        assert await case.delivered() == [b"0", b"1", b"2"]

    run_case(server, test)


def test_a_repeated_item_is_delivered_once(server: RedisServer) -> None:
    """A decoder that replaces another decoder starts with the first item."""

    async def test(case: Case) -> None:
        stream = case.stream()
        for index in (0, 1, 0, 1, 2):
            await stream.put(index, packet(b"%d" % index), 1)
        assert await case.delivered() == [b"0", b"1", b"2"]

    run_case(server, test)


def test_cancelling_the_caller_neither_loses_nor_repeats_the_item(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        stream = case.stream()
        for attempt in range(20):
            task = asyncio.create_task(stream.put(attempt, packet(b"%d" % attempt), 1))
            for _ in range(attempt):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stream.put(attempt, packet(b"%d" % attempt), 1)
        assert await case.delivered() == [b"%d" % each for each in range(20)]

    run_case(server, test)


@pytest.mark.parametrize("delivered", range(4))
def test_the_next_owner_delivers_only_the_missing_items(
    server: RedisServer, delivered: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(case: Case) -> None:
        first, parts = case.stream(), [b"one", b"two", b"three"]
        for index in range(delivered):
            await first.put(index, packet(parts[index]), 3)
        orphan = StoredItem(pb.ResultItem(item_index=delivered, byte_size=1), 1)
        await case.store.items.save(case.request_id, orphan, [b"x"])  # the first owner died before it wrote the event
        epoch = await case.take_over()
        second = case.stream(epoch)
        recomputed = [b"ONE", b"TWO!!", b"THREE"]  # other numerics: the second item is longer
        files = await second.take(indexed([packet(part) for part in recomputed]))
        expected = [*parts[:delivered], *recomputed[delivered:]]
        assert await case.delivered() == expected
        assert files[0].header.byte_size == sum(map(len, expected))
        assert files[0].header.num_frames == 12
        assert [stored.epoch for stored in second.items] == [1] * delivered + [epoch] * (3 - delivered)
        with pytest.raises(Aborted, match="another coordinator"):
            await first.put(delivered, packet(b"late"), 4)
        assert case.ended.is_set()
        assert await case.delivered() == expected

    run_case(server, test)
    assert ("index=1 delivered_bytes=3 computed_bytes=5" in caplog.text) == (delivered > 1)


def test_the_next_owner_of_a_complete_result_delivers_nothing_more(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        await case.stream().take(indexed([packet(b"one"), packet(b"two")]))
        epoch = await case.take_over()
        files = await case.stream(epoch).take(indexed([packet(b"one"), packet(b"two")]))
        assert files[0].header.byte_size == 6
        assert await case.delivered() == [b"one", b"two"]

    run_case(server, test)


@pytest.mark.parametrize(("raw", "field"), [(False, "num_frames"), (True, "output_format")])
def test_a_result_larger_than_max_bytes_is_refused(server: RedisServer, raw: bool, field: str) -> None:
    async def test(case: Case) -> None:
        stream = case.stream(max_bytes=10, raw=raw)
        await stream.put(0, packet(b"12345678"), 8)
        await stream.put(1, packet(b"90"), 2)
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match="at least 11 bytes; at most 10") as caught:
                await stream.put(2, packet(b"x"), 1)
            assert caught.value.field == field
        assert await case.delivered() == ([] if raw else [b"12345678", b"90"])

    run_case(server, test)


def test_a_raw_result_stays_in_memory_and_is_never_stored(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        files = await case.stream(raw=True).take(indexed([packet(b"abc"), packet(b"d" * 70_000)]))
        assert b"".join(bytes(piece) for piece in files[0].pieces) == b"abc" + b"d" * 70_000
        assert (files[0].header.byte_size, files[0].header.num_items) == (70_003, 0)
        assert not await case.redis.keys("fleet:item:*")
        assert await case.delivered() == []

    run_case(server, test)


def test_wrong_items_and_missing_files_are_refused(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        with pytest.raises(InternalError, match="ended with 0 of 0 files"):
            await case.stream().take(indexed([]))
        with pytest.raises(InternalError, match="item 1 of the result; expected item 0"):
            await case.stream().put(1, packet(b"x"), 1)
        with pytest.raises(InternalError, match="has a Latents as item 0"):
            await case.stream().put(0, Packet(artifacts_pb2.Latents()), 1)
        with pytest.raises(InternalError, match="file 2 of 2"):
            await case.stream().put(0, packet(b"x", file=2, files=2), 1)
        stream = case.stream()
        await stream.put(0, packet(b"x", files=2), 1)
        with pytest.raises(InternalError, match="ended with 1 of 2 files"):
            stream.files()
        with pytest.raises(InternalError, match="file 0 of 3; the result has 2 files"):
            await stream.put(1, packet(b"x", files=3), 1)

    run_case(server, test)


def test_an_item_waits_for_a_store_that_is_unavailable() -> None:
    with running_server("valkey") as server:

        async def test(case: Case) -> None:
            stream = case.stream()
            await stream.put(0, packet(b"one"), 3)
            server.kill()
            task = asyncio.create_task(stream.put(1, packet(b"two"), 3))
            await asyncio.sleep(0.3)
            assert not task.done()
            server.start()
            await task
            assert await case.delivered() == [b"one", b"two"]

        run_case(server, test)


def test_an_item_waits_for_a_full_store() -> None:
    with running_server("valkey", "--maxmemory", str(8 * MIB)) as server:

        async def test(case: Case) -> None:
            await fill(case.redis, 7 * MIB)
            task = asyncio.create_task(case.stream().put(0, packet(b"x" * (2 * MIB)), 2 * MIB))
            await asyncio.sleep(0.3)
            assert not task.done()
            await unfill(case.redis)
            await task
            assert [len(each) for each in await case.delivered()] == [2 * MIB]

        run_case(server, test)


def test_close_abandons_an_item_that_the_store_has_not_accepted() -> None:
    with running_server("valkey") as server:

        async def test(case: Case) -> None:
            stream = case.stream()
            await stream.put(0, packet(b"one"), 3)
            server.kill()
            task = asyncio.create_task(stream.put(1, packet(b"two"), 3))
            await asyncio.sleep(0.05)
            task.cancel()
            await stream.close()
            await asyncio.gather(task, return_exceptions=True)
            server.start()

            async def is_store_back() -> bool:
                return len(await case.delivered()) == 1

            await wait_until(is_store_back)
            assert [stored.item.item_index for stored in stream.items] == [0]

        run_case(server, test)


def test_a_damaged_store_is_an_error_instead_of_a_wait(server: RedisServer) -> None:
    async def test(case: Case) -> None:
        stream = case.stream()
        key = f"fleet:request:{case.request_id}"
        await case.redis.delete(key)
        await case.redis.set(key, "x")
        with pytest.raises(InternalError, match="damaged"):
            await stream.put(0, packet(b"one"), 3)
        await stream.close()
        with pytest.raises(InternalError, match="damaged"):
            await case.writers.pop().close()

    run_case(server, test)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.just("take over"), st.tuples(st.integers(0, 3), st.integers(0, 5))), max_size=24))
def test_owners_in_any_order_deliver_each_item_once(server: RedisServer, actions: list[str | tuple[int, int]]) -> None:
    """Former owners continue as if they still owned the request; each owner computes different bytes."""

    async def test(case: Case) -> None:
        owners = [(1, case.stream(), 0)]
        expected: list[bytes] = []
        for action in actions:
            if isinstance(action, str):
                epoch = await case.take_over()
                owners.append((epoch, case.stream(epoch), 0))
                continue
            number = min(action[0], len(owners) - 1)
            epoch, stream, computed = owners[number]
            index = min(action[1], computed)  # the next item, or an earlier item after its decoder was replaced
            data = b"%d of epoch %d" % (index, epoch)
            is_owner = number == len(owners) - 1
            try:
                await stream.put(index, packet(data), len(data))
            except Aborted:
                assert not is_owner
                continue
            owners[number] = (epoch, stream, max(computed, index + 1))
            if is_owner and index == len(expected):
                expected.append(data)
            assert await case.delivered() == expected
        sizes = sum(map(len, expected))
        if expected and owners[-1][2]:
            assert owners[-1][1].files()[0].header.byte_size == sizes

    run_case(server, test)
