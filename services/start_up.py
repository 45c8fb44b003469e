"""Converts the failure of a process to one line on stderr and an exit code.

Every service's main() and the `fleet` command run here. The traceback is written only at log level DEBUG.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.errors import FailedPrecondition, FleetError, InvalidInput
from common.logs import get_logger, writes_json
from common.state.store_url import without_password

FAILED = 1
BAD_INPUT = 2

_MAY_PASS = (ConnectionError, TimeoutError)
_log = get_logger(__name__)
_HINT = "FLEET_LOG_LEVEL=DEBUG shows the traceback"


def service_exit_code(error: FleetError) -> int:
    """2 for a wrong configuration or environment, which a restart does not change; 1 for other errors."""
    return BAD_INPUT if isinstance(error, (InvalidInput, FailedPrecondition)) else FAILED


def run_program(
    prog: str,
    program: Callable[[], int],
    flags: Sequence[str],
    *,
    exit_code: Callable[[FleetError], int] = service_exit_code,
) -> int:
    """Run a program and return its exit code. Writes an error as one line with prefix `prog` on stderr, or as JSON.

    `exit_code` maps a FleetError to an exit code. Failed connections and timeouts give 1. Other errors give 2, because
    the environment causes them (a missing module, a full disk). SystemExit and KeyboardInterrupt propagate.
    """
    try:
        return program()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 -- a panic in a Rust library is not an Exception
        errors = list(_leaves(error))
        if writes_json():
            shown = error if _shows_tracebacks(flags) else None
            _log.critical("process failed", errors=[describe(each) for each in errors], exc_info=shown)
        else:
            if _shows_tracebacks(flags):
                sys.stderr.write(without_password("".join(traceback.format_exception(error))))
            sys.stderr.write("".join(f"{prog}: {describe(each)}\n" for each in errors))
        return max(exit_code(each) if isinstance(each, FleetError) else _unexpected_code(each) for each in errors)


def describe(error: BaseException) -> str:
    """The error on one line, without credentials.

    The message of a FleetError; for other errors, type, message and location.
    """
    if isinstance(error, FleetError):
        return one_line(error)
    # Unlike str(), this also formats an error whose own __str__ fails.
    text = next(line for line in traceback.format_exception_only(error) if not line.startswith(" "))
    text = without_password(plain(" ".join(text.split()))).removeprefix(f"{type(error).__module__}.")
    return f"{text} ({plain(_location(error))}{_HINT})"


def _location(error: BaseException) -> str:
    """File and line of the error; for a SyntaxError, of the malformed file. Empty if unknown."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}; "
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}; " if frames else ""


def plain(text: str) -> str:
    """External text for a terminal: control and bidirectional characters become replacement characters."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def one_line(error: FleetError) -> str:
    """The message on one line, with the field as prefix where the message does not contain it."""
    message = without_password(plain(" ".join(error.message.split())))
    named = not error.field or error.field in message or "--" + error.field.replace("_", "-") in message
    return message if named else f"{plain(error.field)}: {message}"


def escape_output() -> None:
    """Escape characters that the encoding of stdout or stderr lacks, for example as \\xe9."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group and its nested groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _unexpected_code(error: BaseException) -> int:
    return FAILED if isinstance(error, _MAY_PASS) else BAD_INPUT


def _shows_tracebacks(flags: Sequence[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the log level is DEBUG: in logging, else in --log-level, else in FLEET_LOG_LEVEL."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return True
    for flag, value in zip(flags, [*flags, ""][1:], strict=True):
        if flag == "--log-level" or flag.startswith("--log-level="):
            return (flag.partition("=")[2] or value) == "DEBUG"
    return environ.get("FLEET_LOG_LEVEL") == "DEBUG"
