"""Replies in Redis: only where that pays, within a bound, whole or not at all, and never in anybody's way."""

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
    """One worker's view; computing a reply takes a second unless the test says otherwise."""
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
    replies.offer(key, frames, 1.0)
    await replies.settle()


def test_what_one_worker_computed_another_fetches(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        one, other = shared(redis), shared(redis)
        await stored(one, b"apple")
        assert await other.find(b"apple") is None  # it does not know yet what computing takes
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


def test_other_weights_numerics_and_services_are_others(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        await stored(shared(redis), b"apple")
        for more in ({"origin": "weights others"}, {"origin": "others numerics"}, {"service": "image_encoding"}):
            stranger = shared(redis, **more)
            await stored(stranger, b"pear", (b"p",))
            assert await stranger.find(b"apple") is None
            assert await stranger.find(b"pear") == (b"p",)

    run_on_empty_store(each_store_url, story)


@pytest.mark.parametrize(
    ("seconds", "size", "pays"), [(0.029, 4 << 20, True), (0.23, 8 << 20, True), (0.005, 4 << 20, False)]
)
def test_what_is_quick_to_compute_is_not_shared(each_store_url: str, seconds: float, size: int, pays: bool) -> None:
    """T5-XXL's 29 ms and a vision language model's 230 ms pay; an encoder of 5 ms does not."""

    async def story(redis: Redis) -> None:
        replies = shared(redis)
        replies.offer(b"apple", (b"x" * size,), seconds)
        await replies.settle()
        assert replies.pays == pays
        assert bool(await redis.keys("fleet:reply:*")) == pays

    run_on_empty_store(each_store_url, story)


def test_the_latest_used_stay_within_the_bound(each_store_url: str) -> None:
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


def test_a_spoiled_reply_is_none(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        replies = shared(redis)
        await stored(replies, b"apple")
        (key,) = await redis.keys("fleet:reply:*")
        await redis.rpop(key)
        failed = lookups("failed")
        assert await replies.find(b"apple") is None
        assert lookups("failed") == failed + 1
        assert await replies.find(b"apple") is None  # not asked for
        assert lookups("failed") == failed + 1

    run_on_empty_store(each_store_url, story)


def test_a_store_that_is_away_is_left_alone(each_store_url: str) -> None:
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
