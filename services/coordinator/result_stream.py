"""The result of a request as a stream of items.

Each item and its event are stored before the next item is accepted. An item is delivered when its event is stored. Only
the owner of the latest epoch can store events. After a take-over, the coordinator reads the delivered items from the
events, and skips them when workers recompute them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.errors import InternalError, ResourceExhausted
from common.logs import get_logger
from common.rpc.framing import Packet
from common.stage import Call, Contract
from common.state.records import ResultFile
from common.state.requests import RequestStore
from common.state.result_items import StoredItem
from common.state.retries import retry_until_available
from common.streams import ItemBuffer
from fleet.v1 import artifacts_pb2, generation_pb2
from services.coordinator.events import EventWriter

_log = get_logger(__name__)


class ResultStream:
    """ItemSink that stores the items of one request's result. Holds one item in memory.

    A `raw` result is not stored: its bytes stay in memory for the caller of Generate, and its items have no events.
    put() raises ResourceExhausted beyond `max_bytes` in total. Call close() before EventWriter.close().
    """

    def __init__(
        self,
        store: RequestStore,
        events: EventWriter,
        request_id: str,
        *,
        max_bytes: int,
        epoch: int = 1,
        raw: bool = False,
    ) -> None:
        self._store = store
        self._events = events
        self._request_id = request_id
        self._max_bytes = max_bytes
        self._epoch = epoch
        self._raw = raw
        self._is_loaded = epoch == 1
        self._sizes: list[int] = []
        self._headers: dict[int, generation_pb2.FileHeader] = {}
        self._pieces: dict[int, list[bytes | memoryview]] = {}
        self._stored: list[StoredItem] = []
        self._storing: asyncio.Task[None] | None = None

    @property
    def items(self) -> Sequence[StoredItem]:
        """The stored items, for RequestStore.finish()."""
        return self._stored

    async def take(self, items: AsyncIterable[tuple[int, Packet]]) -> list[ResultFile]:
        """Store all items of a stream and return the files. Raises the errors of put() and files()."""
        async for index, packet in items:
            await self.put(index, packet, packet.byte_size)
        return self.files()

    async def has_items(self) -> bool:
        """Whether an item was delivered, under this epoch or an earlier one."""
        if not self._is_loaded:
            await self._load()
        return bool(self._sizes)

    async def put(self, index: int, item: Packet, byte_size: int) -> None:
        """Store the item with this index and its event. Skips an item that was delivered before.

        Waits while the store is unavailable or full. Cancellation does not interrupt the write; the caller may then put
        the same item again. Raises ResourceExhausted beyond `max_bytes`, Aborted if the request has ended or continues
        at another coordinator, and InternalError for an item out of order.
        """
        del byte_size
        await self._settle()
        if not self._is_loaded:
            await self._load()
        message = item.message
        if not isinstance(message, artifacts_pb2.MediaItem):
            raise InternalError(f"the result has a {message.DESCRIPTOR.name} as item {index}, not a MediaItem")
        if index < len(self._sizes):
            self._skip(index, message)
            return
        if index > len(self._sizes):
            raise InternalError(f"received item {index} of the result; expected item {len(self._sizes)}")
        self._storing = asyncio.create_task(self._add(message, _pieces_of(item, message)))
        await self._settle()

    async def close(self) -> None:
        """Stop storing items. An event that is not yet stored is stored with the request's end, or not at all."""
        if self._storing is not None:
            self._storing.cancel()
            await asyncio.gather(self._storing, return_exceptions=True)

    def files(self) -> list[ResultFile]:
        """The files of the complete result. Only raw files contain bytes; other bytes are in the store.

        Raises InternalError for a missing file.
        """
        count = next((header.count for header in self._headers.values()), 0)
        if not count or len(self._headers) < count:
            raise InternalError(f"the result stream ended with {len(self._headers)} of {count} files")
        return [ResultFile(self._headers[index], self._pieces.get(index, ())) for index in range(count)]

    async def _settle(self) -> None:
        """Wait until the current item is stored. Raises the error of the write."""
        if self._storing is not None:
            await asyncio.shield(self._storing)

    async def _load(self) -> None:
        """Read the items delivered under earlier epochs. The owners of these epochs can deliver no further items."""
        what = "read of delivered items"
        delivered = await retry_until_available(what, partial(self._store.delivered_items, self._request_id))
        await retry_until_available(what, partial(self._store.items.refresh, self._request_id, delivered))
        for stored in delivered:
            self._count(stored.item)
        self._stored += delivered
        self._is_loaded = True

    def _skip(self, index: int, message: artifacts_pb2.MediaItem) -> None:
        if message.data.byte_size != self._sizes[index]:
            # The item differs if its worker has another numerics fingerprint than the worker of the delivered item.
            _log.warning(
                "recomputed item differs from the delivered item, which stays in the result",
                index=index,
                delivered_bytes=self._sizes[index],
                computed_bytes=message.data.byte_size,
            )

    async def _add(self, message: artifacts_pb2.MediaItem, pieces: list[bytes | memoryview]) -> None:
        item = self._described(message)
        size = sum(self._sizes) + item.byte_size
        if size > self._max_bytes:
            kind, field = ("raw result", "output_format") if self._raw else ("result", "num_frames")
            raise ResourceExhausted(
                f"the {kind} has at least {size} bytes; at most {self._max_bytes} are allowed", field=field
            )
        if self._raw:
            self._pieces.setdefault(item.file_index, []).extend(pieces)
            self._count(item)
            return
        stored = StoredItem(item, self._epoch)
        what = f"save of item {item.item_index} of request {self._request_id}"
        await retry_until_available(what, partial(self._store.items.save, self._request_id, stored, pieces))
        self._stored.append(stored)
        self._count(item)
        await self._events.add_stored(generation_pb2.Event(item=item))

    def _described(self, message: artifacts_pb2.MediaItem) -> generation_pb2.ResultItem:
        """The message for the item's event. Raises InternalError for an item that contradicts earlier items."""
        count = message.file_count or 1
        before = self._headers.get(message.file_index)
        counts = {header.count for header in self._headers.values()} or {count}
        if message.file_index >= count or counts != {count}:
            raise InternalError(
                f"an item belongs to file {message.file_index} of {count}; the result has {min(counts)} files, "
                "whose indices start at 0"
            )
        return generation_pb2.ResultItem(
            item_index=len(self._sizes),
            file_index=message.file_index,
            file_count=count,
            offset=before.byte_size if before else 0,
            byte_size=message.data.byte_size,
            num_frames=message.num_frames,
            content_type=message.content_type,
            height=message.height,
            width=message.width,
        )

    def _count(self, item: generation_pb2.ResultItem) -> None:
        """Add the size of an item to the header of its file."""
        self._sizes.append(item.byte_size)
        header = self._headers.setdefault(
            item.file_index,
            generation_pb2.FileHeader(
                index=item.file_index,
                count=item.file_count,
                content_type=item.content_type,
                height=item.height,
                width=item.width,
            ),
        )
        header.byte_size += item.byte_size
        header.num_frames += item.num_frames
        header.num_items += 0 if self._raw else 1


def _pieces_of(packet: Packet, message: artifacts_pb2.MediaItem) -> list[bytes | memoryview]:
    """The bytes of an item. The packet of an item has one tensor, the data."""
    paths = list(packet.chunks)
    return list(packet.payload(paths[0] if paths else "", message.data))


FILES = "files"
"""Slot of the files of a streamed result. No stage writes to a slot of this name."""


@dataclass(frozen=True)
class ResultRunner:
    """The last runner of a pipeline with a streamed result. Stores the stream in `slot` and returns the files."""

    slot: str
    result: ResultStream

    @property
    def contract(self) -> Contract:
        """Input: the stream of items. Output: the files."""
        return Contract("ResultRunner", {self.slot: "Stream[MediaItem]"}, {FILES: FILES})

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        """Store the items as they arrive. Raises the errors of ResultStream."""
        del call
        return {FILES: await self.result.take(_indexed(values[self.slot]))}


async def _indexed(stream: ItemBuffer) -> AsyncIterator[tuple[int, Packet]]:
    index = 0
    async for packet, _ in stream.read(forgets=True):
        yield index, packet
        del packet
        index += 1
