"""Runs a service of a model on whichever worker is free, and on another one when it goes away."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import grpc

from common.errors import Cancelled, ResourceExhausted, Unavailable
from common.pipeline import ServiceSpec
from common.rpc.client import RemoteRunner, WorkerLost
from common.rpc.framing import Limits, Packet
from common.stage import Call, Contract
from common.state.slots import Rank, Slot, Slots
from common.state.workers import WorkerRegistry
from services.coordinator.access import WorkerAccess
from services.coordinator.resume import RESUME_SLOT, Recovery, origin_of

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_CLOSING_SECONDS = 3_600.0  # for the calls that a worker which shuts down still finishes

_log = logging.getLogger(__name__)


class Connections:
    """Channels to workers, opened once and kept; a worker that does not answer is connected to anew, and every one
    when the coordinator has another certificate to show.
    """

    def __init__(self, limits: Limits, access: WorkerAccess | None = None) -> None:
        self._limits = limits
        self._access = access or WorkerAccess()
        self._version = self._access.version
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._runners: dict[tuple[str, str, str], RemoteRunner] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def runner(self, model: str, spec: ServiceSpec, address: str) -> RemoteRunner:
        """What calls a service of a model at an address."""
        if (version := self._access.version) != self._version:
            self._version = version
            for opened in list(self._channels):
                self.drop(opened)
        key = (model, spec.service, address)
        if key not in self._runners:
            if address not in self._channels:
                self._channels[address] = self._access.open(address)
            self._runners[key] = RemoteRunner(self._channels[address], spec.service, spec.contract, limits=self._limits)
        return self._runners[key]

    def drop(self, address: str) -> None:
        """Connect anew to an address next time; calls that are under way there go on."""
        self._runners = {key: runner for key, runner in self._runners.items() if key[2] != address}
        channel = self._channels.pop(address, None)
        if channel is not None:
            closing = asyncio.create_task(channel.close(_CLOSING_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels."""
        for closing in self._closing:
            closing.cancel()
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._runners.clear()


class ArtifactMemory:
    """Bounds the bytes of all packets that requests hold on to here."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.used_bytes = 0

    def hold(self, packets: Iterable[Packet]) -> None:
        """Count packets for as long as they live. Raises ResourceExhausted beyond the bound."""
        for packet in packets:
            size = packet.byte_size
            self.used_bytes += size
            weakref.finalize(packet, self._forget, size)
        if self.used_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"artifacts of running requests take {self.used_bytes} bytes; at most {self._max_bytes} are kept"
            )

    def _forget(self, size: int) -> None:
        self.used_bytes -= size


@dataclass(frozen=True)
class Workers:
    """How this coordinator reaches workers."""

    slots: Slots
    registry: WorkerRegistry
    connections: Connections
    memory: ArtifactMemory
    attempts: int = 3
    patience_seconds: float | None = None


class WorkerRunner:
    """One service of a model for one request: a Runner whose values are packets.

    `on_begin` is called each time that a worker begins on it. A worker that goes away is tried no more until it is
    heard of again, and a full one later. Raises Unavailable when the attempts are used up, and InternalError for a
    request that too many workers have died of.
    """

    def __init__(
        self,
        workers: Workers,
        model: str,
        spec: ServiceSpec,
        rank: Rank,
        recovery: Recovery,
        on_begin: Callable[[], None],
    ) -> None:
        self._workers = workers
        self._model = model
        self._spec = spec
        self._rank = rank
        self._recovery = recovery
        self._on_begin = on_begin

    @property
    def contract(self) -> Contract:
        """What the service's stages read and write together."""
        return self._spec.contract

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        """Wait for a worker, run there, and give its slot back."""
        lost = 0
        pause = _FIRST_PAUSE_SECONDS
        while True:
            slot = await self._claim(call)
            address = slot.worker.address
            began, used = time.monotonic(), 0.0
            try:
                self._on_begin()
                outputs = await self._run(slot, values, call)
                used = time.monotonic() - began
                self._workers.memory.hold(outputs.values())
                return outputs
            except (Unavailable, Cancelled) as error:
                lost += 1
                if isinstance(error, WorkerLost):
                    await self._recovery.worker_died(slot.worker.worker_id, self._spec.service, error)
                _log.warning("request %s lost %s at %s: %s", call.request_id, self._spec.service, address, error)
                if lost >= self._workers.attempts:
                    raise Unavailable(
                        f"{self._spec.service} was lost on {lost} workers, at last with: {error.message}"
                    ) from error
                await self._give_up(slot)
            except ResourceExhausted as error:
                if error.field:  # about a value, and not the worker
                    raise
                _log.info("request %s finds %s full: %s", call.request_id, address, error)
            finally:
                self._workers.slots.release(slot, used)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _run(self, slot: Slot, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        """Run on one worker, from where another one got to if that gives the same bytes."""
        runner = self._workers.connections.runner(self._model, self._spec, slot.worker.address)
        numerics = slot.worker.numerics_fingerprint
        if RESUME_SLOT not in self._spec.contract.inputs or not numerics:
            return await runner(values, call)
        origin = origin_of(numerics, values)
        checkpoint = await self._recovery.point.find(origin)
        if checkpoint is not None:
            _log.info("request %s goes on with %s where it was", call.request_id, self._spec.service)
            values = {**values, RESUME_SLOT: checkpoint}
        return await runner.telling(partial(self._recovery.point.remember, origin))(values, call)

    async def _claim(self, call: Call) -> Slot:
        """A slot; waits for as long as it takes, also for a store that is away."""
        return await self._workers.slots.claim(
            self._model,
            self._spec.service,
            call.request_id,
            self._rank,
            patience_seconds=self._workers.patience_seconds,
        )

    async def _give_up(self, slot: Slot) -> None:
        """Send no more requests to a worker that went away, until its next heartbeat."""
        self._workers.connections.drop(slot.worker.address)
        try:
            await self._workers.registry.suspect(slot.worker.worker_id)
        except Unavailable as error:
            _log.warning("cannot report worker %s: %s", slot.worker.worker_id, error)
