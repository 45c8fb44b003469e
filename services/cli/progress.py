"""Shows on stderr how a request comes along: a bar for each stage on a terminal, a line for each step elsewhere."""

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
    """What the commands tell while they wait. Use it as a context manager: leaving it leaves stderr in order."""

    @abstractmethod
    def note(self, text: str) -> None:
        """A line of its own."""

    @abstractmethod
    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """A stage came further."""

    def warning(self, warning: artifacts_pb2.Warning) -> None:
        """Something was done differently from what was asked."""
        about = f"{warning.field}: " if warning.field else ""
        self.note(f"warning: {about}{warning.message}")

    @abstractmethod
    def finish(self) -> None:
        """The result is here: no stage is left."""

    @abstractmethod
    def close(self) -> None:
        """Nothing is shown after this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineReporter(TerminalReporter):
    """For logs and pipes."""

    def note(self, text: str) -> None:
        """A line of its own."""
        sys.stderr.write(plain(text) + "\n")
        sys.stderr.flush()

    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """A line a step; only the name for stages without steps."""
        steps = f" {progress.step}/{progress.total_steps}" if progress.total_steps else ""
        self.note(f"{progress.service}{steps}")

    def finish(self) -> None:
        """Every line is out already."""

    def close(self) -> None:
        """Every line is out already."""


class BarReporter(TerminalReporter):
    """For terminals."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def close(self) -> None:
        """Give the cursor back."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(plain(text), markup=False, highlight=False)

    def progress(self, progress: generation_pb2.StageProgress) -> None:
        """Move the stage's bar; it appears with the stage's first news."""
        total = progress.total_steps or None
        if progress.service not in self._tasks:
            self._tasks[progress.service] = self._progress.add_task(progress.service, total=total)
        self._progress.update(self._tasks[progress.service], completed=progress.step, total=total)

    def finish(self) -> None:
        """Fill the bars of stages that tell no steps."""
        for task in self._progress.tasks:
            total = task.total or 1
            self._progress.update(task.id, completed=total, total=total)


def terminal_reporter() -> TerminalReporter:
    """Bars if somebody is watching."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()
