"""Reads the timelines of requests, which `fleet trace` displays. Times are of the store's clock.

The store's script adds entries within the operations that change a request, without further round trips. Entries
of state changes and of progress are derived from the request's events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from common.state.connection import store_errors
from common.state.records import key_of, read_event, timestamp_of
from common.state.redis_client import Redis
from fleet.v1 import generation_pb2
from fleet.v1.generation_pb2 import RequestState, TimelineEntry, TimelineKind

_KINDS = {
    b"queued": TimelineKind.TIMELINE_KIND_QUEUED,
    b"granted": TimelineKind.TIMELINE_KIND_GRANTED,
    b"checkpoint": TimelineKind.TIMELINE_KIND_CHECKPOINT,
    b"completed": TimelineKind.TIMELINE_KIND_COMPLETED,
    b"handed_over": TimelineKind.TIMELINE_KIND_HANDED_OVER,
    b"ended": TimelineKind.TIMELINE_KIND_ENDED,
    b"lost": TimelineKind.TIMELINE_KIND_LOST,
    b"taken_over": TimelineKind.TIMELINE_KIND_TAKEN_OVER,
}


class Timelines:
    """Reads the timelines of requests."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self, request_id: str) -> list[TimelineEntry]:
        """Return the timeline of a request in chronological order, with only the latest step of each attempt."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.lrange(key_of("timeline", request_id), 0, -1)
                pipeline.xrange(key_of("events", request_id))
                lines, rows = await pipeline.execute()
        events = [read_event(entry_id.decode(), fields[b"event"]) for entry_id, fields in rows]
        entries = [*_entries_of_lines(lines), *_entries_of_events(events)]
        return sorted(entries, key=_order_of)


def _order_of(entry: TimelineEntry) -> tuple[int, int]:
    """Sort key: the time; within a millisecond, QUEUED first and the terminal state last."""
    if entry.state == RequestState.REQUEST_STATE_QUEUED:
        rank = 0
    else:
        rank = 2 if entry.state >= RequestState.REQUEST_STATE_SUCCEEDED else 1
    return entry.time.ToMilliseconds(), rank


def _entries_of_lines(lines: Sequence[Any]) -> Iterator[TimelineEntry]:
    """Yield the entries of the script's lines. Skips unknown kinds, which later releases may write."""
    for line in lines:
        fields = bytes(line).split(b"|")
        if len(fields) != 5 or fields[1] not in _KINDS:
            continue
        moment, kind, service, worker, number = fields
        is_taken_over = kind == b"taken_over"
        yield TimelineEntry(
            time=timestamp_of(int(moment)),
            kind=_KINDS[kind],
            service=service.decode(),
            worker_id="" if is_taken_over else worker.decode(),
            step=0 if is_taken_over else int(number),
            epoch=int(number) if is_taken_over else 0,
        )


def _entries_of_events(events: Sequence[generation_pb2.Event]) -> Iterator[TimelineEntry]:
    latest: dict[str, TimelineEntry] = {}
    for event in events:
        if event.HasField("state_change"):
            yield TimelineEntry(time=event.time, kind=TimelineKind.TIMELINE_KIND_STATE, state=event.state_change.state)
        elif event.HasField("progress"):
            progress = event.progress
            entry = TimelineEntry(
                time=event.time,
                kind=TimelineKind.TIMELINE_KIND_STEP if progress.step else TimelineKind.TIMELINE_KIND_BEGUN,
                service=progress.service,
                step=progress.step,
                total_steps=progress.total_steps,
            )
            if progress.step:
                latest[progress.service] = entry
                continue
            if progress.service in latest:
                yield latest.pop(progress.service)
            yield entry
    yield from latest.values()
