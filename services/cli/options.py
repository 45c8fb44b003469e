"""What the subcommands share: parsing, exit codes, one-line errors, and how an asyncio program ends on a signal."""

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
"""Flags that give a worker group its shape."""
ACCESS_FLAGS = ("tls", "tls_ca", "tls_cert", "tls_key", "api_key")

_CALLERS_FAULT = (InvalidInput, NotFound, CheckpointError, Unauthenticated, PermissionDenied, UnsupportedPackage)
_PATIENCE_SECONDS = 3.0
_SHOW_CURSOR = "\x1b[?25h"


def command_parser(name: str, description: str) -> FlagParser:
    """A parser for `fleet NAME`."""
    return FlagParser(prog=f"fleet {name}", description=description, allow_abbrev=False)


def add_endpoint(parser: FlagParser) -> None:
    """Add --endpoint, and how to get in, to a command that talks to a running fleet."""
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", help=f"where the fleet answers (default: FLEET_ENDPOINT, {DEFAULT_ENDPOINT})"
    )
    add_access(parser)


def add_access(parser: FlagParser) -> None:
    """Add the flags of a command that talks to a running fleet."""
    group = parser.add_argument_group("access", "each is also a variable, such as FLEET_TLS_CA or FLEET_API_KEY")
    group.add_argument("--tls", action="store_true", default=None, help="speak TLS; FLEET_TLS=1")
    group.add_argument("--tls-ca", metavar="FILE", help="speak TLS, and believe this authority (PEM)")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate to show, where the fleet asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert")
    group.add_argument("--api-key", metavar="KEY", help="who is calling; prefer the variable, which `ps` does not show")


def add_request_id(parser: FlagParser) -> None:
    """Add the positional ID."""
    parser.add_argument("id", metavar="ID", type=_request_id, help="the request")


def _request_id(text: str) -> str:
    if not (text.isascii() and text.isprintable() and text):
        raise argparse.ArgumentTypeError(f"must be the ID of a request, not {text!r}")
    return text


def endpoint_of(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The flag, else FLEET_ENDPOINT, else the port that `fleet up` listens on. Raises SettingsError when malformed."""
    endpoint = given or environ.get("FLEET_ENDPOINT") or DEFAULT_ENDPOINT
    if endpoint.startswith("unix:"):
        return endpoint
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise SettingsError(f"--endpoint must be HOST:PORT or unix:PATH, not {endpoint!r}", field="endpoint")
    return endpoint


def exit_code(error: FleetError) -> int:
    """2 where the caller gave something wrong or a package is unsupported, 1 for the rest."""
    return BAD_INPUT if isinstance(error, _CALLERS_FAULT) else FAILED


def let_threads_sleep() -> None:
    """Make OpenMP's threads wait asleep unless the environment says otherwise. To be called before torch is imported.

    By default they spin at the end of every operation. Where processes or device threads share the cores, that steals
    the time of those who compute: 20 steps of the emoji model took 10 s instead of 0.6 on two busy cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_async(program: Coroutine[Any, Any, int], *, abandon: Callable[[], None] | None = None) -> int:
    """Run a program; SIGINT and SIGTERM cancel it, so that it cleans up, and then decide the exit code.

    With `abandon`, which cleans up what must not stay, a program that has not ended some seconds after the signal, or
    at the second one, is left as it is and the process ends: reading weights cannot be interrupted.
    """
    return asyncio.run(_until_signal(program, abandon))


async def _until_signal(program: Coroutine[Any, Any, int], abandon: Callable[[], None] | None) -> int:
    task = asyncio.ensure_future(program)
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def leave() -> None:
        if abandon is not None:
            abandon()
            sys.stderr.write(_SHOW_CURSOR if sys.stderr.isatty() else "")  # progress bars hide it
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
    """SIGTERM's handler outside asyncio: unwinds like Ctrl-C, with an exit code of its own."""
    raise SystemExit(TERMINATED)
