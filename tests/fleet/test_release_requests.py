"""Requests that the latest release stored, in each state.

The current code reads all of them, and runs the open requests to their end.
tests/golden/v0.1.0/requests has the Redis keys of a killed coordinator of the release.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from chaos_processes import credentials, write_keys
from redis.asyncio import Redis

from async_tests import HANG_SECONDS
from common.rpc.client import open_channel
from common.state.connection import command, connect
from common.state.leases import Leases
from common.state.workers import WorkerRegistry
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from record_requests import IDLE, KEYS, PRESS, STUDIO, VIDEO, build_models, requests_by_state
from redis_servers import RedisServer, running_server
from release import REQUESTS
from services.cli.local import start_fleet
from services.coordinator.coordinator import start_coordinator
from services.coordinator.resume import NewestStepCheckpoint, step_of
from services.coordinator.settings import CoordinatorSettings
from stored_requests import load_store, read_dump

ENDED = {
    "succeeded": pb.REQUEST_STATE_SUCCEEDED,
    "failed": pb.REQUEST_STATE_FAILED,
    "cancelled": pb.REQUEST_STATE_CANCELLED,
    "expired": pb.REQUEST_STATE_EXPIRED,
}
OPEN = {
    "queued": pb.REQUEST_STATE_QUEUED,
    "running": pb.REQUEST_STATE_RUNNING,
    "streaming": pb.REQUEST_STATE_RUNNING,
}
VARIANTS = {"succeeded": "image", "queued": "image", "failed": "", "streaming": ""}
"""Variants of the requests whose variant is not `text`."""
RESUME = "resume_from"
LARGEST_DIFFERENCE = 2.0
"""Largest mean difference of pixel values, from 0 to 255, between hosts with different rounding."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    paths = build_models(tmp_path_factory.mktemp("models"))
    return [open_model(f"{name}={path}", load_registry()) for name, path in paths.items()]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_server("valkey") as server:
        yield server


@dataclass
class Restored:
    """The API on a store with the release's requests. `ids` and `keys` have their ids and store keys by name."""

    stub: Stub
    redis: Redis
    ids: Mapping[str, str]
    keys: Mapping[str, Mapping[str, Any]]

    async def record(self, name: str) -> pb.RequestRecord:
        """The record of a request, read by its caller."""
        call = pb.GetRequestRequest(request_id=self.ids[name])
        return (await self.stub.GetRequest(call, metadata=credentials(requests_by_state()[name].caller))).request

    async def events(self, name: str, after: str = "") -> list[pb.Event]:
        """The events of a request after event id `after`."""
        call = pb.WatchRequest(request_id=self.ids[name], after_event_id=after)
        replies = self.stub.Watch(call, metadata=credentials(requests_by_state()[name].caller))
        return [reply.event async for reply in replies]

    async def download(self, request_id: str, caller: str) -> bytes:
        """The only file of a result."""
        call = pb.DownloadResultRequest(request_id=request_id)
        replies = self.stub.DownloadResult(call, metadata=credentials(caller))
        return b"".join([reply.data async for reply in replies])

    async def items(self, name: str) -> bytes:
        """The concatenated items that the release stored for a request."""
        keys = sorted(key for key in self.keys[name] if key.startswith("fleet:item:"))
        return b"".join([await command(self.redis, "GET", key) for key in keys])


@asynccontextmanager
async def restored(server: RedisServer, stub: Stub) -> AsyncIterator[Restored]:
    """Load the release's requests into an empty store."""
    async with connect(server.url) as redis:
        await redis.flushall()
        ids = await load_store(redis, REQUESTS)
        dump = read_dump(REQUESTS)
        yield Restored(stub, redis, ids, {name: dump[name]["keys"] for name in ids})


def run_on_coordinator(
    server: RedisServer, models: Sequence[ServedModel], test: Callable[[Restored], Awaitable[None]]
) -> None:
    """Run a test on a coordinator with the callers' keys, without workers."""

    async def scenario(stack: AsyncExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        keys = directory / "keys.toml"
        write_keys(keys, (STUDIO, PRESS))
        listen = f"unix:{directory}/coordinator.sock"
        channel = await stack.enter_async_context(open_channel(listen))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        store = await stack.enter_async_context(restored(server, stub))
        settings = CoordinatorSettings(listen=listen, redis=server.url, api_keys=keys, heartbeat_seconds=0.2)
        coordinator = await start_coordinator(models, settings)
        stack.push_async_callback(coordinator.stop, 0)
        await test(store)

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), AsyncExitStack() as stack:
            await scenario(stack)

    asyncio.run(main())


def _scalars(parameters: pb.GenerationParameters) -> dict[str, Any]:
    """Scalar parameters. A record has defaults for omitted parameters, and has no images."""
    fields = parameters.ListFields()
    return {field.name: value for field, value in fields if field.name not in ("images", "params")}


def test_stored_requests_are_listed_and_read(server: RedisServer, models: list[ServedModel]) -> None:
    async def scenario(store: Restored) -> None:
        listed: dict[str, pb.RequestRecord] = {}
        for caller in (STUDIO, PRESS):
            reply = await store.stub.ListRequests(pb.ListRequestsRequest(), metadata=credentials(caller))
            assert {each.caller for each in reply.requests} == {caller}
            listed |= {each.request_id: each for each in reply.requests}
        assert listed.keys() == set(store.ids.values())
        for name, requested in requests_by_state().items():
            for record in (await store.record(name), listed[store.ids[name]]):
                assert (record.caller, record.model) == (requested.caller, requested.model)
                assert _scalars(requested.parameters).items() <= _scalars(record.parameters).items()
                assert record.variant == VARIANTS.get(name, "text")
                assert record.state == {**ENDED, **OPEN}[name]
        assert "16000" in (await store.record("failed")).error.message
        reply = await store.stub.ListRequests(
            pb.ListRequestsRequest(state=pb.REQUEST_STATE_EXPIRED, model=IDLE), metadata=credentials(STUDIO)
        )
        assert [each.request_id for each in reply.requests] == [store.ids["expired"]]

    run_on_coordinator(server, models, scenario)


@pytest.mark.parametrize("name", ENDED)
def test_stored_events_and_files_are_returned(server: RedisServer, models: list[ServedModel], name: str) -> None:
    async def scenario(store: Restored) -> None:
        stored = store.keys[name][f"fleet:events:{store.ids[name]}"]["value"]
        events = await store.events(name)
        assert [event.event_id for event in events] == [event_id for event_id, _ in stored]
        assert events[-1].state_change.state == ENDED[name]
        assert await store.events(name, events[-2].event_id) == events[-1:]
        record = await store.record(name)
        assert list(record.warnings) == [event.warning for event in events if event.HasField("warning")]
        if name == "succeeded":
            assert (await store.download(record.request_id, record.caller)) == await store.items(name)
            assert [file.byte_size for file in record.files] == [len(await store.items(name))]

    run_on_coordinator(server, models, scenario)


def test_idempotency_key_replays_a_stored_request(server: RedisServer, models: list[ServedModel]) -> None:
    async def scenario(store: Restored) -> None:
        for name, key in KEYS.items():
            requested = requests_by_state()[name]
            again = pb.SubmitRequest(model=requested.model, parameters=requested.parameters, idempotency_key=key)
            reply = await store.stub.Submit(again, metadata=credentials(requested.caller))
            assert reply.request.request_id == store.ids[name]

    run_on_coordinator(server, models, scenario)


@pytest.mark.parametrize("name", OPEN)
def test_stored_open_request_is_cancelled(server: RedisServer, models: list[ServedModel], name: str) -> None:
    async def scenario(store: Restored) -> None:
        call = pb.CancelRequestRequest(request_id=store.ids[name])
        await store.stub.CancelRequest(call, metadata=credentials(requests_by_state()[name].caller))
        assert (await store.events(name))[-1].state_change.state == pb.REQUEST_STATE_CANCELLED
        assert (await store.record(name)).state == pb.REQUEST_STATE_CANCELLED
        assert not await store.redis.keys(f"fleet:checkpoint:{store.ids[name]}:*")

    run_on_coordinator(server, models, scenario)


def test_stored_timelines_are_read(server: RedisServer, models: list[ServedModel]) -> None:
    async def scenario(store: Restored) -> None:
        call = pb.GetRequestRequest(request_id=store.ids["succeeded"], with_timeline=True)
        reply = await store.stub.GetRequest(call, metadata=credentials(STUDIO))
        completed = [each for each in reply.timeline if each.kind == pb.TIMELINE_KIND_COMPLETED]
        assert {each.service for each in completed} == {spec.service for spec in models[0].services}

    run_on_coordinator(server, models, scenario)


def test_stored_step_checkpoint_is_resumed_only_with_equal_inputs_and_numerics(server: RedisServer) -> None:
    async def scenario() -> None:
        async with connect(server.url) as redis:
            await redis.flushall()
            request_id = (await load_store(redis, REQUESTS))["running"]
            key = await command(redis, "HGET", f"fleet:request:{request_id}", "point")
            origin = (await command(redis, "HGET", key, "0")).decode()

            def newest() -> NewestStepCheckpoint:
                return NewestStepCheckpoint(Leases(redis, "c-new"), request_id, 2, inherited=True)

            inputs, numerics = origin.split(".")
            assert await newest().find(f"{inputs}.{numerics[::-1]}", RESUME) is None
            assert await newest().find(f"{inputs[::-1]}.{numerics}", RESUME) is None
            found = await newest().find(origin, RESUME)
            assert found is not None
            assert step_of(found) == int(await command(redis, "HGET", f"fleet:request:{request_id}", "reached")) > 0

    asyncio.run(scenario())


def pixels(data: bytes) -> torch.Tensor:
    """The frames of an MP4: float32 (frames, height, width, 3), from 0 to 255."""
    with av.open(io.BytesIO(data), mode="r") as video:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    return torch.stack(frames).float()


async def _undisturbed(store: Restored, name: str) -> bytes:
    """The file of an equal request that is submitted now."""
    requested = requests_by_state()[name]
    reply = await store.stub.Submit(pb.SubmitRequest(model=requested.model, parameters=requested.parameters))
    call = pb.WatchRequest(request_id=reply.request.request_id)
    last = [response.event async for response in store.stub.Watch(call)][-1]
    assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last
    return await store.download(reply.request.request_id, "")


def _steps_of(events: Sequence[pb.Event]) -> list[int]:
    """Reported denoising steps."""
    return [event.progress.step for event in events if event.progress.service == "denoising"]


async def _has_equal_numerics(store: Restored, name: str) -> bool:
    """Whether the numerics of the stored step checkpoint equal those of the live workers."""
    workers = await WorkerRegistry(store.redis).live(VIDEO, "denoising")
    (key,) = (key for key in store.keys[name] if key.startswith("fleet:checkpoint:"))
    numerics = store.keys[name][key]["value"]["0"].partition(".")[2]
    return {hashlib.sha256(each.numerics_fingerprint.encode()).hexdigest() for each in workers} == {numerics}


def test_open_requests_are_taken_over_and_finish(server: RedisServer, models: list[ServedModel]) -> None:
    """Delivered items are retained. A request without items resumes only if its numerics are equal.

    With other numerics, its loop starts at step 0. After a delivered item, a loop resumes with any numerics.
    """

    async def scenario(stack: AsyncExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        channel = await stack.enter_async_context(open_channel(f"unix:{directory}/coordinator.sock"))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        store = await stack.enter_async_context(restored(server, stub))
        delivered = await store.items("streaming")
        before = {name: len(store.keys[name][f"fleet:events:{store.ids[name]}"]["value"]) for name in OPEN}
        stored_steps = int(await command(store.redis, "HGET", f"fleet:request:{store.ids['running']}", "reached"))
        fleet = await start_fleet(models, redis_url=server.url, dtype="float32", directory=directory)
        stack.push_async_callback(fleet.stop)
        files: dict[str, bytes] = {}
        for name in OPEN:
            events = await store.events(name)
            assert events[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED, events[-1]
            files[name] = await store.download(store.ids[name], "")
            again = _steps_of(events[before[name] :])
            assert again[0] == 0, "the loop did not report its start"
            if name == "running":
                is_resumed = await _has_equal_numerics(store, name)
                assert (again[1] > stored_steps > 0) == is_resumed, (again, stored_steps)
        for name in ("queued", "running"):
            assert files[name] == await _undisturbed(store, name)
        assert files["streaming"].startswith(delivered)
        assert 0 < len(delivered) < len(files["streaming"])
        ours, whole = pixels(files["streaming"]), pixels(await _undisturbed(store, "streaming"))
        assert ours.shape == whole.shape
        assert float((ours - whole).abs().mean()) <= LARGEST_DIFFERENCE

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), AsyncExitStack() as stack:
            await scenario(stack)

    asyncio.run(main())
