"""Shows the progress of a request on stderr: a bar per stage on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fleet.v1 import artifacts_pb2, generation_pb2
from services.start_up import plain


class TerminalReporter(ABC):
    """Shows progress and messages of a command. A context manager, which restores the terminal on exit."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Print a line."""

    @abstractmethod
    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """Show the progress of a stage."""

    def warning(self, warning: artifacts_pb2.Warning) -> None:
        """Print a warning of the fleet about the request."""
        about = f"{warning.field}: " if warning.field else ""
        self.note(f"warning: {about}{warning.message}")

    @abstractmethod
    def finish(self) -> None:
        """Show all stages as finished. Call it after the result has arrived."""

    @abstractmethod
    def close(self) -> None:
        """Restore the terminal. Nothing is shown afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineReporter(TerminalReporter):
    """Reporter for logs and pipes."""

    def note(self, text: str) -> None:
        """Print a line."""
        sys.stderr.write(plain(text) + "\n")
        sys.stderr.flush()

    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """Print a line with the stage and its steps; without a total number of steps, only the stage."""
        steps = f" {progress.step}/{progress.total_steps}" if progress.total_steps else ""
        self.note(f"{progress.service}{steps}")

    def finish(self) -> None:
        """Do nothing, because all lines are printed."""

    def close(self) -> None:
        """Do nothing, because lines do not change the terminal."""


class BarReporter(TerminalReporter):
    """Reporter with progress bars, for terminals."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def close(self) -> None:
        """Restore the cursor."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(plain(text), markup=False, highlight=False)

    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """Move the bar of a stage; the first progress event of a stage adds its bar."""
        total = progress.total_steps or None
        if progress.service not in self._tasks:
            self._tasks[progress.service] = self._progress.add_task(progress.service, total=total)
        self._progress.update(self._tasks[progress.service], completed=progress.step, total=total)

    def finish(self) -> None:
        """Fill all bars."""
        for task in self._progress.tasks:
            total = task.total or 1
            self._progress.update(task.id, completed=total, total=total)


def terminal_reporter() -> TerminalReporter:
    """A BarReporter on a terminal, else a LineReporter."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()
