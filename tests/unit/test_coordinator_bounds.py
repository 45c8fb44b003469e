"""Bounds of coordinator settings, and of request fields other than generation parameters."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import InvalidInput
from common.settings import SettingsError
from common.state.worker_slots import QueuePriority
from fleet.v1 import generation_pb2 as pb
from services.coordinator.request_life import Submission, queue_priority_of
from services.coordinator.service import _check_envelope, _stored
from services.coordinator.settings import CoordinatorSettings

POSITIVE = (
    *("max_open_requests", "max_open_of_caller", "queue_limit", "max_calls", "max_streams", "max_connections"),
    *("record_seconds", "result_seconds"),
)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_bounds_must_be_positive(name: str, value: int) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(SettingsError, match=f"{name}: {value} is not more than 0") as caught:
        CoordinatorSettings(**given)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"grace_seconds": -1.0}, "grace_seconds"),
        ({"result_seconds": 9.0, "record_seconds": 8.0}, "result_seconds"),
        ({"heartbeat_seconds": 6.0, "heartbeat_ttl_seconds": 6.0}, "heartbeat_seconds"),
        ({"heartbeat_seconds": 0.0}, "heartbeat_seconds"),
        ({"max_store_memory": 1.1}, "max_store_memory"),
        ({"max_store_memory": 0.0}, "max_store_memory"),
        ({"store_replicas": -1}, "store_replicas"),
        ({"jwt_leeway_seconds": 301.0}, "jwt_leeway_seconds"),
    ],
)
def test_invalid_or_contradictory_settings_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as caught:
        CoordinatorSettings(**given)
    assert caught.value.field == field


def request(**fields: Any) -> pb.SubmitRequest:
    return pb.SubmitRequest(**fields)


def with_deadline(seconds: int, nanos: int = 0) -> pb.SubmitRequest:
    message = pb.SubmitRequest()
    message.deadline.seconds, message.deadline.nanos = seconds, nanos
    return message


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (request(idempotency_key="k" * 129), "idempotency_key"),
        (request(priority=101), "priority"),
        (request(priority=-101), "priority"),
        (with_deadline(0), "deadline"),
        (with_deadline(-1), "deadline"),
        (with_deadline(1 << 62), "deadline"),
        (with_deadline(1, 1_000_000_000), "deadline"),
        (with_deadline(1, -1), "deadline"),
    ],
)
def test_submit_fields_beyond_their_bounds_are_refused(wrong: pb.SubmitRequest, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        _check_envelope(wrong)
    assert caught.value.field == field


def test_submit_fields_at_their_bounds_are_accepted() -> None:
    _check_envelope(request(idempotency_key="k" * 128, priority=100))
    _check_envelope(request(priority=-100))
    _check_envelope(with_deadline(253_402_214_400))


def test_the_stored_request_has_the_drawn_seed() -> None:
    """A coordinator that takes over the request must generate the same image."""
    submitted = request(parameters=pb.GenerationParameters(prompt="a cat"), idempotency_key="k")
    record = pb.RequestRecord(model="emoji", parameters=pb.GenerationParameters(prompt="a cat", seed=41))
    stored = pb.SubmitRequest.FromString(_stored(submitted, record))
    assert (stored.model, stored.parameters.seed, stored.parameters.prompt) == ("emoji", 41, "a cat")
    assert not submitted.parameters.HasField("seed")


def test_queue_priority_of_returns_priority_deadline_caller_and_cost() -> None:
    record = pb.RequestRecord(priority=7, caller="alice")
    record.deadline.seconds = 90
    submission = Submission.__new__(Submission)
    vars(submission).update(record=record, costs={"denoising": 12})
    assert queue_priority_of(submission, "denoising") == QueuePriority(7, 90_000, "alice", 12)
    assert queue_priority_of(submission, "decoding") == QueuePriority(7, 90_000, "alice", 1)
