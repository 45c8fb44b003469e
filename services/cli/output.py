"""The files that `fleet generate` writes. They appear under their names only when they are complete."""

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
    """The result is there, but cannot be written: the disk is full, or the directory has gone."""


def check_output(path: Path) -> Path:
    """Refuse early what could not be written at the end. Raises InvalidInput."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(f"--output must end in {', '.join(FORMATS)}, not {str(path)!r}", field="output")
    if not path.parent.is_dir():
        raise InvalidInput(f"--output: the directory {path.parent} does not exist", field="output")
    if path.is_dir():
        raise InvalidInput(f"--output: {path} is a directory; give a file", field="output")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InvalidInput(f"--output: {path} is not writable", field="output")
    return path


def numbered(path: Path, index: int, count: int) -> Path:
    """Where file `index` of `count` goes: PATH itself when it is the only one, else NAME-0.png, NAME-1.png ..."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


class ResultFiles:
    """Receives the files of a result one after the other. What is unfinished at exit is removed.

    Raises OutputError for what the file system refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._target = path
        self._missing = 0
        self.paths: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what is still in the buffer
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def begin(self, index: int, count: int, byte_size: int) -> None:
        """The next file. The one before must be complete."""
        if self._missing:
            raise InternalError(f"{self._target.name} ended {self._missing} bytes early")
        self._target, self._missing = numbered(self._path, index, count), byte_size
        with self._writing():
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 -- it stays open over several calls
                dir=self._path.parent, prefix=f".{self._path.stem[:64]}-", suffix=".part", delete=False
            )
            self._finish_when_complete()

    def write(self, data: bytes) -> None:
        """More of the current file; complete, it appears under its name."""
        if self._file is None or len(data) > self._missing:
            raise InternalError("the result has more bytes than its header says")
        with self._writing():
            self._file.write(data)
            self._missing -= len(data)
            self._finish_when_complete()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {self._target}: {error.strerror}", field="output") from error

    def _finish_when_complete(self) -> None:
        if self._missing or self._file is None:
            return
        part = Path(self._file.name)
        self._file.close()
        part.chmod(0o666 & ~_umask())
        part.replace(self._target)
        self._file = None
        self.paths.append(self._target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
