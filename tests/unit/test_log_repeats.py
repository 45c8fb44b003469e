"""Repeats beyond a limit become one summary with their count; records below WARNING are always written."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable

from common.log_context import log_scope
from common.log_format import LogFormatter
from common.log_repeats import MOST_REPEATS, RepeatLimitingHandler


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _logger(out: io.StringIO, clock: Callable[[], float], *, seconds: float = 60.0, most: int = 3) -> logging.Logger:
    handler = RepeatLimitingHandler(out, most=most, seconds=seconds, clock=clock)
    handler.setFormatter(LogFormatter("coordinator", "text"))
    logger = logging.Logger("services.test")
    logger.addHandler(handler)
    return logger


def _events(out: io.StringIO) -> list[str]:
    """Written lines without their timestamps."""
    return [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]


def test_repeats_become_a_summary_after_the_window() -> None:
    out, clock = io.StringIO(), Clock()
    logger = _logger(out, clock)
    for number in range(60):
        with log_scope(request_id=f"r-{number}"):
            logger.warning("store is unavailable")
    assert len(_events(out)) == 3
    clock.now += 60
    with log_scope(request_id="another"):
        logger.warning("something else")
    written = _events(out)
    assert written[3:] == [
        "WARNING coordinator store is unavailable repeated=57",
        "WARNING coordinator something else request_id=another",
    ], "the summary must not name a request"
    logger.warning("store is unavailable")
    assert len(_events(out)) == 6, "a new window begins"
    logger.handlers[0].close()
    assert len(_events(out)) == 6, "no line was collapsed in the new window"


def test_repeats_have_the_same_event_and_call_site() -> None:
    out, clock = io.StringIO(), Clock()
    logger = _logger(out, clock)
    for number in range(5):
        logger.warning("of arguments %d", number)
    for _ in range(5):
        logger.warning("here")
    for _ in range(2):
        logger.error("there")
    for number in range(5):
        logger.error(f"differs {number}")
    assert len(_events(out)) == 3 + 3 + 2 + 5


def test_lines_below_warning_are_always_written() -> None:
    out, clock = io.StringIO(), Clock()
    logger = _logger(out, clock)
    for number in range(500):
        with log_scope(request_id=f"r-{number}"):
            logger.info("request accepted")
    assert len(_events(out)) == 500


def test_the_summary_is_written_without_a_later_record() -> None:
    out = io.StringIO()
    logger = _logger(out, time.monotonic, seconds=0.2)
    for _ in range(10):
        logger.error("failed")
    deadline = time.monotonic() + 20
    while not out.getvalue().endswith("repeated=7\n"):
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)
    for _ in range(5):
        logger.error("failed")
    logger.handlers[0].close()
    assert re.findall(r"repeated=\d+", out.getvalue()) == ["repeated=7", "repeated=2"]


def test_close_writes_the_summary() -> None:
    out, clock = io.StringIO(), Clock()
    logger = _logger(out, clock, most=MOST_REPEATS)
    for _ in range(MOST_REPEATS + 4):
        logger.critical("failed")
    logger.handlers[0].close()
    assert _events(out)[-1] == "CRITICAL coordinator failed repeated=4"


def test_a_summary_hides_the_private_texts_of_its_records() -> None:
    out, clock = io.StringIO(), Clock()
    logger = _logger(out, clock)
    with log_scope(private=["a canary on a branch"]):
        for _ in range(5):
            logger.warning("cannot read: a canary on a branch")
    logger.handlers[0].close()
    assert _events(out)[-1] == "WARNING coordinator cannot read: [hidden] repeated=2"


def test_distinct_messages_take_bounded_memory() -> None:
    handler = RepeatLimitingHandler(io.StringIO(), clock=Clock())
    handler.setFormatter(LogFormatter("coordinator", "text"))
    logger = logging.Logger("library")
    logger.addHandler(handler)
    for number in range(3_000):
        logger.warning(f"request {number}")
    assert len(handler._windows) <= 1_024
