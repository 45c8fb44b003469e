"""Items of streams on the wire: a StreamItem frame, then the chunks of the tensors that it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from google.protobuf.message import Message

from common.errors import InvalidInput
from common.rpc.frames import ChunkView
from common.rpc.framing import Assembler, CallLimits, Packet, StoreFactory, chunk_frames, described_tensors
from fleet.v1 import artifacts_pb2 as pb

_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        field.message_type.name: field.name
        for field in pb.StreamItem.DESCRIPTOR.oneofs_by_name["artifact"].fields
        if field.message_type is not None
    }
)
"""The field of StreamItem for a message, by the message's name."""


@dataclass(frozen=True)
class ReceivedItem:
    """An item that is complete."""

    slot: str
    index: int
    packet: Packet


def item_frames(frame: type[Message], slot: str, index: int, packet: Packet) -> Iterator[bytes]:
    """The serialised frames of an item, made one at a time. `frame` is the type of the frames of the RPC."""
    message: Any = frame()
    message.item.slot, message.item.index = slot, index
    getattr(message.item, _FIELDS[packet.message.DESCRIPTOR.name]).CopyFrom(packet.message)
    yield cast(bytes, message.SerializeToString())
    yield from chunk_frames(packet.chunks)


class ItemAssembler:
    """Puts the items of a call together, one after the other.

    `kinds` are the messages of the streams' items, by slot; `store_of` makes the stores of a slot's payloads.
    """

    def __init__(self, kinds: Mapping[str, str], limits: CallLimits, store_of: Callable[[str], StoreFactory]) -> None:
        self._kinds = kinds
        self._limits = limits
        self._store_of = store_of
        self._item: tuple[str, int, Message] | None = None
        self._chunks: Assembler | None = None

    @property
    def is_within_item(self) -> bool:
        """Whether chunks of an item are still to come."""
        return self._item is not None

    def takes(self, chunk: ChunkView) -> bool:
        """Whether a chunk belongs to the item whose chunks are to come."""
        return self._item is not None and chunk.path.startswith(f"{self._item[0]}.")

    def begin(self, item: pb.StreamItem) -> ReceivedItem | None:
        """Take the frame of an item; returns the item if no chunks follow. Raises InvalidInput for a wrong one."""
        if self._item is not None:
            raise InvalidInput(f"an item of {item.slot!r} begins before {self._item[0]!r} is complete", field=item.slot)
        if item.slot not in self._kinds:
            raise InvalidInput(f"an item of {item.slot[:80]!r}, which is no stream of this call", field=item.slot[:80])
        name = item.WhichOneof("artifact")
        if name is None or name != _FIELDS.get(self._kinds[item.slot]):
            raise InvalidInput(f"an item of {item.slot} has {name or 'no artifact'}", field=item.slot)
        message: Message = getattr(item, name)
        tensors = described_tensors(item.slot, message, self._limits)
        self._item, self._chunks = (item.slot, item.index, message), Assembler(tensors, self._store_of(item.slot))
        return self._completed()

    def add(self, chunk: ChunkView) -> ReceivedItem | None:
        """Take a chunk that takes() accepts; returns the item if it was the last one. Raises InvalidInput."""
        assert self._chunks is not None, "takes() was asked before"
        self._chunks.add(chunk)
        return self._completed()

    def _completed(self) -> ReceivedItem | None:
        if self._item is None or self._chunks is None or not self._chunks.complete:
            return None
        slot, index, message = self._item
        item = ReceivedItem(slot, index, Packet(message, self._chunks.finish()))
        self._item = self._chunks = None
        return item
