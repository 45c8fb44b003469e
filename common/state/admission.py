"""Errors for requests that the store refuses at admission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.errors import InvalidInput, ResourceExhausted
from common.state.records import timestamp_of
from fleet.v1 import generation_pb2


def check_admitted(reply: Sequence[Any], record: generation_pb2.RequestRecord) -> None:
    """Raise InvalidInput or ResourceExhausted if the reply to an admission is a refusal.

    RequestStore.admit() handles the refusal `memory`.
    """
    match reply[0]:
        case b"late":
            clock = timestamp_of(int(reply[1])).ToJsonString()
            raise InvalidInput(
                f"deadline: {record.deadline.ToJsonString()} is not in the future; the fleet's clock reads {clock}",
                field="deadline",
            )
        case b"crowded":
            what = f"{int(reply[1])} requests for {record.model} are open, which is the limit"
        case b"quota":
            what = f"{record.caller} has {int(reply[1])} open requests, which is the limit"
        case b"full":
            what = f"{int(reply[1])} requests wait for {reply[3].decode()} of {record.model}, which is the limit"
        case b"unmeasured":
            what = (
                f"{int(reply[1])} requests for {record.model} are open, and none has ended yet, so that "
                "their duration is unknown"
            )
        case b"busy":
            what = f"{record.model} has {int(reply[1]) / 1_000:.1f} s of work outstanding, which exceeds the limit"
        case _:
            return
    raise ResourceExhausted(what, retry_seconds=int(reply[2]) / 1_000 or None)
