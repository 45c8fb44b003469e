"""The request store against real servers: admission, events, one end, paging, results, expiry."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.errors import InvalidInput, NotFound, ResourceExhausted, Unavailable
from common.state.connection import connect
from common.state.presence import Presence
from common.state.records import ResultFile, state_event
from common.state.requests import AdmissionLimits, RequestStore, Retention
from fleet.v1 import artifacts_pb2, generation_pb2
from redis_servers import run_on_empty_store, running_server, server_binaries

State = generation_pb2.RequestState


def record(model: str = "emoji", **parameters: str) -> generation_pb2.RequestRecord:
    return generation_pb2.RequestRecord(
        request_id=secrets.token_hex(8),
        model=model,
        parameters=generation_pb2.GenerationParameters(**parameters),  # type: ignore[arg-type]
    )


def progress(step: int) -> generation_pb2.Event:
    return generation_pb2.Event(progress=generation_pb2.StageProgress(service="denoising", step=step, total_steps=9))


def warning(message: str) -> generation_pb2.Event:
    return generation_pb2.Event(warning=artifacts_pb2.Warning(field="prompt", message=message))


def image_file(data: bytes) -> ResultFile:
    header = generation_pb2.FileHeader(count=1, content_type="image/png", byte_size=len(data), height=8, width=8)
    return ResultFile(header, [data])


def test_a_request_has_its_events_and_files_from_admission_to_end(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        submitted = record(prompt="a red apple")
        submitted.warnings.add(field="height", message="rounded")
        admitted = await store.admit(submitted)
        assert not admitted.replayed
        assert admitted.record.state == State.REQUEST_STATE_QUEUED
        assert admitted.record.created_at.seconds > 1_700_000_000
        assert await store.append(
            submitted.request_id, [state_event(State.REQUEST_STATE_RUNNING), progress(1)], number=0
        )
        assert await store.append(submitted.request_id, [warning("cut")], number=2)
        data = bytes(range(256)) * 10_000
        assert await store.finish(
            submitted.request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(data)], events=[progress(9)]
        )
        events = [event async for event in store.events(submitted.request_id)]
        kinds = [event.WhichOneof("kind") for event in events]
        assert kinds == ["state_change", "warning", "state_change", "progress", "warning", "progress", "state_change"]
        assert events[-1].state_change.state == State.REQUEST_STATE_SUCCEEDED
        assert all(event.time.seconds > 1_700_000_000 for event in events)
        stored = await store.get(submitted.request_id)
        assert stored.parameters.prompt == "a red apple"
        assert [each.message for each in stored.warnings] == ["rounded", "cut"]
        assert stored.files[0].byte_size == len(data)
        chunks = [chunk async for chunk in store.result_chunks(submitted.request_id, 0, len(data))]
        assert b"".join(chunks) == data
        assert max(map(len, chunks)) == 1 << 20

    run_on_empty_store(each_store_url, scenario)


def test_a_request_ends_once_and_has_no_events_afterwards(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        ends = [State.REQUEST_STATE_SUCCEEDED, State.REQUEST_STATE_CANCELLED, State.REQUEST_STATE_EXPIRED] * 7
        files = [[image_file(b"x" * 100)] if end == State.REQUEST_STATE_SUCCEEDED else [] for end in ends]
        ends_seen = await asyncio.gather(
            *(store.finish(request_id, end, files=each) for end, each in zip(ends, files, strict=True))
        )
        won = [each is not None for each in ends_seen]
        assert sum(won) == 1
        stored = await store.get(request_id)
        assert stored.state == ends[won.index(True)]
        assert await store.append(request_id, [progress(3)], number=0) is None
        events = [event async for event in store.events(request_id)]
        assert [event.state_change.state for event in events] == [State.REQUEST_STATE_QUEUED, stored.state]

    run_on_empty_store(each_store_url, scenario)


def test_files_of_a_late_end_are_deleted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        assert await store.finish(request_id, State.REQUEST_STATE_CANCELLED)
        assert await store.finish(request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"x" * 9)]) is None
        assert not await redis.keys("fleet:result:*")

    run_on_empty_store(each_store_url, scenario)


def test_every_key_of_an_ended_request_expires(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, retention=Retention(record_seconds=0.05, result_seconds=0.05))
        request_id = (await store.admit(record(), idempotency_key="k")).record.request_id
        await store.finish(request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"x" * 3_000_000)])
        keys = [key for key in await redis.keys("fleet:*") if request_id.encode() in key or b"idempotency" in key]
        ttls = [await redis.pttl(key) for key in keys]
        assert all(-2 <= ttl <= 50 and ttl != -1 for ttl in ttls), dict(zip(keys, ttls, strict=True))

        async def are_expired() -> bool:
            return not keys or not await redis.exists(*keys)

        await wait_until(are_expired)
        with pytest.raises(NotFound, match="may have expired"):
            await store.get(request_id)
        with pytest.raises(NotFound, match="result"):
            [chunk async for chunk in store.result_chunks(request_id, 0, 9)]
        other = (await store.admit(record())).record.request_id
        assert await redis.zrange("fleet:requests", 0, -1) == [other.encode()]
        assert [each.request_id for each in (await store.page())[0]] == [other]

    run_on_empty_store(each_store_url, scenario)


def test_a_repeated_end_retains_its_files(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        assert await store.finish(request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"x")], token="mine")
        assert (
            await store.finish(request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"x")], token="mine") == []
        )
        assert [chunk async for chunk in store.result_chunks(request_id, 0, 1)] == [b"x"]
        assert await store.finish(request_id, State.REQUEST_STATE_FAILED, token="other") is None

    run_on_empty_store(each_store_url, scenario)


def test_an_idempotency_key_replays_one_request_to_concurrent_callers(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        admissions = await asyncio.gather(*(store.admit(record(), idempotency_key="order-7") for _ in range(20)))
        assert len({admission.record.request_id for admission in admissions}) == 1
        assert sum(not admission.replayed for admission in admissions) == 1
        await store.finish(admissions[0].record.request_id, State.REQUEST_STATE_SUCCEEDED)
        again = await store.admit(record(), idempotency_key="order-7")
        assert again.replayed
        assert again.record.state == State.REQUEST_STATE_SUCCEEDED
        assert not (await store.admit(record(), idempotency_key="order-8")).replayed

    run_on_empty_store(each_store_url, scenario)


def test_a_watch_continues_after_an_event_and_wakes_up_at_once(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        seen: asyncio.Queue[generation_pb2.Event] = asyncio.Queue()

        async def watch(after: str) -> None:
            async for event in store.events(request_id, after):
                seen.put_nowait(event)

        first = asyncio.create_task(watch(""))
        assert (await seen.get()).state_change.state == State.REQUEST_STATE_QUEUED
        await store.append(request_id, [progress(1), progress(2)], number=0)
        one, two = await seen.get(), await seen.get()
        assert (one.progress.step, two.progress.step) == (1, 2)
        first.cancel()
        second = asyncio.create_task(watch(one.event_id))
        assert (await seen.get()).event_id == two.event_id
        await store.finish(
            request_id, State.REQUEST_STATE_FAILED, error=generation_pb2.Error(code="INTERNAL", message="x")
        )
        last = await seen.get()
        assert last.state_change.error.code == "INTERNAL"
        await second
        assert [event async for event in store.events(request_id, last.event_id)] == []

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize("after", ["x", "1-", "99999999999999999999999-1", "(1-1"])
def test_a_watch_after_an_invalid_event_id_is_refused(each_store_url: str, after: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        with pytest.raises(InvalidInput, match="after_event_id") as caught:
            await anext(aiter(store.events(request_id, after)))
        assert caught.value.field == "after_event_id"
        with pytest.raises(NotFound):
            await anext(aiter(store.events("nothing")))

    run_on_empty_store(each_store_url, scenario)


def test_admission_is_bounded_and_checks_deadlines(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        limits = AdmissionLimits(services=["text_encoding", "denoising"], max_open=2, queue_limit=1)
        first = await store.admit(record(), limits=limits)
        await store.admit(record(), limits=limits)
        with pytest.raises(ResourceExhausted, match="2 requests for emoji are open"):
            await store.admit(record(), limits=limits)
        await store.admit(record("other"), limits=limits)
        await store.finish(first.record.request_id, State.REQUEST_STATE_CANCELLED)
        await redis.zadd("fleet:queue:emoji/denoising", {"entry": 0})
        with pytest.raises(ResourceExhausted, match="1 requests wait for denoising"):
            await store.admit(record(), limits=limits)
        late = record("third")
        late.deadline.FromJsonString("2020-01-01T00:00:00Z")
        with pytest.raises(InvalidInput, match="is not in the future") as caught:
            await store.admit(late)
        assert caught.value.field == "deadline"
        soon = record("third")
        soon.deadline.FromMilliseconds(first.record.created_at.ToMilliseconds() + 3_600_000)
        left = (await store.admit(soon)).seconds_left
        assert left is not None
        assert 3_500 < left <= 3_600

    run_on_empty_store(each_store_url, scenario)


def test_pages_are_newest_first_and_filtered(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_ids = [
            (await store.admit(record("even" if i % 2 == 0 else "odd"))).record.request_id for i in range(450)
        ]
        for request_id in request_ids[:440]:
            await store.finish(request_id, State.REQUEST_STATE_CANCELLED)
        newest = request_ids[::-1]
        listed: list[str] = []
        token = ""
        while True:
            page, token = await store.page(page_size=100, page_token=token)
            listed += [each.request_id for each in page]
            if not token:
                break
        assert listed == newest
        open_odd, token = await store.page(state=State.REQUEST_STATE_QUEUED, model="odd")
        assert ([each.request_id for each in open_odd], token) == (
            [n for n in newest[:10] if request_ids.index(n) % 2],
            "",
        )
        assert len((await store.page())[0]) == 50
        exact, token = await store.page(page_size=450)
        assert (len(exact), token) == (450, "")
        for size, bad in [(1001, ""), (1, "-1"), (1, "x"), (1, "9" * 40)]:
            with pytest.raises(InvalidInput, match="page_"):
                await store.page(page_size=size, page_token=bad)

    run_on_empty_store(each_store_url, scenario)


def test_a_cancellation_reaches_the_owner_or_ends_a_request_without_an_owner(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        presence = Presence(redis, "me")
        cancelled_ids: asyncio.Queue[str] = asyncio.Queue()
        presence.on_cancel = cancelled_ids.put_nowait
        await presence.start()
        store = RequestStore(redis, owner="me")
        request_id = (await store.admit(record())).record.request_id
        other = RequestStore(redis)
        cancelled, ended_here = await other.request_cancel(request_id)
        assert (cancelled.state, ended_here) == (State.REQUEST_STATE_QUEUED, False)
        assert await cancelled_ids.get() == request_id
        await presence.stop()
        for token, expected in (("first", True), ("first", True), ("second", False), ("", False)):
            cancelled, ended_here = await other.request_cancel(request_id, token=token)
            assert (cancelled.state, ended_here) == (State.REQUEST_STATE_CANCELLED, expected)
            assert cancelled.steps_saved == 0
        with pytest.raises(NotFound):
            await other.request_cancel("nothing")

    run_on_empty_store(each_store_url, scenario)


def test_repeated_events_are_stored_once(each_store_url: str) -> None:
    """A writer repeats events after a lost reply, and a slow network may deliver the first attempt later."""

    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = (await store.admit(record())).record.request_id
        first, second = [warning("cut"), progress(1)], [progress(2)]
        stored = await store.append(request_id, first, number=0)
        assert await store.append(request_id, first, number=0) == stored
        assert len(await store.append(request_id, second, number=2) or ()) == 1
        assert await store.append(request_id, first, number=0) == []
        await store.finish(request_id, State.REQUEST_STATE_SUCCEEDED)
        events = [event async for event in store.events(request_id)]
        assert [event.progress.step for event in events if event.HasField("progress")] == [1, 2]
        assert [each.message for each in (await store.get(request_id)).warnings] == ["cut"]
        assert not await redis.hexists(f"fleet:request:{request_id}", "told")

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize("name", sorted(server_binaries()))
def test_accepted_requests_survive_a_killed_server(name: str) -> None:
    with running_server(name) as server:

        async def scenario() -> None:
            async with connect(server.url) as redis:
                store = RequestStore(redis)
                admitted = (await store.admit(record(prompt="kept"), idempotency_key="k")).record
                server.kill()
                with pytest.raises(Unavailable, match="unavailable"):
                    await store.admit(record())
                server.start()
                assert (await store.get(admitted.request_id)).parameters.prompt == "kept"
                assert (await store.admit(record(), idempotency_key="k")).replayed
                assert await store.finish(admitted.request_id, State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"x")])

        asyncio.run(scenario())


@pytest.mark.parametrize("url", ["http://x", "redis//x", ""])
def test_a_url_that_is_not_a_redis_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="not a Redis URL"):
        connect(url)
