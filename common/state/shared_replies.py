"""Second-level cache: replies that the workers of a service share through Redis.

Replies are shared if fetching is faster than computing by the factor `gain`. The decision uses measured durations of
computing and fetching. The cache is optional: failures are logged and counted, and the reply is computed.
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

# Assumed duration of a fetch before the first measurement: constant part, and duration per byte. Redis on another host
# sends 8 MiB in about 10 ms.
_FETCH_SECONDS, _FETCH_SECONDS_A_BYTE = 0.001, 10e-3 / (8 << 20)
_NEWEST = 0.2  # weight of the latest measurement in the moving averages
_PARTS_MS = 60_000  # TTL of the parts of an incomplete reply
_BATCH_BYTES = 8 << 20
_MOST_STORING = 4
_PAUSE_SECONDS = 10.0
_FETCH_TIMEOUT_SECONDS = 5.0  # timeout of a fetch if all replies are shared

_log = get_logger(__name__)


class SharedReplies:
    """Shared replies of one service of one model, for workers that compute bit-identical replies.

    `origin`: identifies the weights and the numerics; equal for these workers only. `max_bytes`: LRU limit of the
    replies of all services. `keep_seconds`: TTL of a reply after its last use. `gain`: replies are shared if computing
    takes at least `gain` times as long as fetching; 0 to share all.
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
        """Whether fetching is `gain` times faster than computing; False before the first computed reply."""
        return self._computing is not None and self._computing >= self._gain * self._fetching

    async def find(self, key: bytes) -> Frames | None:
        """Return a stored reply; None if no reply is stored, `pays` is False, or the cache fails or is paused."""
        if not self.pays or self._computing is None or time.monotonic() < self._not_before:
            return None
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._computing + _FETCH_SECONDS if self._gain else _FETCH_TIMEOUT_SECONDS):
                parts = await command(self._redis, "LRANGE", self._stored(key), 0, -1)
        except (FleetError, TimeoutError) as error:
            self._failed("fetch", error)
            return None
        if not parts:
            self._lookups["miss"].inc()
            return None
        if not _is_whole(parts):
            self._failed("read", ValueError("the checksum does not match"))
            return None
        self._fetching += _NEWEST * (time.monotonic() - began - self._fetching)
        self._lookups["hit"].inc()
        self._spawn(self._touch(key))
        return tuple(parts[1:])

    def offer(self, key: bytes, frames: Frames, seconds: float) -> None:
        """Store a reply in the background, if `pays` and few writes are in progress. Computing it took `seconds`."""
        size = sum(map(len, frames))
        expected = _FETCH_SECONDS + _FETCH_SECONDS_A_BYTE * size
        if self._computing is None:
            self._computing, self._fetching = seconds, expected
        self._computing += _NEWEST * (seconds - self._computing)
        # Without fetches there are no measurements. Approach the assumed duration, so that sharing resumes.
        self._fetching += _NEWEST * (expected - self._fetching)
        waiting = len(self._tasks) >= _MOST_STORING or time.monotonic() < self._not_before
        if self.pays and size <= self._max_bytes and not waiting:
            self._spawn(self._store(key, frames, size))

    async def settle(self) -> None:
        """Wait until all offered replies are stored."""
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """Cancel the writes in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _name(self, key: bytes) -> str:
        return hashlib.blake2b(self._origin + b"\0" + key, digest_size=32).hexdigest()

    def _stored(self, key: bytes) -> str:
        return f"{PREFIX}reply:{self._name(key)}"

    def _failed(self, what: str, error: Exception) -> None:
        """Count and log a failure, and pause the cache for _PAUSE_SECONDS."""
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
        """Push the parts to a temporary key, then rename it atomically."""
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
