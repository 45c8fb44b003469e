"""A fleet in this process with real gRPC and a real store, for comparison with directly called stages."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from safetensors.torch import load
from torch import Tensor

from async_tests import HANG_SECONDS
from common.artifacts import ParamValue
from common.state.embedded import EmbeddedStore, private_directory
from fleet.v1 import artifacts_pb2, generation_pb2
from models.catalog import ServedModel
from services.cli.client import FleetClient, connect, raise_unless_succeeded
from services.cli.local import start_fleet
from services.cli.parameters import parameters_message

T = TypeVar("T")


@dataclass
class Answer:
    """Record, files and warnings that a client received for a request."""

    record: generation_pb2.RequestRecord
    files: list[bytes]
    warnings: list[artifacts_pb2.Warning]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the safetensors file, such as "latents" and "pixels"."""
        (data,) = self.files
        tensors: dict[str, Tensor] = load(data)
        return tensors


class ServedFleet:
    """Sends requests to a running fleet from the test's thread."""

    def __init__(self, endpoint: str, loop: asyncio.AbstractEventLoop) -> None:
        self.endpoint = endpoint
        self._loop = loop

    def generate(
        self,
        model: str,
        suffix: str = ".safetensors",
        images: Mapping[str, bytes] = MappingProxyType({}),
        **given: ParamValue,
    ) -> Answer:
        """Run one request to its end. Raises the error of the RPC, or RequestFailed."""
        parameters = parameters_message(given, list(images.items()), suffix)
        request = generation_pb2.SubmitRequest(model=model, parameters=parameters)
        return self._run(_generate(self.endpoint, request))

    def models(self) -> list[generation_pb2.Model]:
        """The models that the fleet serves."""
        return self._run(_models(self.endpoint))

    def _run(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=HANG_SECONDS)


async def _models(endpoint: str) -> list[generation_pb2.Model]:
    async with connect(endpoint) as client:
        return list(await client.models())


async def _generate(endpoint: str, request: generation_pb2.SubmitRequest) -> Answer:
    answer = Answer(generation_pb2.RequestRecord(), [], [])
    async with connect(endpoint) as client:
        await collect(client, request, answer)
    return answer


async def collect(client: FleetClient, request: generation_pb2.SubmitRequest, answer: Answer) -> None:
    """Run a request to its end; stores its record, files and warnings in `answer`.

    Raises RequestFailed if the request does not succeed, and the errors of FleetClient.generate().
    """
    async for response in client.generate(request):
        match response.WhichOneof("payload"):
            case "accepted":
                answer.record = response.accepted
            case "event" if response.event.HasField("warning"):
                answer.warnings.append(response.event.warning)
            case "event":
                raise_unless_succeeded(answer.record.request_id, response.event.state_change)
            case "file":
                answer.files.append(b"")
            case "data":
                answer.files[-1] += response.data


@contextmanager
def served_fleet(models: Sequence[ServedModel]) -> Iterator[ServedFleet]:
    """Start every service of the models and a store; stops them when the context exits."""
    directory = private_directory()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fleet")
    thread.start()
    try:
        with EmbeddedStore(appendfsync="no") as store:
            starting = start_fleet(models, redis_url=store.url, dtype="float32", directory=directory)
            fleet = asyncio.run_coroutine_threadsafe(starting, loop).result(timeout=HANG_SECONDS)
            try:
                yield ServedFleet(fleet.endpoint, loop)
            finally:
                asyncio.run_coroutine_threadsafe(fleet.stop(), loop).result(timeout=HANG_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        shutil.rmtree(directory, ignore_errors=True)
