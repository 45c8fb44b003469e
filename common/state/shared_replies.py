"""Replies that the workers of a service share through Redis, where fetching one is quicker than making it.

Whether it is, measurements tell: what the service takes to compute a reply, and what it takes to fetch one. Everything
here is a help and never a need: what fails is logged and counted, and the reply is computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from common.errors import FleetError
from common.logs import get_logger
from common.metrics import SHARED_CACHE_LOOKUPS
from common.rpc.framing import checksum
from common.rpc.replies import Frames
from common.state.connection import PREFIX, Arguments, command, run_script, store_errors
from common.state.redis_client import Redis

# What a fetch takes until one has been measured: a Redis on another host sends 8 MB in about 10 ms.
_FETCH_SECONDS, _FETCH_SECONDS_A_BYTE = 0.001, 10e-3 / (8 << 20)
_NEWEST = 0.2  # weight of the newest measurement in an average
_PARTS_MS = 60_000  # how long the parts of a reply wait for the last one
_BATCH_BYTES = 8 << 20
_MOST_STORING = 4
_PAUSE_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0  # for a fetch that need not pay

_log = get_logger(__name__)


class SharedReplies:
    """The replies of one service of one model, by all workers whose replies are equal to the last bit.

    `origin` is equal for those only: it stands for the weights and the numerics. At most `max_bytes` are kept of all
    services together, the latest used, and each for `keep_seconds` after its last use. A reply is shared where
    computing takes at least `gain` times what fetching does; 0 shares all.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        service: str,
        model: str,
        origin: str,
        max_bytes: int,
        keep_seconds: float = 3_600.0,
        gain: float = 2.0,
    ) -> None:
        self._redis = redis
        self._origin = f"{service}\0{origin}".encode()
        self._max_bytes = max_bytes
        self._keep_ms = int(keep_seconds * 1_000)
        self._gain = gain
        self._lookups = {kind: SHARED_CACHE_LOOKUPS.labels(service, model, kind) for kind in ("hit", "miss", "failed")}
        self._computing: float | None = None
        self._fetching = 0.0
        self._not_before = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pays(self) -> bool:
        """Whether fetching is worth it, by what was measured; not before a first reply was computed."""
        return self._computing is not None and self._computing >= self._gain * self._fetching

    async def find(self, key: bytes) -> Frames | None:
        """A kept reply. One that takes longer to fetch than to compute is given up, unless all are shared."""
        if not self.pays or self._computing is None or time.monotonic() < self._not_before:
            return None
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._computing + _FETCH_SECONDS if self._gain else _PATIENCE_SECONDS):
                parts = await command(self._redis, "LRANGE", self._stored(key), 0, -1)
        except (FleetError, TimeoutError) as error:
            self._failed("fetch", error)
            return None
        if not parts:
            self._lookups["miss"].inc()
            return None
        if not _is_whole(parts):
            self._failed("read", ValueError("its checksum is another"))
            return None
        self._fetching += _NEWEST * (time.monotonic() - began - self._fetching)
        self._lookups["hit"].inc()
        self._spawn(self._touch(key))
        return tuple(parts[1:])

    def offer(self, key: bytes, frames: Frames, seconds: float) -> None:
        """A reply that took so long to compute; it is stored in the background, if that pays and others leave room."""
        size = sum(map(len, frames))
        expected = _FETCH_SECONDS + _FETCH_SECONDS_A_BYTE * size
        if self._computing is None:
            self._computing, self._fetching = seconds, expected
        self._computing += _NEWEST * (seconds - self._computing)
        self._fetching += _NEWEST * (expected - self._fetching)  # so that a slow moment is forgotten
        waiting = len(self._tasks) >= _MOST_STORING or time.monotonic() < self._not_before
        if self.pays and size <= self._max_bytes and not waiting:
            self._spawn(self._store(key, frames, size))

    async def settle(self) -> None:
        """Wait until what was offered is stored."""
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """Stop storing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _name(self, key: bytes) -> str:
        return hashlib.blake2b(self._origin + b"\0" + key, digest_size=32).hexdigest()

    def _stored(self, key: bytes) -> str:
        return f"{PREFIX}reply:{self._name(key)}"

    def _failed(self, what: str, error: Exception) -> None:
        """Leave the store alone for a while."""
        self._lookups["failed"].inc()
        self._not_before = time.monotonic() + _PAUSE_SECONDS
        _log.warning("shared replies are paused", failed=what, seconds=_PAUSE_SECONDS, error=repr(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _touch(self, key: bytes) -> None:
        try:
            await run_script(self._redis, "touch_reply", {"name": self._name(key), "lasts": self._keep_ms})
        except FleetError as error:
            self._failed("touch", error)

    async def _store(self, key: bytes, frames: Frames, size: int) -> None:
        """Push the parts under a name of their own, then let them take their place at once."""
        parts = f"{PREFIX}reply-parts:{secrets.token_hex(8)}"
        try:
            batch: list[bytes] = [checksum(frames).to_bytes(8, "little")]
            for frame in frames:
                batch.append(frame)
                if sum(map(len, batch)) >= _BATCH_BYTES:
                    await self._push(parts, batch)
                    batch = []
            if batch:
                await self._push(parts, batch)
            arguments: Arguments = {
                "parts": parts,
                "name": self._name(key),
                "bytes": size,
                "most": self._max_bytes,
                "lasts": self._keep_ms,
            }
            await run_script(self._redis, "keep_reply", arguments)
        except FleetError as error:
            self._failed("store", error)

    async def _push(self, key: str, parts: Sequence[bytes]) -> None:
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.rpush(key, *parts)
                pipeline.pexpire(key, _PARTS_MS)
                await pipeline.execute()


def _is_whole(parts: Sequence[bytes]) -> bool:
    digest, *frames = parts
    return bool(frames) and digest == checksum(frames).to_bytes(8, "little")
