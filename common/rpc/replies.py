"""Replies that are given again, to calls whose inputs are the same to the last bit.

For stages that cost much and are asked the same again, such as text encoders. What is kept is the frames as they were
sent, warnings included, so a hit is byte-equal to what it spares, and memory is counted exactly. The key is a
cryptographic digest of everything that came: header, tensors and all. Not thread-safe: one cache, one event loop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from common.metrics import CACHE_BYTES, CACHE_LOOKUPS
from common.rpc.framing import Packet

_ENTRY_BYTES = 256  # what an entry costs beside its frames, about

Frames = tuple[bytes, ...]
Write = Callable[[bytes], Awaitable[None]]


class Shared(Protocol):
    """Replies that other workers made too; common.state.shared_replies.SharedReplies is one."""

    async def find(self, key: bytes) -> Frames | None:
        """The frames of a reply, if it is there and worth fetching. Never raises because of the store."""

    def offer(self, key: bytes, frames: Frames, seconds: float) -> None:
        """A reply that was computed here in so long; returns at once."""


class ReplyCache:
    """The latest used replies of one service of one model, `max_bytes` of them at most.

    `indifferent_to` are fields, as slot.field, that make no difference to a reply. They are blanked in the inputs
    before these are read, by the key and by the stages: what the key leaves out, no stage can depend on.
    `shared` is asked for what is not here.
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
        """Blank what makes no difference, and digest the rest and the variant of the model that the call is for."""
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
        """The frames of a reply; it is now the latest used one."""
        frames = self._entries.get(key)
        if frames is None:
            self._misses.inc()
            return None
        self._hits.inc()
        self._entries.move_to_end(key)
        return frames

    async def find(self, key: bytes) -> Frames | None:
        """The frames of a reply, from here or from where it is shared; it is now the latest used one."""
        frames = self.get(key)
        if frames is None and self._shared is not None and (frames := await self._shared.find(key)) is not None:
            self.put(key, frames)
        return frames

    def add(self, key: bytes, frames: Frames, seconds: float) -> None:
        """Keep a reply that took so long to compute, and share it."""
        self.put(key, frames)
        if self._shared is not None:
            self._shared.offer(key, frames, seconds)

    def put(self, key: bytes, frames: Frames) -> None:
        """Keep a reply; those that were used longest ago make room. One that is too large is not kept."""
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
    """Writes frames, and caches them as long as they are worth it, except `uncached`: a cached reply begins nothing."""

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
        """All of them, or none where they became too many bytes."""
        return tuple(self._frames) if self._left >= 0 else ()


def _add(digest: Any, part: bytes) -> None:
    """A part with its length, so that no two lists of parts look the same. The header tells the lengths of tensors."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _size(frames: Frames) -> int:
    return sum(map(len, frames)) + _ENTRY_BYTES
