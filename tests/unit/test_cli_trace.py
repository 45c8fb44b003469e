"""`fleet trace` draws a stored timeline: waits, attempts, step checkpoints, lost workers, take-overs."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from common.errors import InvalidInput
from common.state.records import timestamp_of
from fleet.v1 import generation_pb2 as pb
from fleet.v1.generation_pb2 import TimelineEntry, TimelineKind
from services.cli import trace
from services.cli.timeline import COMPLETED, ENDED, HANDED_OVER, LEFT, LOST, RUNNING, WAITING, Timeline, read_timeline
from services.cli.timeline_image import draw_timeline, write_png

BEGAN = 1_800_000_000_000
"""Creation time of the request, as Unix time in milliseconds."""
WIDTH = 40
"""Width of a bar in characters."""


def at(seconds: float, kind: str, service: str = "", worker: str = "", **more: int) -> TimelineEntry:
    return TimelineEntry(
        time=timestamp_of(BEGAN + int(1_000 * seconds)),
        kind=TimelineKind.Value(f"TIMELINE_KIND_{kind}"),
        service=service,
        worker_id=worker,
        **more,  # type: ignore[arg-type]
    )


def record(state: str = "SUCCEEDED", seconds: float = 10.0) -> pb.RequestRecord:
    return pb.RequestRecord(
        request_id="r1",
        model="emoji",
        state=pb.RequestState.Value(f"REQUEST_STATE_{state}"),
        created_at=timestamp_of(BEGAN),
        updated_at=timestamp_of(BEGAN + int(1_000 * seconds)),
        trace=pb.TraceContext(traceparent=f"00-{'a' * 32}-{'b' * 16}-01"),
    )


ENTRIES = [
    at(0.0, "QUEUED", "text"),
    at(0.5, "GRANTED", "text", "t1"),
    at(0.5, "BEGUN", "text", total_steps=1),
    at(1.0, "STEP", "text", step=1, total_steps=1),
    at(1.0, "COMPLETED", "text", "t1"),
    at(1.0, "QUEUED", "denoising"),
    at(2.0, "GRANTED", "denoising", "d1"),
    at(2.0, "BEGUN", "denoising", total_steps=8),
    at(3.0, "CHECKPOINT", step=2),
    at(4.0, "STEP", "denoising", step=3, total_steps=8),
    at(4.5, "LOST", "denoising", "d1"),
    at(4.6, "ENDED", "denoising", "d1"),
    at(4.6, "QUEUED", "denoising"),
    at(5.0, "GRANTED", "denoising", "d2"),
    at(5.0, "BEGUN", "denoising", total_steps=8),
    at(6.0, "HANDED_OVER", "denoising", "d2"),
    at(6.0, "QUEUED", "denoising"),
    at(6.5, "GRANTED", "denoising", "d3"),
    at(7.0, "TAKEN_OVER", epoch=2),
    at(7.0, "QUEUED", "denoising"),
    at(7.5, "GRANTED", "denoising", "d4"),
    at(7.5, "BEGUN", "denoising", total_steps=8),
    at(9.5, "STEP", "denoising", step=8, total_steps=8),
    at(9.6, "COMPLETED", "denoising", "d4"),
    at(10.0, "STATE", state=pb.REQUEST_STATE_SUCCEEDED),
]


def drawn(timeline: Timeline, width: int = 150) -> list[str]:
    stream = io.StringIO()
    trace.print_timeline(timeline, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def test_read_timeline_groups_entries_into_attempts() -> None:
    timeline = read_timeline(record(), ENTRIES)
    assert [(each.service, each.number, each.worker, each.state) for each in timeline.attempts] == [
        ("text", 1, "t1", COMPLETED),
        ("denoising", 1, "d1", LOST),
        ("denoising", 2, "d2", HANDED_OVER),
        ("denoising", 3, "d3", LEFT),
        ("denoising", 4, "d4", COMPLETED),
    ]
    lost, last = timeline.attempts[1], timeline.attempts[-1]
    assert (lost.queued, lost.granted, lost.begun, lost.ended) == (1.0, 2.0, 2.0, 4.5)
    assert (lost.step, lost.total_steps, lost.checkpoints) == (3, 8, [(3.0, 2)])
    assert (last.step, last.ended, last.checkpoints) == (8, 9.6, [])
    assert timeline.take_overs == [(7.0, 2)]
    assert [each for each in timeline.attempts if each.outcome == LOST] == [lost]
    assert timeline.seconds == 10.0


def test_an_attempt_may_begin_and_complete_in_one_millisecond() -> None:
    """The entries of a millisecond have any order."""
    entries = [
        at(0.1, "QUEUED", "denoising"),
        at(0.2, "GRANTED", "denoising", "w1"),
        at(0.3, "COMPLETED", "denoising", "w1"),
        at(0.3, "BEGUN", "denoising", total_steps=4),
        at(0.4, "QUEUED", "denoising"),
        at(0.4, "GRANTED", "denoising", "w2"),
        at(0.5, "BEGUN", "denoising", total_steps=4),
    ]
    first, second = read_timeline(record("RUNNING"), entries).attempts
    assert (first.begun, first.ended, first.state) == (0.3, 0.3, COMPLETED)
    assert (second.granted, second.begun, second.state) == (0.4, 0.5, RUNNING)


def test_a_running_request_ends_at_its_latest_entry() -> None:
    timeline = read_timeline(record("RUNNING"), ENTRIES[:9])
    assert [each.state for each in timeline.attempts] == [COMPLETED, RUNNING]
    assert timeline.seconds == 3.0
    assert "RUNNING for 3.00 s so far" in timeline.title
    assert read_timeline(record("QUEUED"), ENTRIES[:1]).attempts[0].state == WAITING


def test_open_attempts_of_an_ended_request_have_ended() -> None:
    timeline = read_timeline(record("CANCELLED"), ENTRIES[:9])
    assert [each.state for each in timeline.attempts] == [COMPLETED, ENDED]
    assert timeline.attempts[1].ended == 10.0


def test_a_request_of_an_earlier_version_is_drawn_from_events_only() -> None:
    entries = [
        entry for entry in ENTRIES if entry.kind in (TimelineKind.TIMELINE_KIND_BEGUN, TimelineKind.TIMELINE_KIND_STEP)
    ]
    timeline = read_timeline(record(), entries)
    assert [(each.service, each.step) for each in timeline.attempts] == [
        ("text", 1),
        ("denoising", 3),
        ("denoising", 0),
        ("denoising", 8),
    ]
    assert drawn(timeline)
    assert "no attempts are recorded" in drawn(read_timeline(record(), []))[1]


def test_bars_are_to_scale() -> None:
    timeline = read_timeline(record(), ENTRIES)
    bars = [trace.bar_of(each, timeline.seconds, WIDTH) for each in timeline.attempts]
    assert bars[0] == "··███".ljust(WIDTH)
    assert bars[1] == "    ····████◆█████✗".ljust(WIDTH)
    assert bars[2].strip("· ").count("█") == 5
    assert all(len(bar) == WIDTH for bar in bars)


def test_the_text_has_a_row_for_each_attempt() -> None:
    title, head, *rows = (line.rstrip() for line in drawn(read_timeline(record(), ENTRIES)))
    assert title == f"request r1 of emoji: SUCCEEDED after 10.00 s, trace {'a' * 32}"
    assert head.split()[:4] == ["SERVICE", "#", "0", "s"]
    assert "10.00 s" in head
    assert [row.split()[:2] for row in rows[:5]] == [["text", "1"], *(["denoising", str(n)] for n in (1, 2, 3, 4))]
    assert rows[1].endswith("waited 1.00 s, lost after 2.50 s, steps 3/8, step checkpoints 1, last at step 2, on d1")
    assert rows[4].endswith("waited 0.50 s, completed after 2.10 s, steps 8/8, on d4")
    assert "took over at 7.00 s" in rows[5]
    assert "✗ worker lost" in rows[6]


def test_control_characters_of_names_are_not_printed() -> None:
    timeline = read_timeline(record(), [at(0, "QUEUED", "x\x1b[31m"), at(1, "GRANTED", "x\x1b[31m", "\x1b[2J")])
    assert "\x1b" not in "".join(drawn(timeline))


def colors(image: Image.Image) -> set[str]:
    return {"#%02x%02x%02x" % color for _, color in (image.getcolors(1 << 24) or ()) if isinstance(color, tuple)}  # noqa: UP031


def test_the_png_has_a_color_for_each_kind() -> None:
    whole = draw_timeline(read_timeline(record(), ENTRIES))
    assert {"#2da44e", "#d4a72c", "#cf222e", "#c8d1da", "#8250df", "#82071e", "#bf3989", "#0969da"} <= colors(whole)
    short = draw_timeline(read_timeline(record(), ENTRIES[:5]))
    assert {"#2da44e", "#c8d1da"} <= colors(short)
    assert not {"#cf222e", "#82071e", "#8250df", "#bf3989"} & colors(short)
    assert whole.height - short.height == 4 * 44


def test_write_png_writes_a_png_and_refuses_an_unwritable_path(tmp_path: Path) -> None:
    path = tmp_path / "trace.png"
    write_png(read_timeline(record(), ENTRIES), path)
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1_200)
    with pytest.raises(InvalidInput, match="is not writable: No such file"):
        write_png(read_timeline(record(), ENTRIES), tmp_path / "none" / "trace.png")


def test_an_unsupported_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"output: 'trace\.jpg' is not a \.png file; trace\.png works"):
        trace.main(["r1", "--output", "trace.jpg"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "services.cli.timeline_image")
    with pytest.raises(InvalidInput, match="need Pillow, which is not installed"):
        trace.main(["r1", "--output", "trace.png"])
