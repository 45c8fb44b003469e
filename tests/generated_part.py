"""Parts of README files that programs write, between two marks."""

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
        """The file's text with another part. Raises ValueError for a text without the marks."""
        before, begin, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end):
            marks = f"{self.begin.strip()} and {self.end.strip()}"
            raise ValueError(f"{self.readme.relative_to(ROOT)}: {marks} are not both in it")
        return f"{before}{self.begin}\n{new}\n{self.end}{after}"

    def write(self, new: str) -> None:
        """Replace the part in the file."""
        self.readme.write_text(self.replaced(self.readme.read_text(), new))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, a line for each row."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
