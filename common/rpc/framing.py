"""Packets: the wire representation of artifacts, and the validation of received tensors. Does not import torch.

A Packet is an artifact's message, which contains small tensors inline, and the payloads of large tensors by path
("slot.field.key"). chunk_frames() converts payloads to frames, and an Assembler joins chunks to payloads. An invalid
tensor or chunk raises InvalidInput with the path. The coordinator forwards payloads without decoding them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import Protocol

import xxhash
from google.protobuf.message import Message

from common.errors import InvalidInput, ResourceExhausted
from common.rpc.buffers import BufferLease
from common.rpc.frames import CHUNK_BYTES, INLINE_BYTES, ChunkView, Data, chunk_frame
from fleet.v1 import artifacts_pb2 as pb

ITEM_BYTES: Mapping[int, int] = {
    pb.DTYPE_FLOAT32: 4,
    pb.DTYPE_BFLOAT16: 2,
    pb.DTYPE_FLOAT16: 2,
    pb.DTYPE_INT64: 8,
    pb.DTYPE_UINT8: 1,
    pb.DTYPE_FLOAT64: 8,
    pb.DTYPE_INT32: 4,
    pb.DTYPE_BOOL: 1,
}
"""Element size in bytes, by Dtype."""


@dataclass(frozen=True)
class CallLimits:
    """Limits of the tensors of one header or of one item of a stream."""

    total_bytes: int = 2 << 30
    tensors: int = 4096
    dimensions: int = 8
    path_length: int = 512


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of a payload.

    `frame` is the serialized chunk frame of the bytes, if it can be forwarded unchanged. `owner` is the buffer that
    starts with this payload, if a tensor may use it as storage.
    """

    data: Data
    frame: bytes = b""
    owner: mmap | None = None


Payloads = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class Packet:
    """Wire representation of an artifact: its message, and the payloads of its large tensors by path."""

    message: Message
    chunks: Payloads = field(default_factory=dict)

    @property
    def byte_size(self) -> int:
        """Size of the message and the payloads in bytes."""
        return self.message.ByteSize() + sum(len(piece.data) for pieces in self.chunks.values() for piece in pieces)

    def payload(self, path: str, tensor: pb.Tensor) -> Iterator[Data]:
        """Yield the bytes of a tensor of the packet: inline data as a whole, or the pieces of its payload."""
        if tensor.HasField("data"):
            yield tensor.data
        else:
            yield from (piece.data for piece in self.chunks[path])

    def renamed(self, old: str, new: str) -> Packet:
        """Return the packet for another slot: replaces the prefix `old` of its paths by `new`."""
        return Packet(
            self.message,
            {
                new + path.removeprefix(old): [Piece(piece.data, owner=piece.owner) for piece in pieces]
                for path, pieces in self.chunks.items()
            },
        )


def checksum(parts: Sequence[Data]) -> int:
    """Return the XXH3-64 checksum of concatenated parts."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def tensors_of(path: str, message: Message) -> Iterator[tuple[str, pb.Tensor]]:
    """Yield all tensors of a message with their paths. `path` is the path of the message."""
    if isinstance(message, pb.Tensor):
        yield path, message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        at = f"{path}.{descriptor.name}" if path else descriptor.name
        if descriptor.message_type.GetOptions().map_entry:
            if descriptor.message_type.fields_by_name["value"].message_type is not None:
                for key in sorted(value):
                    yield from tensors_of(f"{at}.{key}", value[key])
        elif isinstance(value, Message):
            yield from tensors_of(at, value)
        else:
            for index, item in enumerate(value):
                yield from tensors_of(f"{at}.{index}", item)


def described_tensors(path: str, message: Message, limits: CallLimits) -> dict[str, pb.Tensor]:
    """Validate the tensors of a header, and return the tensors whose payloads follow in chunks.

    Raises InvalidInput for an inconsistent tensor, and ResourceExhausted if the tensors exceed `limits.total_bytes`.
    """
    following: dict[str, pb.Tensor] = {}
    total = 0
    for count, (at, tensor) in enumerate(tensors_of(path, message), start=1):
        _check_tensor(at, tensor, limits)
        total += tensor.byte_size
        if count > limits.tensors:
            raise InvalidInput(
                f"{at}: {count} tensors are not at most {limits.tensors}, the limit of one message", field=at
            )
        if total > limits.total_bytes:
            raise ResourceExhausted(
                f"{at}: a total of {total} bytes is not at most {limits.total_bytes} bytes, the limit of all tensors",
                field=at,
            )
        if not tensor.HasField("data"):
            following[at] = tensor
    return following


def _check_tensor(path: str, tensor: pb.Tensor, limits: CallLimits) -> None:
    if len(path) > limits.path_length:
        raise InvalidInput(
            f"{path[:64]}: a path of {len(path)} characters is not at most {limits.path_length}", field=path[:64]
        )
    shape = list(tensor.shape)
    if tensor.dtype not in ITEM_BYTES:
        raise InvalidInput(f"{path}: dtype {tensor.dtype} is not a Dtype of this release", field=path)
    if len(shape) > limits.dimensions or any(extent < 0 for extent in shape):
        raise InvalidInput(
            f"{path}: shape {shape[:16]} is not valid; at most {limits.dimensions} extents of at least 0 work",
            field=path,
        )
    size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
    if size != tensor.byte_size:
        raise InvalidInput(
            f"{path}: byte_size {tensor.byte_size} is not {size}, the size of shape {shape} of "
            f"{pb.Dtype.Name(tensor.dtype)}",
            field=path,
        )
    if tensor.HasField("data"):
        if len(tensor.data) != size:
            raise InvalidInput(
                f"{path}: {len(tensor.data)} bytes of inline data are not {size} bytes, the byte_size", field=path
            )
        if size > INLINE_BYTES:
            raise InvalidInput(
                f"{path}: {size} bytes of inline data are not at most {INLINE_BYTES}; chunks work", field=path
            )
    elif size == 0:
        raise InvalidInput(f"{path}: an empty tensor is not inline; inline data of 0 bytes works", field=path)


class Store(Protocol):
    """Destination of the payload of one tensor."""

    def add(self, chunk: ChunkView) -> None:
        """Store the next bytes."""

    def pieces(self) -> Sequence[Piece]:
        """Return the complete payload."""


class KeptFrames:
    """Stores chunks in their received frames: without a copy, and ready to be forwarded."""

    def __init__(self, size: int) -> None:
        del size
        self._pieces: list[Piece] = []

    def add(self, chunk: ChunkView) -> None:
        """Store the next bytes."""
        self._pieces.append(Piece(chunk.data, chunk.frame))

    def pieces(self) -> Sequence[Piece]:
        """Return one piece per chunk."""
        return self._pieces


class PooledPayload:
    """Copies chunks to one pooled buffer, which a tensor can use as storage."""

    def __init__(self, size: int, lease: BufferLease) -> None:
        self._buffer, self._view = lease.take(size)

    def add(self, chunk: ChunkView) -> None:
        """Store the next bytes."""
        self._view[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data

    def pieces(self) -> Sequence[Piece]:
        """Return the whole payload as one piece."""
        return (Piece(self._view, owner=self._buffer),)


class Dropped:
    """Discards the payload of an item whose stream has no reader."""

    def __init__(self, size: int) -> None:
        del size

    def add(self, chunk: ChunkView) -> None:
        """Discard the next bytes."""

    def pieces(self) -> Sequence[Piece]:
        """Return no pieces."""
        return ()


class StoreFactory(Protocol):
    """Creates the Store of one payload."""

    def __call__(self, size: int, /) -> Store:
        """Return a Store for a payload of `size` bytes."""


class Assembler:
    """Collects the payloads that one header describes. Chunks of a tensor arrive in order; tensors may interleave."""

    def __init__(self, tensors: Mapping[str, pb.Tensor], make_store: StoreFactory) -> None:
        self._tensors = tensors
        self._stores = {path: make_store(tensor.byte_size) for path, tensor in tensors.items()}
        self._received = dict.fromkeys(tensors, 0)
        self._digests = {path: xxhash.xxh3_64() for path in tensors}
        self._missing = len(tensors)

    @property
    def complete(self) -> bool:
        """Whether all payloads are complete."""
        return not self._missing

    def add(self, chunk: ChunkView) -> None:
        """Add a chunk. Raises InvalidInput if it is not the next chunk of a payload, or if the checksum is wrong."""
        path, offset, data = chunk.path, chunk.offset, chunk.data
        if path not in self._tensors:
            raise InvalidInput(f"{path!r}: a chunk was sent for a tensor that the header does not describe", field=path)
        size, received = self._tensors[path].byte_size, self._received[path]
        if not 0 < len(data) <= CHUNK_BYTES:
            raise InvalidInput(
                f"{path}: a chunk of {len(data)} bytes is not valid; 1 to {CHUNK_BYTES} bytes work", field=path
            )
        if offset != received:
            raise InvalidInput(
                f"{path}: chunk offset {offset} is not {received}, the number of received bytes", field=path
            )
        if offset + len(data) > size:
            raise InvalidInput(
                f"{path}: a chunk that ends at {offset + len(data)} is not within the tensor's {size} bytes", field=path
            )
        self._stores[path].add(chunk)
        self._digests[path].update(data)
        self._received[path] = offset + len(data)
        if self._received[path] == size:
            self._missing -= 1
            self._check_digest(path)

    def _check_digest(self, path: str) -> None:
        announced, found = self._tensors[path].checksum, self._digests[path].intdigest()
        if announced != found:
            raise InvalidInput(
                f"{path}: the payload's checksum {found:016x} is not {announced:016x}, the header's checksum",
                field=path,
            )

    def finish(self) -> dict[str, Sequence[Piece]]:
        """Return the payloads by path. Raises InvalidInput if a payload is incomplete."""
        for path, received in self._received.items():
            size = self._tensors[path].byte_size
            if received != size:
                raise InvalidInput(f"{path}: the payload ended after {received} of {size} bytes", field=path)
        return {path: store.pieces() for path, store in self._stores.items()}


def split_packets(header: Message, payloads: Payloads) -> dict[str, Packet]:
    """Return one packet for each slot that is present in a header."""
    chunks: dict[str, dict[str, Sequence[Piece]]] = {}
    for path, pieces in payloads.items():
        chunks.setdefault(path.partition(".")[0], {})[path] = pieces
    return {field.name: Packet(value, chunks.get(field.name, {})) for field, value in header.ListFields()}


def chunk_frames(payloads: Payloads) -> Iterator[bytes]:
    """Yield the chunk frames of payloads. Received frames are forwarded unchanged."""
    for path, pieces in payloads.items():
        offset = 0
        for piece in pieces:
            if piece.frame:
                yield piece.frame
            else:
                view = memoryview(piece.data)
                for start in range(0, len(view), CHUNK_BYTES):
                    yield chunk_frame(path, offset + start, view[start : start + CHUNK_BYTES])
            offset += len(piece.data)
