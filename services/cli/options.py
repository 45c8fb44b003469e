"""What the subcommands share: parsing, exit codes, one-line errors, and how an asyncio program ends on a signal."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn

from common.errors import CheckpointError, FleetError, InvalidInput, NotFound
from common.settings import FlagParser, SettingsError

SUCCESS = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

DEFAULT_ENDPOINT = "127.0.0.1:50051"


def command_parser(name: str, description: str) -> FlagParser:
    """A parser for `fleet NAME`."""
    return FlagParser(prog=f"fleet {name}", description=description, allow_abbrev=False)


def add_endpoint(parser: FlagParser) -> None:
    """Add --endpoint to a command that talks to a running fleet."""
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", help=f"where the fleet answers (default: FLEET_ENDPOINT, {DEFAULT_ENDPOINT})"
    )


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
    """2 where the caller gave something wrong, 1 for the rest."""
    return BAD_INPUT if isinstance(error, (InvalidInput, NotFound, CheckpointError)) else FAILED


def one_line(error: FleetError) -> str:
    """The error's sentence, led by the field where the sentence does not name it."""
    message = " ".join(error.message.split())
    named = not error.field or error.field in message or "--" + error.field.replace("_", "-") in message
    return message if named else f"{error.field}: {message}"


def run_async(program: Coroutine[Any, Any, int]) -> int:
    """Run a program; SIGINT and SIGTERM cancel it, so that it cleans up, and then decide the exit code."""
    return asyncio.run(_until_signal(program))


async def _until_signal(program: Coroutine[Any, Any, int]) -> int:
    task = asyncio.ensure_future(program)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return INTERRUPTED if received[0] == signal.SIGINT else TERMINATED


def interrupt(*_: object) -> NoReturn:
    """SIGTERM's handler outside asyncio: unwinds like Ctrl-C, with an exit code of its own."""
    raise SystemExit(TERMINATED)
