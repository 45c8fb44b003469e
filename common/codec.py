"""Encodes artifacts as packets and decodes them. A dataclass and its message have fields of the same names.

This module does not import torch. A TensorLeaf converts tensors: common.tensors.TORCH in workers, NO_TENSORS in
processes that pack only Prompt, Canvas, Sampling and files. If the fields of a dataclass and its message differ, the
first use raises TypeError. A value that its field cannot hold raises InvalidInput with the path of the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from mmap import mmap
from typing import Any, Protocol, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from common import artifacts
from common.artifacts import ParamValue, artifact_name, message_name
from common.errors import InvalidInput
from common.rpc.frames import INLINE_BYTES, INLINE_TOTAL_BYTES
from common.rpc.framing import Packet, Piece, checksum
from fleet.v1 import artifacts_pb2 as pb

T = TypeVar("T")


class TensorLeaf(Protocol):
    """Converts tensors to bytes and back."""

    def view(self, path: str, value: Any) -> tuple[pb.Dtype.ValueType, Sequence[int], memoryview]:
        """Return Dtype, shape and bytes of a tensor. The view holds a reference to the tensor's memory."""

    def restore(self, path: str, tensor: pb.Tensor, buffer: bytearray | mmap) -> Any:
        """Return a tensor that uses the beginning of `buffer` as its storage."""


class NoTensors:
    """TensorLeaf of processes without torch: supports only files, which are bytes, as uint8 tensors."""

    def view(self, path: str, value: Any) -> tuple[pb.Dtype.ValueType, Sequence[int], memoryview]:
        """Return the bytes of a file. Raises TypeError for any other value."""
        if isinstance(value, bytes):
            return pb.DTYPE_UINT8, (len(value),), memoryview(value)
        raise TypeError(f"{path} is a {type(value).__name__}; packing tensors requires common.tensors.TORCH")

    def restore(self, path: str, tensor: pb.Tensor, buffer: bytearray | mmap) -> Any:
        """Raise TypeError: tensors cannot be restored without torch."""
        raise TypeError(
            f"{path} is a tensor of {len(tensor.shape)} dimensions and {len(buffer)} bytes; unpacking tensors requires "
            "common.tensors.TORCH"
        )


NO_TENSORS = NoTensors()


def artifact_class(name: str) -> type[Any]:
    """Return the artifact class of a message name. Raises TypeError if there is none."""
    cls = vars(artifacts).get(artifact_name(name))
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and name in pb.DESCRIPTOR.message_types_by_name):
        raise TypeError(f"{name!r} is not an artifact")
    return cls


def pack(slot: str, artifact: Any, leaf: TensorLeaf = NO_TENSORS) -> Packet:
    """Return the packet of an artifact for a slot. References the memory of large CPU tensors without a copy."""
    name = message_name(type(artifact).__name__)
    if artifact_class(name) is not type(artifact):
        raise TypeError(f"{slot}: {name} is not an artifact")
    message = GetMessageClass(pb.DESCRIPTOR.message_types_by_name[name])()
    writer = _Writer(leaf)
    writer.write(slot, artifact, message)
    return Packet(message, writer.payloads)


def unpack(slot: str, cls: type[T], packet: Packet, leaf: TensorLeaf = NO_TENSORS) -> T:
    """Return the artifact in a packet. Maps are sorted by key, because protobuf maps are unordered.

    Raises InvalidInput for a missing field, and TypeError if the artifact is not a `cls`.
    """
    if packet.message.DESCRIPTOR.name != message_name(cls.__name__):
        raise TypeError(f"{slot} contains a {packet.message.DESCRIPTOR.name}, not a {cls.__name__}")
    reader = _Reader(leaf, packet)
    result: T = reader.read(slot, packet.message)
    return result


@cache
def _fields(name: str) -> tuple[tuple[FieldDescriptor, bool], ...]:
    """Return each field of an artifact's message, and whether the dataclass field has a default."""
    cls, descriptor = artifact_class(name), pb.DESCRIPTOR.message_types_by_name[name]
    ours = {item.name: item for item in dataclasses.fields(cls)}
    theirs = {item.name: item for item in descriptor.fields}
    if ours.keys() != theirs.keys():
        raise TypeError(f"{cls.__name__} and {descriptor.full_name} differ in {sorted(ours.keys() ^ theirs.keys())}")
    missing = dataclasses.MISSING
    return tuple(
        (theirs[each], item.default is not missing or item.default_factory is not missing)
        for each, item in ours.items()
    )


def _map_value(descriptor: FieldDescriptor) -> FieldDescriptor | None:
    entry = descriptor.message_type
    if entry is None or not entry.GetOptions().map_entry:
        return None
    return entry.fields_by_name["value"]


class _Writer:
    def __init__(self, leaf: TensorLeaf) -> None:
        self._leaf = leaf
        self._inline_left = INLINE_TOTAL_BYTES
        self.payloads: dict[str, Sequence[Piece]] = {}

    def write(self, path: str, value: Any, message: Message) -> None:
        if message_name(type(value).__name__) != message.DESCRIPTOR.name:
            raise InvalidInput(f"{path} is a {type(value).__name__}, not a {message.DESCRIPTOR.name}", field=path)
        for descriptor, _ in _fields(message.DESCRIPTOR.name):
            item = getattr(value, descriptor.name)
            if item is not None or not descriptor.has_presence:
                self._write_field(f"{path}.{descriptor.name}", item, descriptor, message)

    def _write_field(self, path: str, item: Any, descriptor: FieldDescriptor, message: Message) -> None:
        name = descriptor.name
        if _map_value(descriptor) is not None:
            for key, each in item.items():
                self._write_message(f"{path}.{key}", each, getattr(message, name)[key])
        elif descriptor.message_type is None:
            with _refusing(path, item):
                if descriptor.is_repeated:
                    getattr(message, name).extend(item)
                else:
                    setattr(message, name, item)
        elif descriptor.is_repeated:
            for index, each in enumerate(item):
                self._write_message(f"{path}.{index}", each, getattr(message, name).add())
        else:
            child = getattr(message, name)
            child.SetInParent()
            self._write_message(path, item, child)

    def _write_message(self, path: str, item: Any, message: Any) -> None:
        if isinstance(message, pb.Tensor):
            self._write_tensor(path, item, message)
        elif isinstance(message, pb.ParamValue):
            message.CopyFrom(write_param(path, item))
        else:
            self.write(path, item, message)

    def _write_tensor(self, path: str, value: Any, message: pb.Tensor) -> None:
        dtype, shape, view = self._leaf.view(path, value)
        message.dtype = dtype
        message.shape.extend(shape)
        message.byte_size = len(view)
        if len(view) <= min(INLINE_BYTES, self._inline_left):
            self._inline_left -= len(view)
            message.data = bytes(view)
        else:
            message.checksum = checksum((view,))
            self.payloads[path] = (Piece(view),)


class _Reader:
    def __init__(self, leaf: TensorLeaf, packet: Packet) -> None:
        self._leaf = leaf
        self._packet = packet

    def read(self, path: str, message: Message) -> Any:
        cls = artifact_class(message.DESCRIPTOR.name)
        values: dict[str, Any] = {}
        for descriptor, has_default in _fields(message.DESCRIPTOR.name):
            name, at = descriptor.name, f"{path}.{descriptor.name}"
            if descriptor.has_presence and not message.HasField(name):
                if not has_default:
                    raise InvalidInput(f"{at} is missing; {cls.__name__} needs it", field=at)
                continue
            values[name] = self._read_field(at, getattr(message, name), descriptor)
        return cls(**values)

    def _read_field(self, path: str, item: Any, descriptor: FieldDescriptor) -> Any:
        if _map_value(descriptor) is not None:
            return {key: self._read_message(f"{path}.{key}", item[key]) for key in sorted(item)}
        if descriptor.message_type is None:
            return tuple(item) if descriptor.is_repeated else item
        if descriptor.is_repeated:
            return tuple(self._read_message(f"{path}.{index}", each) for index, each in enumerate(item))
        return self._read_message(path, item)

    def _read_message(self, path: str, message: Any) -> Any:
        if isinstance(message, pb.Tensor):
            return self._leaf.restore(path, message, self._buffer(path, message))
        if isinstance(message, pb.ParamValue):
            return read_param(path, message)
        return self.read(path, message)

    def _buffer(self, path: str, tensor: pb.Tensor) -> bytearray | mmap:
        if tensor.HasField("data"):
            return bytearray(tensor.data)
        pieces = self._packet.chunks.get(path, ())
        if len(pieces) == 1 and pieces[0].owner is not None:
            return pieces[0].owner
        buffer = bytearray().join(piece.data for piece in pieces)
        if len(buffer) != tensor.byte_size:
            raise InvalidInput(f"{path} has {len(buffer)} of {tensor.byte_size} bytes", field=path)
        return buffer


def write_param(path: str, value: ParamValue) -> pb.ParamValue:
    """Return the message of a parameter. Raises InvalidInput for a value that the message cannot hold."""
    message = pb.ParamValue()
    with _refusing(path, value):
        match value:
            case bool():
                message.bool_value = value
            case int():
                message.int_value = value
            case float():
                message.double_value = value
            case str():
                message.string_value = value
            case tuple():
                message.doubles_value.SetInParent()
                message.doubles_value.values.extend(value)
            case _:
                raise TypeError("not a bool, int, float, str or tuple of floats")
    return message


def read_param(path: str, message: pb.ParamValue) -> ParamValue:
    """Return the value of a parameter. Raises InvalidInput if no value is set."""
    match message.WhichOneof("kind"):
        case "bool_value":
            return message.bool_value
        case "int_value":
            return message.int_value
        case "double_value":
            return message.double_value
        case "string_value":
            return message.string_value
        case "doubles_value":
            return tuple(message.doubles_value.values)
        case _:
            raise InvalidInput(f"{path} has no value", field=path)


@contextmanager
def _refusing(path: str, value: object) -> Iterator[None]:
    """Convert protobuf's errors for an invalid value to InvalidInput."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{path}: {_brief(value)} is not valid: {error}", field=path) from error


def _brief(value: object) -> str:
    if isinstance(value, (Mapping, tuple, list)):
        return f"this {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
