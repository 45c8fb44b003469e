"""The live view of `fleet status`: redrawn after each response, with an error line while calls fail."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import FleetError, Unavailable
from fleet.v1 import generation_pb2
from services.cli.client import state_name
from services.cli.options import BAD_INPUT, exit_code
from services.cli.status_cells import (
    NOTICES,
    Snapshot,
    activity_text,
    degrees_text,
    duration_text,
    pace_text,
    seconds_text,
    shortened,
    store_health_text,
    store_text,
    workers_text,
)
from services.start_up import one_line, plain

MOST_REQUESTS = 100
_NARROW = 80
"""Terminal width in columns below which headings are abbreviated and parallel degrees are hidden."""

_WIDE, _WIDEST = 100, 130
"""Minimum terminal widths, in columns, at which the model and the prompt of a request are shown."""

_LONGEST_SECONDS = 5.0
"""Timeout of one call to the fleet, in seconds."""

_STATES = {"RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "EXPIRED": "yellow"}

Read = Callable[[], Awaitable[Snapshot]]


@dataclass(frozen=True)
class Failure:
    """The latest error of consecutive failed calls, and the time of the first failure."""

    message: str
    since: datetime


@dataclass(frozen=True)
class StatusView:
    """The content of the terminal: the latest snapshot, and the failure of later calls, if any."""

    endpoint: str
    interval: float
    snapshot: Snapshot
    failure: Failure | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The fleet, its store, and as many requests as fit on the screen."""
        width, height = options.max_width, options.height or console.size.height
        above = Group(*self._header(), *self._stages(width), *self._notices(), *self._store())
        lines = len(console.render_lines(above, options.update(height=None), pad=False))
        yield above
        most = max(height - lines - 2, 1)
        if self.snapshot.listing.requests:
            yield Text()
            yield self._requests(width, most)

    def _header(self) -> Iterator[Text]:
        yield _line(f"{_clock(self.snapshot)} UTC, fleet at {self.endpoint}", "bold")
        if self.failure is not None:
            since = f"{self.failure.since:%H:%M:%S}"
            yield _line(f"UNAVAILABLE since {since} UTC, last data {_clock(self.snapshot)} UTC", "bold red")
            yield Text(plain(self.failure.message), style="red")
        else:
            yield _line(f"every {self.interval:g} s; Ctrl-C ends", "dim")

    def _stages(self, width: int) -> Iterator[RenderableType]:
        workers = "LIVE" if width < _NARROW else "WORKERS"
        for model in self.snapshot.overview.models:
            yield Text()
            yield _line(f"{model.name} ({model.pipeline_name})", "bold")
            has_degrees = width >= _NARROW and any(each.groups for each in model.services)
            table = _table("STAGE", workers, "BUSY", "QUEUED", "SECONDS", "PACE", *["DEGREES"] * has_degrees)
            for each in model.services:
                degrees = [_text(degrees_text(each.groups))] if has_degrees else []
                table.add_row(*map(_text, _stage_cells(each)), *degrees, style=_stage_style(each))
            yield table

    def _notices(self) -> Iterator[RenderableType]:
        for notice in NOTICES:
            rows = notice.rows(self.snapshot.overview)
            if rows:
                table = _table(*notice.head)
                for row in rows:
                    table.add_row(*map(_text, row))
                yield Text()
                yield table

    def _store(self) -> Iterator[Text]:
        store = self.snapshot.overview.store
        yield Text()
        yield Text(store_text(store), style="red" if store.is_full else "")
        if health := store_health_text(store):
            is_lossy = store.HasField("is_durable") and not store.is_durable
            yield Text(health, style="yellow" if is_lossy or store.replicas < store.required_replicas else "")

    def _requests(self, width: int, most: int) -> Table:
        shows_model, shows_prompt = width >= _WIDE, width >= _WIDEST
        heads = ("REQUEST", "STATE", "AGE", *["MODEL"] * shows_model, "NOW", *["PROMPT"] * shows_prompt)
        table = _table(*heads, flexible=("NOW", "PROMPT"))
        for record in list(self.snapshot.listing.requests)[:most]:
            name = state_name(record.state)
            cells = [_text(record.request_id), Text(name, style=_STATES.get(name, ""))]
            cells.append(_text(duration_text(self.snapshot.age(record))))
            cells += [_text(record.model)] * shows_model
            cells.append(_text(activity_text(record)))
            cells += [_text(shortened(record.parameters.prompt))] * shows_prompt
            table.add_row(*cells)
        return table


def _clock(snapshot: Snapshot) -> str:
    return f"{snapshot.taken_at:%H:%M:%S}"


def _text(cell: str) -> Text:
    """A cell with external text, without markup and terminal control characters."""
    return Text(plain(cell))


def _line(text: str, style: str = "") -> Text:
    return Text(plain(text), style=style, no_wrap=True, overflow="ellipsis")


def _table(*heads: str, flexible: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=bool(flexible))
    for head in heads:
        ratio = 1 if head in flexible else None
        table.add_column(head, no_wrap=True, overflow="ellipsis", ratio=ratio, header_style="bold")
    return table


def _stage_cells(service: generation_pb2.ServiceStatus) -> tuple[str, ...]:
    busy = f"{service.busy}/{service.capacity}"
    queued = str(service.queued)
    return service.service, workers_text(service), busy, queued, seconds_text(service), pace_text(service)


def _stage_style(service: generation_pb2.ServiceStatus) -> str:
    """Red if open requests need a stage without workers, yellow if workers are dead."""
    if service.open_requests and not service.workers:
        return "red"
    return "yellow" if service.dead_workers else ""


async def show_live(view: StatusView, read: Read, console: Console) -> None:
    """Show the view until cancellation. Refreshes it every `interval` seconds and when the terminal is resized.

    Raises permanent FleetErrors, such as a refused API key.
    """
    with Live(view, console=console, screen=True, auto_refresh=False) as live:
        asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, live.refresh)
        live.refresh()
        while True:
            await asyncio.sleep(view.interval)
            view = await next_view(view, read)
            live.update(view, refresh=True)


async def next_view(view: StatusView, read: Read) -> StatusView:
    """The view after one more call: with a new snapshot, or with the error of the call."""
    try:
        return replace(view, snapshot=await read_in_time(read), failure=None)
    except FleetError as error:
        if exit_code(error) == BAD_INPUT:
            raise
        since = datetime.now(UTC) if view.failure is None else view.failure.since
        return replace(view, failure=Failure(one_line(error), since))


async def read_in_time(read: Read) -> Snapshot:
    """Call `read` with a timeout of 5 s. Raises Unavailable on timeout."""
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            return await read()
    except TimeoutError as error:
        raise Unavailable(f"no answer within {_LONGEST_SECONDS:g} s") from error
