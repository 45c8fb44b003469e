"""Documents, comments, strings and names of definitions avoid words that have a precise replacement.

language.toml lists permitted lines, each with a reason. Each of its entries must match a line.
"""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = "tests/unit/language.toml"
FOLDERS = (".ci", "common", "configs", "k8s", "models", "proto", "services", "tests")
SUFFIXES = frozenset({".py", ".md", ".proto", ".lua", ".yaml", ".toml", ".sh"})
SKIPPED = frozenset({"golden", "node_modules"})
"""Directories of files of a release and of installed packages."""
EXCLUDED = frozenset({LIST, "tests/unit/test_language.py"})

REPLACEMENTS = {
    "tell": "report, log, send, return or state",
    "tells": "reports, logs, sends, returns or states",
    "told": "reported, logged, sent, returned or stated",
    "anew": "again, or a verb with re-",
    "whoever": "the process, the worker or the caller",
    "behind each other": "concatenated",
    "shared out": "sharded",
    "picture": "image",
    "pictures": "images",
    "is away": "is unavailable",
    "has gone": "is disconnected",
}
# An underscore separates words, so that the rule holds for words within names.
_PATTERN = re.compile(rf"(?<![A-Za-z])({'|'.join(REPLACEMENTS)})(?![A-Za-z])".replace(" ", r"[\s_]+"), re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """A line of a file with a refused word."""

    path: str
    number: int
    word: str
    line: str

    def __str__(self) -> str:
        word = re.sub(r"[\s_]+", " ", self.word.lower())
        return f"{self.path}:{self.number}: {word!r}; use {REPLACEMENTS[word]}"


# From Python 3.12 on, an f-string is several tokens: the text between replacement fields has its own type.
_PROSE_TOKENS = {kind for kind, name in tokenize.tok_name.items() if name in ("COMMENT", "STRING", "FSTRING_MIDDLE")}


def findings_of(path: str, text: str) -> Iterator[Finding]:
    """Refused words in a file. In Python code, only comments, strings and names of definitions are searched."""
    if not _PATTERN.search(text):
        return
    lines = text.splitlines()
    for first, part in _python_parts(text) if path.endswith(".py") else [(1, text)]:
        for match in _PATTERN.finditer(part):
            number = first + part.count("\n", 0, match.start())
            yield Finding(path, number, match[0], lines[number - 1])


def _python_parts(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each comment, string and name of a definition."""
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _PROSE_TOKENS or previous in ("def", "class"):
            yield token.start[0], token.string
        previous = token.string


def _files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name.startswith("Dockerfile"))
    for folder in FOLDERS:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES or folder == ".ci")


@cache
def found() -> Sequence[Finding]:
    """All findings of the tree, without generated stubs, files of a release and installed packages."""
    findings: list[Finding] = []
    for path in _files():
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and name not in EXCLUDED and not SKIPPED.intersection(path.parts) and "_pb2" not in path.name:
            findings += findings_of(name, path.read_text(encoding="utf-8"))
    return findings


@cache
def allowed() -> Sequence[tuple[str, str, str]]:
    """(path, regular expression of the line, reason) of permitted lines."""
    entries = tomllib.loads((ROOT / LIST).read_text(encoding="utf-8"))["allowed"]
    return [(each["path"], each["line"], each["reason"]) for each in entries]


def _permits(entry: tuple[str, str, str], finding: Finding) -> bool:
    path, line, _ = entry
    return path == finding.path and re.search(line, finding.line) is not None


def test_no_file_has_a_refused_word() -> None:
    refused = [str(each) for each in found() if not any(_permits(entry, each) for entry in allowed())]
    assert not refused, "\n".join(refused)


def test_every_allowed_line_exists() -> None:
    unused = [entry for entry in allowed() if not any(_permits(entry, each) for each in found())]
    assert not unused, f"remove these entries from {LIST}"
    assert all(reason for _, _, reason in allowed())


def test_words_are_found_in_prose_and_not_in_expressions() -> None:
    source = '''"""It tells\nnothing."""
# told

picture = pictures.tell(f"anew {picture}")


def test_a_picture_is_away() -> None:
    """Heads are shared
    out, whoever computes."""
'''
    assert [
        (each.number, each.word.lower()) for each in sorted(findings_of("a.py", source), key=lambda x: x.number)
    ] == [
        (1, "tells"),
        (3, "told"),
        (5, "anew"),
        (5, "picture"),
        (8, "picture"),
        (8, "is_away"),
        (9, "shared\n    out"),
        (10, "whoever"),
    ]
    assert [str(each) for each in findings_of("a.md", "Products\nhas gone\n")] == [
        "a.md:2: 'has gone'; use is disconnected"
    ]
    assert not list(findings_of("a.yaml", "fortellers: retold, pictured, hasgone\n"))
