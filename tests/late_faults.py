"""Repetition of test cases whose fault came after the computation that it was meant to interrupt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

MOST_ATTEMPTS = 5
"""Maximum attempts of a case."""

T = TypeVar("T")


class FaultTooLate(Exception):
    """The fault, or the request itself, came too late, so that the case is inconclusive."""


async def repeat_if_late(case: Callable[[], Awaitable[T]], restore: Callable[[], Awaitable[None]] | None = None) -> T:
    """Run a case, and repeat it while its fault comes too late.

    Faults may come late on a busy host, which delays progress messages. `restore` is called before each repetition.
    Raises FaultTooLate after MOST_ATTEMPTS attempts.
    """
    late = None
    for attempt in range(MOST_ATTEMPTS):
        if attempt and restore is not None:
            await restore()
        try:
            return await case()
        except FaultTooLate as error:
            late = error
    raise FaultTooLate(f"the fault came too late in {MOST_ATTEMPTS} attempts; the last: {late}")


def longer_each_time(first: float) -> Iterator[float]:
    """Time limits of the attempts of a case in seconds; each time limit is three times the previous one."""
    return (first * 3**attempt for attempt in range(MOST_ATTEMPTS))
