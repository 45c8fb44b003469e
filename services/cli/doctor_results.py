"""Results of `fleet doctor`, and a runner of its checks with timeouts. A failed check does not end other checks."""

from __future__ import annotations

import enum
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import FleetError
from common.state.store_url import without_password
from services.start_up import describe, plain


class CheckStatus(enum.IntEnum):
    """Status of a result. The worst status is the exit code of the command."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Result:
    """One line of output: status, name of the check, finding, and advice (empty for OK)."""

    status: CheckStatus
    name: str
    found: str
    advice: str = ""

    def as_json(self) -> Mapping[str, Any]:
        """The fields for JSON, with the status in lower case."""
        return {"status": self.status.name.lower(), "check": self.name, "found": self.found, "advice": self.advice}


def ok(name: str, found: str) -> Result:
    """A result that needs no action. `found` describes the checked item."""
    return Result(CheckStatus.OK, name, found)


def warning(name: str, found: str, advice: str) -> Result:
    """A result for a problem that makes services slower or less safe, or prevents some requests."""
    return Result(CheckStatus.WARNING, name, found, advice)


def error(name: str, found: str, advice: str) -> Result:
    """A result for a problem that prevents a service from starting, or makes requests fail."""
    return Result(CheckStatus.ERROR, name, found, advice)


@dataclass(frozen=True)
class Check:
    """A function that returns or yields results, with its timeout.

    After a timeout of `seconds`, the check reports its results so far and an error. A check is skipped without output
    if the check named by `needs` had an error or was skipped. `advice` is used for a FleetError and for a timeout.
    """

    name: str
    run: Callable[[], Iterable[Result]]
    advice: str
    seconds: float = 15.0
    needs: str = ""


def run_checks(checks: Sequence[Check], *, shows_tracebacks: bool = False) -> Iterator[Result]:
    """Run checks in order. Yields the results of each check when it ends, without credentials."""
    failed: set[str] = set()
    for check in checks:
        if check.needs in failed:
            failed.add(check.name)
            continue
        results = _run(check, shows_tracebacks)
        if any(each.status is CheckStatus.ERROR for each in results):
            failed.add(check.name)
        yield from map(_without_credentials, results)


def _run(check: Check, shows_tracebacks: bool) -> list[Result]:
    """Run a check on a separate thread, because a hanging call cannot be interrupted."""
    found: list[Result] = []

    def work() -> None:
        try:
            for result in check.run():
                found.append(result)
        except BaseException as failure:  # noqa: BLE001 -- any failure of a check becomes a result
            if shows_tracebacks:
                sys.stderr.write(without_password("".join(traceback.format_exception(failure))))
            found.append(_failed(check, failure))

    thread = threading.Thread(target=work, name=f"check {check.name}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    results = list(found)
    if thread.is_alive():
        results.append(error(check.name, f"no result within {check.seconds:g} s", check.advice))
    return results


def _failed(check: Check, failure: BaseException) -> Result:
    if isinstance(failure, FleetError):
        return error(check.name, describe(failure), check.advice)
    return error(
        check.name, f"the check failed: {describe(failure)}", "fix the cause that the error names, or report a bug"
    )


def _without_credentials(result: Result) -> Result:
    """The result on one line, without passwords and terminal control characters."""
    return replace(result, name=_shown(result.name), found=_shown(result.found), advice=_shown(result.advice))


def _shown(text: str) -> str:
    return without_password(plain(" ".join(text.split())))
