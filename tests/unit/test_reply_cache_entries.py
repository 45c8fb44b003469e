"""The reply cache's key covers slot names as well as values, and its byte count is exact."""

from __future__ import annotations

import asyncio

from common.rpc.framing import Packet
from common.rpc.replies import Recorder, ReplyCache
from fleet.v1 import artifacts_pb2


def cache(max_bytes: int = 10_000) -> ReplyCache:
    return ReplyCache(max_bytes, service="entries", model="m")


def prompt(text: str) -> Packet:
    return Packet(artifacts_pb2.Prompt(prompt=text), {})


def test_equal_values_in_other_slots_have_another_key() -> None:
    kept = cache()
    keys = [
        kept.key({"prompt": prompt("a"), "other": prompt("b")}),
        kept.key({"prompt": prompt("b"), "other": prompt("a")}),
        kept.key({"prompt": prompt("a"), "another": prompt("b")}),
        kept.key({"prompt": prompt("a")}),
        kept.key({"other": prompt("a")}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_reply_stored_twice_counts_once() -> None:
    """Two concurrent calls with equal inputs may both miss the cache and store the reply."""
    kept = cache()
    kept.put(b"k", (b"x" * 1_000,))
    used = kept.used_bytes
    kept.put(b"k", (b"x" * 1_000,))
    assert kept.used_bytes == used
    assert kept.get(b"k") == (b"x" * 1_000,)


def test_a_reply_larger_than_the_cache_displaces_nothing() -> None:
    kept = cache(2_000)
    kept.put(b"small", (b"x" * 100,))
    kept.put(b"large", (b"x" * 2_000,))
    assert kept.get(b"small") is not None
    assert kept.get(b"large") is None


def test_a_recorder_drops_a_reply_that_exceeds_its_bound() -> None:
    sent: list[bytes] = []

    async def write(frame: bytes) -> None:
        sent.append(frame)

    async def story() -> None:
        recorder = Recorder(write, 10, uncached=b"begun")
        await recorder.write(b"begun")
        await recorder.write(b"12345")
        assert len(recorder.frames) == 1
        await recorder.write(b"678901")
        await recorder.write(b"2")
        assert not recorder.frames

    asyncio.run(story())
    assert sent == [b"begun", b"12345", b"678901", b"2"]
