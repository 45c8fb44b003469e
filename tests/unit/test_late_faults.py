"""A case is repeated while its fault comes too late, a bounded number of times; other errors are raised at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from late_faults import MOST_ATTEMPTS, FaultTooLate, repeat_if_late


def case_that_fails(times: int, error: Exception, calls: list[str]) -> Callable[[], Awaitable[str]]:
    """A case that raises `error` in its first `times` attempts, and then returns "result"."""

    async def case() -> str:
        calls.append("case")
        if calls.count("case") <= times:
            raise error
        return "result"

    return case


def test_a_late_case_is_repeated_after_a_restore() -> None:
    calls: list[str] = []

    async def restore() -> None:
        calls.append("restore")

    assert asyncio.run(repeat_if_late(case_that_fails(2, FaultTooLate("ended"), calls), restore)) == "result"
    assert calls == ["case", "restore", "case", "restore", "case"]


def test_a_case_that_is_always_late_raises() -> None:
    calls: list[str] = []
    with pytest.raises(FaultTooLate, match="too late in 5 attempts; the last: ended"):
        asyncio.run(repeat_if_late(case_that_fails(MOST_ATTEMPTS, FaultTooLate("ended"), calls)))
    assert len(calls) == MOST_ATTEMPTS


def test_other_errors_are_raised_at_once() -> None:
    calls: list[str] = []
    with pytest.raises(AssertionError, match="another file"):
        asyncio.run(repeat_if_late(case_that_fails(1, AssertionError("another file"), calls)))
    assert calls == ["case"]
