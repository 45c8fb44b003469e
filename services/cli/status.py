"""`fleet status`: the services, store and requests of a running fleet. Live on a terminal."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.console import Console

from common.errors import FleetError
from common.settings import SettingsError
from services.cli.access import Access, access_of
from services.cli.client import FleetClient, connect
from services.cli.options import (
    BAD_INPUT,
    INTERRUPTED,
    SUCCESS,
    add_endpoint,
    command_parser,
    endpoint_of,
    exit_code,
    run_async,
)
from services.cli.status_cells import Snapshot, plain_text
from services.cli.status_json import document, failed_document
from services.cli.status_live import MOST_REQUESTS, StatusView, read_in_time, show_live
from services.start_up import one_line

_REQUESTS = 10
_INTERVAL_SECONDS = 1.0
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.1, 3_600.0


def main(argv: Sequence[str]) -> int:
    """Show the fleet: live on a terminal, else once. Ctrl-C ends a live view with exit code 0."""
    parser = command_parser(
        "status",
        "Show the models of a running fleet, the workers, queue and pace of each stage, its store, and the activity of "
        "its requests. On a terminal the view is live until Ctrl-C, else it is printed once.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON document (fields: services/README.md)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--once", action="store_true", help="print once, also on a terminal")
    modes.add_argument(
        "--interval",
        metavar="SECONDS",
        type=_interval,
        help="interval of the live view (default: 1); with --json, print one document per line until Ctrl-C",
    )
    add_endpoint(parser)
    args = parser.parse_args(argv)
    endpoint, access = endpoint_of(args.endpoint), access_of(args)
    if args.json:
        program = _print_json(endpoint, access, args.interval)
        return _ended(run_async(program), is_live=args.interval is not None)
    console = Console()
    is_terminal = sys.stdout.isatty() and not console.is_dumb_terminal
    if args.interval is not None and not is_terminal:
        raise SettingsError("--interval: the output is not a terminal; omit the flag, or add --json", field="interval")
    if args.once or not is_terminal:
        return run_async(_status(endpoint, access))
    return _ended(run_async(_watch(endpoint, access, args.interval or _INTERVAL_SECONDS, console)), is_live=True)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _SHORTEST_SECONDS <= seconds <= _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of seconds from 0.1 to 3600; 2 works")
    return seconds


def _ended(code: int, *, is_live: bool) -> int:
    """The exit code of a view: 0 for a live view that Ctrl-C has ended."""
    return SUCCESS if is_live and code == INTERRUPTED else code


async def _read(client: FleetClient, count: int) -> Snapshot:
    overview, listing = await asyncio.gather(client.overview(), client.activities(count))
    return Snapshot(overview, listing, datetime.now(UTC))


async def _status(endpoint: str, access: Access) -> int:
    async with connect(endpoint, access) as client:
        snapshot = await _read(client, _REQUESTS)
    sys.stdout.write(plain_text(snapshot))
    return SUCCESS


async def _watch(endpoint: str, access: Access, interval: float, console: Console) -> int:
    async with connect(endpoint, access) as client:
        read = partial(_read, client, MOST_REQUESTS)
        await show_live(StatusView(endpoint, interval, await read_in_time(read)), read, console)
    return SUCCESS


async def _print_json(endpoint: str, access: Access, interval: float | None) -> int:
    async with connect(endpoint, access) as client:
        read = partial(_read, client, MOST_REQUESTS)
        if interval is None:
            _write_line(document(endpoint, await read()))
            return SUCCESS
        while True:
            try:
                _write_line(document(endpoint, await read_in_time(read)))
            except FleetError as error:
                if exit_code(error) == BAD_INPUT:
                    raise
                _write_line(failed_document(endpoint, one_line(error)))
            await asyncio.sleep(interval)


def _write_line(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
