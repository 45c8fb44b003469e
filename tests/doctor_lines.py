"""Results of `fleet doctor` as lines, for tests."""

from __future__ import annotations

from collections.abc import Iterable

from services.cli.doctor_results import CheckStatus, Result


def lines(results: Iterable[Result]) -> list[str]:
    """Format each result as STATUS NAME: FOUND -> ADVICE. Only results with status "ok" have no advice."""
    listed = list(results)
    assert all(bool(each.advice) == (each.status is not CheckStatus.OK) for each in listed)
    return [
        f"{each.status.name.lower()} {each.name}: {each.found}" + (f" -> {each.advice}" if each.advice else "")
        for each in listed
    ]
