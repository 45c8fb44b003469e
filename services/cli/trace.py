"""`fleet trace ID`: the timeline of a request, as text or as a PNG."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import InvalidInput
from services.cli.access import Access, access_of
from services.cli.client import connect
from services.cli.options import SUCCESS, add_endpoint, add_request_id, command_parser, endpoint_of, run_async
from services.cli.timeline import COMPLETED, HANDED_OVER, LOST, RUNNING, WAITING, Attempt, Timeline, read_timeline
from services.start_up import plain

_WAIT, _RUN, _CHECKPOINT, _DEATH, _TAKE_OVER = "·", "█", "◆", "✗", "▲"
_STYLES = {COMPLETED: "green", HANDED_OVER: "yellow", LOST: "red", RUNNING: "cyan", WAITING: "dim"}
_NARROWEST = 30
"""Minimum width of the bars, in characters."""


def main(argv: Sequence[str]) -> int:
    """Print the timeline, or write it to --output and print the path; returns the exit code."""
    parser = command_parser(
        "trace",
        "Show the timeline of a request: waits for workers, attempts, step checkpoints, lost workers, take-overs. "
        "The timeline is stored as long as the record of the request.",
    )
    add_request_id(parser)
    parser.add_argument("--output", metavar="FILE.png", type=Path, help="write a PNG instead of text")
    add_endpoint(parser)
    args = parser.parse_args(argv)
    write = _timeline_writer(args.output)
    return run_async(_trace(endpoint_of(args.endpoint), access_of(args), args.id, write))


async def _trace(endpoint: str, access: Access, request_id: str, write: Callable[[Timeline], None]) -> int:
    async with connect(endpoint, access) as client:
        found = await client.timeline(request_id)
    write(read_timeline(found.request, found.timeline))
    return SUCCESS


def _timeline_writer(output: Path | None) -> Callable[[Timeline], None]:
    """A function that prints a timeline, or writes it to a file. Raises InvalidInput."""
    if output is None:
        return lambda timeline: print_timeline(timeline, Console(file=sys.stdout, highlight=False))
    if output.suffix.lower() != ".png":
        raise InvalidInput(f"output: {str(output)!r} is not a .png file; trace.png works", field="output")
    try:
        # Pillow is optional, and text output does not need it.
        module = importlib.import_module("services.cli.timeline_image")
    except ModuleNotFoundError as error:
        message = "output: PNG files need Pillow, which is not installed; pip install pillow"
        raise InvalidInput(message, field="output") from error

    def write(timeline: Timeline) -> None:
        vars(module)["write_png"](timeline, output)
        sys.stdout.write(f"{output}\n")

    return write


def print_timeline(timeline: Timeline, console: Console) -> None:
    """Print one row per attempt: service, number of the attempt, bar over time, and outcome."""
    console.print(Text(plain(timeline.title)))
    if not timeline.attempts:
        console.print("no attempts are recorded")
        return
    names = max(len(each.service) for each in timeline.attempts)
    notes = {id(each): note_of(each) for each in timeline.attempts}
    width = max(_NARROWEST, console.width - names - max(map(len, notes.values())) - 10)
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("SERVICE", no_wrap=True)
    table.add_column("#", justify="right")
    table.add_column(f"0 s{f'{timeline.seconds:.2f} s'.rjust(width - 3)}", no_wrap=True, min_width=width)
    table.add_column("ATTEMPT", overflow="fold")
    for each in timeline.attempts:
        bar = Text(bar_of(each, timeline.seconds, width), style=_STYLES.get(each.state, ""))
        table.add_row(plain(each.service), str(each.number), bar, Text(plain(notes[id(each)])))
    for moment, epoch in timeline.take_overs:
        bar = Text(" " * _column(moment, timeline.seconds, width) + _TAKE_OVER)
        table.add_row("coordinator", str(epoch), bar, f"took over at {moment:.2f} s")
    console.print(table)
    marks = ((_WAIT, "waiting"), (_RUN, "running"), (_CHECKPOINT, "step checkpoint"), (_DEATH, "worker lost"))
    console.print("  ".join(f"{mark} {meaning}" for mark, meaning in marks), style="dim")


def note_of(attempt: Attempt) -> str:
    """The outcome of an attempt as text.

    Example: "waited 0.01 s, completed after 1.20 s, steps 8/8, on denoising-host-7".
    """
    parts: list[str] = []
    if attempt.queued is not None and attempt.granted is not None:
        parts.append(f"waited {attempt.granted - attempt.queued:.2f} s")
    since = attempt.queued if attempt.granted is None else attempt.granted
    seconds = "" if attempt.ended is None or since is None else f" after {attempt.ended - since:.2f} s"
    parts.append(f"{attempt.state}{seconds}")
    if attempt.total_steps > 1:
        parts.append(f"steps {attempt.step}/{attempt.total_steps}")
    if attempt.checkpoints:
        parts.append(f"step checkpoints {len(attempt.checkpoints)}, last at step {attempt.checkpoints[-1][1]}")
    return ", ".join(parts) + (f", on {attempt.worker}" if attempt.worker else "")


def bar_of(attempt: Attempt, seconds: float, width: int) -> str:
    """The attempt on a time axis of `width` characters for `seconds`."""
    end = seconds if attempt.ended is None else attempt.ended
    cells = [" "] * width
    for mark, start, stop in ((_WAIT, attempt.queued, attempt.granted or end), (_RUN, attempt.granted, end)):
        if start is not None:
            first, last = _column(start, seconds, width), _column(stop, seconds, width)
            cells[first : last + 1] = mark * (last + 1 - first)
    for moment, _ in attempt.checkpoints:
        cells[_column(moment, seconds, width)] = _CHECKPOINT
    if attempt.outcome == LOST:
        cells[_column(end, seconds, width)] = _DEATH
    return "".join(cells)


def _column(moment: float, seconds: float, width: int) -> int:
    return min(width - 1, int(width * moment / seconds)) if seconds > 0 else 0
