"""The timeline of a request: attempts and waiting times, built from the entries in the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fleet.v1 import generation_pb2
from fleet.v1.generation_pb2 import TimelineEntry, TimelineKind
from services.cli.client import TERMINAL, state_name

COMPLETED, HANDED_OVER, ENDED, LOST = "completed", "handed over", "ended", "lost"
LEFT = "left by its coordinator"
RUNNING, WAITING = "running", "waiting"

_OUTCOMES = {
    TimelineKind.TIMELINE_KIND_COMPLETED: COMPLETED,
    TimelineKind.TIMELINE_KIND_HANDED_OVER: HANDED_OVER,
    TimelineKind.TIMELINE_KIND_ENDED: ENDED,
    TimelineKind.TIMELINE_KIND_LOST: LOST,
}


@dataclass
class Attempt:
    """A wait for a worker of a service, and the run on this worker. Times: seconds since the request's admission."""

    service: str
    number: int
    queued: float | None = None
    granted: float | None = None
    begun: float | None = None
    ended: float | None = None
    outcome: str = ""
    worker: str = ""
    step: int = 0
    total_steps: int = 0
    checkpoints: list[tuple[float, int]] = field(default_factory=list)
    """Time and step of each step checkpoint."""

    @property
    def state(self) -> str:
        """The outcome, or the state of an attempt without an outcome."""
        return self.outcome or (WAITING if self.granted is None else RUNNING)


@dataclass
class Timeline:
    """A request and its attempts, by start time. `seconds` is the time of the request's end or of its latest entry."""

    record: generation_pb2.RequestRecord
    attempts: list[Attempt] = field(default_factory=list)
    take_overs: list[tuple[float, int]] = field(default_factory=list)
    """Time and epoch of each take-over."""
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the request has not ended."""
        return self.record.state not in TERMINAL

    @property
    def title(self) -> str:
        """A line about the request, with its trace ID if it has one."""
        record = self.record
        how_long = f"for {self.seconds:.2f} s so far" if self.is_open else f"after {self.seconds:.2f} s"
        trace = record.trace.traceparent or record.trace.client_traceparent
        traced = f", trace {trace.split('-')[1]}" if trace else ""
        return f"request {record.request_id} of {record.model}: {state_name(record.state)} {how_long}{traced}"


def read_timeline(record: generation_pb2.RequestRecord, entries: Sequence[TimelineEntry]) -> Timeline:
    """Build a timeline from entries, sorted by time. Entries may be missing."""
    timeline = Timeline(record)
    began = record.created_at.ToNanoseconds()
    for entry in entries:
        moment = max(0.0, (entry.time.ToNanoseconds() - began) / 1e9)
        if entry.kind != TimelineKind.TIMELINE_KIND_STATE or entry.state in TERMINAL or timeline.is_open:
            timeline.seconds = max(timeline.seconds, moment)
        _take(timeline, entry, moment)
    if not timeline.is_open:
        timeline.seconds = max(0.0, (record.updated_at.ToNanoseconds() - began) / 1e9)
        for attempt in _open(timeline):
            attempt.ended, attempt.outcome = timeline.seconds, ENDED
    return timeline


def _take(timeline: Timeline, entry: TimelineEntry, moment: float) -> None:
    match entry.kind:
        case TimelineKind.TIMELINE_KIND_QUEUED:
            _add(timeline, entry.service).queued = moment
        case TimelineKind.TIMELINE_KIND_GRANTED:
            waiting = (each for each in _open(timeline, entry.service) if each.granted is None)
            attempt = next(waiting, None) or _add(timeline, entry.service)
            attempt.granted, attempt.worker = moment, entry.worker_id
        case TimelineKind.TIMELINE_KIND_BEGUN:
            attempt = _not_begun(timeline, entry.service, moment) or _add(timeline, entry.service)
            attempt.begun, attempt.total_steps = moment, entry.total_steps
            attempt.granted = moment if attempt.granted is None else attempt.granted
        case TimelineKind.TIMELINE_KIND_STEP:
            _note_step(timeline, entry)
        case TimelineKind.TIMELINE_KIND_CHECKPOINT:
            begun = [each for each in _open(timeline) if each.begun is not None]
            if begun:
                max(begun, key=lambda each: each.total_steps).checkpoints.append((moment, entry.step))
        case TimelineKind.TIMELINE_KIND_TAKEN_OVER:
            timeline.take_overs.append((moment, entry.epoch))
            for attempt in _open(timeline):
                attempt.ended, attempt.outcome = moment, LEFT
        case kind if kind in _OUTCOMES:
            _end(timeline, entry, moment)


def _add(timeline: Timeline, service: str) -> Attempt:
    number = 1 + sum(each.service == service for each in timeline.attempts)
    timeline.attempts.append(Attempt(service, number))
    return timeline.attempts[-1]


def _open(timeline: Timeline, service: str = "") -> Iterator[Attempt]:
    """The attempts without an outcome, of one service or of all services."""
    return (each for each in timeline.attempts if not each.outcome and service in ("", each.service))


def _not_begun(timeline: Timeline, service: str, moment: float) -> Attempt | None:
    """The attempt of a service that has a worker, but whose stages have not begun.

    If none is running, the one that has completed at `moment`, as entries of a millisecond may have any order.
    """
    attempts = [each for each in timeline.attempts if each.service == service]
    granted = [each for each in attempts if each.granted is not None and each.begun is None]
    completed = (each for each in granted if each.outcome == COMPLETED and each.ended == moment)
    return next((each for each in granted if not each.outcome), None) or next(completed, None)


def _note_step(timeline: Timeline, entry: TimelineEntry) -> None:
    """Set the step of the latest begun attempt of the service, which may have ended before the entry."""
    for attempt in reversed(timeline.attempts):
        if attempt.service == entry.service and attempt.begun is not None:
            attempt.step, attempt.total_steps = entry.step, entry.total_steps
            return


def _end(timeline: Timeline, entry: TimelineEntry, moment: float) -> None:
    """End the attempt on the worker of the entry; for an entry without a worker, the wait for a worker."""
    for attempt in _open(timeline, entry.service):
        if attempt.worker == entry.worker_id or (
            entry.worker_id and not attempt.worker and attempt.granted is not None
        ):
            attempt.ended, attempt.outcome = moment, _OUTCOMES[entry.kind]
            return
