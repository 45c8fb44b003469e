"""Stores the bytes of the items of streamed results.

The bytes of an item are written first, to keys that contain the writer's epoch. The event that is appended afterwards
makes the item a part of the result. A former owner of a request may still write bytes, but no event refers to them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

from common.errors import NotFound
from common.state.connection import command, store_errors
from common.state.records import CHUNK_BYTES, batches_of, chunks_of, key_of
from common.state.redis_client import Redis
from common.state.replication import Replication
from fleet.v1 import generation_pb2

_UNENDED_MS = 86_400_000
"""TTL in ms of an item whose request has not ended. A take-over renews it; a request that one coordinator owns for
longer loses the bytes of its first items."""
_EXPIRE_AT_ONCE = 1_000  # keys per PEXPIRE pipeline


class StoredItem(NamedTuple):
    """An item of a result, and the epoch under which its bytes were stored."""

    item: generation_pb2.ResultItem
    epoch: int


class ResultItems:
    """The bytes of the items of all requests."""

    def __init__(self, redis: Redis, replication: Replication) -> None:
        self._redis = redis
        self._replication = replication

    async def save(self, request_id: str, stored: StoredItem, pieces: Sequence[bytes | memoryview]) -> None:
        """Store the bytes of an item, acknowledged by replicas. Idempotent. Raises Unavailable."""
        chunks = dict(zip(_keys(request_id, stored), chunks_of(pieces), strict=True))
        async with self._redis.pipeline(transaction=False) as pipeline:
            for batch in batches_of(chunks):
                for key, chunk in batch.items():
                    pipeline.set(key, chunk, px=_UNENDED_MS)
                with store_errors():
                    await pipeline.execute()
            self._replication.follow(pipeline, chunks)
            with store_errors():
                replies = await pipeline.execute(raise_on_error=False)
        self._replication.check(replies, chunks)

    async def chunks(self, request_id: str, stored: StoredItem, skipped: int = 0) -> AsyncIterator[bytes]:
        """Yield an item's bytes from offset `skipped`, in chunks of at most 1 MiB. Raises NotFound if they expired."""
        async for chunk in read_chunks(self._redis, request_id, _keys(request_id, stored), skipped):
            yield chunk

    async def refresh(self, request_id: str, items: Iterable[StoredItem]) -> None:
        """Renew the TTL of items that another coordinator has stored."""
        await self.expire(request_id, items, _UNENDED_MS)

    async def expire(self, request_id: str, items: Iterable[StoredItem], milliseconds: int) -> None:
        """Set the TTL of the bytes of items, in ms."""
        keys = [key for stored in items for key in _keys(request_id, stored)]
        for start in range(0, len(keys), _EXPIRE_AT_ONCE):
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key in keys[start : start + _EXPIRE_AT_ONCE]:
                    pipeline.pexpire(key, milliseconds)
                with store_errors():
                    await pipeline.execute()


def _keys(request_id: str, stored: StoredItem) -> list[str]:
    """Return the keys of an item's chunks."""
    item, epoch = stored
    count = len(range(0, item.byte_size, CHUNK_BYTES))
    return [key_of("item", request_id, epoch, item.item_index, number) for number in range(count)]


async def read_chunks(redis: Redis, request_id: str, keys: Sequence[str], skipped: int) -> AsyncIterator[bytes]:
    """Yield bytes that are stored in chunks of 1 MiB, from the offset `skipped`. Raises NotFound."""
    for key in keys[skipped // CHUNK_BYTES :]:
        chunk = await command(redis, "GET", key)
        if chunk is None:
            raise NotFound(f"the result of request {request_id} has expired", field="request_id")
        yield chunk[skipped % CHUNK_BYTES :]
        skipped = 0
