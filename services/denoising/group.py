"""Rank 0 of a worker group, which runs every call of its server on all ranks together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from common.codec import pack
from common.errors import FailedPrecondition, FleetError
from common.logs import get_logger
from common.rpc.client import header_frame
from common.rpc.framing import chunk_frames
from common.rpc.method import request_type, stage_method
from common.rpc.stage_servicer import Stages
from common.stage import Call, Contract
from common.tensors import TORCH
from services.denoising.agreement import LeadingCall, outcome
from services.denoising.call_header import CallHeader
from services.denoising.messages import Kind, Link, OutOfStep

SETTLE_SECONDS = 30.0
"""Maximum seconds between the ends of one call on two ranks. A longer time is a hang: ranks compute in step."""

_log = get_logger(__name__)


class LeadingStages:
    """Stages that this rank runs together with followers, with the same interface as other stages.

    An error that all ranks raise, such as InvalidInput, is the result of the call. If ranks differ, they are out of
    step, which only a restart repairs: `abandon` is called, and does not return.
    """

    def __init__(self, service: str, stages: Stages, links: Sequence[Link], abandon: Callable[[str], NoReturn]) -> None:
        if streams := sorted(stages.contract.input_streams):
            raise FailedPrecondition(
                f"{service} reads the stream {', '.join(streams)}, which worker groups do not support; use one rank"
            )
        self.contract = stages.contract
        self._request = request_type(stage_method(service))
        self._stages = stages
        self._links = links
        self._abandon = abandon

    def contract_of(self, variant: str) -> Contract:
        """The contract of one variant. Raises InvalidInput for a variant that is not served."""
        return self._stages.contract_of(variant)

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Run the stages on all ranks, and return artifacts by slot. Raises the errors that all ranks raise."""
        leading = LeadingCall(
            request_id=call.request_id,
            on_progress=call.on_progress,
            on_warning=call.on_warning,
            on_item=call.on_item,
            cancelled=call.cancelled,
            hand_over=call.hand_over,
            deadline=call.deadline,
            variant=call.variant,
            send=self._send_answer,
        )
        try:
            self._hand_out(call, values)
            outputs = self._run(values, leading)
            self._settle(b"")
        except OutOfStep as error:
            self._abandon(str(error))
        return outputs

    def _run(self, values: Mapping[str, Any], call: LeadingCall) -> dict[str, Any]:
        try:
            return self._stages.run(values, call)
        except FleetError as error:
            self._settle(outcome(error))
            raise
        except OutOfStep:
            raise
        except Exception as error:
            _log.exception("call failed on this rank", rank=0)
            raise OutOfStep(f"rank 0 raised {type(error).__name__}: {error}") from error

    def _hand_out(self, call: Call, values: Mapping[str, Any]) -> None:
        """Send the inputs to every follower, in the frames that a coordinator sends."""
        self._send(Kind.CALL, CallHeader.of(call).encoded())
        for frame in self._frames(values):
            self._send(Kind.INPUT, frame)
        self._send(Kind.RUN)

    def _frames(self, values: Mapping[str, Any]) -> Iterator[bytes]:
        packets = {slot: pack(slot, artifact, TORCH) for slot, artifact in values.items()}
        chunks = itertools.chain.from_iterable(chunk_frames(packet.chunks) for packet in packets.values())
        return itertools.chain((header_frame(self._request, packets),), chunks)

    def _send_answer(self, answer: bytes) -> None:
        self._send(Kind.CHECK, answer)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        for link in self._links:
            link.send(kind, payload)

    def _settle(self, own: bytes) -> None:
        """Compare the outcome on all ranks. Raises OutOfStep for different outcomes."""
        self._send(Kind.OUTCOME, own)
        for link in self._links:
            compare(link, own)


def compare(link: Link, own: bytes) -> None:
    """Compare the outcome of a call with a peer's. Raises OutOfStep if they differ, or after SETTLE_SECONDS."""
    _, theirs = link.receive(Kind.OUTCOME, seconds=SETTLE_SECONDS)
    if theirs != own:
        raise OutOfStep(f"a call ended with {_text(theirs)} on rank {link.peer}, but with {_text(own)} on this rank")


def _text(reply: bytes) -> str:
    """An outcome for an error message. A rank that is out of step may send invalid UTF-8."""
    return ": ".join(reply.decode(errors="backslashreplace").split("\n", 1)) if reply else "a result"
