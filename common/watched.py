"""Reloads files that are replaced while the process runs, such as keys and certificates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from common.errors import FleetError
from common.logs import get_logger

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int] | None, ...]

_log = get_logger(__name__)


class WatchedFiles(Generic[T]):
    """Caches the value that `read` computes from files, and reloads it when a file changes.

    Accessing the value checks inode, modification time and size of the files at most every `check_seconds`. While a
    certificate and its key are replaced one after the other, they do not match: if `read` raises FleetError, the error
    is logged once and the previous value remains valid. Symbolic links are followed, as mounted Kubernetes secrets
    require. Thread-safe, because gRPC reads certificates on its own threads. The constructor raises the errors of
    `read`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        check_seconds: float,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._check_seconds = check_seconds
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        # Before read(), so that a write during read() is detected as a change.
        self._stamp = self._current_stamp()
        self._value = read()
        self._version = 1
        self._next_check = clock() + check_seconds

    @property
    def value(self) -> T:
        """The latest valid value."""
        return self.versioned()[1]

    def versioned(self) -> tuple[int, T]:
        """Return a version, which grows with each reload, and the latest valid value."""
        with self._lock:
            now = self._clock()
            if now >= self._next_check:
                self._next_check = now + self._check_seconds
                if (stamp := self._current_stamp()) != self._stamp:
                    self._stamp = stamp
                    self._reload()
            return self._version, self._value

    def _reload(self) -> None:
        try:
            self._value = self._read()
        except FleetError as error:
            _log.error("changed files are invalid, the previous content is used", setting=self._name, error=error)
        else:
            self._version += 1
            _log.info("changed files loaded", setting=self._name, files=self._paths)

    def _current_stamp(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return inode, modification time in ns and size of a file; None for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
