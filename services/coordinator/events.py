"""Writes the events of a running request without blocking it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from common.errors import Aborted, Unavailable
from common.logs import get_logger
from common.rpc.status import MAX_FIELD, MAX_MESSAGE
from common.state.requests import RequestStore
from fleet.v1 import artifacts_pb2, generation_pb2
from services.coordinator.state_lines import log_state

_RETRY_SECONDS = 0.5
_MOST_WARNINGS = 64

_log = get_logger(__name__)


class EventLog:
    """The stored events of a running request, so that followers in this process need not read the store."""

    def __init__(self, events: Iterable[generation_pb2.Event] = ()) -> None:
        self._events = list(events)
        self._closed = False
        self._more = asyncio.Event()

    def extend(self, events: Iterable[generation_pb2.Event]) -> None:
        """Add events after they are stored."""
        self._events += events
        self._wake()

    def close(self) -> None:
        """End all iterations of follow()."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self) -> AsyncIterator[generation_pb2.Event]:
        """Yield all events as they are added, until close()."""
        sent = 0
        while True:
            for event in self._events[sent:]:
                sent += 1
                yield event
            if sent == len(self._events):
                if self._closed:
                    return
                await self._more.wait()


class EventWriter:
    """Writes events in batches, one write at a time. A batch contains only the latest step of each stage.

    If the reply to a write is lost, the write is retried with the same events and numbers, so that each event is
    stored once. A batch that contains only steps waits until `step_seconds` after the previous write, which bounds the
    write rate. `log` receives the stored events. `on_ended` is called when the store reports that the request has ended
    or continues at another coordinator.
    """

    def __init__(
        self,
        store: RequestStore,
        request_id: str,
        log: EventLog,
        on_ended: Callable[[], None],
        *,
        epoch: int = 1,
        step_seconds: float = 0.0,
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._request_id = request_id
        self._log = log
        self._on_ended = on_ended
        self._step_seconds = step_seconds
        self._pending: list[generation_pb2.Event] = []
        self._unsure: list[generation_pb2.Event] = []
        self._waiters: list[tuple[generation_pb2.Event, asyncio.Future[bool]]] = []
        self._number = 0
        self._warnings = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._write())
        self._task.add_done_callback(self._release)

    def progress(self, service: str, step: int, total_steps: int) -> None:
        """Add the progress of a stage. `step` is 0 when the stage begins."""
        if step:
            self._pending = [each for each in self._pending if not _is_step_of(each, service)]
        self.add(
            generation_pb2.Event(
                progress=generation_pb2.StageProgress(service=service, step=step, total_steps=total_steps)
            )
        )

    def warning(self, field: str, message: str) -> None:
        """Add a warning for the caller. The record stores all warnings, so their number and length are bounded."""
        self._warnings += 1
        if self._warnings > _MOST_WARNINGS:
            _log.warning("warning dropped, the request has too many warnings", field=field[:MAX_FIELD])
            return
        warning = artifacts_pb2.Warning(field=field[:MAX_FIELD], message=message[:MAX_MESSAGE])
        self.add(generation_pb2.Event(warning=warning))

    def add(self, event: generation_pb2.Event) -> None:
        """Add an event."""
        self._pending.append(event)
        self._wake.set()

    async def add_stored(self, event: generation_pb2.Event) -> None:
        """Add an event and wait until it is stored.

        Raises Aborted if the request has ended or continues at another coordinator.
        """
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append((event, waiter))
        self.add(event)
        if not await waiter:
            raise Aborted(f"request {self._request_id} has ended, or continues at another coordinator")

    async def close(self) -> None:
        """Stop writing."""
        self._closing = True
        self._wake.set()
        await self._task

    async def rest(self) -> list[generation_pb2.Event]:
        """Return the events that remain to be stored with the end of the request. Call it after close().

        First repeats a write whose result is unknown. Raises Unavailable.
        """
        if self._unsure:
            await self._store_unsure()
        return self._pending

    def report_written_with_end(self) -> None:
        """Log the states that rest() returned. Call it after they are stored."""
        _report_states(self._pending)

    async def _store_unsure(self) -> None:
        stored = await self._store.append(self._request_id, self._unsure, number=self._number, epoch=self._epoch)
        self._number += len(self._unsure)
        self._settle(self._unsure, is_stored=stored is not None)
        if stored is None:
            self._on_ended()
        else:
            _report_states(self._unsure)
        self._unsure = []
        self._log.extend(stored or ())

    def _settle(self, events: Sequence[generation_pb2.Event], *, is_stored: bool) -> None:
        """Resolve the futures of add_stored() for these events."""
        for event, waiter in self._waiters:
            if any(event is each for each in events) and not waiter.done():
                waiter.set_result(is_stored)
        self._waiters = [(event, waiter) for event, waiter in self._waiters if not waiter.done()]

    def _release(self, task: asyncio.Task[None]) -> None:
        """Resolve all remaining futures with the error of the write task, or cancel them."""
        error = None if task.cancelled() else task.exception()
        for _, waiter in self._waiters:
            if not waiter.done() and error is not None:
                waiter.set_exception(error)
            else:
                waiter.cancel()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        not_before = 0.0
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self._closing and loop.time() < not_before and all(map(_is_step, self._pending)):
                await self._woken_before(not_before)
            if self._closing:
                return
            if not self._unsure:
                self._unsure, self._pending = self._pending, []
            try:
                await self._store_unsure()
                not_before = loop.time() + self._step_seconds
                if self._pending:
                    self._wake.set()
            except Unavailable as error:
                _log.warning("events wait for the request store", error=error)
                again = loop.time() + _RETRY_SECONDS
                while not self._closing and loop.time() < again:
                    await self._woken_before(again)
                self._wake.set()

    async def _woken_before(self, moment: float) -> None:
        """Wait for a new event until `moment`, a `loop.time()` timestamp."""
        try:
            async with asyncio.timeout_at(moment):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()


def _report_states(events: Iterable[generation_pb2.Event]) -> None:
    for event in events:
        if event.HasField("state_change"):
            log_state(event.state_change.state)


def _is_step(event: generation_pb2.Event) -> bool:
    return bool(event.progress.step)


def _is_step_of(event: generation_pb2.Event, service: str) -> bool:
    return _is_step(event) and event.progress.service == service
