"""A running coordinator: the server, what it keeps alive in the store, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Sequence

from redis.asyncio import Redis

from common.errors import FailedPrecondition, InternalError, InvalidInput, Unavailable
from common.rpc.framing import Limits
from common.rpc.serving import FleetServer
from common.state.connection import connect
from common.state.leases import Leases
from common.state.presence import Presence
from common.state.requests import RequestStore
from common.state.slots import Slots
from common.state.store_server import StoreMemory
from common.state.workers import WorkerRegistry
from common.telemetry import QUEUE_LENGTH, MetricsInterceptor
from fleet.v1 import generation_pb2
from models.catalog import ServedModel
from services.coordinator.access import WorkerAccess, public_credentials
from services.coordinator.callers import admission
from services.coordinator.dispatch import ArtifactMemory, Connections, Workers
from services.coordinator.driver import Driver
from services.coordinator.handlers import ServiceHandler
from services.coordinator.request_life import ExecutionContext
from services.coordinator.service import GenerationService, OfferedModel
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.store_watch import SUBMIT_HEALTH, StoreWatch

_DELIVERY_SECONDS = 1.0  # for callers to hear of an end that came with the end of the grace time

_log = logging.getLogger(__name__)


class Coordinator:
    """Accepts requests at `address` from start() to stop(). Ready, as health checks see it, while the store answers.

    The health of SUBMIT_HEALTH also says whether the store has memory for new requests.
    """

    def __init__(self, models: Sequence[ServedModel], settings: CoordinatorSettings) -> None:
        self._models = {model.name: OfferedModel.of(model) for model in models}
        if len(self._models) != len(models):
            names = ", ".join(sorted(model.name for model in models))
            raise InvalidInput(f"two models have one name ({names}); write OTHER=DIR for one of them", field="model")
        self._settings = settings
        self._redis: Redis = connect(settings.redis)
        beat, ttl = settings.heartbeat_seconds, settings.heartbeat_ttl_seconds
        owner = f"coordinator-{secrets.token_hex(6)}"
        self._presence = Presence(self._redis, owner, beat_seconds=beat, ttl_seconds=ttl)
        self._registry = WorkerRegistry(self._redis, beat_seconds=beat, ttl_seconds=ttl)
        self._slots = Slots(self._redis, self._presence)
        self._connections = Connections(Limits(total_bytes=settings.max_artifact_bytes), WorkerAccess.of(settings))
        self.artifact_memory = ArtifactMemory(settings.max_artifact_bytes)
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
            worker_ttl_seconds=ttl,
            step_seconds=settings.step_seconds,
        )
        self._driver = Driver(context)
        self._presence.on_cancel = self._driver.cancel
        self._service = GenerationService(self._models, store, self._registry, self._driver, settings)
        self._server = FleetServer(
            settings.listen,
            interceptors=[MetricsInterceptor("coordinator")],
            limits=settings.server_limits,
            credentials=public_credentials(settings),
            admit=admission(settings),
            health_listen=settings.health_listen,
        )
        self._watch = StoreWatch(self._redis, memory, self._server)
        self._store_checked = False
        self._present = False
        self._patient_until = 0.0
        self._kept_house = -math.inf
        self._housekeeping: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    @property
    def calls_in_flight(self) -> int:
        """Calls being served."""
        return self._server.gate.in_flight

    async def start(self) -> None:
        """Listen, and become ready once the store answers.

        Raises FailedPrecondition when the store disagrees on a model, or is one that cannot hold requests.
        """
        descriptor = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
        handler = ServiceHandler(descriptor, self._service.functions)
        self._server.add(handler.methods, handler.service_name)
        await self._server.start()
        try:
            await self._keep_house()
        except Unavailable as error:
            _log.warning("not ready yet: %s", error)
        self._housekeeping = asyncio.create_task(self._keep_keeping_house())

    async def stop(self, grace: float) -> None:
        """Accept nothing more, let running requests end within `grace` seconds, leave the store."""
        began = asyncio.get_running_loop().time()
        self._server.gate.close()
        await self._set_unready()
        await self._driver.drain(grace)
        self._service.close()
        left = grace - (asyncio.get_running_loop().time() - began)
        await self._server.drain(max(left, _DELIVERY_SECONDS))
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.gather(self._housekeeping, return_exceptions=True)
        await self._slots.close()
        await self._connections.close()
        await self._presence.stop()
        await self._redis.aclose()

    async def _keep_keeping_house(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            try:
                await self._keep_house()
            except (Unavailable, FailedPrecondition) as error:
                _log.error("not ready: %s", error)
                await self._set_unready()
            except InternalError:
                _log.exception("not ready")
                await self._set_unready()

    async def _set_unready(self) -> None:
        await self._server.set_ready(False)
        await self._server.set_method_ready(SUBMIT_HEALTH, False)

    async def _keep_house(self) -> None:
        """Be present, say what the models are, take over what dead coordinators left; ready if all that works."""
        patient = self._is_patient()
        if not self._store_checked:
            await self._settings.check_store(self._redis)
            self._store_checked = True
        if not self._present:
            await self._presence.start()
            self._present = True
            _log.info("is %s in the request store", self._presence.owner)
        for name, model in self._models.items():
            contracts = {spec.service: spec.contract for spec in model.services}
            await self._registry.declare(name, model.served.checkpoint.fingerprint, contracts)
            for spec in model.services:
                load = await self._registry.load(name, spec.service)
                QUEUE_LENGTH.labels(spec.service, name).set(load.queued)
                await self._slots.give_back_unknown(name, spec.service)
            await self._driver.take_over(name, self._service.restore, beyond_own=not patient)
        self._kept_house = asyncio.get_running_loop().time()
        await self._server.set_ready(True)
        await self._watch.look()

    def _is_patient(self) -> bool:
        """Whether living coordinators may look dead: once the store is back, each needs a heartbeat to show itself."""
        now, settings = asyncio.get_running_loop().time(), self._settings
        if now - self._kept_house > settings.heartbeat_ttl_seconds - settings.heartbeat_seconds:
            self._patient_until = now + settings.heartbeat_ttl_seconds
        return now < self._patient_until


async def start_coordinator(models: Sequence[ServedModel], settings: CoordinatorSettings) -> Coordinator:
    """A coordinator that listens. Raises FleetError when its settings or its models cannot be served."""
    coordinator = Coordinator(models, settings)
    try:
        await coordinator.start()
    except BaseException:
        await coordinator.stop(0)
        raise
    return coordinator
