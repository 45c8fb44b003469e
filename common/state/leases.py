"""What becomes of a request when a process dies: its next owner, the workers that it lost, the step to resume at.

A coordinator's heartbeat is its lease on all that it owns. Who takes a request over gets the next epoch, and the store
refuses every write under an earlier one, so that a coordinator which only seemed dead does no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

from common.errors import FleetError, NotFound
from common.state.connection import PREFIX, Arguments, command, run_script, store_errors
from common.state.records import read_record
from common.state.redis_client import Redis
from fleet.v1 import generation_pb2

_MOST_AT_ONCE = 50
_KEPT_MS = 3_600_000
_BATCH_BYTES = 8 << 20


class Inherited(NamedTuple):
    """A request that no coordinator runs. `seconds_left` until its deadline; None without one.

    `cause` is "left" where its owner ended by itself, "lost" where that owner's heartbeat expired, and "own" for a
    request of this coordinator.
    """

    record: generation_pb2.RequestRecord
    epoch: int
    submission: bytes
    cancel_requested: bool
    seconds_left: float | None
    cause: str


class Loss(NamedTuple):
    """A call that had begun and was lost with its worker.

    `stage` is the service's place among the request's services, `reached` the step of the checkpoint that was stored.
    The loss is suspect once the worker's heartbeat has run out, which is decided in `undecided_seconds`. It is in churn
    if a worker of the service that did not run the request was lost within 10 minutes of it.
    """

    worker_id: str
    service: str
    stage: int
    reached: int
    suspect: bool
    in_churn: bool
    undecided_seconds: float


class Leases:
    """Takes requests over for one coordinator, and keeps what the next owner of a request needs."""

    def __init__(self, redis: Redis, owner: str) -> None:
        self._redis = redis
        self._owner = owner

    async def take_over(
        self, model: str, *, running: Iterable[str] = (), beyond_own: bool = True
    ) -> tuple[list[Inherited], list[str]]:
        """Own some of the open requests of a model that nobody runs; call again until there are none.

        These are the requests of dead coordinators (unless only one's own are wanted), and one's own that are not among
        `running`: an answer may have been lost that told of them. Also returns which of those that it runs are to be
        cancelled, for the same reason. Who has no heartbeat itself gets nothing.
        """
        arguments: Arguments = {
            "owner": self._owner,
            "model": model,
            "most": _MOST_AT_ONCE,
            "beyond_own": int(beyond_own),
            "running": list(running),
        }
        taken, cancels = await run_script(self._redis, "take_over", arguments)
        return [_inherited(row) for row in taken], [request_id.decode() for request_id in cancels]

    async def add_death(
        self, request_id: str, epoch: int, worker_id: str, *, service: str, stage: int, ttl_seconds: float
    ) -> list[Loss]:
        """Record that a call which had begun was lost; returns the same as losses().

        A worker that is marked as leaving is no loss. `ttl_seconds` is how long a heartbeat lasts of a worker that the
        store does not know any more.
        """
        arguments: Arguments = {
            "id": request_id,
            "epoch": epoch,
            "worker": worker_id,
            "service": service,
            "stage": stage,
            "lasts": int(ttl_seconds * 1_000),
        }
        return [_loss(row) for row in await run_script(self._redis, "death", arguments)]

    async def losses(self, request_id: str, epoch: int) -> list[Loss]:
        """The losses of a request that are suspect or undecided, in order; none where another coordinator owns it."""
        arguments: Arguments = {"id": request_id, "epoch": epoch}
        return [_loss(row) for row in await run_script(self._redis, "losses", arguments)]

    async def save_step_checkpoint(
        self, request_id: str, epoch: int, number: int, parts: Iterable[bytes], *, step: int
    ) -> bool:
        """Store a checkpoint, in place of the one before; False where the request is not ours any more, or is further.

        `number` counts the checkpoints of an epoch; each part is at most a little above 1 MiB.
        """
        key = f"{PREFIX}checkpoint:{request_id}:{epoch}-{number}"
        arguments: Arguments = {"id": request_id, "epoch": epoch, "checkpoint_key": key, "step": step}
        is_written = False
        try:
            await self._put_all(key, parts)
            is_written = True
            return bool(await run_script(self._redis, "step_checkpoint", arguments))
        except asyncio.CancelledError:
            # A key that no request refers to would use memory until it expires. The script deletes it where the request
            # has ended, and may run twice.
            script = partial(run_script, self._redis, "step_checkpoint", arguments)
            with suppress(FleetError):
                await asyncio.shield(script() if is_written else command(self._redis, "UNLINK", key))
            raise

    async def _put_all(self, key: str, parts: Iterable[bytes]) -> None:
        batch: dict[str, bytes] = {}
        for index, part in enumerate(parts):
            batch[str(index)] = part
            if sum(map(len, batch.values())) >= _BATCH_BYTES:
                await self._put(key, batch)
                batch = {}
        if batch:
            await self._put(key, batch)

    async def _put(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Write parts under their numbers, which may be done twice: redis-py repeats what it got no answer to."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hset(key, mapping=cast(Any, parts))
                pipeline.pexpire(key, _KEPT_MS)
                await pipeline.execute()

    async def load_step_checkpoint(self, request_id: str) -> list[bytes]:
        """The parts of the newest checkpoint. Raises NotFound where there is none."""
        key = await command(self._redis, "HGET", f"{PREFIX}request:{request_id}", "point")
        parts: list[bytes] = []
        while key is not None and (part := await command(self._redis, "HGET", key, len(parts))) is not None:
            parts.append(part)
        if not parts:
            raise NotFound(f"request {request_id} has no checkpoint")
        return parts


def _inherited(row: list[Any]) -> Inherited:
    _, epoch, submission, cancel, now, fields, cause = row
    record = read_record(fields)
    left = (record.deadline.ToMilliseconds() - int(now)) / 1_000 if record.HasField("deadline") else None
    return Inherited(record, int(epoch), submission, cancel == b"1", left, cause.decode())


def _loss(row: list[Any]) -> Loss:
    worker, service, stage, reached, suspect, churn, left = row
    return Loss(
        worker.decode(), service.decode(), int(stage), int(reached), bool(suspect), bool(churn), int(left) / 1_000
    )
