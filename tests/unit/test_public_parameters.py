"""Fields of GenerationParameters, exit codes of errors, and calls that cannot meet their deadline."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from common import errors
from common.codec import write_param
from common.errors import DeadlineExceeded, FleetError, InvalidInput
from common.rpc import client
from common.rpc.client import RemoteRunner
from common.stage import Call, Contract
from fleet.v1 import generation_pb2 as pb
from services.cli.options import BAD_INPUT, FAILED, exit_code
from services.coordinator.parameters import given_parameters


@pytest.mark.parametrize("name", ["prompt", "seed", "images", "params", "output_format"])
def test_a_parameter_with_its_own_field_is_refused_in_params(name: str) -> None:
    message = pb.GenerationParameters()
    message.params[name].CopyFrom(write_param(name, 1))
    with pytest.raises(InvalidInput, match=f"{name} has its own field") as caught:
        given_parameters(message)
    assert caught.value.field == name


def test_a_format_of_a_later_version_is_refused() -> None:
    with pytest.raises(InvalidInput, match="output_format: 77 is not a format; png, mp4, safetensors work") as caught:
        given_parameters(pb.GenerationParameters(output_format=cast(Any, 77)))
    assert caught.value.field == "output_format"


CALLERS_FAULT = {"InvalidInput", "NotFound", "CheckpointError", "Unauthenticated", "PermissionDenied"}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FleetError)]


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes_are_2_for_errors_of_the_caller_and_1_for_others(kind: type[FleetError]) -> None:
    assert exit_code(kind("wrong")) == (BAD_INPUT if kind.__name__ in CALLERS_FAULT else FAILED)


class NoChannel:
    """A channel that fails the test if a call is opened."""

    def stream_stream(self, *_: object) -> Any:
        return self._refuse

    def _refuse(self, *_: object, **__: object) -> Any:
        raise AssertionError("a call was opened")


def test_a_call_that_cannot_arrive_before_its_deadline_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_HOP_SECONDS", 3_600.0)
    contract = Contract("t", {"prompt": "Prompt"}, {"text_conditioning": "Conditioning"})
    runner = RemoteRunner(cast(Any, NoChannel()), "text_encoding", contract)
    call = Call("r", deadline=time.monotonic() + 600)
    with pytest.raises(DeadlineExceeded, match="cannot reach text_encoding before its deadline"):
        asyncio.run(runner({}, call))
