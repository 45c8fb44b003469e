"""Rank 0's side of a worker group: a call that its server takes is run by all ranks at once."""

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
"""How far apart ranks may end one call. They compute in step, so that more than a moment means that one hangs."""

_log = get_logger(__name__)


class LeadingStages:
    """Stages that this rank runs together with followers; to a server they are like any other.

    An error that all ranks raise alike, such as InvalidInput, is an answer. Whatever else happens on one rank and not
    on all leaves them out of step, which no rank can mend: `abandon` is called, which does not return.
    """

    def __init__(self, service: str, stages: Stages, links: Sequence[Link], abandon: Callable[[str], NoReturn]) -> None:
        if streams := sorted(stages.contract.input_streams):
            raise FailedPrecondition(f"{service} reads the stream {', '.join(streams)}: a worker group cannot do that")
        self.contract = stages.contract
        self._request = request_type(stage_method(service))
        self._stages = stages
        self._links = links
        self._abandon = abandon

    def contract_of(self, variant: str) -> Contract:
        """What the stages of one variant read and write. Raises InvalidInput for a variant that is not served."""
        return self._stages.contract_of(variant)

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Artifacts in, artifacts out, by slot. Raises what all ranks raise."""
        leading = LeadingCall(
            request_id=call.request_id,
            on_progress=call.on_progress,
            on_warning=call.on_warning,
            on_item=call.on_item,
            cancelled=call.cancelled,
            hand_over=call.hand_over,
            deadline=call.deadline,
            variant=call.variant,
            tell=self._tell,
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
            _log.exception("rank failed", rank=0)
            raise OutOfStep(f"rank 0 raised {type(error).__name__}: {error}") from error

    def _hand_out(self, call: Call, values: Mapping[str, Any]) -> None:
        """Give every follower the inputs, in the frames that they would have come in from a coordinator."""
        self._send(Kind.CALL, CallHeader.of(call).encoded())
        for frame in self._frames(values):
            self._send(Kind.INPUT, frame)
        self._send(Kind.RUN)

    def _frames(self, values: Mapping[str, Any]) -> Iterator[bytes]:
        packets = {slot: pack(slot, artifact, TORCH) for slot, artifact in values.items()}
        chunks = itertools.chain.from_iterable(chunk_frames(packet.chunks) for packet in packets.values())
        return itertools.chain((header_frame(self._request, packets),), chunks)

    def _tell(self, answer: bytes) -> None:
        self._send(Kind.CHECK, answer)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        for link in self._links:
            link.send(kind, payload)

    def _settle(self, own: bytes) -> None:
        """Tell how the call ended here, and hear how on the followers. Raises OutOfStep where it is not the same."""
        self._send(Kind.OUTCOME, own)
        for link in self._links:
            compare(link, own)


def compare(link: Link, own: bytes) -> None:
    """Hear how a call ended on the peer. Raises OutOfStep when it ended otherwise than here, or does not end."""
    _, theirs = link.receive(Kind.OUTCOME, seconds=SETTLE_SECONDS)
    if theirs != own:
        raise OutOfStep(f"a call ended with {_words(theirs)} on rank {link.peer}, and with {_words(own)} here")


def _words(reply: bytes) -> str:
    """For people: a rank that is out of step may send what is no text."""
    return ": ".join(reply.decode(errors="backslashreplace").split("\n", 1)) if reply else "a result"
