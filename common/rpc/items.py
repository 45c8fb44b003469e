"""Encodes and decodes items of streams: a StreamItem frame, then the chunks of its tensors."""

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
"""Field name of StreamItem by message name."""


@dataclass(frozen=True)
class ReceivedItem:
    """A complete item."""

    slot: str
    index: int
    packet: Packet


def item_frames(frame: type[Message], slot: str, index: int, packet: Packet) -> Iterator[bytes]:
    """Yield the serialized frames of an item. `frame` is the frame type of the RPC."""
    message: Any = frame()
    message.item.slot, message.item.index = slot, index
    getattr(message.item, _FIELDS[packet.message.DESCRIPTOR.name]).CopyFrom(packet.message)
    yield cast(bytes, message.SerializeToString())
    yield from chunk_frames(packet.chunks)


class ItemAssembler:
    """Assembles the items of a call from frames, one item at a time.

    `kinds` maps slots to the message names of their items. `store_of` returns the factory that creates the Store
    of each payload of a slot.
    """

    def __init__(self, kinds: Mapping[str, str], limits: CallLimits, store_of: Callable[[str], StoreFactory]) -> None:
        self._kinds = kinds
        self._limits = limits
        self._store_of = store_of
        self._item: tuple[str, int, Message] | None = None
        self._chunks: Assembler | None = None

    @property
    def is_within_item(self) -> bool:
        """Whether an item is incomplete."""
        return self._item is not None

    def takes(self, chunk: ChunkView) -> bool:
        """Return whether a chunk belongs to the incomplete item."""
        return self._item is not None and chunk.path.startswith(f"{self._item[0]}.")

    def begin(self, item: pb.StreamItem) -> ReceivedItem | None:
        """Start an item. Returns it if no chunks follow. Raises InvalidInput for an invalid item."""
        if self._item is not None:
            raise InvalidInput(
                f"{item.slot!r}: an item starts before the item of {self._item[0]!r} is complete", field=item.slot
            )
        if item.slot not in self._kinds:
            raise InvalidInput(
                f"{item.slot[:80]!r}: an item was sent for a slot that is no stream of this call", field=item.slot[:80]
            )
        name = item.WhichOneof("artifact")
        if name is None or name != _FIELDS.get(self._kinds[item.slot]):
            raise InvalidInput(
                f"{item.slot}: {name or 'no artifact'} is not {_FIELDS.get(self._kinds[item.slot])}, its artifact",
                field=item.slot,
            )
        message: Message = getattr(item, name)
        tensors = described_tensors(item.slot, message, self._limits)
        self._item, self._chunks = (item.slot, item.index, message), Assembler(tensors, self._store_of(item.slot))
        return self._completed()

    def add(self, chunk: ChunkView) -> ReceivedItem | None:
        """Add a chunk for which takes() is true. Returns the item if it is complete. Raises InvalidInput."""
        assert self._chunks is not None, "takes() was not checked"
        self._chunks.add(chunk)
        return self._completed()

    def _completed(self) -> ReceivedItem | None:
        if self._item is None or self._chunks is None or not self._chunks.complete:
            return None
        slot, index, message = self._item
        item = ReceivedItem(slot, index, Packet(message, self._chunks.finish()))
        self._item = self._chunks = None
        return item
