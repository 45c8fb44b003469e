"""Generated parts of README files, between two marker comments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from readme import ROOT


@dataclass(frozen=True)
class GeneratedPart:
    """The text between the lines `begin` and `end` of a README file."""

    readme: Path
    begin: str
    end: str

    def replaced(self, text: str, new: str) -> str:
        """Replace the part in the file's text. Raises ValueError if a marker is missing."""
        before, begin, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end):
            markers = f"{self.begin.strip()} and {self.end.strip()}"
            raise ValueError(f"{self.readme.relative_to(ROOT)}: {markers} are not both present; both lines work")
        return f"{before}{self.begin}\n{new}\n{self.end}{after}"

    def write(self, new: str) -> None:
        """Replace the part in the file."""
        self.readme.write_text(self.replaced(self.readme.read_text(), new))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table, one line per row."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
