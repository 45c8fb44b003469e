"""SIGKILL of a worker, or of worker and coordinator, during denoising does not change the result.

At SIGTERM, the worker hands the request over. All processes are real. Families: Flux (Euler solver), Wan (UniPC solver,
whose state contains earlier predictions), an image request of Wan 2.2 TI2V, whose first frame is replaced after the
last step, and GLM-Image, whose before_denoising worker is killed.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from async_tests import HANG_SECONDS
from coarse_images import coarse_image, png
from common.state.connection import command
from fleet.v1 import generation_pb2 as pb
from resume_fleet import STEPS, Family, Served, resumed_at, served
from tiny_glm_image import build_tiny_glm_image
from tiny_wan import build_tiny_wan_ti2v

KILLED_AT = (1, STEPS // 2, STEPS - 1)

FAMILIES = {
    "flux": Family("emoji", {"height": 384, "width": 384}, b"\x89PNG"),
    "wan": Family("emoji-video", {"num_frames": 17}, b"\x00\x00\x00"),
}
# More steps than STEPS, as each step is short.
TI2V = Family(
    "ti2v",
    {"height": 256, "width": 384, "num_frames": 9, "num_inference_steps": 3 * STEPS},
    b"\x00\x00\x00",
    build_tiny_wan_ti2v,
    images=[pb.ImageInput(role="image", data=png(coarse_image(60, 40)))],
    coordinators=1,
    workers=1,
)


# Sampling the 640 prior tokens takes longer than both denoising steps, and longer than the delivery of progress.
GLM_IMAGE = Family(
    "glm",
    {"height": 512, "width": 768, "num_inference_steps": 2},
    b"\x89PNG",
    build_tiny_glm_image,
    coordinators=1,
    service="before_denoising",
)


async def lose_worker(fleet: Served, whole: bytes, kill_at: int) -> None:
    stub = fleet.stubs[0]
    again, steps = await fleet.result(stub, await fleet.submit(stub), kill_at, fleet.kill_worker)
    assert again == whole
    assert resumed_at(steps) > kill_at, steps


async def end_worker(fleet: Served, whole: bytes) -> None:
    """A worker that receives SIGTERM hands the request over: no step is computed twice."""
    stub = fleet.stubs[0]
    request_id = await fleet.submit(stub)
    again, steps = await fleet.result(stub, request_id, STEPS // 2, fleet.end_worker)
    assert again == whole
    assert resumed_at(steps) > STEPS // 2, steps
    done = [step for step in steps if step]
    assert done == sorted(set(done)), steps
    assert not await command(fleet.redis, "HGET", f"fleet:request:{request_id}", "deaths")
    assert not await fleet.redis.keys("fleet:checkpoint:*")


async def lose_worker_and_coordinator(fleet: Served, whole: bytes) -> None:
    """The first coordinator resumes a request of the second coordinator from the stored step checkpoint."""
    request_id = await fleet.submit(fleet.stubs[1])
    again, steps = await fleet.result(fleet.stubs[0], request_id, STEPS // 2, fleet.kill_both)
    assert again == whole
    assert resumed_at(steps) > fleet.stored_step > 0, steps


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_lost_processes_do_not_change_the_result(family: Family) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(family) as fleet:
            whole, steps = await fleet.result(fleet.stubs[0], await fleet.submit(fleet.stubs[0]))
            assert whole.startswith(family.begins_with)
            assert steps.count(0) == 1
            for kill_at in KILLED_AT:
                await fleet.repeat_if_late(partial(lose_worker, fleet, whole, kill_at))
            await fleet.repeat_if_late(partial(end_worker, fleet, whole))
            await fleet.repeat_if_late(partial(lose_worker_and_coordinator, fleet, whole))

    asyncio.run(scenario())


def test_resumed_image_request_has_equal_bytes() -> None:
    """The step checkpoint contains the denoised first frame; the image replaces it after the last step."""

    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(TI2V) as fleet:
            (stub,) = fleet.stubs
            whole, steps = await fleet.result(stub, await fleet.submit(stub))
            assert whole.startswith(TI2V.begins_with)
            assert steps.count(0) == 1
            await fleet.repeat_if_late(partial(lose_worker, fleet, whole, STEPS))

    asyncio.run(scenario())


def test_prior_tokens_are_sampled_again_after_a_loss() -> None:
    """Prior tokens have no step checkpoint. Another worker samples all tokens, with equal random numbers."""

    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), served(GLM_IMAGE) as fleet:
            (stub,) = fleet.stubs
            whole, tokens = await fleet.result(stub, await fleet.submit(stub))
            assert whole.startswith(GLM_IMAGE.begins_with)
            assert tokens.count(0) == 1

            async def lose_worker_of_prior_tokens() -> None:
                again, tokens = await fleet.result(stub, await fleet.submit(stub), 10, fleet.kill_worker)
                assert again == whole
                assert tokens.count(0) == 2, tokens

            await fleet.repeat_if_late(lose_worker_of_prior_tokens)

    asyncio.run(scenario())
