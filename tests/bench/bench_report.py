"""Output of every benchmark: the host, tables, and comparisons with a stated budget."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "grpcio", "protobuf", "redis")


def say(text: str = "") -> None:
    """Print a line and flush, so that progress is visible."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_machine(title: str) -> None:
    """Print the title, the processor, package versions and the load average of the host."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    say(f"# {title}")
    say()
    say(f"{processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}")
    say(f"Python {platform.python_version()}, {versions}; load before the run {os.getloadavg()[0]:.1f}")
    say()


def processor() -> str:
    """Processor name from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table.

    Floats of 100 or more have no decimals, floats from 1 to 100 one decimal, smaller floats three significant digits.
    """
    say("| " + " | ".join(header) + " |")
    say("|" + "---|" * len(header))
    for row in rows:
        say("| " + " | ".join(_cell(value) for value in row) + " |")
    say()


def print_verdict(what: str, measured: float, budget: float, unit: str, *, at_least: bool = False) -> bool:
    """Print a measured value, its budget, and "ok" or "FAIL"; returns True for "ok"."""
    kept = measured >= budget if at_least else measured <= budget
    relation = "at least" if at_least else "at most"
    say(f"{'ok  ' if kept else 'FAIL'}  {what}: {_cell(measured)} {unit} ({relation} {_cell(budget)} {unit})")
    return kept


def median(values: Iterable[float]) -> float:
    """Median; NaN for an empty sequence."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def quantile(values: Iterable[float], share: float) -> float:
    """Quantile `share` (0 to 1) without interpolation; NaN for an empty sequence."""
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"
    return str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
