"""A stage service in this process: a small stage behind a real gRPC server, and its RemoteRunner."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from async_tests import HANG_SECONDS, run_bounded
from common.artifacts import Canvas, Conditioning, LatentPart, Latents, Sampling, StepCheckpoint
from common.codec import pack
from common.local import HostedStages
from common.rpc.client import RemoteRunner, open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.framing import Packet
from common.rpc.replies import ReplyCache
from common.rpc.stage_servicer import ServicerLimits, StageServicer
from common.rpc.watchdog import Watchdog
from common.stage import STEP_CHECKPOINTS, Call, PipelineStage
from common.tensors import TORCH
from step_checkpoints import Sink

SERVICE = "denoising"
METHOD = "/fleet.v1.DenoisingService/Denoise"


@dataclass(frozen=True, kw_only=True)
class StageInput:
    """Stage inputs of several artifact types; one slot is optional."""

    initial_latents: Latents
    sampling: Sampling
    text_conditioning: Conditioning | None = None


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """A stage output with one slot."""

    denoised_latents: Latents


Script = Callable[[StageInput, Call], None]


def do_nothing(_: StageInput, call: Call) -> None:
    """A script that only checks for a cancellation."""
    call.check_cancelled()


class ScriptedStage(PipelineStage[StageInput, StageOutput]):
    """A stage that runs the script, then multiplies the latents by the number of steps."""

    def __init__(self, script: Script = do_nothing) -> None:
        self._script = script

    def run(self, x: StageInput, call: Call) -> StageOutput:
        """Run the stage."""
        self._script(x, call)
        parts = {
            name: LatentPart(
                latents=part.latents * x.sampling.num_inference_steps, raw_latent_shape=part.raw_latent_shape
            )
            for name, part in x.initial_latents.parts.items()
        }
        return StageOutput(denoised_latents=Latents(parts=parts))


def latents(count: int = 1 << 20, seed: int = 0) -> Latents:
    """Random latents: `count` float32 values."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return Latents(parts={"image": LatentPart(latents=values, raw_latent_shape=(count,))})


def artifacts(count: int = 1 << 20, **more: Any) -> dict[str, Any]:
    """Input artifacts of a ScriptedStage."""
    return {"initial_latents": latents(count), "sampling": Sampling(num_inference_steps=3, seed=1)} | more


def packets(count: int = 1 << 20, **more: Any) -> dict[str, Packet]:
    """Input packets of a ScriptedStage."""
    return {slot: pack(slot, artifact, TORCH) for slot, artifact in artifacts(count, **more).items()}


CANVAS = Canvas(height=8, width=8)


@dataclass
class RecordedCall:
    """Progress, warnings and step checkpoints that a call reported."""

    progress: list[tuple[int, int]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: list[Packet] = field(default_factory=list)

    def call(self, **more: Any) -> Call:
        """A Call whose callbacks append to this record."""
        return Call(
            "r1",
            sinks={STEP_CHECKPOINTS: Sink(self.checkpoints.append)},
            on_progress=lambda step, total: self.progress.append((step, total)),
            on_warning=lambda name, text: self.warnings.append((name, text)),
            **more,
        )


class Gate:
    """A script that blocks the stage until the test opens the gate, for at most HANG_SECONDS.

    `was_cancelled`: for each call, whether it was cancelled when the gate opened.
    """

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.was_cancelled: list[bool] = []

    def __call__(self, _: StageInput, call: Call) -> None:
        self.entered.set()
        self.opened.wait(HANG_SECONDS)
        self.was_cancelled.append(call.cancelled.wait(0))
        call.check_cancelled()


@dataclass
class Served:
    """A running server, its servicer, and a channel to it."""

    server: FleetServer
    servicer: StageServicer
    channel: grpc.aio.Channel
    hosted: HostedStages
    recorded: RecordedCall = field(default_factory=RecordedCall)

    def runner(self, **more: Any) -> RemoteRunner:
        """A RemoteRunner that calls the server."""
        return RemoteRunner(self.channel, SERVICE, self.hosted.contract, **more)

    async def raw_call(self, *frames: bytes) -> list[bytes]:
        """Send raw frames and half-close the call; returns the received frames."""
        open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self.channel.stream_stream(METHOD)
        return [reply async for reply in open_call(iter(frames))]


@asynccontextmanager
async def served(
    script: Script = do_nothing,
    *,
    listen: str = "127.0.0.1:0",
    limits: ServicerLimits | None = None,
    cache: ReplyCache | None = None,
    watchdog: Watchdog | None = None,
) -> AsyncIterator[Served]:
    """Serve a scripted stage."""
    hosted = HostedStages(SERVICE, [ScriptedStage(script)])
    with ThreadPoolExecutor(1) as executor:
        server = FleetServer(listen)
        servicer = StageServicer(SERVICE, hosted, executor, TORCH, limits=limits, cache=cache, watchdog=watchdog)
        server.add(servicer.methods, servicer.service_name)
        address = await server.start()
        await server.set_ready(True)
        async with open_channel(address) as channel:
            try:
                yield Served(server, servicer, channel, hosted)
            finally:
                await server.drain(0)


def run_served(test: Callable[[Served], Awaitable[None]], script: Script | None = None, **options: Any) -> None:
    """Run a test against a served stage."""

    async def served_test() -> None:
        async with served(*([script] if script else []), **options) as stage:
            await test(stage)

    run_bounded(served_test)


def step_checkpoint_of(x: StageInput, step: int) -> StepCheckpoint:
    """A step checkpoint with the stage's input latents."""
    return StepCheckpoint(step=step, latents=x.initial_latents)
