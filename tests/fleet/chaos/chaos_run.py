"""Runs of a fleet under load: checkpoints and references, warm-up, clients, and the checks at the end."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import grpc
import torch
from chaos_checks import Baseline, Stored, check_files, check_requests, lines_about, read_store, settled
from chaos_clients import Channels, Client, RunProgress, Stub, UnexpectedReply, download
from chaos_plan import CALLERS, CAUSAL, FLUX, WAN, MediaRequest, Order, Plan
from chaos_processes import Fleet, credentials
from redis.asyncio import Redis

from async_tests import wait_until
from fleet.v1 import generation_pb2 as pb
from local_fleet import open_fleet
from tiny_flux import build_tiny_flux
from tiny_wan import build_tiny_wan, build_tiny_wan_causal

SILENT_SECONDS = 60.0
"""Longest time in seconds without an event or an ended order."""

References = Mapping[MediaRequest, Sequence[bytes]]


def build_models(directory: Path, plan: Plan) -> dict[str, Path]:
    """Build the checkpoints, by model name."""
    build = {FLUX: build_tiny_flux, WAN: build_tiny_wan, CAUSAL: build_tiny_wan_causal}
    return {name: build[name](directory / name) for name in dict.fromkeys(each.model for each in plan.media_requests)}


def make_references(models: Mapping[str, Path], media_requests: Sequence[MediaRequest]) -> References:
    """Generate the files of each request in this process, with the same stages and number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    references: dict[MediaRequest, Sequence[bytes]] = {}
    for name, path in models.items():
        local = open_fleet(f"{name}={path}")
        for media_request in (each for each in media_requests if each.model == name):
            references[media_request] = [
                item.data.numpy().tobytes() for item in local.media(**media_request.given).items
            ]
        local.close()
    torch.set_num_threads(threads)
    return references


class FleetRun:
    """A fleet and its clients. `findings` are failed checks; `stored` is the content of the store."""

    permitted_fields: ClassVar[tuple[str, ...]] = ()
    """Prefixes of further fields that the records of ended requests may have."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        self.plan = plan
        self.fleet = fleet
        self.redis = redis
        self.channels = Channels()
        self.run_progress = RunProgress()
        self.clients: list[Client] = []
        self.findings: list[str] = []
        self.stored: dict[str, Stored] = {}
        self._references = references
        self._warmed: list[str] = []

    def new_client(self, order: Order) -> Client:
        """A client that runs an order to its end."""
        return Client(order, self.fleet, self.channels, self.run_progress, self.plan.seed)

    async def warm_up(self) -> None:
        """Wait for all workers, and run one request of each model on every coordinator."""
        coordinators = self.fleet.of(coordinators=True)
        await asyncio.gather(*(self._warm(self.channels.stub(each.target)) for each in coordinators))

    async def wait_for_all_workers(self, stub: Stub) -> None:
        """Wait until a coordinator lists all workers of the fleet."""
        key = credentials(CALLERS[0])

        async def lists_all_workers() -> bool:
            reply = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, metadata=key)
            wanted = self.fleet.workers
            return all(each.workers == wanted[each.service] for model in reply.models for each in model.services)

        await wait_until(lists_all_workers)

    async def _warm(self, stub: Stub) -> None:
        await self.wait_for_all_workers(stub)
        key = credentials(CALLERS[0])
        for media_request in {each.model: each for each in self.plan.media_requests}.values():
            request = pb.SubmitRequest(model=media_request.model, parameters=media_request.parameters)
            accepted = await stub.Submit(request, metadata=key)
            self._warmed.append(accepted.request.request_id)
            watch = stub.Watch(pb.WatchRequest(request_id=self._warmed[-1]), metadata=key)
            last = [reply.event async for reply in watch][-1]
            assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last

    async def serve(self, clients: Iterator[Client]) -> None:
        """Run all clients, `plan.clients` of them concurrently."""

        async def work() -> None:
            for client in clients:
                try:
                    await client.run()
                except UnexpectedReply as error:
                    self.findings.append(str(error))
                self.run_progress.order()

        workers = [asyncio.create_task(work()) for _ in range(self.plan.clients)]
        while not all(worker.done() for worker in workers):
            await asyncio.wait(workers, timeout=1)
            if time.monotonic() - self.run_progress.last_moved > SILENT_SECONDS:
                self.findings.append(f"no event for {SILENT_SECONDS:g} s: {self._unfinished()}")
                break
        for worker in workers:
            worker.cancel()
        for failure in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    def _unfinished(self) -> str:
        outcomes = [client.outcome for client in self.clients]
        open_ones = [each for each in outcomes if each.received and each.received[-1].state_change.state < 3]
        return ", ".join(f"order {each.order.number} is request {each.request_id}" for each in open_ones)

    async def check(self, baseline: Baseline | None = None) -> None:
        """Check the end and bytes of all requests, and that the fleet is clean."""
        outcomes = [client.outcome for client in self.clients]
        await self.channels.close()
        gc.collect()  # closes the connections of failed calls, which tracebacks still reference
        self.findings += await settled(self.fleet, self.redis, baseline, self.permitted_fields)
        self.stored = await read_store(self.redis)
        self.findings += check_requests(self.stored, outcomes, self._warmed)
        received = {outcome.request_id: outcome.files for outcome in outcomes if outcome.files}
        stub = self.channels.stub(self.fleet.of(coordinators=True)[0].target)
        for name, each in self.stored.items():
            if each.record.state == pb.REQUEST_STATE_SUCCEEDED:
                try:
                    files = await download(stub, each.record.caller, name)
                except grpc.aio.AioRpcError as error:
                    self.findings.append(f"the result of request {name} cannot be downloaded: {error.details()}")
                    continue
                self.findings += check_files(name, each.record, files, self._references)
                if received.get(name, files) != files:
                    self.findings.append(f"the client of request {name} received other bytes than the stored ones")

    def details(self) -> list[str]:
        """The history of the run, and events and log lines of the requests that findings name."""
        text = "\n".join(self.findings)
        names = [name for name in self.stored if name in text]
        streams = [f"{name}: {event}".replace("\n", " ") for name in names for event in self.stored[name].events]
        return ["history:", *self.fleet.history, "events:", *streams, "logs:", *lines_about(self.fleet, names)]
