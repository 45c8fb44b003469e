"""Hypothesis strategies for untrusted input: mutated valid input, unusual messages, and noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Frames = tuple[bytes, ...]
"""One input: the frames of a call, or a single frame."""

_DEPTH = 4
_TEXT = (
    "",
    "a",
    "x" * 200,
    "prompt",
    "../../etc/passwd",
    "\x00",
    "\n",
    "ü\u202e😀",
    "latents",
    "1e999",
    "%s{}",
    "a/b|c",
)
_KINDS = ("flip", "cut", "insert", "repeat", "noise", "splice")
_TOKENS = (
    b"\x00",
    b"\xff" * 10,
    b"\x80" * 11,
    b"\x7f",
    b"\xf8\x01\x01",
    b"\x0a\xff\xff\xff\xff\x0f",
    b'"',
    b"{}",
    b"9" * 40,
)

_INTS = {
    32: st.sampled_from((0, 1, 2, -1, 7, 64, 255, 65536, 2**31 - 1, -(2**31))),
    64: st.sampled_from((0, 1, 2, -1, 7, 64, 4096, 2**31, 2**40, 2**53, 2**63 - 1, -(2**63))),
}
_UNSIGNED = {
    32: st.sampled_from((0, 1, 2, 7, 1000, 2**31, 2**32 - 1)),
    64: st.sampled_from((0, 1, 4, 64, 2**20, 2**32, 2**53, 2**63, 2**64 - 1)),
}
_FLOATS = st.sampled_from((0.0, -0.0, 1.0, 3.3, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")))


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    strategies = {
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_DOUBLE: _FLOATS,
        FieldDescriptor.TYPE_STRING: st.sampled_from(_TEXT) | st.text(max_size=8),
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
        FieldDescriptor.TYPE_INT32: _INTS[32],
        FieldDescriptor.TYPE_ENUM: _INTS[32],
        FieldDescriptor.TYPE_INT64: _INTS[64],
        FieldDescriptor.TYPE_UINT32: _UNSIGNED[32],
        FieldDescriptor.TYPE_UINT64: _UNSIGNED[64],
        FieldDescriptor.TYPE_FIXED64: _UNSIGNED[64],
    }
    return cast("st.SearchStrategy[Any]", strategies[field.type])


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = _DEPTH) -> Message:
    """A well-formed message of a type, with arbitrary fields and unusual values."""
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.booleans()):
            _fill(draw, message, field, depth)
    return cast(Message, message)


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int) -> None:
    kind = field.message_type
    if kind is not None and depth == 0:
        return
    if kind is not None and kind.GetOptions().map_entry:
        value = kind.fields_by_name["value"]
        for key in draw(st.lists(st.sampled_from(_TEXT), max_size=2)):
            if value.message_type is None:
                getattr(message, field.name)[key] = draw(_scalar(value))
            else:
                getattr(message, field.name)[key].CopyFrom(draw(messages(value.message_type, depth - 1)))
    elif kind is not None:
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(messages(kind, depth - 1), max_size=2)))
        else:
            getattr(message, field.name).CopyFrom(draw(messages(kind, depth - 1)))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_scalar(field), max_size=4)))
    else:
        setattr(message, field.name, draw(_scalar(field)))


@st.composite
def mutated(draw: st.DrawFn, frame: bytes, others: Sequence[bytes]) -> bytes:
    """A frame with a few mutations."""
    data = bytearray(frame)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from((1, 1, 2, 8, 64)))
        match draw(st.sampled_from(_KINDS)):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + size]
            case "insert":
                data[at:at] = draw(st.sampled_from(_TOKENS))
            case "repeat":
                data[at:at] = data[at : at + size] * draw(st.sampled_from((1, 3, 50)))
            case "noise":
                data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
            case "splice":
                data[at:] = draw(st.sampled_from(others))[at:]
    return bytes(data)


@st.composite
def inputs(draw: st.DrawFn, seeds: Sequence[Frames], types: Sequence[Descriptor]) -> Frames:
    """Frames for a target: noise, or a seed with mutated, extended, dropped, inserted or reversed frames."""
    pieces = [frame for seed in seeds for frame in seed] or [b""]
    if not seeds or draw(st.integers(0, 9)) == 0:
        return tuple(draw(st.lists(st.binary(max_size=64), max_size=3)))
    frames = list(draw(st.sampled_from(seeds)))
    for index in range(min(len(frames), 8)):
        if draw(st.booleans()):
            frames[index] = draw(mutated(frames[index], pieces))
        if types and draw(st.integers(0, 2)) == 0:
            # Protobuf merges concatenated messages: only the fields of the second message change.
            frames[index] += draw(messages(draw(st.sampled_from(types)))).SerializeToString()
    match draw(st.integers(0, 9)):
        case 0 if frames:
            del frames[draw(st.integers(0, len(frames) - 1))]
        case 1:
            frames.insert(draw(st.integers(0, len(frames))), draw(st.sampled_from(pieces)))
        case 2:
            frames.reverse()
    return tuple(frames)


_MORE_TOKENS = (
    *_TOKENS,
    b"null",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"[callers",
    b"=",
    b"\n",
    b"[" * 5000,
    b'{"a":' * 5000,
)


def any_input(rng: random.Random, seeds: Sequence[Frames]) -> Frames:
    """Draw mutated frames without Hypothesis: no shrinking, but many times faster."""
    pieces = [frame for seed in seeds for frame in seed] or [b""]
    frames = [_mutate(rng, frame, pieces) if rng.random() < 0.6 else frame for frame in rng.choice(seeds)]
    match rng.randint(0, 12):
        case 0 if frames:
            del frames[rng.randrange(len(frames))]
        case 1:
            frames.insert(rng.randint(0, len(frames)), rng.choice(pieces))
        case 2:
            frames.reverse()
    return tuple(frames)


def _mutate(rng: random.Random, frame: bytes, others: Sequence[bytes]) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
        at, size = rng.randint(0, len(data)), rng.choice((1, 1, 2, 8, 64))
        match rng.choice(_KINDS):
            case "flip" if at < len(data):
                data[at] ^= 1 << rng.randint(0, 7)
            case "cut":
                del data[at : at + size]
            case "insert":
                data[at:at] = rng.choice(_MORE_TOKENS)
            case "repeat":
                data[at:at] = data[at : at + size] * rng.choice((1, 3, 50))
            case "noise":
                data[at : at + size] = rng.randbytes(size)
            case "splice":
                data[at:] = rng.choice(others)[at:]
    return bytes(data)
