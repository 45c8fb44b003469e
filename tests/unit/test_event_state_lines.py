"""The line of a state follows the write that makes it the request's state, and comes once."""

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
    """Takes events as the test says: each outcome is an answer or an error. It answers once the test lets it."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()

    async def append(
        self, request_id: str, events: Sequence[generation_pb2.Event], **_: Any
    ) -> list[generation_pb2.Event] | None:
        del request_id
        self.asked.set()
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


def test_a_state_that_is_written_again_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        store = Store(Unavailable("away"))
        events = writer_of(store)
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        await store.asked.wait()
        assert running_lines(caplog) == 0, "it is not stored yet"
        store.answers.set()
        await events.close()
        assert running_lines(caplog) == 0
        assert await events.rest() == []
        assert running_lines(caplog) == 1

    asyncio.run(story())


def test_a_state_that_is_refused_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The request goes on at another coordinator, which logs it."""

    async def story() -> None:
        store = Store(ValueError("refused"))
        events = writer_of(store)
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        await store.asked.wait()
        store.answers.set()
        await events.close()
        await events.rest()
        assert running_lines(caplog) == 0

    asyncio.run(story())


def test_a_state_that_is_written_with_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        store = Store()
        events = writer_of(store)
        events.progress("text_encoding", 0, 1)
        await store.asked.wait()
        events.add(state_event(State.REQUEST_STATE_RUNNING))
        closing = asyncio.create_task(events.close())
        await asyncio.sleep(0)
        store.answers.set()
        await closing
        assert len(await events.rest()) == 1
        assert running_lines(caplog) == 0, "the end is not stored yet"
        events.report_written_with_end()
        assert running_lines(caplog) == 1

    asyncio.run(story())
