"""Parses messages in handlers, so that errors name the invalid field.

If gRPC parsed the messages, it would return INTERNAL without a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from common.errors import InvalidInput
from common.rpc.method import TOKENS_KEY

M = TypeVar("M", bound=Message)

_LENGTH_DELIMITED = 2
_MOST_DIGITS = 20


class _RawField(NamedTuple):
    """Element of UnknownFieldSet, which its type stub does not declare."""

    field_number: int
    wire_type: int
    data: bytes


def parse(message_type: type[M], raw: bytes) -> M:
    """Parse a message. Raises InvalidInput, with the field if a string is not UTF-8."""
    try:
        return message_type.FromString(raw)
    except DecodeError:
        descriptor = cast(Descriptor, message_type.DESCRIPTOR)
        if path := _first_bad_text(descriptor, raw):
            raise InvalidInput(f"{path} is not valid UTF-8", field=path) from None
        raise InvalidInput(f"the bytes are not a {descriptor.full_name}") from None


def read_tokens(metadata: Mapping[str, str | bytes]) -> int:
    """Return StageWork.tokens, the relative size of one step, from metadata; 0 if missing or invalid."""
    text = metadata.get(TOKENS_KEY, "")
    is_number = isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS
    return int(text) if is_number else 0


def refuse_unknown_fields(path: str, message: Message) -> None:
    """Raise InvalidInput for unknown fields, so that no field is ignored silently."""
    for unknown in _unknown_fields(message):
        at = path or message.DESCRIPTOR.name
        raise InvalidInput(f"{at}: this release does not support the field {unknown.field_number}", field=at)
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        at = f"{path}.{descriptor.name}" if path else descriptor.name
        if descriptor.message_type.GetOptions().map_entry:
            if descriptor.message_type.fields_by_name["value"].message_type is not None:
                for key, item in value.items():
                    refuse_unknown_fields(f"{at}.{key}", item)
        elif isinstance(value, Message):
            refuse_unknown_fields(at, value)
        else:
            for index, item in enumerate(value):
                refuse_unknown_fields(f"{at}.{index}", item)


def _unknown_fields(message: Message) -> Iterator[_RawField]:
    return iter(cast(Iterable[_RawField], UnknownFieldSet(message)))


def _first_bad_text(descriptor: Descriptor, raw: bytes) -> str:
    """Return the path of the first string field that is not UTF-8; empty if there is none.

    The path is also empty if `raw` is not a valid message. Parsing `raw` as Empty yields all fields as unknown fields
    with their bytes; the descriptor identifies strings.
    """
    try:
        fields = list(_unknown_fields(Empty.FromString(raw)))
    except DecodeError:
        return ""
    for field in fields:
        known = descriptor.fields_by_number.get(field.field_number)
        if known is None or field.wire_type != _LENGTH_DELIMITED:
            continue
        for name in _bad_text_in(known, field.data):
            return name
    return ""


def _bad_text_in(field: FieldDescriptor, data: bytes) -> Iterator[str]:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data.decode()
        except UnicodeDecodeError:
            yield field.name
    elif field.message_type is not None and (inner := _first_bad_text(field.message_type, data)):
        yield f"{field.name}.{inner}"
