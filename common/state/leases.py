"""Recovery of requests after the loss of a process: next owners, lost workers, step checkpoints.

A coordinator's heartbeat is its lease on all requests that it owns. A coordinator that takes a request over gets the
next epoch, a fencing token: the store refuses writes with an earlier epoch, so that a former owner that is still
running cannot change the request.
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
_KEPT_MS = 3_600_000  # TTL of a step checkpoint
_BATCH_BYTES = 8 << 20


class Inherited(NamedTuple):
    """A request that this coordinator has taken over. `seconds_left` is the time to its deadline; None without one.

    `cause`: "left" if the former owner shut down, "lost" if its heartbeat expired, "own" for a request that this
    coordinator already owned.
    """

    record: generation_pb2.RequestRecord
    epoch: int
    submission: bytes
    cancel_requested: bool
    seconds_left: float | None
    cause: str


class Loss(NamedTuple):
    """A call whose stages had started and that was lost with its worker.

    `stage`: index of the service in the request's pipeline. `reached`: step of the stored step checkpoint. `suspect`:
    the worker's heartbeat has expired, and the request may be the cause. A loss that is not suspect is decided in
    `undecided_seconds`. `in_churn`: another worker of the service, which did not run the request, was lost within 10
    minutes of this loss.
    """

    worker_id: str
    service: str
    stage: int
    reached: int
    suspect: bool
    in_churn: bool
    undecided_seconds: float


class Leases:
    """Takes requests over for one coordinator, and stores losses and step checkpoints for next owners."""

    def __init__(self, redis: Redis, owner: str) -> None:
        self._redis = redis
        self._owner = owner

    async def take_over(
        self, model: str, *, running: Iterable[str] = (), beyond_own: bool = True
    ) -> tuple[list[Inherited], list[str]]:
        """Take over open requests of a model that no coordinator runs. Call repeatedly until no request is returned.

        Returns requests of coordinators without a heartbeat (only with `beyond_own`), and requests of this coordinator
        that are not in `running`, because the reply to an earlier call may have been lost. Also returns the ids of
        running requests that must be cancelled, because the cancel message may have been lost. Returns nothing if this
        coordinator's heartbeat has expired.
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
        """Record that a call whose stages had started was lost. Returns the same as losses().

        The loss of a worker that shuts down is not recorded. `ttl_seconds` is the assumed heartbeat TTL of a worker
        whose record has expired.
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
        """Return the suspect and undecided losses of a request, in order; empty for a former owner."""
        arguments: Arguments = {"id": request_id, "epoch": epoch}
        return [_loss(row) for row in await run_script(self._redis, "losses", arguments)]

    async def save_step_checkpoint(
        self, request_id: str, epoch: int, number: int, parts: Iterable[bytes], *, step: int
    ) -> bool:
        """Replace the step checkpoint of a request.

        Returns False if the request has ended, the epoch is not current or a later step checkpoint is stored. `number`
        counts the step checkpoints of an epoch. `parts` are byte strings of at most about 1 MiB.
        """
        key = f"{PREFIX}checkpoint:{request_id}:{epoch}-{number}"
        arguments: Arguments = {"id": request_id, "epoch": epoch, "checkpoint_key": key, "step": step}
        is_written = False
        try:
            await self._put_all(key, parts)
            is_written = True
            return bool(await run_script(self._redis, "step_checkpoint", arguments))
        except asyncio.CancelledError:
            # Delete the key, which would occupy memory until it expires. If the parts are written, run the script
            # again, which is idempotent and deletes the key if the request has ended.
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
        """Write parts by number. Must be idempotent, because redis-py retries commands without a reply."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hset(key, mapping=cast(Any, parts))
                pipeline.pexpire(key, _KEPT_MS)
                await pipeline.execute()

    async def load_step_checkpoint(self, request_id: str) -> list[bytes]:
        """Return the parts of the latest step checkpoint. Raises NotFound if there is none."""
        key = await command(self._redis, "HGET", f"{PREFIX}request:{request_id}", "point")
        parts: list[bytes] = []
        while key is not None and (part := await command(self._redis, "HGET", key, len(parts))) is not None:
            parts.append(part)
        if not parts:
            raise NotFound(f"request {request_id} has no step checkpoint")
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
