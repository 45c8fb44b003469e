"""Cache of replies, for calls with bit-identical inputs.

For expensive stages with repeated inputs, such as text encoders. The cache stores the sent frames, including warnings,
so that a cached reply is byte-equal to a computed reply, and its exact size is known. The key is a cryptographic digest
of all inputs. Not thread-safe: use one cache per event loop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from common.metrics import CACHE_BYTES, CACHE_LOOKUPS
from common.rpc.framing import Packet

_ENTRY_BYTES = 256  # estimated overhead of an entry

Frames = tuple[bytes, ...]
Write = Callable[[bytes], Awaitable[None]]


class Shared(Protocol):
    """Cache that workers share, implemented by common.state.shared_replies.SharedReplies."""

    async def find(self, key: bytes) -> Frames | None:
        """Return the frames of a reply; None if it is missing or slower to fetch than to compute. Does not raise."""

    def offer(self, key: bytes, frames: Frames, seconds: float) -> None:
        """Share a reply that took `seconds` to compute. Does not block."""


class ReplyCache:
    """LRU cache of the replies of one service of one model, with at most `max_bytes`.

    `indifferent_to` are input fields, as slot.field, that do not affect a reply. They are cleared in the inputs before
    the key is computed and the stages run, so that no stage can depend on a field that the key omits. `shared` is the
    second-level cache.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        service: str,
        model: str,
        indifferent_to: Collection[str] = (),
        shared: Shared | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self._shared = shared
        self._blank = [path.split(".") for path in indifferent_to]
        self._entries: OrderedDict[bytes, Frames] = OrderedDict()
        self._hits = CACHE_LOOKUPS.labels(service, model, "hit")
        self._misses = CACHE_LOOKUPS.labels(service, model, "miss")
        self._gauge = CACHE_BYTES.labels(service, model)
        self.used_bytes = 0

    def key(self, inputs: Mapping[str, Packet], variant: str = "") -> bytes:
        """Clear the `indifferent_to` fields, and return the digest of the inputs and of the variant."""
        for slot, name in self._blank:
            if slot in inputs:
                inputs[slot].message.ClearField(name)
        digest = hashlib.blake2b(digest_size=32)
        if variant:
            _add(digest, f"variant {variant}".encode())  # No slot has a space in its name.
        for slot in sorted(inputs):
            packet = inputs[slot]
            _add(digest, slot.encode())
            _add(digest, packet.message.SerializeToString(deterministic=True))
            for path in sorted(packet.chunks):
                _add(digest, path.encode())
                for piece in packet.chunks[path]:
                    digest.update(piece.data)
        return digest.digest()

    def get(self, key: bytes) -> Frames | None:
        """Return the frames of a reply from this cache, and mark it as most recently used."""
        frames = self._entries.get(key)
        if frames is None:
            self._misses.inc()
            return None
        self._hits.inc()
        self._entries.move_to_end(key)
        return frames

    async def find(self, key: bytes) -> Frames | None:
        """Return the frames of a reply from this cache or the shared cache, and mark it as most recently used."""
        frames = self.get(key)
        if frames is None and self._shared is not None and (frames := await self._shared.find(key)) is not None:
            self.put(key, frames)
        return frames

    def add(self, key: bytes, frames: Frames, seconds: float) -> None:
        """Store a reply that took `seconds` to compute, and offer it to the shared cache."""
        self.put(key, frames)
        if self._shared is not None:
            self._shared.offer(key, frames, seconds)

    def put(self, key: bytes, frames: Frames) -> None:
        """Store a reply, unless it is larger than the cache, and evict the least recently used replies."""
        size = _size(frames)
        if size > self.max_bytes or key in self._entries:
            return
        self._entries[key] = frames
        self.used_bytes += size
        while self.used_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.used_bytes -= _size(oldest)
        self._gauge.set(self.used_bytes)


class Recorder:
    """Writes frames and records them for the cache, up to `max_bytes`, except the Begun frame `uncached`."""

    def __init__(self, write: Write, max_bytes: int, *, uncached: bytes | None = None) -> None:
        self._write = write
        self._uncached = uncached
        self._left = max_bytes
        self._frames: list[bytes] = []

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        await self._write(frame)
        if frame == self._uncached:
            return
        self._left -= len(frame)
        if self._left >= 0:
            self._frames.append(frame)
        else:
            self._frames.clear()

    @property
    def frames(self) -> Frames:
        """All recorded frames; empty if they exceed `max_bytes`."""
        return tuple(self._frames) if self._left >= 0 else ()


def _add(digest: Any, part: bytes) -> None:
    """Add a part with its length, so that different lists of parts have different digests."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _size(frames: Frames) -> int:
    return sum(map(len, frames)) + _ENTRY_BYTES
