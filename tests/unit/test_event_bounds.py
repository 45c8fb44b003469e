"""Bounds of what a running request writes: number and length of warnings, and of several steps the latest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from services.coordinator.events import EventLog, EventWriter


def unwritten(script: Callable[[EventWriter], object]) -> list[generation_pb2.Event]:
    """The events that a writer holds which has not written yet."""

    async def main() -> list[generation_pb2.Event]:
        writer = EventWriter(cast(RequestStore, None), "r", EventLog(), lambda: None)
        script(writer)
        await writer.close()  # before the writer's task first ran: nothing was written
        return await writer.rest()

    return asyncio.run(main())


def test_a_request_has_at_most_64_warnings() -> None:
    def script(writer: EventWriter) -> None:
        for number in range(70):
            writer.warning("prompt", f"{number}")

    events = unwritten(script)
    assert [event.warning.message for event in events] == [str(number) for number in range(64)]


def test_a_warning_of_a_worker_has_a_bounded_length() -> None:
    (event,) = unwritten(lambda writer: writer.warning("f" * 1_000, "m" * 100_000))
    assert (len(event.warning.field), len(event.warning.message)) == (256, 2_048)


def test_of_a_services_steps_only_the_latest_waits() -> None:
    def script(writer: EventWriter) -> None:
        writer.progress("denoising", 0, 9)
        writer.progress("denoising", 1, 9)
        writer.progress("decoding", 1, 1)
        writer.progress("denoising", 2, 9)

    steps = [(event.progress.service, event.progress.step) for event in unwritten(script)]
    assert steps == [("denoising", 0), ("decoding", 1), ("denoising", 2)]
