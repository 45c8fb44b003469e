"""Processes of the latest release and of this source tree in one fleet return equal bytes."""

from __future__ import annotations

import asyncio
import random
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import psutil
from chaos_processes import COORDINATOR, Fleet, Process
from warm_starter import TREE

from async_tests import HANG_SECONDS, wait_until
from common.rpc.client import open_channel
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from release import unpack_release
from resume_fleet import is_complete
from tiny_flux import build_tiny_flux

MODEL = "flux"


async def image_of(stub: Stub) -> bytes:
    """Run a request at the stub's coordinator; returns its file."""
    given = pb.GenerationParameters(prompt="a red apple", seed=3, height=64, width=64, num_inference_steps=4)
    request_id = (await stub.Submit(pb.SubmitRequest(parameters=given))).request.request_id
    last = [reply.event async for reply in stub.Watch(pb.WatchRequest(request_id=request_id))][-1]
    assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last
    download = stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id))
    return b"".join([reply.data async for reply in download])


def test_old_and_new_coordinators_and_workers_return_equal_bytes() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixed-")))
        release = unpack_release(directory / "release")
        models = {MODEL: build_tiny_flux(directory / MODEL)}
        fleet = Fleet(directory, models, random.Random(0), coordinators=2, workers=1, trees=(release, TREE))
        stack.push_async_callback(fleet.close)
        await fleet.start()

        async def stub_of(process: Process) -> Stub:
            channel = await stack.enter_async_context(open_channel(process.target))
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            await wait_until(partial(is_complete, stub, fleet.workers))
            return stub

        retained, replaced = fleet.of(coordinators=True)
        old = await stub_of(retained)
        new = await stub_of(await fleet.replace(replaced, TREE))
        images = {
            "old coordinator, old workers": await image_of(old),
            "new coordinator, old workers": await image_of(new),
        }
        for worker in [each for each in fleet.living if each.role != COORDINATOR]:
            await fleet.replace(worker, TREE)
        for stub in (old, new):
            await wait_until(partial(is_complete, stub, fleet.workers))
        images |= {
            "old coordinator, new workers": await image_of(old),
            "new coordinator, new workers": await image_of(new),
        }
        trees = {process.tree: psutil.Process(process.pid).cmdline()[1] for process in fleet.living}
        assert all(Path(program).is_relative_to(tree) for tree, program in trees.items())
        assert [process.name for process in fleet.living if process.tree == release] == [retained.name]
        await fleet.stop()
        assert not fleet.findings
        assert images["old coordinator, old workers"].startswith(b"\x89PNG")
        assert {name for name, image in images.items() if image != images["old coordinator, old workers"]} == set()

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), AsyncExitStack() as stack:
            await scenario(stack)

    asyncio.run(main())
