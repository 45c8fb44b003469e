"""At log level DEBUG, the output of a fleet contains no prompt, API key, user name or password."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from warm_starter import WarmStarter

from async_tests import run_bounded, wait_until
from redis_servers import RedisServer, running_server

_FLEET = (sys.executable, "-m", "services.cli")
PROMPT = "canaryprompt on a branch"
NEGATIVE = "canarynegative on a branch"
KEY = "canarykey-0123456789-0123456789"
PASSWORD = "canarypassword"
USER = "canaryuser"
SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")

_UP_OUTPUT = re.compile(r"[\w-]+: (started|ended|ends)|ready: |stop|fleet up: ")
"""Start of the lines that `fleet up` prints for its user, which are not JSON records."""


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short path of a directory for sockets, keys and logs. Sets the fleet's environment variables."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    keys = path / "keys.toml"
    keys.write_text(f'[callers.alice]\nkey_sha256 = ["{hashlib.sha256(KEY.encode()).hexdigest()}"]\n')
    settings = {"API_KEY": KEY, "API_KEYS": str(keys), "LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}
    for name, value in settings.items():
        monkeypatch.setenv(f"FLEET_{name}", value)
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A store that requires a user and a password."""
    with running_server("valkey", "--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all") as server:
        yield server


@asynccontextmanager
async def _command(log: Path, *arguments: str) -> AsyncIterator[Process]:
    """Run `fleet ARGUMENTS` in the block with its output in `log`."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*_FLEET, *arguments, stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _contains(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text(errors="replace")


async def _wait_for(log: Path, text: str) -> None:
    await wait_until(partial(_contains, log, text))


async def _check_up(log: Path, url: str) -> None:
    """Run `fleet up` without workers until it is ready, and stop it."""
    async with _command(log, "up", "--autoscale", "--port=0", "--scaler-port=0", "--redis", url) as process:
        await _wait_for(log, "ready: ")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def _generate(endpoint: str, output: Path, *arguments: str) -> int | None:
    """Run `fleet generate` with PROMPT; returns its exit code."""
    flags = ("--negative-prompt", NEGATIVE, "--true-cfg-scale=2", "--num-inference-steps=2", *arguments)
    command = (*_FLEET, "generate", PROMPT, *flags, "--output", str(output), "--endpoint", endpoint)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    await process.communicate()
    return process.returncode


async def _run_fleet(directory: Path, server: RedisServer) -> None:
    """Generate an image, send an invalid request, and stop the fleet while the store is unavailable.

    Each service logs to DIRECTORY/NAME.log. Services other than denoising are forked from one process, because each
    import of the libraries takes several seconds.
    """
    url = f"unix://{USER}:{PASSWORD}@{server.socket}"
    common = ("--model=emoji", "--redis", url)
    log = {name: directory / f"{name}.log" for name in ("up", "coordinator", *SERVICES)}
    endpoint = f"unix:{directory}/coordinator.sock"
    group_arguments = (*common, "--ulysses=2", f"--listen=unix:{directory}/denoising.sock")
    starter = WarmStarter()
    async with _command(log["denoising"], "serve", "denoising", *group_arguments) as group:
        try:
            await asyncio.gather(starter.start(["emoji"]), _check_up(log["up"], url))
            forked = [
                await starter.fork(name, (*common, f"--listen=unix:{directory}/{name}.sock"), log[name])
                for name in ("coordinator", *SERVICES)
                if name != "denoising"
            ]
            for name in ("coordinator", *SERVICES):
                await _wait_for(log[name], '"listens"' if name == "coordinator" else '"serves"')
            assert await _generate(endpoint, directory / "x.png") == 0
            assert await _generate(endpoint, directory / "x.png", "--height=3") == 2
            server.kill()
            for path in log.values():
                if path != log["up"]:
                    await _wait_for(path, '"heartbeat failed"')
            group.send_signal(signal.SIGTERM)
            for each in forked:
                os.kill(each.pid, signal.SIGTERM)
            assert {await group.wait(), *[await each.ended for each in forked]} == {0}
        finally:
            await starter.close()


def test_no_secret_is_written_at_debug(directory: Path, server: RedisServer) -> None:
    """test_log_lines.py tests the setting that logs prompts. test_logs.py tests redaction in text lines."""
    run_bounded(lambda: _run_fleet(directory, server))
    written = "".join(path.read_text() for path in sorted(directory.glob("*.log")))
    assert "canary" not in written.lower(), [line for line in written.splitlines() if "canary" in line.lower()]
    lines = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    assert {line["service"] for line in lines} == {"coordinator", *SERVICES}
    events = {line["event"] for line in lines}
    assert {"listens", "attempt started", "request finished", "heartbeat failed", "rank started"} <= events
    (accepted,) = [line for line in lines if line["event"] == "request accepted"]
    assert accepted["caller"] == "alice"
    assert "DEBUG" in {line["level"] for line in lines if "logger" in line}, "no library has logged at DEBUG"
    others = [line for line in written.splitlines() if not line.startswith("{")]
    assert all(_UP_OUTPUT.match(line) for line in others), others
