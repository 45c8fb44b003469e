"""services/README.md contains the generated tables of metrics."""

from __future__ import annotations

import pytest
from prometheus_client import Gauge

import metric_table
from common import metrics


def test_the_readme_has_the_generated_tables() -> None:
    text = metric_table.README.read_text()
    assert metric_table.PART.replaced(text, metric_table.table()) == text, "run `poe metrics`"


@pytest.mark.parametrize(
    "cell", ["`fleet_queued_seconds`", "| histogram |", "`grpc_method`", "Calls in flight at a server"]
)
def test_an_edit_of_the_tables_is_detected(cell: str) -> None:
    text = metric_table.README.read_text()
    edited = text.replace(cell, "edited")
    assert edited != text
    assert metric_table.PART.replaced(edited, metric_table.table()) != edited


def test_a_new_metric_needs_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = metric_table.table()
    monkeypatch.setattr(metrics, "NEW", Gauge("fleet_new_bytes", "Something new", registry=None), raising=False)
    assert set(metric_table.table().splitlines()) - set(before.splitlines()) == {
        "| `fleet_new_bytes` | gauge | none | Something new |"
    }
    assert "fleet_new_bytes" in metric_table.series()


def test_a_histogram_has_three_kinds_of_series() -> None:
    series = metric_table.series()
    assert series["fleet_queue_wait_seconds_bucket"] == {"service", "model", "le"}
    assert series["fleet_queue_wait_seconds_count"] == series["fleet_queue_wait_seconds_sum"] == {"service", "model"}
    assert "fleet_queue_wait_seconds" not in series
    assert "fleet_requests" not in series
    assert series["fleet_requests_total"] == {"model", "state"}


def test_each_per_call_metric_of_grfc_a66_is_offered_or_has_a_note() -> None:
    sizes = "total_compressed_message_size"
    names = [
        *(f"grpc.client.attempt.{each}" for each in ("started", "duration", f"sent_{sizes}", f"rcvd_{sizes}")),
        "grpc.client.call.duration",
        *(f"grpc.server.call.{each}" for each in ("started", "duration", f"sent_{sizes}", f"rcvd_{sizes}")),
    ]
    units = {"started": "total", "duration": "seconds_count"}
    offered = metric_table.series()
    absent = [
        name
        for name in names
        if f"{name.replace('.', '_')}_{units.get(name.rpartition('.')[2], 'bytes_count')}" not in offered
    ]
    assert absent == ["grpc.client.call.duration"]
    notes = " ".join(metric_table.table().partition("\ngRFC A66")[2].split())
    assert notes.startswith(f"'s `{absent[0]}` is omitted: ")


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"services/README\.md: .* are not both present"):
        metric_table.PART.replaced("# Services", "| table |\n")
