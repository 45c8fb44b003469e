"""A running coordinator: its server, its housekeeping in the store, and its shutdown."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from functools import partial

from common.errors import FailedPrecondition, InternalError, InvalidInput, Unavailable
from common.logs import get_logger
from common.metrics import ARTIFACT_BYTES
from common.rpc.fleet_server import FleetServer
from common.rpc.framing import CallLimits
from common.state.connection import connect
from common.state.leases import Leases
from common.state.presence import Presence
from common.state.redis_client import Redis
from common.state.requests import RequestStore
from common.state.stage_loads import StageLoads
from common.state.store_health import StoreHealth
from common.state.store_server import StoreMemory
from common.state.worker_slots import WorkerSlots
from common.state.workers import WorkerRegistry
from common.telemetry import MetricsInterceptor
from externalscaler import externalscaler_pb2
from fleet.v1 import generation_pb2
from models.catalog import ServedModel
from services.coordinator.access import WorkerAccess, public_credentials, scaler_credentials
from services.coordinator.activity import RequestActivities
from services.coordinator.callers import admission
from services.coordinator.driver import Driver
from services.coordinator.handlers import ServiceHandler
from services.coordinator.request_life import ExecutionContext
from services.coordinator.scaler import ScalerService
from services.coordinator.service import GenerationService, OfferedModel
from services.coordinator.service_gauges import create_series, set_service_gauges
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.store_watch import SUBMIT_HEALTH, StoreWatch
from services.coordinator.worker_runner import ArtifactMemory, Connections, Workers

_DELIVERY_SECONDS = 1.0
"""Minimum time, in seconds, for callers to receive terminal events, even if the grace time is over."""


_log = get_logger(__name__)


class Coordinator:
    """Accepts requests at `address` from start() to stop().

    Health checks return SERVING while the store is available. SUBMIT_HEALTH also requires free memory in the store.
    """

    def __init__(self, models: Sequence[ServedModel], settings: CoordinatorSettings) -> None:
        self._models = {model.name: OfferedModel.of(model) for model in models}
        if len(self._models) != len(models):
            names = ", ".join(sorted(model.name for model in models))
            raise InvalidInput(f"two models have the same name ({names}); rename one with OTHER=DIR", field="model")
        for name, model in self._models.items():
            create_series(name, [spec.service for spec in model.services])
        self._settings = settings
        self._redis: Redis = connect(settings.redis)
        heartbeat, ttl = settings.heartbeat_seconds, settings.heartbeat_ttl_seconds
        owner = f"coordinator-{secrets.token_hex(6)}"
        self._presence = Presence(self._redis, owner, heartbeat_seconds=heartbeat, ttl_seconds=ttl)
        self._registry = WorkerRegistry(self._redis, heartbeat_seconds=heartbeat, ttl_seconds=ttl)
        self._slots = WorkerSlots(self._redis, self._presence)
        self._connections = Connections(CallLimits(total_bytes=settings.max_artifact_bytes), WorkerAccess.of(settings))
        self.artifact_memory = ArtifactMemory(settings.max_artifact_bytes)
        ARTIFACT_BYTES.set_function(partial(_used_bytes, self.artifact_memory))
        workers = Workers(
            self._slots,
            self._connections,
            self.artifact_memory,
            settings.worker_wait_seconds,
        )
        memory = StoreMemory(self._redis, settings.max_store_memory)
        store = RequestStore(
            self._redis, owner=owner, retention=settings.retention, replicas=settings.store_replicas, memory=memory
        )
        context = ExecutionContext(
            store,
            Leases(self._redis, owner),
            workers,
            max_raw_result_bytes=settings.max_raw_result_bytes,
            max_result_bytes=settings.max_result_bytes,
            worker_ttl_seconds=ttl,
            step_seconds=settings.step_seconds,
            log_prompts=settings.log_prompts,
        )
        self._driver = Driver(context)
        self._presence.on_cancel = self._driver.cancel
        self._loads = StageLoads(self._redis, settings.assumed_seconds)
        self._service = GenerationService(
            self._models,
            store,
            self._registry,
            self._loads,
            self._driver,
            settings,
            health=StoreHealth(self._redis, memory, required_replicas=settings.store_replicas),
            activities=RequestActivities(self._redis, self._loads),
        )
        self._server = FleetServer(
            settings.listen,
            interceptors=[MetricsInterceptor()],
            limits=settings.server_limits,
            credentials=public_credentials(settings),
            admit=admission(settings),
            health_listen=settings.health_listen,
        )
        self._scaler = self._scaler_server() if settings.scaler_listen else None
        self._watch = StoreWatch(self._redis, memory, self._server)
        self._store_checked = False
        self._present = False
        self._await_heartbeats_until = 0.0
        self._last_housekeeping = -math.inf
        self._housekeeping: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The listen address of the public API."""
        return self._server.address

    @property
    def scaler_address(self) -> str:
        """The listen address of the external scaler; empty if `scaler_listen` is not set."""
        return self._scaler.address if self._scaler else ""

    @property
    def calls_in_flight(self) -> int:
        """Number of RPCs in progress."""
        return self._server.gate.in_flight

    async def start(self) -> None:
        """Listen, and become ready once the store is available.

        Raises FailedPrecondition for an unsuitable store, or if the fleet serves a model from another checkpoint.
        """
        descriptor = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
        handler = ServiceHandler(descriptor, self._service.functions)
        self._server.add(handler.methods, handler.service_name)
        await self._server.start()
        if self._scaler is not None:
            await self._scaler.start()
            await self._scaler.set_ready(True)
        try:
            await self._run_housekeeping()
        except Unavailable as error:
            _log.warning("not ready", error=error)
        self._housekeeping = asyncio.create_task(self._repeat_housekeeping())

    async def stop(self, grace: float) -> None:
        """Refuse new requests, wait at most `grace` seconds for running requests, and withdraw from the store."""
        began = asyncio.get_running_loop().time()
        self._server.gate.close()
        await self._set_unready()
        await self._driver.drain(grace)
        self._service.close()
        if self._scaler is not None:
            await self._scaler.drain(0)
        left = grace - (asyncio.get_running_loop().time() - began)
        await self._server.drain(max(left, _DELIVERY_SECONDS))
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.gather(self._housekeeping, return_exceptions=True)
        await self._slots.close()
        await self._connections.close()
        await self._presence.stop()
        await self._redis.aclose()

    def _scaler_server(self) -> FleetServer:
        """The server of KEDA's external scaler. Requires no API key; requires mutual TLS if workers use it."""
        stages = {name: tuple(spec.service for spec in model.services) for name, model in self._models.items()}
        descriptor = externalscaler_pb2.DESCRIPTOR.services_by_name["ExternalScaler"]
        handler = ServiceHandler(descriptor, ScalerService(stages, self._loads).functions)
        server = FleetServer(self._settings.scaler_listen, credentials=scaler_credentials(self._settings))
        server.add(handler.methods, handler.service_name)
        return server

    async def _repeat_housekeeping(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            try:
                await self._run_housekeeping()
            except (Unavailable, FailedPrecondition) as error:
                _log.error("not ready", error=error)
                await self._set_unready()
            except InternalError:
                _log.exception("not ready")
                await self._set_unready()

    async def _set_unready(self) -> None:
        await self._server.set_ready(False)
        await self._server.set_method_ready(SUBMIT_HEALTH, False)

    async def _run_housekeeping(self) -> None:
        """Announce the coordinator and its models, take over requests, then set the server ready."""
        must_await_heartbeats = self._must_await_heartbeats()
        if not self._store_checked:
            await self._settings.check_store(self._redis)
            self._store_checked = True
        if not self._present:
            await self._presence.start()
            self._present = True
            _log.info("coordinator announced in the request store", owner=self._presence.owner)
        for name, model in self._models.items():
            await self._registry.declare(name, model.served.checkpoint.fingerprint)
            for spec in model.services:
                set_service_gauges(
                    name,
                    spec.service,
                    await self._registry.load(name, spec.service, model.wirings[spec.service]),
                    await self._loads.read(name, spec.service),
                )
                await self._slots.give_back_unknown(name, spec.service)
            await self._driver.take_over(name, self._service.restore, beyond_own=not must_await_heartbeats)
        await self._service.cancellations.settle()
        self._last_housekeeping = asyncio.get_running_loop().time()
        await self._server.set_ready(True)
        await self._watch.poll()

    def _must_await_heartbeats(self) -> bool:
        """Whether live coordinators may appear lost. After a store outage, each has one TTL to send a heartbeat."""
        now, settings = asyncio.get_running_loop().time(), self._settings
        if now - self._last_housekeeping > settings.heartbeat_ttl_seconds - settings.heartbeat_seconds:
            self._await_heartbeats_until = now + settings.heartbeat_ttl_seconds
        return now < self._await_heartbeats_until


def _used_bytes(memory: ArtifactMemory) -> float:
    return memory.used_bytes


async def start_coordinator(models: Sequence[ServedModel], settings: CoordinatorSettings) -> Coordinator:
    """Start a coordinator. Raises FleetError when its settings or models cannot be served."""
    coordinator = Coordinator(models, settings)
    try:
        await coordinator.start()
    except BaseException:
        await coordinator.stop(0)
        raise
    return coordinator
