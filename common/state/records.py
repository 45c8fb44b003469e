"""Between what the store keeps of a request and the public API's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

from google.protobuf.timestamp_pb2 import Timestamp

from common.errors import FailedPrecondition, NotFound
from common.state.connection import PREFIX
from fleet.v1 import generation_pb2

State = generation_pb2.RequestState
StateValue: TypeAlias = "generation_pb2.RequestState.ValueType"

CHUNK_BYTES = 1 << 20
# Chunks of a result are sent to Redis in batches of about this size, so that a long video is not copied as a whole.
_BATCH_BYTES = 8 << 20
SNAPSHOT = ("record", "extra", "state", "created", "updated")
"""The fields of a stored request that make its record, in the order of read_record()."""


@dataclass(frozen=True)
class ResultFile:
    """A file of a result: its header, and its bytes in pieces of any size; no bytes for one that is stored by items."""

    header: generation_pb2.FileHeader
    pieces: Sequence[bytes | memoryview] = field(repr=False)


class Cancellation(NamedTuple):
    """A request after the attempt to cancel it. `ended_here`: no coordinator ran it, and this attempt ended it."""

    record: generation_pb2.RequestRecord
    ended_here: bool


def state_event(
    state: StateValue, error: generation_pb2.Error | None = None, *, steps_saved: int = 0
) -> generation_pb2.Event:
    """The event of a change of state."""
    change = generation_pb2.StateChange(state=state, error=error, steps_saved=steps_saved)
    return generation_pb2.Event(state_change=change)


def is_terminal(state: int) -> bool:
    """Whether a request in this state has ended."""
    return state >= State.REQUEST_STATE_SUCCEEDED


def chunks_of(pieces: Sequence[bytes | memoryview]) -> list[memoryview]:
    """The bytes of all pieces, cut at 1 MiB; pieces that end elsewhere are joined, which copies them."""
    whole = [memoryview(piece) for piece in pieces if len(piece)]
    if any(len(piece) % CHUNK_BYTES for piece in whole[:-1]):
        whole = [memoryview(b"".join(whole))]
    return [piece[start : start + CHUNK_BYTES] for piece in whole for start in range(0, len(piece), CHUNK_BYTES)]


def batches_of(chunks: Mapping[str, memoryview]) -> list[dict[str, memoryview]]:
    """The chunks by key, in batches of at most 8 MiB, or of one chunk."""
    batches: list[dict[str, memoryview]] = [{}]
    size = 0
    for key, chunk in chunks.items():
        if batches[-1] and size + len(chunk) > _BATCH_BYTES:
            batches.append({})
            size = 0
        batches[-1][key] = chunk
        size += len(chunk)
    return batches


def key_of(kind: str, *parts: object) -> str:
    """The store's key of something of a request."""
    return PREFIX + ":".join((kind, *map(str, parts)))


def require_succeeded(record: generation_pb2.RequestRecord) -> None:
    """Raise FailedPrecondition unless the request has a result."""
    if record.state != State.REQUEST_STATE_SUCCEEDED:
        name = State.Name(record.state).removeprefix("REQUEST_STATE_")
        why = f" ({record.error.code}: {record.error.message})" if record.HasField("error") else ""
        raise FailedPrecondition(f"request {record.request_id} is {name}{why}; only one that SUCCEEDED has a result")


def unknown_request(request_id: str, record_seconds: float) -> NotFound:
    """The error of a request that is not there. Records are kept for `record_seconds` after the end of a request."""
    kept = f"a record is kept for {duration(record_seconds)} after the end of its request"
    return NotFound(f"there is no request {request_id[:80]!r}; it may have expired: {kept}", field="request_id")


def duration(seconds: float) -> str:
    """A duration in the largest unit that gives a whole number, such as "24 h"."""
    for unit, length in (("h", 3_600), ("min", 60)):
        if seconds >= length and not seconds % length:
            return f"{seconds // length:g} {unit}"
    return f"{seconds:g} s"


def require_own(record: generation_pb2.RequestRecord, caller: str, record_seconds: float) -> None:
    """Raise NotFound for another caller's request, as if it were not there. Without a name, all may see all."""
    if caller and record.caller != caller:
        raise unknown_request(record.request_id, record_seconds)


def timestamp_of(milliseconds: int) -> Timestamp:
    """A time since the epoch as the API tells it."""
    return Timestamp(seconds=milliseconds // 1_000, nanos=milliseconds % 1_000 * 1_000_000)


def with_ids(events: Sequence[generation_pb2.Event], ids: Sequence[bytes]) -> list[generation_pb2.Event]:
    """Events as the store keeps them under these ids; none where it gave none."""
    return [read_event(each.decode(), event.SerializeToString()) for event, each in zip(events, ids, strict=False)]


def read_event(event_id: str, payload: bytes) -> generation_pb2.Event:
    """A stored event, with its id, which is also its time."""
    event = generation_pb2.Event.FromString(payload)
    event.event_id = event_id
    event.time.CopyFrom(timestamp_of(int(event_id.partition("-")[0])))
    return event


def read_record(fields: Sequence[bytes]) -> generation_pb2.RequestRecord:
    """The record that the fields of SNAPSHOT make."""
    record = generation_pb2.RequestRecord.FromString(fields[0] + fields[1])
    record.state = cast("StateValue", int(fields[2]))
    record.created_at.CopyFrom(timestamp_of(int(fields[3])))
    record.updated_at.CopyFrom(timestamp_of(int(fields[4])))
    return record
