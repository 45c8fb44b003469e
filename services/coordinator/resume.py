"""Resumes the denoising of a request from a step checkpoint after its worker or coordinator is lost.

The newest step checkpoint is held in memory and saved to the store in the background. It is used only for the same
inputs (verified by a digest) and on a worker with the same numerics fingerprint, because otherwise the result differs.
A request that has emitted items of a stream also resumes with another fingerprint; see Recovery.
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
    """A step checkpoint as sent by a worker, and its origin; see origin_of()."""

    origin: str
    packet: Packet = field(repr=False)


def origin_of(numerics: str, values: Mapping[str, Packet]) -> str:
    """The origin of a step checkpoint: INPUTS.NUMERICS.

    INPUTS is a digest of the inputs and the step checkpoint format, NUMERICS a digest of the numerics fingerprint.
    Hashes only messages, which contain the checksums of their tensors.
    """
    digest = hashlib.sha256(f"{STEP_CHECKPOINT_FORMAT}".encode())
    for slot in sorted(values):
        digest.update(slot.encode() + b"\0" + values[slot].message.SerializeToString(deterministic=True))
    return f"{digest.hexdigest()}.{hashlib.sha256(numerics.encode()).hexdigest()}"


class NewestStepCheckpoint:
    """The newest step checkpoint of one request.

    If `inherited`, the store may contain a step checkpoint of an earlier epoch.
    """

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
        """Hold a new step checkpoint, and save it in the background. While the store is slow, saves only the newest."""
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
                _log.warning("step checkpoint not stored", error=error)
            except FleetError:
                STEP_CHECKPOINT_SAVES.labels("failed").inc()
                _log.exception("step checkpoint not stored")

    @property
    def is_known(self) -> bool:
        """Whether this coordinator holds a step checkpoint, received from a worker or loaded from the store."""
        return self._latest is not None

    async def load(self) -> None:
        """Load the step checkpoint of an earlier epoch, once. Waits while the store is unavailable."""
        if self._load and self._latest is None:
            self._latest = await retry_until_available("load of a step checkpoint", self._loaded)
        self._load = False

    async def find(self, origin: str, slot: str, *, with_any_numerics: bool = False) -> Packet | None:
        """The newest step checkpoint, as value of `slot`; None if it has another origin, or none exists.

        `with_any_numerics` also accepts a step checkpoint of the same inputs from a worker with another numerics
        fingerprint.
        """
        await self.load()
        if self._latest is None:
            return None
        own = self._latest.origin
        if own != origin and not (with_any_numerics and own.partition(".")[0] == origin.partition(".")[0]):
            return None
        return self._latest.packet.renamed(STEP_CHECKPOINTS, slot)

    async def _loaded(self) -> StepCheckpointPacket | None:
        """The stored step checkpoint; None if there is none, or if it is unreadable. Raises Unavailable."""
        try:
            origin, state, *frames = await self._leases.load_step_checkpoint(self._request_id)
            return StepCheckpointPacket(origin.decode(), _packet(state, frames))
        except NotFound:
            return None
        except (InvalidInput, ResourceExhausted, DecodeError, ValueError) as error:
            _log.warning("step checkpoint unreadable", error=error)
            return None

    async def settle(self) -> None:
        """Wait until the newest step checkpoint is stored, or its write has failed."""
        if self._saving is not None:
            await asyncio.wait({self._saving})

    async def close(self) -> None:
        """Cancel the background write."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait({self._saving})


def step_of(packet: Packet) -> int:
    """The denoising step of a step checkpoint."""
    return cast(artifacts_pb2.DenoiseState, packet.message).step


def _packet(state: bytes, frames: list[bytes]) -> Packet:
    """Decode a stored step checkpoint. Raises InvalidInput for an incomplete one."""
    message = artifacts_pb2.DenoiseState.FromString(state)
    assembler = Assembler(described_tensors(STEP_CHECKPOINTS, message, CallLimits()), KeptFrames)
    for frame in frames:
        chunk = read_chunk(frame)
        if chunk is None:
            raise InvalidInput("a frame of the stored step checkpoint is not a chunk")
        assembler.add(chunk)
    return Packet(message, assembler.finish())


class Recovery:
    """The losses of one request, and its step checkpoint.

    `has_emitted`: a reader has received items of the request's stream. The request then resumes after these items, even
    on a worker with another numerics fingerprint. A loss is undecided until the worker reappears or its heartbeat
    expires; it is suspect after the expiry. If the request would fail with all undecided losses counted as suspect, it
    waits until they are decided.
    """

    def __init__(self, leases: Leases, request_id: str, *, epoch: int = 1, ttl_seconds: float = TTL_SECONDS) -> None:
        self.step_checkpoint = NewestStepCheckpoint(leases, request_id, epoch, inherited=epoch > 1)
        self._leases = leases
        self._request_id = request_id
        self._epoch = epoch
        self._ttl_seconds = ttl_seconds
        self.has_emitted = False
        self._has_losses = epoch > 1  # An earlier owner may have recorded losses.
        self._recorded = 0

    async def worker_lost(self, worker_id: str, service: str, stage: int) -> None:
        """Record the loss of a call that had begun. Waits until the store is available, so that no loss is missed.

        `stage` is the index of the service among the services of the request.
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
        """Wait until the request may claim a worker slot. Returns whether the claim must include all slots of a worker.

        Raises InternalError if the request repeatedly loses its workers.
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
                where = f"the last one at {suspect[-1].service}"
                raise InternalError(f"{reason}, {where}; the request is not retried, to protect other requests")
            if not reason_to_give_up(losses):
                return bool(losses)
            await asyncio.sleep(max(_SHORTEST_WAIT_SECONDS, min(_undecided(losses))))
        return False


def _undecided(losses: list[Loss]) -> list[float]:
    """Seconds until each undecided loss is decided."""
    return [loss.undecided_seconds for loss in losses if not loss.suspect]
