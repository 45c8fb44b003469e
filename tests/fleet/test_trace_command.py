"""`fleet trace` at a running fleet: running, ended and unknown requests, and lost workers."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import pytest
from PIL import Image

from coordinator_fleet import FakeFleet, Gate, Script, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb


async def fleet_trace(endpoint: str, *arguments: str) -> tuple[int, str, str]:
    """Run the command; returns exit code, stdout and stderr."""
    command = (sys.executable, "-m", "services.cli", "trace", *arguments, "--endpoint", endpoint)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    output, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), error.decode()


def test_trace_shows_lost_workers_and_the_resume(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        script = Script(fleet.scripts["denoising"].contract, gate)
        first = await fleet.add_worker("denoising", script, ttl_seconds=0.5)
        coordinator, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        code, output, _ = await fleet_trace(coordinator.address, request_id)
        assert code == 0
        assert f"request {request_id} of emoji: RUNNING for " in output
        await first.die()
        second = await fleet.add_worker("denoising")
        assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        code, output, error = await fleet_trace(coordinator.address, request_id)
        assert (code, error) == (0, "")
        assert f"request {request_id} of emoji: SUCCEEDED after " in output
        denoising = [line for line in output.splitlines() if line.startswith("denoising")]
        assert len(denoising) == 2
        assert "✗" in denoising[0]
        assert "lost after" in denoising[0]
        assert denoising[0].rstrip().endswith(f"on {first.info.worker_id}")
        assert "completed after" in denoising[1]
        assert denoising[1].rstrip().endswith(f"on {second.info.worker_id}")
        path = fleet.directory / "trace.png"
        assert await fleet_trace(coordinator.address, request_id, "--output", str(path)) == (0, f"{path}\n", "")
        with Image.open(path) as image:
            assert image.format == "PNG"
            color_of_lost_attempts = (0xCF, 0x22, 0x2E)
            assert color_of_lost_attempts in {color for _, color in image.getcolors(1 << 24) or ()}
        answer = await stub.GetRequest(pb.GetRequestRequest(request_id=request_id))
        assert not answer.timeline

    monkeypatch.setenv("COLUMNS", "200")
    run_on_fleet(store_url, scenario)


def test_unknown_request_is_an_error(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator(record_seconds=7_200.0)
        for request_id in ("0123456789abcdef", "no/id"):
            code, output, error = await fleet_trace(coordinator.address, request_id)
            assert (code, output) == (2, "")
            assert error == (
                f"fleet trace: request_id: there is no request '{request_id}'; it may have expired: "
                "records expire 2 h after the end of their requests\n"
            )

    run_on_fleet(store_url, scenario)
