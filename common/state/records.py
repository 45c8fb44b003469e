"""Converts stored fields of requests to messages of the public API, and results to chunks."""

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
# Results are sent to Redis in batches of this size, so that a long video is not copied as a whole.
_BATCH_BYTES = 8 << 20
SNAPSHOT = ("record", "extra", "state", "created", "updated")
"""Fields of a stored request from which read_record() creates its record, in this order."""


@dataclass(frozen=True)
class ResultFile:
    """A file of a result: header, and bytes in pieces of any size; no bytes if it is stored as items."""

    header: generation_pb2.FileHeader
    pieces: Sequence[bytes | memoryview] = field(repr=False)


class Cancellation(NamedTuple):
    """Result of request_cancel(). `ended_here`: no coordinator ran the request, and the store ended it."""

    record: generation_pb2.RequestRecord
    ended_here: bool


def state_event(
    state: StateValue, error: generation_pb2.Error | None = None, *, steps_saved: int = 0
) -> generation_pb2.Event:
    """Return the event of a state change."""
    change = generation_pb2.StateChange(state=state, error=error, steps_saved=steps_saved)
    return generation_pb2.Event(state_change=change)


def is_terminal(state: int) -> bool:
    """Return whether a state is terminal."""
    return state >= State.REQUEST_STATE_SUCCEEDED


def chunks_of(pieces: Sequence[bytes | memoryview]) -> list[memoryview]:
    """Split the concatenated pieces into chunks of 1 MiB.

    Copies only if the size of a piece before the last is not a multiple of 1 MiB.
    """
    whole = [memoryview(piece) for piece in pieces if len(piece)]
    if any(len(piece) % CHUNK_BYTES for piece in whole[:-1]):
        whole = [memoryview(b"".join(whole))]
    return [piece[start : start + CHUNK_BYTES] for piece in whole for start in range(0, len(piece), CHUNK_BYTES)]


def batches_of(chunks: Mapping[str, memoryview]) -> list[dict[str, memoryview]]:
    """Split a mapping from keys to chunks into batches of at most 8 MiB, or of one chunk."""
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
    """Return the key of a value of a request in the store."""
    return PREFIX + ":".join((kind, *map(str, parts)))


def require_succeeded(record: generation_pb2.RequestRecord) -> None:
    """Raise FailedPrecondition unless the request has succeeded."""
    if record.state != State.REQUEST_STATE_SUCCEEDED:
        name = State.Name(record.state).removeprefix("REQUEST_STATE_")
        why = f" ({record.error.code}: {record.error.message})" if record.HasField("error") else ""
        raise FailedPrecondition(
            f"request {record.request_id} is {name}{why}; only a request that SUCCEEDED has a result"
        )


def unknown_request(request_id: str, record_seconds: float) -> NotFound:
    """Return the error for an unknown request. Records expire `record_seconds` after the end of a request."""
    expiry = f"records expire {duration(record_seconds)} after the end of their requests"
    return NotFound(f"there is no request {request_id[:80]!r}; it may have expired: {expiry}", field="request_id")


def duration(seconds: float) -> str:
    """Format a duration in the largest unit that results in a whole number, such as "24 h"."""
    for unit, length in (("h", 3_600), ("min", 60)):
        if seconds >= length and not seconds % length:
            return f"{seconds // length:g} {unit}"
    return f"{seconds:g} s"


def require_own(record: generation_pb2.RequestRecord, caller: str, record_seconds: float) -> None:
    """Raise NotFound for a request of another caller, as if it did not exist. An empty `caller` has access to all."""
    if caller and record.caller != caller:
        raise unknown_request(record.request_id, record_seconds)


def timestamp_of(milliseconds: int) -> Timestamp:
    """Convert milliseconds since 1970 to a Timestamp."""
    return Timestamp(seconds=milliseconds // 1_000, nanos=milliseconds % 1_000 * 1_000_000)


def with_ids(events: Sequence[generation_pb2.Event], ids: Sequence[bytes]) -> list[generation_pb2.Event]:
    """Return events with the ids that the store has assigned; an empty list without ids."""
    return [read_event(each.decode(), event.SerializeToString()) for event, each in zip(events, ids, strict=False)]


def read_event(event_id: str, payload: bytes) -> generation_pb2.Event:
    """Parse a stored event. Its id contains its time."""
    event = generation_pb2.Event.FromString(payload)
    event.event_id = event_id
    event.time.CopyFrom(timestamp_of(int(event_id.partition("-")[0])))
    return event


def read_record(fields: Sequence[bytes]) -> generation_pb2.RequestRecord:
    """Create a record from the values of the fields SNAPSHOT."""
    record = generation_pb2.RequestRecord.FromString(fields[0] + fields[1])
    record.state = cast("StateValue", int(fields[2]))
    record.created_at.CopyFrom(timestamp_of(int(fields[3])))
    record.updated_at.CopyFrom(timestamp_of(int(fields[4])))
    return record
