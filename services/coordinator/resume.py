"""Where a request's denoising can go on after its worker, or its coordinator, has died.

The newest step checkpoint is kept in memory and, off the critical path, in the store. It is of use only to a worker
with an equal numerics fingerprint and for equal inputs, which a digest tells: else the result would be another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from google.protobuf.message import DecodeError

from common.artifacts import STEP_CHECKPOINT_FORMAT
from common.errors import FleetError, InternalError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from common.logs import get_logger
from common.metrics import STEP_CHECKPOINT_SAVES
from common.rpc.frames import read_chunk
from common.rpc.framing import Assembler, CallLimits, KeptFrames, Packet, chunk_frames, described_tensors
from common.stage import STEP_CHECKPOINTS
from common.state.leases import Leases, Loss
from common.state.presence import TTL_SECONDS
from common.state.retries import retry_until_available
from fleet.v1 import artifacts_pb2
from services.coordinator.poison import reason_to_give_up

_SHORTEST_WAIT_SECONDS = 0.01

_log = get_logger(__name__)


@dataclass(frozen=True)
class StepCheckpointPacket:
    """A checkpoint as a worker sent it, and what it is good for."""

    origin: str
    packet: Packet = field(repr=False)


def origin_of(numerics: str, values: Mapping[str, Packet]) -> str:
    """Equal only where a checkpoint of one run fits into another: same inputs, same format and, after a dot, numerics.

    Messages hold the checksums of the tensors that travel beside them, so that the messages are enough.
    """
    digest = hashlib.sha256(f"{STEP_CHECKPOINT_FORMAT}".encode())
    for slot in sorted(values):
        digest.update(slot.encode() + b"\0" + values[slot].message.SerializeToString(deterministic=True))
    return f"{digest.hexdigest()}.{hashlib.sha256(numerics.encode()).hexdigest()}"


class NewestStepCheckpoint:
    """The newest checkpoint of one request. `inherited` says that there may be one in the store already."""

    def __init__(self, leases: Leases, request_id: str, epoch: int, *, inherited: bool = False) -> None:
        self._leases = leases
        self._request_id = request_id
        self._epoch = epoch
        self._load = inherited
        self._latest: StepCheckpointPacket | None = None
        self._unsaved: StepCheckpointPacket | None = None
        self._numbers = itertools.count()
        self._saving: asyncio.Task[None] | None = None

    def remember(self, origin: str, packet: Packet) -> None:
        """A worker came so far. Saved in the background; while the store is slow, only the newest one is."""
        self._latest = self._unsaved = StepCheckpointPacket(origin, packet)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        while (checkpoint := self._unsaved) is not None:
            self._unsaved = None
            packet = checkpoint.packet
            head = (checkpoint.origin.encode(), packet.message.SerializeToString())
            parts = itertools.chain(head, chunk_frames(packet.chunks))
            try:
                number, step = next(self._numbers), step_of(packet)
                await self._leases.save_step_checkpoint(self._request_id, self._epoch, number, parts, step=step)
                STEP_CHECKPOINT_SAVES.labels("stored").inc()
            except Unavailable as error:
                STEP_CHECKPOINT_SAVES.labels("failed").inc()
                _log.warning("step checkpoint is not stored", error=error)
            except FleetError:
                STEP_CHECKPOINT_SAVES.labels("failed").inc()
                _log.exception("step checkpoint is not stored")

    @property
    def is_known(self) -> bool:
        """Whether a worker has sent a checkpoint to this coordinator."""
        return self._latest is not None

    async def find(self, origin: str, slot: str, *, with_any_numerics: bool = False) -> Packet | None:
        """The checkpoint to continue from, for the resume slot `slot`; None where no checkpoint has this origin.

        With `with_any_numerics`, one of the same inputs is taken whichever worker made it.
        """
        if self._load and self._latest is None:
            self._latest = await self._loaded()
        self._load = False
        if self._latest is None:
            return None
        own = self._latest.origin
        if own != origin and not (with_any_numerics and own.partition(".")[0] == origin.partition(".")[0]):
            return None
        return self._latest.packet.renamed(STEP_CHECKPOINTS, slot)

    async def _loaded(self) -> StepCheckpointPacket | None:
        try:
            origin, state, *frames = await self._leases.load_step_checkpoint(self._request_id)
            return StepCheckpointPacket(origin.decode(), _packet(state, frames))
        except NotFound:
            return None
        except (Unavailable, InvalidInput, ResourceExhausted, DecodeError, ValueError) as error:
            _log.warning("step checkpoint cannot be read", error=error)
            return None

    async def settle(self) -> None:
        """Wait until the newest checkpoint is stored, or given up."""
        if self._saving is not None:
            await asyncio.wait({self._saving})

    async def close(self) -> None:
        """Stop saving."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait({self._saving})


def step_of(packet: Packet) -> int:
    """The step of a checkpoint."""
    return cast(artifacts_pb2.DenoiseState, packet.message).step


def _packet(state: bytes, frames: list[bytes]) -> Packet:
    """A stored checkpoint. Raises InvalidInput for one that is not whole."""
    message = artifacts_pb2.DenoiseState.FromString(state)
    assembler = Assembler(described_tensors(STEP_CHECKPOINTS, message, CallLimits()), KeptFrames)
    for frame in frames:
        chunk = read_chunk(frame)
        if chunk is None:
            raise InvalidInput("a part of the checkpoint is no chunk")
        assembler.add(chunk)
    return Packet(message, assembler.finish())


class Recovery:
    """The losses of one request, and the checkpoint to resume at.

    `has_emitted` is whether a reader has items of a stream that a worker of the request emitted. The request continues
    after them then, also on a worker whose numerics differ: what was delivered stays, and is made only once. A loss is
    undecided until the worker's heartbeat expires. Until then the request continues, unless it would be given up if the
    loss were suspect.
    """

    def __init__(self, leases: Leases, request_id: str, *, epoch: int = 1, ttl_seconds: float = TTL_SECONDS) -> None:
        self.step_checkpoint = NewestStepCheckpoint(leases, request_id, epoch, inherited=epoch > 1)
        self._leases = leases
        self._request_id = request_id
        self._epoch = epoch
        self._ttl_seconds = ttl_seconds
        self.has_emitted = False
        self._has_losses = epoch > 1  # perhaps: an earlier owner may have recorded some
        self._recorded = 0

    async def worker_lost(self, worker_id: str, service: str, stage: int) -> None:
        """Record a loss of a call that had begun. Waits until the store is available: the count must be right.

        `stage` is the service's place among the services of the request.
        """
        await self.step_checkpoint.settle()
        await retry_until_available(
            "record of a lost call",
            partial(
                self._leases.add_death,
                self._request_id,
                self._epoch,
                worker_id,
                service=service,
                stage=stage,
                ttl_seconds=self._ttl_seconds,
            ),
        )
        self._has_losses = True
        self._recorded += 1

    async def wait_until_claimable(self) -> bool:
        """Wait until the request may be claimed; returns whether all slots of a worker have to be claimed.

        Raises InternalError when workers die of the request.
        """
        while self._has_losses:
            recorded = self._recorded
            losses = await retry_until_available(
                "read of lost calls", partial(self._leases.losses, self._request_id, self._epoch)
            )
            if not losses and recorded == self._recorded:
                self._has_losses = False
            suspect = [loss for loss in losses if loss.suspect]
            if reason := reason_to_give_up(suspect):
                where = f"the last one in {suspect[-1].service}"
                raise InternalError(f"{reason}, {where}; it is given up for the sake of the others")
            if not reason_to_give_up(losses):
                return bool(losses)
            await asyncio.sleep(max(_SHORTEST_WAIT_SECONDS, min(_undecided(losses))))
        return False


def _undecided(losses: list[Loss]) -> list[float]:
    """The seconds until each loss is decided that is not yet."""
    return [loss.undecided_seconds for loss in losses if not loss.suspect]
