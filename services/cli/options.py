"""Shared parts of the subcommands: flags, exit codes, and a runner of asyncio programs."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

from common.errors import CheckpointError, FleetError, InvalidInput, NotFound, PermissionDenied, Unauthenticated
from common.package_guard import UnsupportedPackage
from common.settings import FlagParser, SettingsError
from services.start_up import BAD_INPUT as BAD_INPUT
from services.start_up import FAILED as FAILED

SUCCESS = 0
INTERRUPTED = 130
TERMINATED = 143

DEFAULT_ENDPOINT = "127.0.0.1:50051"
DEGREES = ("tp", "ulysses", "ring", "cfg")
"""Flags of the parallel degrees of a worker group."""
ACCESS_FLAGS = ("tls", "tls_ca", "tls_cert", "tls_key", "api_key")

_CALLERS_FAULT = (InvalidInput, NotFound, CheckpointError, Unauthenticated, PermissionDenied, UnsupportedPackage)
_PATIENCE_SECONDS = 3.0
_SHOW_CURSOR = "\x1b[?25h"


def command_parser(name: str, description: str) -> FlagParser:
    """A parser for `fleet NAME`."""
    return FlagParser(prog=f"fleet {name}", description=description, allow_abbrev=False)


def add_endpoint(parser: FlagParser, default_help: str = f"FLEET_ENDPOINT, else {DEFAULT_ENDPOINT}") -> None:
    """Add --endpoint and the access flags to a command that calls a running fleet. `default_help` is for --help."""
    parser.add_argument("--endpoint", metavar="HOST:PORT", help=f"address of a running fleet (default: {default_help})")
    add_access(parser)


def add_access(parser: FlagParser) -> None:
    """Add the TLS and API key flags to a command that calls a running fleet."""
    group = parser.add_argument_group("access", "each flag has a variable, such as FLEET_TLS_CA or FLEET_API_KEY")
    group.add_argument(
        "--tls", action="store_true", default=None, help="connect with TLS, and trust public authorities; FLEET_TLS=1"
    )
    group.add_argument("--tls-ca", metavar="FILE", help="connect with TLS, and trust this authority (PEM)")
    group.add_argument(
        "--tls-cert", metavar="FILE", help="client certificate, if the fleet requires client certificates (PEM)"
    )
    group.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert (PEM)")
    group.add_argument("--api-key", metavar="KEY", help="API key; prefer the variable, which `ps` does not show")


def add_request_id(parser: FlagParser) -> None:
    """Add the positional ID."""
    parser.add_argument("id", metavar="ID", type=_request_id, help="ID of the request")


def _request_id(text: str) -> str:
    if not (text.isascii() and text.isprintable() and text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the ID of a request; `fleet status` lists the IDs")
    return text


def endpoint_of(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The value of --endpoint, else FLEET_ENDPOINT, else DEFAULT_ENDPOINT. Raises SettingsError if malformed."""
    endpoint = given or environ.get("FLEET_ENDPOINT") or DEFAULT_ENDPOINT
    if endpoint.startswith("unix:"):
        return endpoint
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise SettingsError(
            f"--endpoint: {endpoint!r} is not HOST:PORT or unix:PATH; {DEFAULT_ENDPOINT} works", field="endpoint"
        )
    return endpoint


def exit_code(error: FleetError) -> int:
    """2 for an error in the caller's input or an unsupported package, 1 for other errors."""
    return BAD_INPUT if isinstance(error, _CALLERS_FAULT) else FAILED


def let_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY=PASSIVE unless it is set. Call it before torch is imported.

    By default, OpenMP threads spin after every operation, which slows down other processes on the same cores: 20 steps
    of the emoji model took 10 s instead of 0.6 s on two busy cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_async(program: Coroutine[Any, Any, int], *, abandon: Callable[[], None] | None = None) -> int:
    """Run a program and return its exit code. SIGINT and SIGTERM cancel the program and determine the exit code.

    Some work cannot be interrupted, such as loading weights. If the program has not ended a few seconds after the
    signal, or at a second signal, calls `abandon` for cleanup and exits. Without `abandon`, waits for the program.
    """
    return asyncio.run(_until_signal(program, abandon))


async def _until_signal(program: Coroutine[Any, Any, int], abandon: Callable[[], None] | None) -> int:
    task = asyncio.ensure_future(program)
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def leave() -> None:
        if abandon is not None:
            abandon()
            sys.stderr.write(_SHOW_CURSOR if sys.stderr.isatty() else "")  # Progress bars hide the cursor.
            sys.stderr.write("interrupted\n")
            sys.stderr.flush()
            os._exit(_signal_code(received[0]))

    def stop(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            leave()
        task.cancel()
        loop.call_later(_PATIENCE_SECONDS, leave)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return _signal_code(received[0])


def _signal_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM outside asyncio: raise SystemExit with exit code 143."""
    raise SystemExit(TERMINATED)
