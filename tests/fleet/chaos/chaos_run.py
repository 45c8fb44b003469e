"""What runs of a fleet under load share: checkpoints and references, warm-up, clients, and the checks at the end."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import torch
from chaos_checks import Baseline, Stored, check_files, check_requests, lines_about, read_store, settled
from chaos_clients import Channels, Client, Pulse, Stub, Wrong, download
from chaos_plan import CALLERS, CAUSAL, FLUX, WAN, Order, Picture, Plan
from chaos_processes import Fleet, credentials
from redis.asyncio import Redis

from fleet.v1 import generation_pb2 as pb
from local_fleet import open_fleet
from redis_servers import until
from tiny_flux import build_tiny_flux
from tiny_wan import build_tiny_wan, build_tiny_wan_causal

SILENT_SECONDS = 60.0
"""Seconds after which a run without any event is given up."""

References = Mapping[Picture, Sequence[bytes]]


def build_models(directory: Path, plan: Plan) -> dict[str, Path]:
    """The checkpoints that are served, by name."""
    build = {FLUX: build_tiny_flux, WAN: build_tiny_wan, CAUSAL: build_tiny_wan_causal}
    return {name: build[name](directory / name) for name in dict.fromkeys(each.model for each in plan.pictures)}


def make_references(models: Mapping[str, Path], pictures: Sequence[Picture]) -> References:
    """What each picture's files are, computed in this process by the same stages, with as many threads as there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    references: dict[Picture, Sequence[bytes]] = {}
    for name, path in models.items():
        local = open_fleet(f"{name}={path}")
        for picture in (each for each in pictures if each.model == name):
            references[picture] = [item.data.numpy().tobytes() for item in local.media(**picture.given).items]
        local.close()
    torch.set_num_threads(threads)
    return references


class FleetRun:
    """A fleet and its clients. `findings` are sentences that name what is wrong; `stored` is what the store had."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        self.plan = plan
        self.fleet = fleet
        self.redis = redis
        self.channels = Channels()
        self.pulse = Pulse()
        self.clients: list[Client] = []
        self.findings: list[str] = []
        self.stored: dict[str, Stored] = {}
        self._references = references
        self._warmed: list[str] = []

    def new_client(self, order: Order) -> Client:
        """A client that sees an order through."""
        return Client(order, self.fleet, self.channels, self.pulse, self.plan.seed)

    async def warm_up(self) -> None:
        """Wait for all workers, and let every coordinator and every stage serve once."""
        coordinators = self.fleet.of(coordinators=True)
        await asyncio.gather(*(self._warm(self.channels.stub(each.target)) for each in coordinators))

    async def see_everybody(self, stub: Stub) -> None:
        """Wait until a coordinator knows all workers that should be there."""
        key = credentials(CALLERS[0])

        async def sees_everybody() -> bool:
            reply = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, metadata=key)
            wanted = self.fleet.workers
            return all(each.workers == wanted[each.service] for model in reply.models for each in model.services)

        await until(sees_everybody)

    async def _warm(self, stub: Stub) -> None:
        await self.see_everybody(stub)
        key = credentials(CALLERS[0])
        for picture in {each.model: each for each in self.plan.pictures}.values():
            request = pb.SubmitRequest(model=picture.model, parameters=picture.parameters)
            accepted = await stub.Submit(request, metadata=key)
            self._warmed.append(accepted.request.request_id)
            watch = stub.Watch(pb.WatchRequest(request_id=self._warmed[-1]), metadata=key)
            last = [reply.event async for reply in watch][-1]
            assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last

    async def serve(self, clients: Iterator[Client]) -> None:
        """So many clients at a time, each with its orders one after the other."""

        async def work() -> None:
            for client in clients:
                try:
                    await client.run()
                except Wrong as wrong:
                    self.findings.append(str(wrong))
                self.pulse.order()

        workers = [asyncio.create_task(work()) for _ in range(self.plan.clients)]
        while not all(worker.done() for worker in workers):
            await asyncio.wait(workers, timeout=1)
            if time.monotonic() - self.pulse.beaten > SILENT_SECONDS:
                self.findings.append(f"nothing has happened for {SILENT_SECONDS:g} s: {self._unfinished()}")
                break
        for worker in workers:
            worker.cancel()
        for failure in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    def _unfinished(self) -> str:
        outcomes = [client.outcome for client in self.clients]
        open_ones = [each for each in outcomes if each.heard and each.heard[-1].state_change.state < 3]
        return ", ".join(f"order {each.order.number} is request {each.request_id}" for each in open_ones)

    async def check(self, baseline: Baseline | None = None) -> None:
        """Every request has ended as its order allows, every result has its bytes, and nothing is left over."""
        outcomes = [client.outcome for client in self.clients]
        await self.channels.close()
        gc.collect()  # calls that broke off live on in the tracebacks of their errors, and keep their connections
        self.findings += await settled(self.fleet, self.redis, baseline)
        self.stored = await read_store(self.redis)
        self.findings += check_requests(self.stored, outcomes, self._warmed)
        heard = {outcome.request_id: outcome.files for outcome in outcomes if outcome.files}
        stub = self.channels.stub(self.fleet.of(coordinators=True)[0].target)
        for name, each in self.stored.items():
            if each.record.state == pb.REQUEST_STATE_SUCCEEDED:
                try:
                    files = await download(stub, each.record.caller, name)
                except grpc.aio.AioRpcError as error:
                    self.findings.append(f"the result of request {name} cannot be had: {error.details()}")
                    continue
                self.findings += check_files(name, each.record, files, self._references)
                if heard.get(name, files) != files:
                    self.findings.append(f"the client of request {name} got other bytes than are stored")

    def details(self) -> list[str]:
        """The story of the run, and events and log lines of the requests that findings name."""
        text = "\n".join(self.findings)
        names = [name for name in self.stored if name in text]
        streams = [f"{name}: {event}".replace("\n", " ") for name in names for event in self.stored[name].events]
        return ["what happened:", *self.fleet.story, "events:", *streams, "logs:", *lines_about(self.fleet, names)]
