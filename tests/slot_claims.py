"""Workers of one service and claims for their worker slots, for store tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from async_tests import wait_until
from common.state.presence import Presence
from common.state.worker_slots import WorkerSlots
from common.state.workers import WorkerRegistry
from fleet.v1 import worker_pb2

SLOW = 3_600.0
"""An interval in seconds that does not end during a test."""


def worker(worker_id: str, *, capacity: int = 1, fingerprint: str = "f", numerics: str = "") -> worker_pb2.WorkerInfo:
    contract = worker_pb2.StageContract(stages=["DenoisingStage"], inputs={"canvas": "Canvas"})
    return worker_pb2.WorkerInfo(
        worker_id=worker_id,
        service="denoising",
        model="emoji",
        model_fingerprint=fingerprint,
        numerics_fingerprint=numerics,
        capacity=capacity,
        address=f"unix:/{worker_id}",
        contract=contract,
    )


def registry_of(redis: Redis) -> WorkerRegistry:
    """A registry that sends one heartbeat of each worker, which does not expire during a test."""
    return WorkerRegistry(redis, heartbeat_seconds=SLOW, ttl_seconds=SLOW)


def presence_of(redis: Redis, owner: str) -> Presence:
    """The presence of a coordinator that sends one heartbeat, which does not expire during a test.

    A later heartbeat would make a coordinator live again after a test has removed its key.
    """
    return Presence(redis, owner, heartbeat_seconds=SLOW, ttl_seconds=SLOW)


@asynccontextmanager
async def slots_of(redis: Redis, owner: str, *, ask_again_seconds: float = SLOW) -> AsyncIterator[WorkerSlots]:
    presence = presence_of(redis, owner)
    slots = WorkerSlots(redis, presence, ask_again_seconds=ask_again_seconds)
    await presence.start()
    yield slots
    await slots.settle()
    await presence.stop()


async def queued(registry: WorkerRegistry, count: int) -> None:
    """Wait until `count` claims are in the queue."""

    async def is_reached() -> bool:
        return (await registry.load("emoji", "denoising")).queued == count

    await wait_until(is_reached)
