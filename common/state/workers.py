"""The workers of a fleet: who lives, what they serve, and whether they agree on what a model is."""

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
    """A live worker that cannot take the requests of a variant, and why."""

    worker_id: str
    variant: str
    reason: str


class ServiceLoad(NamedTuple):
    """The live workers of one service of a model, the slots taken on them, and the claims that wait.

    `dead` counts the workers that were lost within 10 minutes and are not announced again. A worker that is
    `incompatible` with every variant is not among `workers`.
    """

    workers: list[worker_pb2.WorkerInfo]
    busy: int
    queued: int
    dead: int = 0
    incompatible: Sequence[Incompatible] = ()

    @property
    def capacity(self) -> int:
        """Requests that the workers take at a time, together."""
        return sum(worker.capacity for worker in self.workers)

    @property
    def num_unusable(self) -> int:
        """Live workers that cannot take the requests of any variant."""
        return len({each.worker_id for each in self.incompatible} - {worker.worker_id for worker in self.workers})


class WorkerRegistry:
    """Announces workers with a heartbeat, and knows the live ones.

    The first to declare a model, worker or coordinator, decides its fingerprint for as long as any heartbeat for the
    model lasts.
    """

    def __init__(
        self, redis: Redis, *, heartbeat_seconds: float = HEARTBEAT_SECONDS, ttl_seconds: float = TTL_SECONDS
    ) -> None:
        self._redis = redis
        self._heartbeat_seconds = heartbeat_seconds
        self._ttl = int(ttl_seconds * 1_000)
        self._beats: dict[str, asyncio.Task[None]] = {}

    async def declare(self, model: str, fingerprint: str) -> None:
        """Say which checkpoint a model is, for as long as a beat lasts.

        Raises FailedPrecondition when the fleet serves another one under that name.
        """
        arguments: Arguments = {"model": model, "fingerprint": fingerprint, "lasts": self._ttl}
        reply = await run_script(self._redis, "declare", arguments)
        if reply[0] == b"fingerprint":
            raise FailedPrecondition(
                f"the fleet serves {model} from a checkpoint with fingerprint {reply[1].decode()}, this one has "
                f"{fingerprint}; serve it under another name, or stop the others first",
                field="model_fingerprint",
            )

    async def announce(self, info: worker_pb2.WorkerInfo, *, is_able: Callable[[], bool] = _always) -> None:
        """Make a worker known, and keep it so until withdraw(). Raises FailedPrecondition when the model is another.

        No heartbeat is sent while the worker is not `is_able`.
        """
        for name, value in (("worker_id", info.worker_id), ("model", info.model), ("service", info.service)):
            if not value or any(sign in value for sign in "|/\n"):
                raise InvalidInput(f"{name} {value!r} must be a name without '|' and '/'", field=name)
        await self._announce(info)
        self._stop_beat(info.worker_id)
        self._beats[info.worker_id] = asyncio.create_task(self._keep_announcing(info, is_able))

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
        """Workers of a model that were refused in the last 10 minutes, the latest first; those refused alike once."""
        return [_refused(row) for row in await run_script(self._redis, "refusals", {"model": model})]

    async def _keep_announcing(self, info: worker_pb2.WorkerInfo, is_able: Callable[[], bool]) -> None:
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
            except InternalError:  # the next one may succeed; without any, nobody would ever find this worker again
                _log.exception("heartbeat failed", worker=info.worker_id)

    def _stop_beat(self, worker_id: str) -> None:
        beat = self._beats.pop(worker_id, None)
        if beat is not None:
            beat.cancel()

    async def withdraw(self, worker_id: str, *, grace_seconds: float = 0.0) -> None:
        """Mark a worker as leaving, and take it off the list: no new request goes there.

        It ends within `grace_seconds`. Until a heartbeat's time to live after that, a call that is lost with the worker
        counts against no request. Raises Unavailable when the store is unavailable.
        """
        self._stop_beat(worker_id)
        lasts = self._ttl + int(grace_seconds * 1_000)
        await run_on_leaving(self._redis, "leaving", {"worker": worker_id, "lasts": lasts})

    async def free_slots(self, info: worker_pb2.WorkerInfo) -> int:
        """Free slots of the live workers that make the same bytes as this one, for the same service and model.

        They have the same contract, so that they can take the same claims. A worker without a numerics fingerprint has
        no equals.
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
        """The live workers of a service of a model."""
        return (await self.load(model, service)).workers

    async def load(self, model: str, service: str, wirings: Sequence[Wiring] = ()) -> ServiceLoad:
        """How busy a service of a model is, with these wirings of its variants. Without any, every worker counts."""
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
