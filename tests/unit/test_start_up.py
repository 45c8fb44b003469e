"""Each error at start is one line on stderr and sets the exit code; tracebacks appear only at DEBUG."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import grpc
import huggingface_hub.errors
import PIL
import PIL.Image
import pytest
import redis.exceptions
import safetensors
import torch
from diffusers.utils import import_utils
from torch import distributed

from async_tests import HANG_SECONDS
from common.errors import InternalError, InvalidInput, Unavailable
from common.logs import setup_logging
from common.state.embedded import private_directory
from models.catalog import open_model
from models.registry import load_registry
from models.warm_up import WarmUp
from services import stage_services, start_up, worker
from services.cli import __main__ as cli
from services.cli import generate, status, up
from services.coordinator import __main__ as coordinator
from services.denoising import __main__ as denoising
from services.denoising import launcher, rank
from services.denoising.joining import Place
from services.denoising.settings import DenoisingSettings
from services.start_up import run_program

LIBRARIES = [builtins, json, safetensors, PIL, PIL.Image, torch, import_utils]
LIBRARIES += [huggingface_hub.errors, redis.exceptions, grpc, grpc.aio]
EXCLUDED = (
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    BaseExceptionGroup,
    Warning,
    StopIteration,
    StopAsyncIteration,
)
STORE_URL = "unix:///nowhere/store.sock"
WORKER = ("--model", "emoji", "--redis", STORE_URL, "--device", "cpu", "--listen", "unix:/nowhere/worker.sock")


def _errors_of(module: ModuleType) -> Iterator[type[Exception]]:
    for each in vars(module).values():
        if isinstance(each, type) and issubclass(each, Exception) and not issubclass(each, EXCLUDED):
            yield each


DISTRIBUTED = (
    distributed.DistError,
    distributed.DistBackendError,
    distributed.DistNetworkError,
    distributed.DistStoreError,
)
FOUND: set[type[Exception]] = {*DISTRIBUTED, *(each for module in LIBRARIES for each in _errors_of(module))}
ERRORS = sorted(FOUND, key=lambda each: each.__qualname__)

SAMPLE: list[type[Exception]] = [ImportError, KeyError, OSError, PermissionError, ConnectionError, TimeoutError]
SAMPLE += [RuntimeError, MemoryError, UnicodeError, RecursionError, redis.exceptions.ConnectionError, *ERRORS[::25]]
"""A sample of the errors for slower cases; the same code handles all errors."""


def _instance_of(kind: type[Exception]) -> Exception:
    """An instance made without a call of __init__(), whose parameters differ between classes."""
    return kind.__new__(kind, "some\nwords")


def _raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


async def _store_is_checked(*_: object) -> bool:
    return True


Main = Callable[[list[str]], int]
Case = tuple[Any, str, Main, list[str], str]
SERVICE = (partial(stage_services.main, "decoding"), list(WORKER), "fleet serve decoding")
CASES: dict[str, Case] = {
    "worker: plugins": (worker, "load_registry", *SERVICE),
    "worker: model": (worker, "open_model", *SERVICE),
    "worker: weights": (worker, "load_variants", *SERVICE),
    "worker: store": (worker, "connect", *SERVICE),
    "group: launcher": (launcher, "launch", denoising.main, [*WORKER, "--tp", "2"], "fleet serve denoising"),
    "coordinator: plugins": (coordinator, "load_registry", coordinator.main, ["--redis", STORE_URL], "coordinator"),
    "coordinator: store": (coordinator, "start_coordinator", coordinator.main, ["--redis", STORE_URL], "coordinator"),
    "fleet up: plugins": (up, "load_registry", cli.main, ["up"], "fleet up"),
    "fleet up: directory": (up, "private_directory", cli.main, ["up", "--port", "0"], "fleet up"),
    "fleet generate": (generate, "open_model", cli.main, ["generate", "p", "--output", "X.png"], "fleet generate"),
    "fleet status": (status, "connect", cli.main, ["status"], "fleet status"),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLEET_LOG_LEVEL", "ERROR")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", CASES)
def test_every_error_of_the_libraries_is_reported_on_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function, main, flags, prog = CASES[name]
    if function == "load_variants":
        monkeypatch.setattr(worker, "_is_store_checked", _store_is_checked)
    assert len(ERRORS) > 100
    for kind in ERRORS if function == "load_registry" else SAMPLE:
        if main is cli.main and issubclass(kind, BrokenPipeError):
            continue  # The reader of stdout has closed it, so no line is written.
        monkeypatch.setattr(module, function, _raising(_instance_of(kind)))
        code = main(flags)
        lines = capsys.readouterr().err.splitlines()
        assert code == (1 if issubclass(kind, (ConnectionError, TimeoutError)) else 2), kind
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{prog}: {kind.__name__}"), lines
        assert "Traceback" not in lines[0]


@pytest.mark.parametrize("name", CASES)
def test_the_traceback_appears_at_debug(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function, main, flags, prog = CASES[name]
    if function == "load_variants":
        monkeypatch.setattr(worker, "_is_store_checked", _store_is_checked)
    monkeypatch.setenv("FLEET_LOG_LEVEL", "DEBUG")
    monkeypatch.setattr(module, function, _raising(KeyError("color")))
    assert main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith(f"{prog}: KeyError: 'color' ({__file__}:")


def test_the_log_level_flag_overrides_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, level, shown in (
        (["--log-level", "DEBUG"], "ERROR", True),
        (["--log-level=DEBUG"], "", True),
        (["--log-level", "INFO"], "DEBUG", False),
        (["--log-level"], "DEBUG", False),
        ([], "DEBUG", True),
    ):
        monkeypatch.setenv("FLEET_LOG_LEVEL", level)
        assert run_program("prog", _raising(InvalidInput("wrong")), flags) == 2
        assert ("Traceback" in capsys.readouterr().err) is shown, flags


def test_each_error_of_an_exception_group_is_one_line_and_the_largest_exit_code_is_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = ExceptionGroup("both", [Unavailable("no store"), ExceptionGroup("one", [ImportError("no module")])])
    assert run_program("prog", _raising(group), []) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "prog: no store"
    assert second.startswith("prog: ImportError: no module (")
    assert run_program("prog", _raising(InternalError("broken")), []) == 1
    assert run_program("prog", _raising(BaseException("panicked")), []) == 2  # as raised by a Rust extension
    for error in (SystemExit(7), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run_program("prog", _raising(error), [])


def test_a_failed_rank_may_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 ends the group without a restart. Errors that may be temporary have another exit code."""
    place = Place(rank=0, local_rank=0, world_size=1, num_nodes=1, store_host="localhost", store_port=1, token="t")
    model = open_model("emoji", load_registry())
    for error in (distributed.DistNetworkError("reset"), torch.OutOfMemoryError("full"), MemoryError()):
        monkeypatch.setattr(rank, "_join_and_run", _raising(error))
        with pytest.raises(Unavailable, match=f"rank 0: {type(error).__name__}"):
            rank.run_rank(
                model, DenoisingSettings(model="emoji", redis=STORE_URL, device="cpu"), place, WarmUp.parse(model, ())
            )


def test_without_a_directory_for_temporary_files_the_error_names_tmpdir(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", _raising(FileNotFoundError(2, "No usable temporary directory found")))
    with pytest.raises(InvalidInput, match="set TMPDIR"):
        private_directory()
    assert cli.main(["up", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fleet up: TMPDIR: no directory for temporary files is writable (No usable")


def test_output_is_escaped_where_the_encoding_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="ascii"))
    monkeypatch.setattr(generate, "main", lambda _: generate._print_paths([Path("caf\xe9.png"), Path("\udcff")]))
    assert cli.main(["generate"]) == 0
    assert out.getvalue() == b"caf\\xe9.png\n\\udcff\n"


def test_no_line_shows_a_password(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_LOG_LEVEL", "DEBUG")
    for url in ("redis://:pa#sswd@host", "redis://:pa/sswd@host", "redis://:pa?sswd@host", "redis://:pa@sswd@host"):
        error = ValueError(f"cannot read {url}")
        assert start_up.run_program("prog", _raising(error), []) == 2
        assert "sswd" not in capsys.readouterr().err
        assert cli.main(["up", url]) == 2  # an unexpected argument
        assert "sswd" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("import nothing_there\n", "INFO", "ModuleNotFoundError: No module named 'nothing_there'"),
        ("{}['x']\n", "DEBUG", "KeyError: 'x'"),
    ],
)
def test_a_process_reports_a_broken_plugin(text: str, level: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text(f"{text}EntryClass = None\n")
    command = [sys.executable, "-m", "services.cli", "serve", "coordinator", "--redis", STORE_URL, "--plugins"]
    flags = [*command, str(tmp_path), "--log-level", level]
    done = subprocess.run(flags, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"coordinator: {message} ({tmp_path / 'broken_plugin.py'}:1; ")
    assert ("Traceback" in done.stderr) is (level == "DEBUG")
    assert level == "DEBUG" or len(lines) == 1


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_an_error_is_one_json_record_where_the_log_is_json(level: str) -> None:
    """Log collectors receive the reason for the exit as JSON, at DEBUG with the traceback."""
    out = io.StringIO()

    def program() -> int:
        setup_logging("coordinator", level=level, form="json", stream=out)
        raise InvalidInput("listen: redis://u:secret@host/ is no address", field="listen")

    assert run_program("coordinator", program, []) == 2
    (line,) = map(json.loads, out.getvalue().splitlines())
    assert (line["level"], line["service"], line["event"]) == ("CRITICAL", "coordinator", "process failed")
    assert line["errors"] == ["listen: redis://***@host/ is no address"]
    assert ("exception" in line) == (level == "DEBUG")
    assert "secret" not in out.getvalue()
