"""Where a request's denoising can go on after its worker, or its coordinator, has died.

The newest step checkpoint is kept in memory and, off the critical path, in the store. It is of use only to a worker
with an equal numerics fingerprint and for equal inputs, which a digest tells: else the result would be another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from common.errors import FleetError, InternalError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from common.rpc.frames import read_chunk
from common.rpc.framing import Assembler, KeptFrames, Limits, Packet, chunk_frames, described_tensors
from common.state.leases import Leases
from fleet.v1 import artifacts_pb2

RESUME_SLOT = "resume_from"
_SENT_AS = "checkpoint"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a worker sent it, and what it is good for."""

    origin: str
    packet: Packet = field(repr=False)


def origin_of(numerics: str, values: Mapping[str, Packet]) -> str:
    """Equal only where a checkpoint of one run fits into another: same numerics, same inputs.

    Messages hold the checksums of the tensors that travel beside them, so that the messages are enough.
    """
    digest = hashlib.sha256(numerics.encode())
    for slot in sorted(values):
        digest.update(slot.encode() + b"\0" + values[slot].message.SerializeToString(deterministic=True))
    return digest.hexdigest()


class ResumePoint:
    """The newest checkpoint of one request. `inherited` says that there may be one in the store already."""

    def __init__(self, leases: Leases, request_id: str, epoch: int, *, inherited: bool = False) -> None:
        self._leases = leases
        self._request_id = request_id
        self._epoch = epoch
        self._load = inherited
        self._latest: Checkpoint | None = None
        self._unsaved: Checkpoint | None = None
        self._numbers = itertools.count()
        self._saving: asyncio.Task[None] | None = None

    def remember(self, origin: str, packet: Packet) -> None:
        """A worker came so far. Saved in the background; while the store is slow, only the newest one is."""
        self._latest = self._unsaved = Checkpoint(origin, packet)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        while (checkpoint := self._unsaved) is not None:
            self._unsaved = None
            packet = checkpoint.packet
            head = (checkpoint.origin.encode(), packet.message.SerializeToString())
            parts = itertools.chain(head, chunk_frames(packet.chunks))
            try:
                await self._leases.save_checkpoint(self._request_id, self._epoch, next(self._numbers), parts)
            except Unavailable as error:
                _log.warning("a checkpoint of request %s is not stored: %s", self._request_id, error)
            except FleetError:
                _log.exception("a checkpoint of request %s is not stored", self._request_id)

    async def find(self, origin: str) -> Packet | None:
        """The checkpoint to go on from, for the slot "resume_from"; None where there is none that fits."""
        if self._load and self._latest is None:
            self._latest = await self._loaded()
        self._load = False
        if self._latest is None or self._latest.origin != origin:
            return None
        return self._latest.packet.renamed(_SENT_AS, RESUME_SLOT)

    async def _loaded(self) -> Checkpoint | None:
        try:
            origin, state, *frames = await self._leases.load_checkpoint(self._request_id)
            return Checkpoint(origin.decode(), _packet(state, frames))
        except NotFound:
            return None
        except (Unavailable, InvalidInput, ResourceExhausted, DecodeError, ValueError) as error:
            _log.warning("the checkpoint of request %s cannot be read: %s", self._request_id, error)
            return None

    async def close(self) -> None:
        """Stop saving."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait({self._saving})


def _packet(state: bytes, frames: list[bytes]) -> Packet:
    """A stored checkpoint. Raises InvalidInput for one that is not whole."""
    message = artifacts_pb2.DenoiseState.FromString(state)
    assembler = Assembler(described_tensors(_SENT_AS, message, Limits()), KeptFrames)
    for frame in frames:
        chunk = read_chunk(frame)
        if chunk is None:
            raise InvalidInput("a part of the checkpoint is no chunk")
        assembler.add(chunk)
    return Packet(message, assembler.finish())


class Recovery:
    """What a request has been through: the workers that died of it, perhaps, and the point to go on from."""

    def __init__(
        self,
        leases: Leases,
        request_id: str,
        *,
        epoch: int = 1,
        deaths: frozenset[str] = frozenset(),
        most_deaths: int = 2,
    ) -> None:
        self.point = ResumePoint(leases, request_id, epoch, inherited=epoch > 1)
        self._leases = leases
        self._request_id = request_id
        self._epoch = epoch
        self._deaths = deaths
        self._most_deaths = most_deaths

    async def worker_died(self, worker_id: str, service: str, error: FleetError) -> None:
        """Count a worker that died during the call. Raises InternalError once it is the last that the request gets."""
        self._deaths |= {worker_id}
        try:
            self._deaths |= await self._leases.add_death(self._request_id, self._epoch, worker_id)
        except Unavailable as unavailable:
            _log.warning("a death under request %s is not stored: %s", self._request_id, unavailable)
        if len(self._deaths) >= self._most_deaths:
            raise InternalError(
                f"{len(self._deaths)} workers died while they ran this request, the last one in {service} "
                f"({error.message}); it is given up for the sake of the others"
            ) from error
