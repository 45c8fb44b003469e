"""SIGKILL while a request denoises, of its worker at any step, or of its coordinator too: its result keeps its bytes.

At SIGTERM the worker hands the request over. All processes are real, for Flux (Euler), for Wan (UniPC, whose solver has
a history), for an image request of Wan 2.2 TI2V, whose latents at the end are not those of the last step, and for
GLM-Image, whose worker before denoising dies.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chaos_processes import Fleet
from redis.asyncio import Redis

from coarse_pictures import coarse_image, png
from common.rpc.client import open_channel
from common.state.connection import command, connect
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from models.catalog import open_model
from models.registry import load_registry
from redis_servers import until
from tiny_glm_image import build_tiny_glm_image
from tiny_wan import build_tiny_wan_ti2v

STEPS = 8
KILLED_AT = (1, STEPS // 2, STEPS - 1)
CHECKPOINTS = Path(__file__).resolve().parents[2] / "models" / "checkpoints"


@dataclass(frozen=True)
class Family:
    """A model, and a request so large that a step takes longer than its progress needs to arrive here.

    `model` is a shipped one, or that which `build` writes to a directory. `workers` are those of each service, two at
    least of denoising. `service` is that whose workers die.
    """

    model: str
    given: dict[str, Any]
    begins_with: bytes
    build: Callable[[Path], Path] | None = None
    images: Sequence[pb.ImageInput] = ()
    coordinators: int = 2
    workers: int = 2
    service: str = "denoising"


FAMILIES = {
    "flux": Family("emoji", {"height": 384, "width": 384}, b"\x89PNG"),
    "wan": Family("emoji-video", {"num_frames": 17}, b"\x00\x00\x00"),
}
# Its steps are quick, so that there are more of them.
TI2V = Family(
    "ti2v",
    {"height": 256, "width": 384, "num_frames": 9, "num_inference_steps": 3 * STEPS},
    b"\x00\x00\x00",
    build_tiny_wan_ti2v,
    images=[pb.ImageInput(role="image", data=png(coarse_image(60, 40)))],
    coordinators=1,
    workers=1,
)


# Its 262 prior tokens take longer than the few steps.
GLM_IMAGE = Family(
    "glm",
    {"height": 64, "width": 96, "num_inference_steps": 2},
    b"\x89PNG",
    build_tiny_glm_image,
    coordinators=1,
    service="before_denoising",
)


class Served:
    """A running fleet of one model, with a client of each coordinator."""

    def __init__(self, fleet: Fleet, redis: Redis, family: Family, stubs: Sequence[Stub]) -> None:
        self.fleet = fleet
        self.redis = redis
        self.stubs = stubs
        self.stored_step = 0
        self._family = family

    async def submit(self, stub: Stub) -> str:
        """Ask for the one result of this test."""
        parameters = pb.GenerationParameters(
            prompt="a red heart moving left",
            seed=3,
            images=self._family.images,
            **{"num_inference_steps": STEPS, **self._family.given},
        )
        return (await stub.Submit(pb.SubmitRequest(parameters=parameters))).request.request_id

    async def result(
        self, stub: Stub, name: str, kill_at: int = 0, kill: Callable[[str], Awaitable[None]] | None = None
    ) -> tuple[bytes, list[int]]:
        """The file, and the steps that the service reported; `kill` is called once, at step `kill_at`."""
        steps: list[int] = []
        last = pb.StateChange()
        async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
            last = reply.event.state_change
            if reply.event.progress.service == self._family.service:
                steps.append(reply.event.progress.step)
                if kill is not None and steps[-1] >= kill_at:
                    await kill(name)
                    kill = None
        assert last.state == pb.REQUEST_STATE_SUCCEEDED, last
        download = stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
        return b"".join([reply.data async for reply in download]), steps

    async def kill_worker(self, _: str) -> None:
        """SIGKILL the process that has the slot."""
        await self._signal_worker(signal.SIGKILL)

    async def end_worker(self, _: str) -> None:
        """SIGTERM to the process that has the slot."""
        await self._signal_worker(signal.SIGTERM)

    async def _signal_worker(self, number: signal.Signals) -> None:
        """A worker's name has its process id."""
        (slot,) = await command(self.redis, "HVALS", f"fleet:slots:{self._family.model}/{self._family.service}")
        pid = int(slot.decode().partition("|")[0].split("-")[-2])
        (worker,) = [each for each in self.fleet.of(coordinators=False) if each.pid == pid]
        self.fleet.signal(worker, number)

    async def kill_both(self, name: str) -> None:
        """SIGKILL the second coordinator, once the store has a checkpoint, and the worker."""

        async def is_stored() -> bool:
            step_checkpoint_key: bytes = await command(self.redis, "HGET", f"fleet:request:{name}", "point") or b"-0"
            self.stored_step = int(
                step_checkpoint_key.rpartition(b"-")[2]
            )  # at least so many came before it, one a step
            return self.stored_step > 0

        await until(is_stored)
        self.fleet.signal(self.fleet.of(coordinators=True)[1], signal.SIGKILL)
        await self.kill_worker(name)


@asynccontextmanager
async def served(family: Family) -> AsyncIterator[Served]:
    """The family's coordinators, and its workers for each service, all of which see each other."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resume-")))
        path = CHECKPOINTS / family.model if family.build is None else family.build(directory / family.model)
        fleet = Fleet(
            directory,
            {family.model: path},
            random.Random(0),
            coordinators=family.coordinators,
            workers=family.workers,
            denoisers=2,
            services=[spec.service for spec in open_model(str(path), load_registry()).services],
        )
        stack.push_async_callback(fleet.close)
        await fleet.start()
        redis = await stack.enter_async_context(connect(fleet.server.url))
        stubs: list[Stub] = []
        for coordinator in fleet.of(coordinators=True):
            channel = await stack.enter_async_context(open_channel(coordinator.target))
            stubs.append(generation_pb2_grpc.GenerationServiceStub(channel))
            await until(partial(_is_complete, stubs[-1], fleet.workers))
        yield Served(fleet, redis, family, stubs)
        await fleet.stop()
        assert not fleet.findings


async def _is_complete(stub: Stub, workers: Mapping[str, int]) -> bool:
    (model,) = (await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True)).models
    return {each.service: each.workers for each in model.services} == workers


def resumed_at(steps: list[int]) -> int:
    """The first step that the second worker did."""
    assert steps.count(0) == 2, steps
    return steps[steps.index(0, 1) + 1]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_death_in_the_middle_changes_no_byte(family: Family) -> None:
    async def story() -> None:
        async with asyncio.timeout(150), served(family) as fleet:
            stub = fleet.stubs[0]
            whole, steps = await fleet.result(stub, await fleet.submit(stub))
            assert whole.startswith(family.begins_with)
            assert steps.count(0) == 1
            for kill_at in KILLED_AT:
                again, steps = await fleet.result(stub, await fleet.submit(stub), kill_at, fleet.kill_worker)
                assert again == whole
                assert resumed_at(steps) > kill_at, steps
            # A worker that leaves has time to finish, and hands the request over: no step is done twice.
            name = await fleet.submit(stub)
            again, steps = await fleet.result(stub, name, STEPS // 2, fleet.end_worker)
            assert again == whole
            assert resumed_at(steps) > STEPS // 2, steps
            done = [step for step in steps if step]
            assert done == sorted(set(done)), steps
            assert not await command(fleet.redis, "HGET", f"fleet:request:{name}", "deaths")
            assert not await fleet.redis.keys("fleet:checkpoint:*")
            # Its coordinator dies too: what the next one goes on from, it has from the store.
            again, steps = await fleet.result(stub, await fleet.submit(fleet.stubs[1]), STEPS // 2, fleet.kill_both)
            assert again == whole
            assert resumed_at(steps) > fleet.stored_step > 0, steps

    asyncio.run(story())


def test_an_image_request_resumes_to_the_same_bytes() -> None:
    """The checkpoint has the loop's own first frame; that of the image is put back at the end."""

    async def story() -> None:
        async with asyncio.timeout(90), served(TI2V) as fleet:
            (stub,) = fleet.stubs
            whole, steps = await fleet.result(stub, await fleet.submit(stub))
            assert whole.startswith(TI2V.begins_with)
            assert steps.count(0) == 1
            kill_at = STEPS
            again, steps = await fleet.result(stub, await fleet.submit(stub), kill_at, fleet.kill_worker)
            assert again == whole
            assert resumed_at(steps) > kill_at, steps

    asyncio.run(story())


def test_prior_tokens_are_sampled_again_after_a_death() -> None:
    """They have no checkpoint: another worker begins with the first one, and its draws are those of the seed."""

    async def story() -> None:
        async with asyncio.timeout(90), served(GLM_IMAGE) as fleet:
            (stub,) = fleet.stubs
            whole, tokens = await fleet.result(stub, await fleet.submit(stub))
            assert whole.startswith(GLM_IMAGE.begins_with)
            assert tokens.count(0) == 1
            again, tokens = await fleet.result(stub, await fleet.submit(stub), 100, fleet.kill_worker)
            assert again == whole
            assert tokens.count(0) == 2, tokens

    asyncio.run(story())
