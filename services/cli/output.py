"""Output files of `fleet generate`: complete files, and videos that can be played while they grow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from common.errors import FleetError, InternalError, InvalidInput
from services.cli.parameters import FORMATS


class OutputError(FleetError):
    """The result cannot be written, for example to a full disk or a deleted directory."""


def check_output(path: Path) -> Path:
    """Check that an output path is writable, before the request is sent. Raises InvalidInput."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(
            f"--output: {str(path)!r} does not end in {' or '.join(FORMATS)}; image.png works", field="output"
        )
    if not path.parent.is_dir():
        raise InvalidInput(f"--output: the directory {path.parent} does not exist; create it", field="output")
    if path.is_dir():
        raise InvalidInput(f"--output: {path} is a directory; give a file", field="output")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InvalidInput(f"--output: {path} is not writable", field="output")
    return path


def numbered(path: Path, index: int, count: int) -> Path:
    """The path of file `index` of `count`: PATH for a single file, else NAME-0.png, NAME-1.png ..."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


class ResultFiles:
    """Receives the files of a result. On exit, deletes incomplete files.

    A file has a temporary name until it is complete. A growing file is renamed at its first bytes, so that it can be
    played while it grows. Raises OutputError for errors of the file system, and InternalError for bytes out of order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[int, _File] = {}
        self._current = -1
        self.count: int | None = None
        """Number of files in the result; None until the first file has begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.discard()

    @property
    def paths(self) -> list[Path]:
        """The complete files, in order."""
        return [file.target for _, file in sorted(self._files.items()) if file.is_complete]

    def received(self, index: int) -> int:
        """Number of received bytes of a file."""
        return self._files[index].received if index in self._files else 0

    def is_complete(self, index: int) -> bool:
        """Whether all bytes of a file are received."""
        return index in self._files and self._files[index].is_complete

    def begin(self, index: int, count: int, byte_size: int | None) -> None:
        """Begin a file, or set the final size of a growing file. `byte_size` is None for a growing file."""
        self.count = count
        if index in self._files:
            if byte_size is not None:
                self._files[index].set_size(byte_size)
            return
        self.check_complete(growing=False)
        self._current = index
        self._files[index] = _File(numbered(self._path, index, count), byte_size)

    def write(self, data: bytes) -> None:
        """Append to the file that began last."""
        if self._current not in self._files:
            raise InternalError("the result has bytes before a file's header")
        self._files[self._current].write(data)

    def write_at(self, index: int, offset: int, data: bytes) -> None:
        """Append to any file that has begun; `offset` must be the number of bytes received."""
        if index not in self._files:
            raise InternalError(f"file {index} of the result has bytes before its header")
        if offset != self._files[index].received:
            raise InternalError(f"received byte {offset} of file {index}; expected byte {self.received(index)}")
        self._files[index].write(data)

    def check_complete(self, *, growing: bool = True) -> None:
        """Raise InternalError if a file is incomplete. With `growing` False, ignores growing files."""
        for file in self._files.values():
            if file.size is not None and file.received < file.size:
                raise InternalError(f"{file.target.name} ended {file.size - file.received} bytes before its size")
            if growing and file.size is None:
                raise InternalError(f"{file.target.name} ended before its size was sent")


class _File:
    """A file that is being received."""

    def __init__(self, target: Path, size: int | None) -> None:
        self.target = target
        self.size = size
        self.received = 0
        self.is_complete = False
        self._is_shown = False
        with _writing(target):
            self._file: IO[bytes] = tempfile.NamedTemporaryFile(  # noqa: SIM115 -- stays open across calls
                dir=target.parent, prefix=f".{target.stem[:64]}-", suffix=".part", delete=False
            )
            self._finish_when_complete()

    def set_size(self, size: int) -> None:
        self.size = size
        if self.received > size:
            raise InternalError("the result has more bytes than its header states")
        with _writing(self.target):
            self._finish_when_complete()

    def write(self, data: bytes) -> None:
        if self.size is not None and self.received + len(data) > self.size:
            raise InternalError("the result has more bytes than its header states")
        with _writing(self.target):
            self._file.write(data)
            self.received += len(data)
            if self.size is None:
                self._file.flush()
                self._show()
            self._finish_when_complete()

    def discard(self) -> None:
        """Remove the file unless it is complete."""
        if not self.is_complete:
            with suppress(OSError):  # Closing flushes the buffer, which fails on a full disk.
                self._file.close()
            (self.target if self._is_shown else Path(self._file.name)).unlink(missing_ok=True)

    def _finish_when_complete(self) -> None:
        if self.received == self.size and not self.is_complete:
            self._file.close()
            self._show()
            self.is_complete = True

    def _show(self) -> None:
        """Move the file to its target, replacing an older file."""
        if not self._is_shown:
            part = Path(self._file.name)
            part.chmod(0o666 & ~_umask())
            part.replace(self.target)
            self._is_shown = True


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}", field="output") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
