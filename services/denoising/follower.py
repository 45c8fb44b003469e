"""A follower of a worker group, which receives calls from rank 0 and runs them in step with rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from google.protobuf.message import Message

from common.codec import artifact_class, unpack
from common.errors import FleetError
from common.logs import get_logger
from common.rpc.buffers import BufferLease, BufferPool
from common.rpc.frames import read_chunk
from common.rpc.framing import Assembler, CallLimits, Packet, PooledPayload, described_tensors, split_packets
from common.rpc.method import request_type, stage_method
from common.rpc.parsing import parse
from common.rpc.stage_servicer import Stages
from common.tensors import TORCH
from services.denoising.agreement import FollowingCall, outcome
from services.denoising.call_header import CallHeader
from services.denoising.group import compare
from services.denoising.messages import Kind, Link, OutOfStep

_log = get_logger(__name__)


class Follower:
    """Runs the stages with rank 0 until END. `total_bytes` bounds the tensors of a call."""

    def __init__(self, service: str, stages: Stages, link: Link, *, total_bytes: int) -> None:
        self._service = service
        self._request = request_type(stage_method(service))
        self._stages = stages
        self._link = link
        self._limits = CallLimits(total_bytes=total_bytes)
        self._pool = BufferPool()

    def follow(self) -> None:
        """Run calls until END. Raises OutOfStep if this rank and rank 0 are no longer in step."""
        while True:
            kind, called = self._link.receive(Kind.CALL, Kind.END)
            if kind is Kind.END:
                return
            lease = self._pool.lease()
            try:
                header = CallHeader.decoded(called)
                with header.scope(self._service):
                    self._run(header, lease)
            finally:
                lease.close()

    def _run(self, header: CallHeader, lease: BufferLease) -> None:
        reply = b""
        try:
            self._compute(self._inputs(lease), FollowingCall(header.request_id, variant=header.variant, ask=self._ask))
        except FleetError as error:
            reply = outcome(error)
        except OutOfStep:
            raise
        except Exception as error:
            _log.exception("call failed on this rank")
            raise OutOfStep(f"this rank raised {type(error).__name__}: {error}") from error
        self._link.send(Kind.OUTCOME, reply)
        compare(self._link, reply)

    def _compute(self, values: Mapping[str, Any], call: FollowingCall) -> None:
        """Run the stages and discard the outputs, because rank 0 sends them."""
        self._stages.run(values, call)

    def _ask(self) -> bytes:
        return self._link.receive(Kind.CHECK)[1]

    def _inputs(self, lease: BufferLease) -> dict[str, Any]:
        """The inputs of a call by slot, with tensors as views of leased buffers."""
        _, raw = self._link.receive(Kind.INPUT)
        header: Message = cast(Any, parse(self._request, raw)).header
        chunks = Assembler(described_tensors("", header, self._limits), partial(PooledPayload, lease=lease))
        while (message := self._link.receive(Kind.INPUT, Kind.RUN))[0] is Kind.INPUT:
            chunk = read_chunk(message[1])
            if chunk is None:
                raise OutOfStep("rank 0 sent a message that is not a chunk")
            chunks.add(chunk)
        return self._unpacked(split_packets(header, chunks.finish()))

    def _unpacked(self, packets: dict[str, Packet]) -> dict[str, Any]:
        """Unpack packets and remove them from the dict, so that only the tensors reference the buffers."""
        kinds = self._stages.contract.inputs
        return {slot: unpack(slot, artifact_class(kinds[slot]), packets.pop(slot), TORCH) for slot in list(packets)}
