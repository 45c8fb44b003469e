"""Workers and coordinators of this process that a test starts individually; gRPC and store are real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from async_tests import HANG_SECONDS
from common.rpc.client import open_channel
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from models.catalog import ServedModel
from redis_servers import running_server
from services.cli.serve import settings_class
from services.coordinator.coordinator import Coordinator, start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import start_worker


class Parts:
    """Workers and coordinators of one model, which a test starts individually."""

    def __init__(self, url: str, model: ServedModel, directory: Path, stack: AsyncExitStack) -> None:
        self.url = url
        self.model = model
        self.directory = directory
        self._stack = stack
        self._count = 0

    def _listen(self) -> str:
        self._count += 1
        return f"unix:{self.directory}/{self._count}.sock"

    async def add_worker(self, service: str) -> str:
        """Start a worker; returns its address."""
        settings = settings_class(service)(
            model=self.model.name, redis=self.url, listen=self._listen(), device="cpu", threads=1
        )
        worker = await start_worker(service, self.model, settings)
        self._stack.push_async_callback(worker.stop, 5)
        return worker.address

    async def add_coordinator(self, **more: Any) -> tuple[Coordinator, Stub]:
        """Start a coordinator with extra settings; returns it with a stub. It stops when the test ends."""
        settings = CoordinatorSettings(
            model=(self.model.name,),
            redis=self.url,
            listen=self._listen(),
            heartbeat_seconds=0.1,
            heartbeat_ttl_seconds=0.5,
            **more,
        )
        coordinator = await start_coordinator([self.model], settings)
        self._stack.push_async_callback(coordinator.stop, 0)
        channel = await self._stack.enter_async_context(open_channel(coordinator.address))
        return coordinator, generation_pb2_grpc.GenerationServiceStub(channel)


def run_parts(model: ServedModel, directory: Path, test: Callable[[Parts], Awaitable[None]]) -> None:
    """Run a test on a new store."""

    async def main(url: str) -> None:
        async with asyncio.timeout(HANG_SECONDS), AsyncExitStack() as stack:
            await test(Parts(url, model, directory, stack))

    with running_server("valkey") as server:
        asyncio.run(main(server.url))


async def state_of(stub: Stub, request_id: str) -> pb.RequestState.ValueType:
    """The state of a request."""
    return (await stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request.state


async def ended(stub: Stub, request_id: str) -> pb.RequestRecord:
    """Wait for the end of a request; returns its record."""
    async for _ in stub.Watch(pb.WatchRequest(request_id=request_id)):
        pass
    return (await stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request


async def serve_text_before_image(parts: Parts, text: pb.SubmitRequest, image: pb.SubmitRequest) -> None:
    """Check that an image request waits for an image encoder, and that a text request does not need it."""
    variant = parts.model.variant("text")
    assert variant is not None, "the model has the variant"
    for spec in variant.services:
        await parts.add_worker(spec.service)
    _, stub = await parts.add_coordinator()
    waiting, running = [(await stub.Submit(each)).request.request_id for each in (image, text)]
    end = await ended(stub, running)
    assert (end.state, end.variant) == (pb.REQUEST_STATE_SUCCEEDED, "text"), end.error.message
    assert await state_of(stub, waiting) < pb.REQUEST_STATE_SUCCEEDED
    await parts.add_worker("image_encoding")
    end = await ended(stub, waiting)
    assert (end.state, end.variant) == (pb.REQUEST_STATE_SUCCEEDED, "image"), end.error.message
