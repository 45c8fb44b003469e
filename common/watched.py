"""Files that are replaced while the process runs, such as keys and certificates: read again when they change."""

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
    """What `read` made of some files, always as they are now.

    Asking for the value looks at the files, at most every `check_seconds`, and reads them again once one is another
    file, or was written to. Files that are replaced one after the other, as a certificate and its key, do not fit in
    between: content that `read` refuses with a FleetError is logged once, and what was read before stays in force.
    Links are followed, so that a mounted Kubernetes secret counts as changed when its link is. Thread-safe: gRPC asks
    for certificates on threads of its own. The first reading raises what `read` raises.
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
        # Before the reading: what is written during it is a change then.
        self._stamp = self._look()
        self._value = read()
        self._version = 1
        self._next_look = clock() + check_seconds

    @property
    def value(self) -> T:
        """The content that is in force."""
        return self.versioned()[1]

    def versioned(self) -> tuple[int, T]:
        """The same, with a number that grows each time that other content comes into force."""
        with self._lock:
            now = self._clock()
            if now >= self._next_look:
                self._next_look = now + self._check_seconds
                if (stamp := self._look()) != self._stamp:
                    self._stamp = stamp
                    self._read_again()
            return self._version, self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read()
        except FleetError as error:
            _log.error("changed files refused, the earlier content stays in force", setting=self._name, error=error)
        else:
            self._version += 1
            _log.info("changed files loaded", setting=self._name, files=self._paths)

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
