"""Keys of the reply cache cover slot names as well as values, and the cache's byte count is exact."""

from __future__ import annotations

import asyncio

from common.rpc.framing import Packet
from common.rpc.replies import Recorder, ReplyCache
from fleet.v1 import artifacts_pb2


def make_cache(max_bytes: int = 10_000) -> ReplyCache:
    return ReplyCache(max_bytes, service="entries", model="m")


def prompt(text: str) -> Packet:
    return Packet(artifacts_pb2.Prompt(prompt=text), {})


def test_equal_values_in_different_slots_have_different_keys() -> None:
    cache = make_cache()
    keys = [
        cache.key({"prompt": prompt("a"), "other": prompt("b")}),
        cache.key({"prompt": prompt("b"), "other": prompt("a")}),
        cache.key({"prompt": prompt("a"), "another": prompt("b")}),
        cache.key({"prompt": prompt("a")}),
        cache.key({"other": prompt("a")}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_reply_stored_twice_counts_once() -> None:
    """Two concurrent calls with equal inputs may both miss the cache and store the reply."""
    cache = make_cache()
    cache.put(b"k", (b"x" * 1_000,))
    used = cache.used_bytes
    cache.put(b"k", (b"x" * 1_000,))
    assert cache.used_bytes == used
    assert cache.get(b"k") == (b"x" * 1_000,)


def test_a_reply_larger_than_the_cache_displaces_nothing() -> None:
    cache = make_cache(2_000)
    cache.put(b"small", (b"x" * 100,))
    cache.put(b"large", (b"x" * 2_000,))
    assert cache.get(b"small") is not None
    assert cache.get(b"large") is None


def test_a_recorder_drops_a_reply_that_exceeds_its_bound() -> None:
    sent: list[bytes] = []

    async def write(frame: bytes) -> None:
        sent.append(frame)

    async def scenario() -> None:
        recorder = Recorder(write, 10, uncached=b"begun")
        await recorder.write(b"begun")
        await recorder.write(b"12345")
        assert len(recorder.frames) == 1
        await recorder.write(b"678901")
        await recorder.write(b"2")
        assert not recorder.frames

    asyncio.run(scenario())
    assert sent == [b"begun", b"12345", b"678901", b"2"]
