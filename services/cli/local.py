"""A whole fleet in one process. Its services use gRPC on unix sockets in a private directory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from common.tracing import exporting
from models.catalog import ServedModel
from services.cli.serve import service_names, settings_class
from services.coordinator.coordinator import Coordinator, start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import Worker, start_worker
from services.worker_settings import LoopSettings, WorkerSettings

_GRACE_SECONDS = 5.0

Dtype = Literal["float32", "bfloat16"]


class LocalFleet:
    """A coordinator and workers in one process.

    start_fleet() creates it. stop() also ends a partly started fleet.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._tracing = ExitStack()
        self._tracing.enter_context(exporting("local"))
        self._coordinators: list[Coordinator] = []
        self._workers: list[Worker] = []

    async def add_coordinator(self, models: Sequence[ServedModel], settings: CoordinatorSettings) -> None:
        """Start the coordinator."""
        self._coordinators.append(await start_coordinator(models, settings))

    async def add_worker(self, service: str, model: ServedModel, settings: WorkerSettings) -> None:
        """Start a worker, which loads its weights on a separate thread."""
        self._workers.append(await start_worker(service, model, settings))

    async def stop(self) -> None:
        """Stop the coordinator before the workers, because its running requests need the workers."""
        await asyncio.gather(*(each.stop(_GRACE_SECONDS) for each in self._coordinators))
        await asyncio.gather(*(each.stop(_GRACE_SECONDS) for each in self._workers))
        self._tracing.close()


async def start_fleet(
    models: Sequence[ServedModel], *, redis_url: str, dtype: Dtype | None, directory: Path
) -> LocalFleet:
    """Start all services of the models concurrently, with sockets in `directory`. Returns when all are ready.

    Services accept a store with eviction or without durable writes, because the store is embedded or the command has
    checked it. If a service fails, stops all services and raises the first error, such as CheckpointError for
    unreadable weights.
    """
    fleet = LocalFleet(f"unix:{directory}/coordinator.sock")
    settings = CoordinatorSettings(
        model=tuple(model.name for model in models),
        listen=fleet.endpoint,
        redis=redis_url,
        allow_eviction=True,
        allow_data_loss=True,
    )
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fleet.add_coordinator(models, settings))
            for number, model in enumerate(models):
                for spec in model.services:
                    chosen = _settings_class(spec.service)(
                        model=model.name,
                        redis=redis_url,
                        allow_eviction=True,
                        allow_data_loss=True,
                        listen=f"unix:{directory}/{spec.service}-{number}.sock",
                        dtype=dtype or "auto",
                        announce_seconds=_GRACE_SECONDS,
                    )
                    group.create_task(fleet.add_worker(spec.service, model, chosen))
    except BaseExceptionGroup as failures:
        await fleet.stop()
        raise failures.exceptions[0] from None
    except asyncio.CancelledError:
        await fleet.stop()
        raise
    return fleet


def _settings_class(service: str) -> type[WorkerSettings]:
    """The settings class of a service; LoopSettings for a service that only a plugin has."""
    cls: type[WorkerSettings] = settings_class(service) if service in service_names() else LoopSettings
    return cls
