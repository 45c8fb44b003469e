"""Registry of the fleet's workers: heartbeats, metadata, and the checkpoint fingerprint of each model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.errors import FailedPrecondition, InternalError, InvalidInput, Unavailable
from common.logs import get_logger
from common.state.connection import Arguments, run_script
from common.state.presence import HEARTBEAT_SECONDS, TTL_SECONDS, run_on_leaving
from common.state.redis_client import Redis
from common.wiring import Wiring, contract_text, older_text
from fleet.v1 import worker_pb2

_MOST_REASON = 500  # characters

_log = get_logger(__name__)


def _always() -> bool:
    return True


class Incompatible(NamedTuple):
    """A live worker that cannot run the requests of a variant, and the reason."""

    worker_id: str
    variant: str
    reason: str


class ServiceLoad(NamedTuple):
    """Live workers of one service of a model, and numbers of taken worker slots and of waiting claims.

    `dead`: workers that were lost in the last 10 minutes and have not registered again. `workers` does not contain
    workers that are `incompatible` with all variants.
    """

    workers: list[worker_pb2.WorkerInfo]
    busy: int
    queued: int
    dead: int = 0
    incompatible: Sequence[Incompatible] = ()

    @property
    def capacity(self) -> int:
        """Maximum number of concurrent requests of all workers together."""
        return sum(worker.capacity for worker in self.workers)

    @property
    def num_unusable(self) -> int:
        """Number of live workers that cannot run the requests of any variant."""
        return len({each.worker_id for each in self.incompatible} - {worker.worker_id for worker in self.workers})


class WorkerRegistry:
    """Sends heartbeats of workers, and lists live workers.

    The first worker or coordinator that declares a model determines its fingerprint, until all heartbeats of the model
    have expired.
    """

    def __init__(
        self, redis: Redis, *, heartbeat_seconds: float = HEARTBEAT_SECONDS, ttl_seconds: float = TTL_SECONDS
    ) -> None:
        self._redis = redis
        self._heartbeat_seconds = heartbeat_seconds
        self._ttl = int(ttl_seconds * 1_000)
        self._heartbeats: dict[str, asyncio.Task[None]] = {}

    async def declare(self, model: str, fingerprint: str) -> None:
        """Declare the checkpoint fingerprint of a model, for the TTL of a heartbeat.

        Raises FailedPrecondition if the fleet serves another checkpoint under that name.
        """
        arguments: Arguments = {"model": model, "fingerprint": fingerprint, "lasts": self._ttl}
        reply = await run_script(self._redis, "declare", arguments)
        if reply[0] == b"fingerprint":
            raise FailedPrecondition(
                f"the fleet serves {model} from a checkpoint with fingerprint {reply[1].decode()}, this checkpoint "
                f"has {fingerprint}; serve it under another name, or stop the processes of the other checkpoint first",
                field="model_fingerprint",
            )

    async def announce(self, info: worker_pb2.WorkerInfo, *, is_able: Callable[[], bool] = _always) -> None:
        """Register a worker, and send heartbeats until withdraw(). No heartbeat is sent while is_able() is False.

        Raises FailedPrecondition if the fleet serves another checkpoint under the model's name, and InvalidInput for an
        invalid name.
        """
        for name, value in (("worker_id", info.worker_id), ("model", info.model), ("service", info.service)):
            if not value or any(sign in value for sign in "|/\n"):
                raise InvalidInput(
                    f"{name}: {value!r} is not a non-empty name without '|', '/' and line breaks", field=name
                )
        await self._announce(info)
        self._stop_heartbeats(info.worker_id)
        self._heartbeats[info.worker_id] = asyncio.create_task(self._send_heartbeats(info, is_able))

    async def _announce(self, info: worker_pb2.WorkerInfo) -> None:
        try:
            await self.declare(info.model, info.model_fingerprint)
        except FailedPrecondition as error:
            await self._record_refusal(info, error)
            raise
        arguments: Arguments = {
            "worker": info.worker_id,
            "model": info.model,
            "service": info.service,
            "capacity": info.capacity,
            "info": info.SerializeToString(),
            "lasts": self._ttl,
            "numerics": info.numerics_fingerprint,
            "contract": contract_text(info),
            "older": older_text(info),
        }
        await run_script(self._redis, "announce", arguments)

    async def _record_refusal(self, info: worker_pb2.WorkerInfo, error: FailedPrecondition) -> None:
        arguments: Arguments = {
            "model": info.model,
            "service": info.service,
            "fingerprint": info.model_fingerprint,
            "worker": info.worker_id,
            "reason": error.message[:_MOST_REASON],
        }
        try:
            await run_script(self._redis, "refuse", arguments)
        except Unavailable as unavailable:
            _log.warning("refusal of a worker is not recorded", worker=info.worker_id, error=unavailable)

    async def refusals(self, model: str) -> list[worker_pb2.RefusedWorker]:
        """Return the distinct refusals of a model's workers in the last 10 minutes, the latest first."""
        return [_refused(row) for row in await run_script(self._redis, "refusals", {"model": model})]

    async def _send_heartbeats(self, info: worker_pb2.WorkerInfo, is_able: Callable[[], bool]) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            if not is_able():
                continue
            try:
                await self._announce(info)
            except Unavailable as error:
                _log.warning("heartbeat failed", worker=info.worker_id, error=error)
            except FailedPrecondition as error:
                _log.error("worker is refused by the fleet", worker=info.worker_id, error=error)
            except InternalError:
                # Continue: if heartbeats stopped, the worker would never get requests again.
                _log.exception("heartbeat failed", worker=info.worker_id)

    def _stop_heartbeats(self, worker_id: str) -> None:
        task = self._heartbeats.pop(worker_id, None)
        if task is not None:
            task.cancel()

    async def withdraw(self, worker_id: str, *, grace_seconds: float = 0.0) -> None:
        """Mark a worker as shutting down and remove it from the live workers, so that it gets no new requests.

        The worker exits within `grace_seconds`. Calls that are lost with the worker do not count against their requests
        until one heartbeat TTL after the grace period. Raises Unavailable.
        """
        self._stop_heartbeats(worker_id)
        lasts = self._ttl + int(grace_seconds * 1_000)
        await run_on_leaving(self._redis, "leaving", {"worker": worker_id, "lasts": lasts})

    async def free_slots(self, info: worker_pb2.WorkerInfo) -> int:
        """Return the number of free worker slots of live workers that compute the same bytes as `info`'s worker.

        These workers have the same service, an equal numerics fingerprint and an equal contract. Returns 0 without a
        numerics fingerprint.
        """
        if not info.numerics_fingerprint:
            return 0
        arguments: Arguments = {
            "place": f"{info.model}/{info.service}",
            "numerics": info.numerics_fingerprint,
            "contract": contract_text(info),
        }
        return int(await run_script(self._redis, "spare", arguments))

    async def live(self, model: str, service: str) -> list[worker_pb2.WorkerInfo]:
        """Return the live workers of a service of a model."""
        return (await self.load(model, service)).workers

    async def load(self, model: str, service: str, wirings: Sequence[Wiring] = ()) -> ServiceLoad:
        """Return the load of a service's workers that fit one of `wirings`. Empty `wirings`: all workers."""
        arguments: Arguments = {"place": f"{model}/{service}", "wirings": [wiring.text for wiring in wirings]}
        infos, *counts, faults = await run_script(self._redis, "status", arguments)
        workers = [worker_pb2.WorkerInfo.FromString(info) for info in infos]
        incompatible = [
            Incompatible(worker.decode(), wirings[number - 1].variant, reason.decode(errors="replace"))
            for worker, number, reason in faults
        ]
        busy, queued, dead = map(int, counts)
        return ServiceLoad(workers, busy, queued, dead, incompatible)


def _refused(row: Sequence[bytes]) -> worker_pb2.RefusedWorker:
    service, fingerprint, at, worker, reason = (each.decode(errors="replace") for each in row[:5])
    refused = worker_pb2.RefusedWorker(worker_id=worker, service=service, model_fingerprint=fingerprint, reason=reason)
    refused.refused_at.FromMilliseconds(int(at))
    return refused
