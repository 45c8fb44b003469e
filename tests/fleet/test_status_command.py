"""`fleet status` at a running fleet: live view on a terminal, output for scripts, permissions."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.cells import cell_len

from async_tests import HANG_SECONDS
from coordinator_fleet import FakeFleet, Gate, Script, error_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import running_server

OTHERS = ("text_encoding", "latent_preparation", "decoding")
COMMAND = (sys.executable, "-m", "services.cli", "status")
ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


class Terminal:
    """A process on a pseudoterminal, and its output."""

    def __init__(self, process: Process, leader: int) -> None:
        self.process = process
        self.written = ""
        self._leader = leader
        self._more = asyncio.Event()
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(leader, self._read)

    def _read(self) -> None:
        try:
            read = os.read(self._leader, 1 << 16)
        except OSError:  # EIO: Linux reports it when the process has closed the terminal
            read = b""
        self.written += read.decode(errors="replace")
        self._more.set()
        if not read:
            asyncio.get_running_loop().remove_reader(self._leader)
            self._ended.set()

    def resize(self, width: int, height: int) -> None:
        """Resize the terminal, and send SIGWINCH."""
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    @property
    def screen(self) -> list[str]:
        """The lines of the latest complete view, without styles."""
        frames = self.written.split("\x1b[H")
        shown = frames[-1] if "\n" in frames[-1] else frames[-2]
        return re.sub(r"\x1b\[[0-9;?]*[a-z]", "", shown.replace("\r", "")).split("\n")

    async def until(self, is_shown: Callable[[str], bool]) -> list[str]:
        """Wait for a screen whose text fulfills the condition; returns its lines."""
        async with asyncio.timeout(HANG_SECONDS):
            while "\x1b[H" not in self.written or not is_shown("\n".join(self.screen)):
                assert not self._ended.is_set(), self.written
                self._more.clear()
                await self._more.wait()
        return self.screen

    async def end(self) -> int:
        """Send SIGINT; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        code = await self.process.wait()
        await self._ended.wait()
        return code


@asynccontextmanager
async def on_terminal(*flags: str, width: int = 120, height: int = 40) -> AsyncIterator[Terminal]:
    """Run `fleet status` on a terminal of this size."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *flags, stdin=follower, stdout=follower, stderr=follower, env={**environ, "TERM": "xterm-256color"}
    )
    os.close(follower)
    try:
        yield Terminal(process, leader)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(leader)
        os.close(leader)


async def fleet_with_gate(fleet: FakeFleet, **settings: Any) -> tuple[str, Any, Gate, str]:
    """Start a fleet whose only denoiser waits at a gate. Returns endpoint, stub, gate and the running request's id."""
    gate = Gate()
    for service in OTHERS:
        await fleet.add_worker(service)
    await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate))
    coordinator, stub = await fleet.add_coordinator(**settings)
    request_id = (await stub.Submit(submission("a red apple"))).request.request_id
    await gate.wait_reached()
    return coordinator.address, stub, gate, request_id


def test_live_view_follows_requests_and_the_terminal_size(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        endpoint, stub, gate, first = await fleet_with_gate(fleet)
        async with on_terminal("--endpoint", endpoint, "--interval", "0.2") as shown:
            await shown.until(lambda text: f"{first} RUNNING" in text and "denoising 0/20 (0%) on denoising-" in text)
            second = (await stub.Submit(submission("a pear"))).request.request_id
            lines = await shown.until(lambda text: "queued at denoising, 0 ahead" in text)
            assert any(re.match(r"denoising +1 +1/1 +1 +~20\.0 ", line) for line in lines), lines
            assert any(line.startswith("primary, durable (appendonly=yes appendfsync=always)") for line in lines)
            for width, height in ((60, 30), (170, 20), (40, 12)):
                shown.resize(width, height)
                lines = await shown.until(partial(_is_as_wide, width))
                assert max(map(cell_len, lines)) <= width
                assert len(lines) <= height
            shown.resize(170, 40)
            gate.opened.set()
            for request_id in (first, second):
                assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
            await shown.until(lambda text: len(re.findall(r"[0-9a-f]{16} SUCCEEDED", text)) == 2 and "s/step" in text)
            assert await shown.end() == 0
            assert shown.written.startswith(ENTER)
            assert LEAVE in shown.written
            assert SHOW_CURSOR in shown.written
            assert "Traceback" not in shown.written

    run_on_fleet(store_url, scenario)


def _is_as_wide(width: int, text: str) -> bool:
    return cell_len(text.partition("\n")[0]) == width


def test_live_view_survives_an_unavailable_coordinator(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        listen = f"unix:{fleet.directory}/public.sock"
        coordinator = await fleet.start_process(listen)
        async with on_terminal("--endpoint", listen, "--interval", "0.1") as shown:
            await shown.until(lambda text: "every 0.1 s; Ctrl-C ends" in text)
            coordinator.kill()
            await coordinator.wait()
            lines = await shown.until(lambda text: "UNAVAILABLE since" in text)
            assert re.match(r"UNAVAILABLE since \d\d:\d\d:\d\d UTC, last data \d\d:\d\d:\d\d UTC", lines[1])
            assert any("no fleet answers at" in line for line in lines)
            assert any("latent_preparation" in line for line in lines)  # the last received data
            await fleet.start_process(listen)
            await shown.until(lambda text: "UNAVAILABLE" not in text and "every 0.1 s" in text)
            assert await shown.end() == 0

    run_on_fleet(store_url, scenario)


def test_once_on_a_terminal_prints_plain_text(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        endpoint, _, gate, request_id = await fleet_with_gate(fleet)
        async with on_terminal("--endpoint", endpoint, "--once") as shown:
            assert await shown.process.wait() == 0
            await shown._ended.wait()
            assert "\x1b" not in shown.written
            assert re.search(rf"^{request_id} +RUNNING +emoji .* a red apple\r$", shown.written, re.MULTILINE)
            assert re.search(rf"^{request_id} +\d+s +denoising 0/20 \(0%\) on denoising-", shown.written, re.MULTILINE)
        gate.opened.set()

    run_on_fleet(store_url, scenario)


def test_json_lines_continue_without_the_store() -> None:
    with running_server("valkey") as server:

        async def scenario(fleet: FakeFleet) -> None:
            endpoint, _, gate, request_id = await fleet_with_gate(fleet)
            flags = ("--endpoint", endpoint, "--json", "--interval", "0.1")
            process = await asyncio.create_subprocess_exec(*COMMAND, *flags, stdout=PIPE, stderr=PIPE)
            assert process.stdout is not None

            async def next_document(has_error: bool) -> dict[str, Any]:
                assert process.stdout is not None
                while True:
                    found: dict[str, Any] = json.loads(await process.stdout.readline())
                    if (found["error"] is not None) is has_error:
                        return found

            found = await next_document(False)
            (listed,) = found["requests"]
            assert (listed["request_id"], listed["activities"][0]["kind"]) == (request_id, "RUNNING")
            server.kill()
            failed = await next_document(True)
            assert "the request store" in failed["error"]
            assert (failed["models"], failed["requests"], failed["store"]) == ([], [], None)
            server.start()
            assert (await next_document(False))["store"]["role"] == "master"
            process.send_signal(signal.SIGINT)
            _, error = await process.communicate()
            assert (process.returncode, error) == (0, b"")
            gate.opened.set()

        run_on_fleet(server.url, scenario)


def test_json_is_one_document_and_a_missing_fleet_is_an_error(store_url: str, tmp_path: Path) -> None:
    async def run(*flags: str) -> tuple[bytes, bytes, int | None]:
        process = await asyncio.create_subprocess_exec(*COMMAND, *flags, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        output, error = await process.communicate()
        return output, error, process.returncode

    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator()
        output, error, code = await run("--endpoint", coordinator.address, "--json")
        assert (code, error) == (0, b"")
        (model,) = json.loads(output)["models"]
        assert [each["service"] for each in model["services"]] == [*OTHERS[:2], "denoising", "decoding"]
        for flags in (("--json",), ()):
            output, error, code = await run("--endpoint", f"unix:{tmp_path}/none.sock", *flags)
            assert (code, output) == (1, b"")
            assert error.startswith(b"fleet status: no fleet answers at")

    run_on_fleet(store_url, scenario)


def test_caller_gets_its_own_requests_with_queue_positions(store_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    names = ("ann", "bob")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    keys.write_text("".join(f'[callers.{name}]\nkey_sha256 = ["{digests[name]}"]\n' for name in names))

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        for service in OTHERS:
            await fleet.add_worker(service)
        await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate))
        _, stub = await fleet.add_coordinator(api_keys=keys)
        bearer = {name: (("authorization", f"Bearer {name}"),) for name in names}
        request_of_ann = (await stub.Submit(submission(), metadata=bearer["ann"])).request.request_id
        await gate.wait_reached()
        request_of_bob = (await stub.Submit(submission("a secret pear"), metadata=bearer["bob"])).request.request_id

        async def listed(name: str) -> list[pb.RequestRecord]:
            request = pb.ListRequestsRequest(with_activity=True)
            return list((await stub.ListRequests(request, metadata=bearer[name])).requests)

        async with asyncio.timeout(HANG_SECONDS):
            found = await listed("bob")
            while found[0].activities[0].service != "denoising":
                await asyncio.sleep(0.01)
                found = await listed("bob")
        assert [each.request_id for each in found] == [request_of_bob]
        assert found[0].activities[0].kind == pb.ACTIVITY_KIND_QUEUED
        assert found[0].activities[0].requests_ahead == 0
        assert [each.request_id for each in await listed("ann")] == [request_of_ann]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListRequests(pb.ListRequestsRequest(with_activity=True))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        gate.opened.set()
        await wait_ended(stub, request_of_bob, bearer["bob"])

    run_on_fleet(store_url, scenario)


async def wait_ended(stub: Any, request_id: str, metadata: tuple[tuple[str, str], ...]) -> None:
    """Wait until a request has ended."""
    async for _ in stub.Watch(pb.WatchRequest(request_id=request_id), metadata=metadata):
        pass


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"state": pb.REQUEST_STATE_QUEUED}, "state"),
        ({"page_token": "7"}, "page_token"),
        ({"page_size": 1_001}, "page_size"),
    ],
)
def test_listing_with_activities_refuses_paging_and_state(store_url: str, fields: dict[str, Any], field: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListRequests(pb.ListRequestsRequest(with_activity=True, **fields))
        assert error_of(caught.value) == ("INVALID_ARGUMENT", field)
        answer = await stub.ListRequests(pb.ListRequestsRequest(with_activity=True, model="unknown"))
        assert not answer.requests

    run_on_fleet(store_url, scenario)


def test_dead_worker_is_counted_and_its_request_continues(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        for service in OTHERS:
            await fleet.add_worker(service)
        script = Script(fleet.scripts["denoising"].contract, gate)
        worker = await fleet.add_worker("denoising", script, ttl_seconds=0.5)
        _, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        await worker.die()

        async def activity() -> pb.RequestActivity:
            answer = await stub.ListRequests(pb.ListRequestsRequest(with_activity=True))
            return answer.requests[0].activities[0]

        async with asyncio.timeout(HANG_SECONDS):
            while (found := await activity()).kind != pb.ACTIVITY_KIND_NO_WORKER:
                assert found.service == "denoising"
                await asyncio.sleep(0.01)
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        denoising = next(each for each in model.services if each.service == "denoising")
        assert (denoising.workers, denoising.dead_workers, denoising.reports_steps) == (0, 1, True)
        await fleet.add_worker("denoising")
        assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(store_url, scenario)
