"""The delay before a retry is sent as `retry-after-ms`, rounded up to whole milliseconds."""

from __future__ import annotations

import grpc
import pytest

from common.errors import ResourceExhausted, Unavailable
from common.rpc.status import RETRY_KEY, from_status, to_status


@pytest.mark.parametrize(("seconds", "milliseconds"), [(5.0, "5000"), (0.0001, "1"), (1.2341, "1235"), (0.0, "0")])
def test_a_full_fleet_returns_the_time_after_which_to_retry(seconds: float, milliseconds: str) -> None:
    """The time is rounded up, because an early retry is refused."""
    status = to_status(ResourceExhausted("full", retry_seconds=seconds))
    assert dict(status.metadata)[RETRY_KEY] == milliseconds
    error = from_status(*status)
    assert isinstance(error, ResourceExhausted)
    assert error.retry_seconds == int(milliseconds) / 1_000


def test_an_error_without_a_retry_time_has_no_retry_metadata() -> None:
    status = to_status(ResourceExhausted("full"))
    assert RETRY_KEY not in dict(status.metadata)
    assert RETRY_KEY not in dict(to_status(Unavailable("the store is unavailable")).metadata)
    error = from_status(*status)
    assert isinstance(error, ResourceExhausted)
    assert error.retry_seconds is None


@pytest.mark.parametrize("text", ["", "-1", "1.5", "soon", "\u0661"])
def test_an_invalid_retry_time_is_ignored(text: str) -> None:
    metadata = (("fleet-error", "ResourceExhausted"), (RETRY_KEY, text))
    error = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata)
    assert isinstance(error, ResourceExhausted)
    assert error.retry_seconds is None
