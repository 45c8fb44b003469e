"""A whole fleet of processes at log level DEBUG: no prompt, key, token or password is in what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from redis_servers import RedisServer, running_server

_FLEET = (sys.executable, "-m", "services.cli")
PROMPT = "canaryprompt on a branch"
NEGATIVE = "canarynegative on a branch"
KEY = "canarykey-0123456789-0123456789"
PASSWORD = "canarypassword"
USER = "canaryuser"
SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")

_OF_FLEET_UP = re.compile(r"[\w-]+: (started|ended|ends)|ready: |stop|fleet up: ")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path, as sockets will lie in it."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _environ(temporary: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    keys = temporary / "keys.toml"
    keys.write_text(f'[callers.alice]\nkey_sha256 = ["{hashlib.sha256(KEY.encode()).hexdigest()}"]\n')
    settings = {"API_KEY": KEY, "API_KEYS": str(keys), "LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}
    named = {f"FLEET_{name}": value for name, value in settings.items()}
    return {**kept, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **named}


@contextmanager
def _fleet(log: Path, url: str, environ: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`fleet up` with a denoising worker group of two ranks; its endpoint, and its process."""
    command = (*_FLEET, "up", "--port", "0", "--redis", url, "--ulysses", "2")
    with log.open("wb") as file, subprocess.Popen(command, env=environ, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 240
            while "\nready: " not in (text := "\n" + log.read_text(errors="replace")):
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.05)
            yield text.partition("\nready: ")[2].split()[0], process
        finally:
            process.kill()


def _written(temporary: Path, server: RedisServer) -> str:
    """All that a fleet writes which draws a picture, refuses a request, and then loses its store."""
    environ = _environ(temporary)
    url = f"unix://{USER}:{PASSWORD}@{server.socket}"
    log = temporary / "log"
    with _fleet(log, url, environ) as (endpoint, process):
        output = str(temporary / "x.png")
        words = ("--negative-prompt", NEGATIVE, "--true-cfg-scale=2", "--num-inference-steps=2", "--output", output)
        for more, code in (((), 0), (("--height", "3"), 2)):
            command = (*_FLEET, "generate", PROMPT, *words, *more, "--endpoint", endpoint)
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)
            assert done.returncode == code, (done.stderr, log.read_text())
        server.kill()
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return log.read_text()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A store that knows one user, with a password."""
    with running_server("valkey", "--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all") as server:
        yield server


def test_no_secret_is_written_at_debug(temporary: Path, server: RedisServer) -> None:
    """test_log_lines.py shows the prompt with the setting; test_logs.py hides the same in text lines."""
    written = _written(temporary, server)
    assert "canary" not in written.lower(), [line for line in written.splitlines() if "canary" in line.lower()]
    lines = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    assert {line["service"] for line in lines} == {"coordinator", *SERVICES}
    events = {line["event"] for line in lines}
    assert {"listens", "attempt started", "request finished", "heartbeat failed", "rank started"} <= events
    (accepted,) = [line for line in lines if line["event"] == "request accepted"]
    assert accepted["caller"] == "alice"
    assert "DEBUG" in {line["level"] for line in lines if "logger" in line}, "libraries log at DEBUG too"
    others = [line for line in written.splitlines() if not line.startswith("{")]
    assert all(_OF_FLEET_UP.match(line) for line in others), others
