"""Stores a request in each state with a fleet of a given source tree, and dumps the Redis keys.

The fleet serves two tiny checkpoints: Wan TI2V, which has two variants, and causal Wan, whose result streams. A second
model name of the first checkpoint has no workers, so that its requests remain queued. All processes are killed at the
end, so that the open requests belong to a lost coordinator.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_processes import COORDINATOR, QUICK_COORDINATOR, Fleet, credentials
from redis.asyncio import Redis

from async_tests import wait_until
from coarse_images import coarse_image, png
from common.rpc.client import open_channel
from common.state.connection import command, connect
from coordinator_fleet import Stub
from fleet.v1 import artifacts_pb2, generation_pb2_grpc
from fleet.v1 import generation_pb2 as pb
from stored_requests import dump_store
from tiny_wan import build_tiny_wan_causal, build_tiny_wan_ti2v

VIDEO, IDLE, CAUSAL = "video", "idle", "causal"
STUDIO, PRESS = "studio", "press"
KEYS = {"succeeded": "key of the result", "queued": "key of the queue"}
"""Idempotency keys of requests of the caller STUDIO, by state."""
_SERVICES = ("text_encoding", "image_encoding", "latent_preparation", "denoising", "decoding")
_FRAME = {"height": 64, "width": 64, "num_frames": 1}
_STREAM = {"height": 32, "width": 32}
_LARGEST_STREAM = 16_000
"""Largest streamed result in bytes; a request with a larger result fails."""
_STEP_SECONDS = 0.1
"""Seconds between progress events, and from the submission of the request "expired" to its deadline."""
_LONG_STEPS = 300
_BLOCKS, _BLOCK_STEPS = 3, 40
_UNUSED = {(CAUSAL, "image_encoding")}
"""(model, service) without workers, as the model has no such stage."""


@dataclass(frozen=True)
class PlannedRequest:
    """Caller, model, parameters and idempotency key of a request."""

    caller: str
    model: str
    given: Mapping[str, Any]
    images: tuple[pb.ImageInput, ...] = ()
    key: str = ""

    @property
    def parameters(self) -> pb.GenerationParameters:
        """The parameters of the request."""
        return pb.GenerationParameters(prompt="a red apple", seed=3, images=self.images, **self.given)


def _image() -> tuple[pb.ImageInput, ...]:
    return (pb.ImageInput(role="image", data=png(coarse_image(32, 32))),)


def _timesteps() -> dict[str, Any]:
    values = [1000 - step * 24 for step in range(_BLOCK_STEPS)]
    return {"dmd_denoising_steps": artifacts_pb2.ParamValue(doubles_value=artifacts_pb2.DoubleList(values=values))}


def requests_by_state() -> dict[str, PlannedRequest]:
    """Requests by the state in which they are dumped."""
    image = _image()
    return {
        "succeeded": PlannedRequest(STUDIO, VIDEO, {**_FRAME, "num_inference_steps": 4}, image, KEYS["succeeded"]),
        "failed": PlannedRequest(PRESS, CAUSAL, {**_STREAM, "num_frames": 29}),
        "cancelled": PlannedRequest(PRESS, IDLE, _FRAME),
        "expired": PlannedRequest(STUDIO, IDLE, _FRAME),
        "queued": PlannedRequest(STUDIO, IDLE, {**_FRAME, "num_inference_steps": 4}, image, KEYS["queued"]),
        "streaming": PlannedRequest(PRESS, CAUSAL, {**_STREAM, "num_frames": 8 * _BLOCKS - 3, "params": _timesteps()}),
        "running": PlannedRequest(STUDIO, VIDEO, {**_FRAME, "num_inference_steps": _LONG_STEPS}),
    }


def build_models(directory: Path) -> dict[str, Path]:
    """Write the checkpoints; returns their directories by model name."""
    video = build_tiny_wan_ti2v(directory / VIDEO)
    return {VIDEO: video, IDLE: video, CAUSAL: build_tiny_wan_causal(directory / CAUSAL)}


class _Recorder:
    """A client of the fleet. `ids` has request ids by the keys of requests_by_state()."""

    def __init__(self, stub: Stub) -> None:
        self.ids: dict[str, str] = {}
        self._stub = stub
        self._planned = requests_by_state()

    async def submit(self, name: str, deadline_seconds: float | None = None) -> None:
        """Submit a request."""
        planned = self._planned[name]
        request = pb.SubmitRequest(model=planned.model, parameters=planned.parameters, idempotency_key=planned.key)
        if deadline_seconds is not None:
            request.deadline.FromNanoseconds(time.time_ns() + int(1e9 * deadline_seconds))
        reply = await self._stub.Submit(request, metadata=credentials(planned.caller), wait_for_ready=True)
        self.ids[name] = reply.request.request_id

    async def cancel(self, name: str) -> None:
        """Cancel a request."""
        call = pb.CancelRequestRequest(request_id=self.ids[name])
        await self._stub.CancelRequest(call, metadata=credentials(self._planned[name].caller))

    async def events(self, name: str) -> AsyncIterator[pb.Event]:
        """All events of a request."""
        call = pb.WatchRequest(request_id=self.ids[name])
        async for reply in self._stub.Watch(call, metadata=credentials(self._planned[name].caller)):
            yield reply.event

    async def end(self, name: str) -> pb.RequestState.ValueType:
        """The terminal state of a request."""
        return [event async for event in self.events(name)][-1].state_change.state

    async def record(self, fleet: Fleet) -> None:
        """Bring a request into each state, and kill the fleet while three requests are open."""
        await self.submit("succeeded")
        await self.submit("failed")
        assert await self.end("succeeded") == pb.REQUEST_STATE_SUCCEEDED
        assert await self.end("failed") == pb.REQUEST_STATE_FAILED
        await self.submit("cancelled")
        await self.cancel("cancelled")
        assert await self.end("cancelled") == pb.REQUEST_STATE_CANCELLED
        await self.submit("expired", _STEP_SECONDS)
        assert await self.end("expired") == pb.REQUEST_STATE_EXPIRED
        await self.submit("queued")
        await self.submit("running")
        async for event in self.events("running"):
            if event.progress.service == "denoising" and event.progress.step:
                break
        await self.submit("streaming")
        async for event in self.events("streaming"):
            if event.HasField("item"):
                break
        await fleet.kill()


async def record_requests(tree: Path, directory: Path, dump: Path) -> None:
    """Store requests with a fleet of a source tree, and write the store's keys to `dump`.

    `directory` has models and logs.
    """
    flags = (*QUICK_COORDINATOR, "--step-seconds", str(_STEP_SECONDS), "--max-result-bytes", str(_LARGEST_STREAM))
    async with AsyncExitStack() as stack:
        fleet = Fleet(
            directory,
            build_models(directory / "models"),
            random.Random(0),
            coordinators=1,
            workers=1,
            services=_SERVICES,
            callers=(STUDIO, PRESS),
            coordinator_flags=flags,
            trees=[tree],
        )
        fleet.roles = [role for role in fleet.roles if role.model != IDLE and (role.model, role.program) not in _UNUSED]
        stack.push_async_callback(fleet.close)
        await fleet.start()
        redis = await stack.enter_async_context(connect(fleet.server.url))
        (coordinator,) = (each for each in fleet.living if each.role == COORDINATOR)
        channel = await stack.enter_async_context(open_channel(coordinator.target))
        recorder = _Recorder(generation_pb2_grpc.GenerationServiceStub(channel))
        await recorder.record(fleet)

        async def heartbeats_are_expired() -> bool:
            heartbeats = [await command(redis, "KEYS", f"fleet:{kind}:*") for kind in ("coordinator", "worker")]
            return not any(heartbeats)

        await wait_until(heartbeats_are_expired)
        await _check(redis, recorder.ids)
        await dump_store(redis, recorder.ids, dump)


async def _check(redis: Redis, ids: Mapping[str, str]) -> None:
    """Assert that the open requests have the intended states."""
    states = {name: int(await command(redis, "HGET", f"fleet:request:{each}", "state")) for name, each in ids.items()}
    assert states["queued"] == pb.REQUEST_STATE_QUEUED, states
    assert states["running"] == states["streaming"] == pb.REQUEST_STATE_RUNNING, states
    assert int(await command(redis, "HGET", f"fleet:request:{ids['running']}", "reached")) < _LONG_STEPS
    items = await command(redis, "KEYS", f"fleet:item:{ids['streaming']}:*")
    assert 0 < len(items) < _BLOCKS, items
