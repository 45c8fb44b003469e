"""The reply cache in Redis stores replies that are slow to compute, within a bound in bytes."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from async_tests import HANG_SECONDS
from common.state.connection import connect
from common.state.shared_replies import SharedReplies
from redis_servers import run_on_empty_store

FRAMES = (b"header", b"\x01" * 700_000, b"\x02" * 1_000_000)
SIZE = sum(map(len, FRAMES))


def shared(redis: Redis, **overrides: Any) -> SharedReplies:
    """The shared replies of one worker."""
    arguments: dict[str, Any] = {
        "service": "text_encoding",
        "model": "m",
        "origin": "weights numerics",
        "max_bytes": 8 << 20,
    } | overrides
    return SharedReplies(redis, **arguments)


def lookups(result: str) -> float:
    labels = {"service": "text_encoding", "model": "m", "result": result}
    return REGISTRY.get_sample_value("fleet_shared_reply_cache_lookups_total", labels) or 0.0


async def store_reply(replies: SharedReplies, key: bytes, frames: tuple[bytes, ...] = FRAMES) -> None:
    """Offer a reply that took HANG_SECONDS to compute, which also limits a fetch, and wait until it is stored."""
    replies.offer(key, frames, HANG_SECONDS)
    await replies.settle()


def test_a_worker_fetches_a_reply_that_another_worker_computed(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        one, other = shared(redis), shared(redis)
        await store_reply(one, b"apple")
        assert await other.find(b"apple") is None  # this worker has not measured a computation yet
        await store_reply(other, b"pear", (b"p",))
        assert await other.find(b"apple") == FRAMES
        assert await one.find(b"pear") == (b"p",)
        misses = lookups("miss")
        assert await other.find(b"plum") is None
        assert lookups("miss") == misses + 1
        await other.settle()
        for key in await redis.keys("fleet:repl*"):
            assert 0 < await redis.pttl(key) <= 3_600_000

    run_on_empty_store(each_store_url, scenario)


def test_replies_are_separate_for_each_origin_and_service(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await store_reply(shared(redis), b"apple")
        for overrides in ({"origin": "weights others"}, {"origin": "others numerics"}, {"service": "image_encoding"}):
            separate = shared(redis, **overrides)
            await store_reply(separate, b"pear", (b"p",))
            assert await separate.find(b"apple") is None
            assert await separate.find(b"pear") == (b"p",)

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize(
    ("seconds", "size", "pays"), [(0.029, 4 << 20, True), (0.23, 8 << 20, True), (0.005, 4 << 20, False)]
)
def test_a_reply_that_is_fast_to_compute_is_not_shared(
    each_store_url: str, seconds: float, size: int, pays: bool
) -> None:
    """Sharing pays off for T5-XXL (29 ms) and a vision language model (230 ms). It does not for a 5 ms encoder."""

    async def scenario(redis: Redis) -> None:
        replies = shared(redis)
        replies.offer(b"apple", (b"x" * size,), seconds)
        await replies.settle()
        assert replies.pays == pays
        assert bool(await redis.keys("fleet:reply:*")) == pays

    run_on_empty_store(each_store_url, scenario)


def test_beyond_the_bound_the_least_recently_used_reply_is_evicted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        replies = shared(redis, max_bytes=3 * SIZE)
        for key in (b"a", b"b", b"c", b"a"):
            await store_reply(replies, key)
        assert await replies.find(b"b") == FRAMES
        await replies.settle()
        await store_reply(replies, b"d")
        assert await replies.find(b"c") is None
        for key in (b"a", b"b", b"d"):
            assert await replies.find(key) == FRAMES
        await replies.settle()
        assert len(await redis.keys("fleet:reply:*")) == await redis.zcard("fleet:replies") == 3
        await store_reply(replies, b"huge", (b"x" * (3 * SIZE + 1),))
        assert await replies.find(b"huge") is None
        assert await redis.keys("fleet:reply-parts:*") == []

    run_on_empty_store(each_store_url, scenario)


def test_a_damaged_reply_is_a_miss(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        replies = shared(redis)
        await store_reply(replies, b"apple")
        (key,) = await redis.keys("fleet:reply:*")
        await redis.rpop(key)
        failed = lookups("failed")
        assert await replies.find(b"apple") is None
        assert lookups("failed") == failed + 1
        assert await replies.find(b"apple") is None  # the store is not queried
        assert lookups("failed") == failed + 1

    run_on_empty_store(each_store_url, scenario)


def test_an_unavailable_store_is_not_queried_again(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with connect("unix:///nowhere/at/all.sock") as nowhere:
            replies = shared(nowhere, gain=0.0)
            await store_reply(replies, b"apple")
            failed = lookups("failed")
            assert await replies.find(b"apple") is None
            await store_reply(replies, b"pear")
            assert lookups("failed") == failed
        assert await redis.dbsize() == 0

    run_on_empty_store(each_store_url, scenario)
