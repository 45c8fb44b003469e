"""Bounds of the events of a running request: number and length of warnings, and pending steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from services.coordinator.events import EventLog, EventWriter


def pending_events(script: Callable[[EventWriter], object]) -> list[generation_pb2.Event]:
    """Pending events of a writer before its first write."""

    async def main() -> list[generation_pb2.Event]:
        writer = EventWriter(cast(RequestStore, None), "r", EventLog(), lambda: None)
        script(writer)
        await writer.close()  # before the first run of the writer's task
        return await writer.rest()

    return asyncio.run(main())


def test_a_request_has_at_most_64_warnings() -> None:
    def script(writer: EventWriter) -> None:
        for number in range(70):
            writer.warning("prompt", f"{number}")

    events = pending_events(script)
    assert [event.warning.message for event in events] == [str(number) for number in range(64)]


def test_a_warning_of_a_worker_has_a_bounded_length() -> None:
    (event,) = pending_events(lambda writer: writer.warning("f" * 1_000, "m" * 100_000))
    assert (len(event.warning.field), len(event.warning.message)) == (256, 2_048)


def test_only_step_0_and_the_latest_step_of_a_service_are_pending() -> None:
    """Step 0 reports that the stage begins. Later steps do not replace it."""

    def script(writer: EventWriter) -> None:
        writer.progress("denoising", 0, 9)
        writer.progress("denoising", 1, 9)
        writer.progress("decoding", 1, 1)
        writer.progress("denoising", 2, 9)

    steps = [(event.progress.service, event.progress.step) for event in pending_events(script)]
    assert steps == [("denoising", 0), ("decoding", 1), ("denoising", 2)]
