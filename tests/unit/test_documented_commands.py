"""Commands in documents are valid: `fleet` lines parse, and named poe tasks and files exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from common.settings import FlagParser, SettingsError, load_settings
from readme import DOCUMENTS, ROOT
from services.cli.__main__ import COMMANDS
from services.cli.options import DEGREES
from services.cli.serve import service_names, settings_class
from services.setting_readers import READERS

PROGRAMS = ("fleet", "poe", "pytest", "python", "torchrun", "kubectl")

_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}(\S.*?)(?: {2,}.*)?$", re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_FLAG = re.compile(r"--[a-z][\w-]*")


class Parsed(Exception):
    """Raised once the parser of a command has accepted the arguments."""


def segments(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, without variable assignments. Targets of redirections are separate commands."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words = list(lexer)
    current: list[str] = []
    for word in words:
        if set(word) <= set("&|;<>"):
            yield current
            current = []
        elif current or not re.fullmatch(r"[A-Z_]+=.*", word):
            current.append(word)
    yield current


def block_commands(document: str) -> list[list[str]]:
    """Commands of known programs in the code blocks of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines: list[str] = []
    for match in _FENCED.finditer(text):
        code = match["code"].replace("\\\n", " ")
        if match["language"] == "bash":
            lines += code.splitlines()
        elif match["language"] == "console":
            lines += [line[2:] for line in code.splitlines() if line.startswith("$ ")]
    lines += [line for line in _INDENTED.findall(_FENCED.sub("", text)) if line.startswith(".venv/bin/")]
    found = [command for line in lines for command in segments(line) if command]
    return [[Path(words[0]).name, *words[1:]] for words in found if Path(words[0]).name in PROGRAMS]


def inline_commands(document: str) -> list[str]:
    """Commands of known programs in the prose of a document."""
    text = _FENCED.sub("", (ROOT / document).read_text(encoding="utf-8"))
    spans = (span.removeprefix(".venv/bin/") for span in _INLINE.findall(text))
    return [span for span in spans if span.split()[0] in PROGRAMS and " " in span]


def parse_fleet(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of `fleet` without running it. Raises SettingsError for invalid arguments."""
    name, *rest = words
    if name == "serve":
        load_settings(settings_class(rest[0]), rest[1:], prog="fleet serve", readers=READERS, environ={})
        return
    assert name in COMMANDS, f"fleet {name}: unknown command"
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: FlagParser, *args: Sequence[str] | None) -> argparse.Namespace:
        original(self, *args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(FlagParser, "parse_args", parse_args, raising=False)
        with pytest.raises(Parsed):
            importlib.import_module(f"services.cli.{name}").main(rest)


def flags_of(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Flags of a `fleet` command, parsed from its help. `serve` without a service has the flags of all services."""
    calls: list[Callable[[Sequence[str]], object]]
    if words[0] == "serve":
        services = [name for name in words[1:2] if name in service_names()] or service_names()
        calls = [partial(load_settings, settings_class(name), prog="fleet serve", environ={}) for name in services]
    else:
        assert words[0] in COMMANDS, f"fleet {words[0]}: unknown command"
        calls = [importlib.import_module(f"services.cli.{words[0]}").main]
    for call in calls:
        with pytest.raises(SystemExit):
            call(["--help"])
    return set(_FLAG.findall(capsys.readouterr().out))


def tasks() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["poe"]["tasks"])


def faults(words: Sequence[str]) -> list[str]:
    """Nonexistent tasks, files, directories and script flags that a command names."""
    program, *rest = words
    if program == "poe":
        return [word for word in rest[:1] if word not in tasks()]
    paths = [word for word in rest if re.match(r"(?:tests|k8s|models|common|services)/", word)]
    wrong = [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]
    scripts = [ROOT / path for path in paths if path.endswith(".py")]
    if program in ("python", "torchrun") and scripts and not wrong:
        # A script's flags are in its source or in a module beside it; flags of degrees are formed from DEGREES.
        source = "".join(path.read_text(encoding="utf-8") for path in scripts[0].parent.glob("*.py"))
        flags = [word.partition("=")[0] for word in rest[rest.index(paths[0]) :] if word.startswith("--")]
        wrong += [flag for flag in flags if f'"{flag}"' not in source and flag.removeprefix("--") not in DEGREES]
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_code_blocks_are_valid(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in block_commands(document):
        if words[0] == "fleet":
            parse_fleet(words[1:], monkeypatch)
        else:
            assert not faults(words), " ".join(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_prose_are_valid(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    for span in inline_commands(document):
        words = span.replace("[", "").replace("]", "").split()
        if words[0] != "fleet":
            assert not faults(words), span
        elif words[1] != "COMMAND":
            assert set(_FLAG.findall(span)) - {"--help"} <= flags_of(words[1:], capsys), span


def test_many_commands_are_checked() -> None:
    commands = [words for document in DOCUMENTS for words in block_commands(document)]
    assert sum(words[0] == "fleet" for words in commands) >= 15
    assert {words[0] for words in commands} >= {"fleet", "poe", "pytest", "kubectl"}
    assert sum(len(inline_commands(document)) for document in DOCUMENTS) >= 50


@pytest.mark.parametrize(
    "line",
    [
        "generate x --outptu a.png",
        "generate x --num-frames",
        "serve denoising --queue-limit 4",
        "serve denoising --redis u --absent 4",
        "up --absent",
        "size --model x",
        "watch",
    ],
)
def test_an_invalid_fleet_line_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError):
        parse_fleet(line.split(), monkeypatch)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("poe absent", "absent"),
        ("pytest tests/unit/test_absent.py", "tests/unit/test_absent.py"),
        ("pytest tests/absent -k word", "tests/absent"),
        ("python tests/bench/absent.py --repeats 3", "tests/bench/absent.py"),
        ("python tests/bench/denoise_step.py --absent", "--absent"),
        ("kubectl apply -k k8s/overlays/absent", "k8s/overlays/absent"),
    ],
)
def test_an_invalid_name_in_a_command_is_found(line: str, fault: str) -> None:
    assert faults(line.split()) == [fault]


def test_a_shell_line_is_split_into_commands() -> None:
    line = 'python3 -m venv .venv && A=1 .venv/bin/fleet generate "a red apple" --output a.png &'
    assert list(segments(line)) == [
        ["python3", "-m", "venv", ".venv"],
        [".venv/bin/fleet", "generate", "a red apple", "--output", "a.png"],
        [],
    ]
