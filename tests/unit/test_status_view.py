"""The live view of `fleet status` at each width, and its plain output for scripts."""

from __future__ import annotations

import asyncio
import io
import re
from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len
from rich.console import Console

from common.errors import InternalError, Unauthenticated, Unavailable
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from services.cli import status_live
from services.cli.__main__ import main
from services.cli.status_cells import Snapshot, duration_text, plain_text, store_health_text
from services.cli.status_live import Failure, StatusView, next_view
from status_samples import KIND, NOTHING, TAKEN_AT, activity, overview, record, requests, snapshot

HOSTILE = "\x1b[2J\x1b]0;title\x07[red]markup[/red] [link=x]\u202egnirts\r\nend"


def render(shown: Snapshot, width: int, height: int = 60, failure: Failure | None = None) -> list[str]:
    """The lines of the view on a terminal of this size, without styles."""
    console = Console(
        file=io.StringIO(), width=width, height=height, record=True, force_terminal=True, color_system="truecolor"
    )
    console.print(StatusView("fleet:50051", 1.0, shown, failure))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for shown in (snapshot(), NOTHING, snapshot(record("r1", requests()[0].state, HOSTILE * 9 + "\u4e16\u754c" * 30))):
        lines = render(shown, width, failure=Failure("no fleet answers " * 20, TAKEN_AT))
        assert max(map(cell_len, lines)) <= width


def test_a_wide_terminal_shows_every_column_and_activity() -> None:
    text = "\n".join(render(snapshot(), 200))
    for part in (
        "22:23:20 UTC, fleet at fleet:50051",
        "every 1 s; Ctrl-C ends",
        "flux (FluxPipeline)",
        "2 (1 dead)",
        "0.41 s/step",
        "24.7",
        "~10.0",
        "tp=2",
        "unusable, cuDNN is used: OSError: a",
        "denoising-host-9",
        "12.0 MiB; requests are refused above 90.0 MiB",
        "primary, durable (appendonly=yes appendfsync=always), 2 replicas (1 required), round trip 0.4 ms",
        "denoising 12/28 (43%) on denoising-host-7",
        "queued at denoising, 3 ahead, about 12 s",
        "waits for a worker of denoising: no live worker is compatible",
        "waits for a retry of denoising: denoising-host-3 is lost",
        "waits for another coordinator to take it over",
        "at its coordinator, between stages",
        "unknown: its coordinator is of an earlier version",
        "INTERNAL",
        "a red apple",
        "1m15s",
        "20s",
    ):
        assert part in text, part


def test_a_narrow_terminal_shows_the_most_important_columns() -> None:
    lines = render(snapshot(), 60)
    assert re.fullmatch(r"STAGE +LIVE +BUSY +QUEUED +SECONDS +PACE *", next(x for x in lines if "STAGE" in x))
    assert any(re.match(r"denoising +2 .*2/2 +3 +24\.7 ", line) for line in lines), lines
    (runs,) = [line for line in lines if line.startswith("runs")]
    assert re.match(r"runs000000000000 RUNNING +1m15s denoising 12/28 \(43%\)", runs)
    assert not any("a red apple" in line for line in lines)


def test_requests_fill_the_remaining_lines() -> None:
    heights = {height: render(snapshot(), 120, height) for height in (23, 26, 60)}
    shown = {height: sum("0000000" in line for line in lines) for height, lines in heights.items()}
    assert shown[60] == len(requests())
    assert shown[23] + 3 == shown[26] < shown[60]
    assert len(heights[26]) == 26
    assert len(render(snapshot(), 60, 24)) == 24


def test_a_fleet_without_data_is_shown() -> None:
    lines = render(NOTHING, 60)
    assert "STORE  0.0 MiB" in lines
    assert not any("REQUEST" in line or "STAGE" in line or "replica" in line for line in lines)
    assert "REQUEST" not in plain_text(NOTHING)


@pytest.mark.parametrize("width", [60, 200])
def test_control_codes_are_replaced_and_markup_is_not_interpreted(width: int) -> None:
    hostile = snapshot(
        record(HOSTILE, requests()[0].state, HOSTILE, activity(KIND.ACTIVITY_KIND_RUNNING, HOSTILE, worker_id=HOSTILE))
    )
    model = hostile.overview.models[0]
    model.name = model.pipeline_name = HOSTILE
    model.services[0].service = HOSTILE
    model.refused_workers.append(worker_pb2.RefusedWorker(worker_id=HOSTILE, service=HOSTILE, reason=HOSTILE))
    hostile.overview.store.role = hostile.overview.store.appendfsync = HOSTILE
    console = Console(file=io.StringIO(), width=width, height=60, force_terminal=True, color_system=None)
    console.print(StatusView(HOSTILE, 1.0, hostile, Failure(HOSTILE, TAKEN_AT)))
    assert isinstance(console.file, io.StringIO)
    for text in (console.file.getvalue(), plain_text(hostile)):
        # Without colors, rich writes only codes of text attributes.
        rest = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert not [each for each in rest if not each.isprintable() and each != "\n"]
    assert "[red]markup[/red]" in plain_text(hostile)
    # Header, failure, title of the model, stage, refused worker, store and request.
    assert width < 200 or sum("[red]markup" in line for line in console.file.getvalue().splitlines()) >= 7


def test_the_plain_output_has_the_columns_that_scripts_read() -> None:
    lines = plain_text(snapshot()).splitlines()
    assert lines[0].split() == ["MODEL", "SERVICE", "WORKERS", "BUSY", "QUEUED", "SECONDS", "DEGREES"]
    assert lines[1].split()[:6] == ["flux", "text_encoding", "1", "0/1", "0", "~10.0"]
    assert lines[2].split() == ["flux", "denoising", "2", "2/2", "3", "24.7", "tp=2"]
    assert "flux   denoising  0.41 s/step  1024x1024 outputs=1 branches=2  1" in lines
    assert "STORE  12.0 MiB; requests are refused above 90.0 MiB" in lines
    (pear,) = [line for line in lines if line.endswith("  a pear")]
    assert pear.split(maxsplit=5) == ["queued0000000000", "QUEUED", "flux", "2023-11-14", "22:22:05", "a pear"]
    assert "queued0000000000  1m15s  queued at denoising, 3 ahead, about 12 s" in lines


def test_a_needed_stage_without_a_worker_is_highlighted() -> None:
    shown = snapshot()
    shown.overview.models[0].services[1].workers = 0
    console = Console(
        file=io.StringIO(), width=120, height=60, record=True, force_terminal=True, color_system="standard"
    )
    console.print(StatusView("fleet:50051", 1.0, shown))
    assert re.search(r"\x1b\[31mdenoising", console.export_text(styles=True))


def test_a_store_that_may_lose_requests_is_described_as_not_durable() -> None:
    store = overview().store
    store.is_durable, store.appendfsync, store.replicas, store.follows_sentinels = False, "everysec", 1, True
    assert store_health_text(store) == (
        "primary, selected by Sentinel, not durable (appendonly=yes appendfsync=everysec), 1 replica (1 required), "
        "round trip 0.4 ms"
    )
    store.ClearField("is_durable")
    store.ClearField("appendfsync")
    assert "durability unknown (appendonly=yes appendfsync=?)" in store_health_text(store)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0s"), (59, "59s"), (65, "1m05s"), (3_600, "1h00m"), (187_200, "2d04h")]
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_failure_is_shown_with_the_time_of_the_last_data_until_a_call_succeeds() -> None:
    async def failing() -> Snapshot:
        raise Unavailable("the request store is unavailable")

    async def answering() -> Snapshot:
        return NOTHING

    async def scenario() -> None:
        view = await next_view(StatusView("fleet:50051", 1.0, snapshot()), failing)
        assert view.failure is not None
        assert datetime.now(UTC) - view.failure.since < timedelta(seconds=20)
        lines = render(view.snapshot, 100, failure=view.failure)
        assert lines[1] == f"UNAVAILABLE since {view.failure.since:%H:%M:%S} UTC, last data 22:23:20 UTC"
        assert lines[2] == "the request store is unavailable"
        assert any("denoising 12/28" in line for line in lines)
        again = await next_view(view, failing)
        assert again.failure is not None
        assert again.failure.since == view.failure.since
        back = await next_view(again, answering)
        assert (back.failure, back.snapshot) == (None, NOTHING)

    asyncio.run(scenario())


def test_a_call_that_hangs_is_a_failure_and_an_unknown_key_ends_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_live, "_LONGEST_SECONDS", 0.05)

    async def hanging() -> Snapshot:
        await asyncio.Event().wait()
        return NOTHING

    async def refused() -> Snapshot:
        raise Unauthenticated("the key is unknown")

    async def broken() -> Snapshot:
        raise InternalError("a defect")

    async def scenario() -> None:
        view = StatusView("fleet:50051", 1.0, NOTHING)
        failures = [(await next_view(view, read)).failure for read in (hanging, broken)]
        assert [each and each.message for each in failures] == ["no answer within 0.05 s", "a defect"]
        with pytest.raises(Unauthenticated):
            await next_view(view, refused)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--interval 0", "'0' is not a number of seconds from 0.1 to 3600; 2 works"),
        ("--interval nan --json", "'nan' is not a number of seconds from 0.1 to 3600"),
        ("--interval soon", "'soon' is not a number of seconds"),
        ("--once --interval 2", "not allowed with argument --once"),
        ("--interval 2", "--interval: the output is not a terminal; omit the flag, or add --json"),
    ],
)
def test_an_invalid_interval_is_reported_on_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", *flags.split()]) == 2
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert message in error


def test_ages_of_requests_use_the_clock_of_the_store() -> None:
    shown = snapshot()
    (age,) = {shown.age(each) for each in shown.listing.requests if each.state < pb.REQUEST_STATE_SUCCEEDED}
    assert age == 75.0
    older = Snapshot(shown.overview, pb.ListRequestsResponse(requests=requests()), TAKEN_AT + timedelta(seconds=5))
    assert older.age(requests()[0]) == 80.0
