"""A FleetError crosses a call unchanged; each status of gRPC itself becomes a FleetError."""

from __future__ import annotations

import grpc
import pytest

from common import errors
from common.errors import FleetError
from common.rpc.status import FIELD_KEY, from_status, to_status

EVERY_ERROR = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, FleetError) and value is not FleetError
]


@pytest.mark.parametrize("kind", EVERY_ERROR)
@pytest.mark.parametrize("field", ["", "params.sigmas", "params.größe %[0]", "a\nb"])
def test_an_error_crosses_a_call_unchanged(kind: type[FleetError], field: str) -> None:
    error = kind("height is 7; 16 is right — näher", field=field)
    found = from_status(*to_status(error))
    assert type(found) is kind
    assert (found.message, found.field) == (error.message, field)


def test_metadata_is_ascii_and_bounded() -> None:
    status = to_status(errors.InvalidInput("x" * 100_000, field="ü" * 100_000))
    assert len(status.details) < 4096
    assert all(value.isascii() and len(value) < 4096 for _, value in status.metadata)


def test_lone_surrogates_are_escaped() -> None:
    found = from_status(*to_status(errors.InvalidInput("bad \ud800", field="\udfff")))
    assert found.message == "bad \\ud800"
    assert found.field == "\\udfff"


def test_an_unlisted_subclass_is_sent_as_its_base_class() -> None:
    class Special(errors.CheckpointError):
        """A subclass that no table of statuses lists."""

    assert type(from_status(*to_status(Special("x")))) is errors.CheckpointError


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_transport_status_becomes_a_fleet_error(code: grpc.StatusCode) -> None:
    assert isinstance(from_status(code, "", ()), FleetError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.INTERNAL, errors.Unavailable),
        (grpc.StatusCode.UNKNOWN, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.UNIMPLEMENTED, errors.FailedPrecondition),
    ],
)
def test_a_status_of_grpc_becomes_the_error_of_its_cause(code: grpc.StatusCode, kind: type[FleetError]) -> None:
    found = from_status(code, "", (("other", "x"), ("binary-bin", b"x")))
    assert type(found) is kind
    assert found.message == code.name


def test_the_field_is_sent_under_its_documented_key() -> None:
    assert (FIELD_KEY, "a.b") in to_status(errors.InvalidInput("x", field="a.b")).metadata
