"""A state is logged once, after the write that stores it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from common.errors import Unavailable
from common.state.records import State, state_event
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from services.coordinator.events import EventLog, EventWriter

RUNNING = "request running state=RUNNING"


class Store:
    """A store whose append() waits for `answers`, then takes the next outcome.

    With None it stores the events, with Unavailable it raises the error, and with any other error it refuses the write.
    """

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)
        self.called = asyncio.Event()
        self.answers = asyncio.Event()

    async def append(
        self, request_id: str, events: Sequence[generation_pb2.Event], **_: Any
    ) -> list[generation_pb2.Event] | None:
        del request_id
        self.called.set()
        await self.answers.wait()
        outcome = self._outcomes.pop(0) if self._outcomes else None
        if isinstance(outcome, Unavailable):
            raise outcome
        return None if outcome is not None else list(events)


def writer_of(store: Store) -> EventWriter:
    return EventWriter(cast(RequestStore, store), "r-1", EventLog(), lambda: None)


def running_lines(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.messages.count(RUNNING)


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "services.coordinator")


def test_a_retried_state_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = Store(Unavailable("unavailable"))
        events = writer_of(store)
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        await store.called.wait()
        assert running_lines(caplog) == 0, "the state is not stored yet"
        store.answers.set()
        await events.close()
        assert running_lines(caplog) == 0
        assert await events.rest() == []
        assert running_lines(caplog) == 1

    asyncio.run(scenario())


def test_a_refused_state_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Another coordinator runs the request and logs its state."""

    async def scenario() -> None:
        store = Store(ValueError("refused"))
        events = writer_of(store)
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        await store.called.wait()
        store.answers.set()
        await events.close()
        await events.rest()
        assert running_lines(caplog) == 0

    asyncio.run(scenario())


def test_a_state_stored_with_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = Store()
        events = writer_of(store)
        events.progress("text_encoding", 0, 1)
        await store.called.wait()
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        closing = asyncio.create_task(events.close())
        await asyncio.sleep(0)
        store.answers.set()
        await closing
        assert len(await events.rest()) == 1
        assert running_lines(caplog) == 0, "the end is not stored yet"
        events.report_written_with_end()
        assert running_lines(caplog) == 1

    asyncio.run(scenario())
