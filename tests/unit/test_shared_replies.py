"""Replies cached in Redis: only if fetching saves time, within a bound in bytes, and always complete."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from common.state.connection import connect
from common.state.shared_replies import SharedReplies
from redis_servers import run_on_empty_store

FRAMES = (b"header", b"\x01" * 700_000, b"\x02" * 1_000_000)
SIZE = sum(map(len, FRAMES))


def shared(redis: Redis, **more: Any) -> SharedReplies:
    """The shared replies of one worker."""
    given: dict[str, Any] = {
        "service": "text_encoding",
        "model": "m",
        "origin": "weights numerics",
        "max_bytes": 8 << 20,
    } | more
    return SharedReplies(redis, **given)


def lookups(result: str) -> float:
    labels = {"service": "text_encoding", "model": "m", "result": result}
    return REGISTRY.get_sample_value("fleet_shared_reply_cache_lookups_total", labels) or 0.0


async def stored(replies: SharedReplies, key: bytes, frames: tuple[bytes, ...] = FRAMES) -> None:
    """Offer a reply that took one second to compute, and wait until it is stored."""
    replies.offer(key, frames, 1.0)
    await replies.settle()


def test_a_worker_fetches_a_reply_that_another_worker_computed(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        one, other = shared(redis), shared(redis)
        await stored(one, b"apple")
        assert await other.find(b"apple") is None  # this worker has not measured a computation yet
        await stored(other, b"pear", (b"p",))
        assert await other.find(b"apple") == FRAMES
        assert await one.find(b"pear") == (b"p",)
        misses = lookups("miss")
        assert await other.find(b"plum") is None
        assert lookups("miss") == misses + 1
        await other.settle()
        for key in await redis.keys("fleet:repl*"):
            assert 0 < await redis.pttl(key) <= 3_600_000

    run_on_empty_store(each_store_url, story)


def test_replies_are_separate_for_each_origin_and_service(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        await stored(shared(redis), b"apple")
        for more in ({"origin": "weights others"}, {"origin": "others numerics"}, {"service": "image_encoding"}):
            separate = shared(redis, **more)
            await stored(separate, b"pear", (b"p",))
            assert await separate.find(b"apple") is None
            assert await separate.find(b"pear") == (b"p",)

    run_on_empty_store(each_store_url, story)


@pytest.mark.parametrize(
    ("seconds", "size", "pays"), [(0.029, 4 << 20, True), (0.23, 8 << 20, True), (0.005, 4 << 20, False)]
)
def test_a_reply_that_is_fast_to_compute_is_not_shared(
    each_store_url: str, seconds: float, size: int, pays: bool
) -> None:
    """Sharing pays off for 29 ms of T5-XXL and 230 ms of a vision language model, not for an encoder of 5 ms."""

    async def story(redis: Redis) -> None:
        replies = shared(redis)
        replies.offer(b"apple", (b"x" * size,), seconds)
        await replies.settle()
        assert replies.pays == pays
        assert bool(await redis.keys("fleet:reply:*")) == pays

    run_on_empty_store(each_store_url, story)


def test_the_most_recently_used_replies_stay_within_the_bound(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        replies = shared(redis, max_bytes=3 * SIZE)
        for key in (b"a", b"b", b"c", b"a"):
            await stored(replies, key)
        assert await replies.find(b"b") == FRAMES
        await replies.settle()
        await stored(replies, b"d")
        assert await replies.find(b"c") is None
        for key in (b"a", b"b", b"d"):
            assert await replies.find(key) == FRAMES
        await replies.settle()
        assert len(await redis.keys("fleet:reply:*")) == await redis.zcard("fleet:replies") == 3
        await stored(replies, b"huge", (b"x" * (3 * SIZE + 1),))
        assert await replies.find(b"huge") is None
        assert await redis.keys("fleet:reply-parts:*") == []

    run_on_empty_store(each_store_url, story)


def test_a_damaged_reply_is_a_miss(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        replies = shared(redis)
        await stored(replies, b"apple")
        (key,) = await redis.keys("fleet:reply:*")
        await redis.rpop(key)
        failed = lookups("failed")
        assert await replies.find(b"apple") is None
        assert lookups("failed") == failed + 1
        assert await replies.find(b"apple") is None  # the store is not queried
        assert lookups("failed") == failed + 1

    run_on_empty_store(each_store_url, story)


def test_an_unavailable_store_is_not_queried_again(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with connect("unix:///nowhere/at/all.sock") as nowhere:
            replies = shared(nowhere, gain=0.0)
            await stored(replies, b"apple")
            failed = lookups("failed")
            assert await replies.find(b"apple") is None
            await stored(replies, b"pear")
            assert lookups("failed") == failed
        assert await redis.dbsize() == 0

    run_on_empty_store(each_store_url, story)
