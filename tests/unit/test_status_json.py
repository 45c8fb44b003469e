"""The documents of `fleet status --json` have exactly the fields that services/README.md lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import status_fields
from services.cli.status_cells import Snapshot
from services.cli.status_json import FIELDS, document, failed_document
from status_samples import NOTHING, record, requests, snapshot


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all values that are not containers. An empty list counts as such a value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from paths(each, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value:
        for each in value:
            yield from paths(each, f"{prefix}[]")
    else:
        yield prefix


def test_the_readme_lists_the_fields_of_the_code() -> None:
    text = status_fields.README.read_text()
    assert status_fields.PART.replaced(text, status_fields.table()) == text, "run `poe status-fields`"
    edited = text.replace("`models[].services[].queued_seconds`", "`queued`")
    assert edited != text
    assert status_fields.PART.replaced(edited, status_fields.table()) != edited


def test_a_document_has_each_field_that_is_listed_and_no_other() -> None:
    found = set(paths(document("fleet:1", snapshot())))
    empty = {path for path in found if any(other.startswith(f"{path}[]") for other in found)}
    assert found - empty == set(FIELDS)


@pytest.mark.parametrize("shown", [snapshot(), NOTHING, None], ids=["full", "nothing", "failed"])
def test_all_documents_have_the_same_top_level_fields(shown: Snapshot | None) -> None:
    found = failed_document("fleet:1", "the store is unavailable") if shown is None else document("fleet:1", shown)
    assert list(found) == ["time", "endpoint", "error", "models", "requests", "store"]
    assert found["error"] == ("the store is unavailable" if shown is None else None)
    assert "\n" not in json.dumps(found)


def test_values_have_the_documented_units() -> None:
    found = document("fleet:1", snapshot())
    (model,) = found["models"]
    denoising = model["services"][1]
    assert (denoising["slots_busy"], denoising["slots_total"], denoising["queued_requests"]) == (2, 2, 3)
    assert (denoising["queued_seconds"], denoising["is_assumed"], denoising["dead_workers"]) == (24.7, False, 1)
    assert denoising["paces"][0]["seconds_per_step"] == 0.412
    by_id = {each["request_id"]: each for each in found["requests"]}
    runs = by_id["runs000000000000"]
    assert (runs["age_seconds"], by_id["ended00000000000"]["age_seconds"]) == (75.0, 20.0)
    (activity,) = runs["activities"]
    assert activity["kind"] == "RUNNING"
    assert activity["progress_percent"] == pytest.approx(100 * 12 / 28)
    assert (activity["since"], activity["requests_ahead"]) == ("2023-11-14T22:23:20.000Z", None)
    (waits,) = by_id["queued0000000000"]["activities"]
    assert (waits["since"], waits["requests_ahead"], waits["estimated_seconds"]) == (None, 3, 12.4)
    assert by_id["failed0000000000"]["error_code"] == "INTERNAL"
    assert found["store"]["is_durable"] is True
    assert document("fleet:1", NOTHING)["store"]["is_durable"] is None


def test_prompts_are_truncated_as_in_the_tables() -> None:
    found = document("fleet:1", snapshot(record("r1", requests()[0].state, "very " * 100 + "secret\x1b[2J")))
    assert len(found["requests"][0]["prompt"]) == 48
    assert "secret" not in json.dumps(found)
