"""Checks of Python and of package versions against the bounds in the metadata of the installed diffusion-fleet."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement

from common.package_versions import VersionFault, installed_version, is_within, version_fault
from services.cli.doctor_results import Result, error, ok, warning

DISTRIBUTION = "diffusion-fleet"
WORKER_EXTRA_ABSENT = "the worker extra is not installed (no torch): GPU, kernel packages and workers are not checked"

_INSTALL = f"pip install '{DISTRIBUTION}"


def has_worker_extra() -> bool:
    """Whether torch is installed, which the coordinator and client commands do without."""
    return installed_version("torch") is not None


def check_python() -> Iterator[Result]:
    """The version of Python against Requires-Python."""
    version, bounds = platform.python_version(), importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if is_within(version, bounds):
        yield ok("python", f"{version}, which is {bounds}")
    else:
        yield error("python", f"{version} is not {bounds}", f"use Python {bounds}")


def check_packages() -> Iterator[Result]:
    """The packages that every process of the fleet needs, those of workers, of GPU workers, and of traces."""
    yield from _extra_results("packages", "")
    yield from _optional_results("tracing")
    if has_worker_extra():
        yield from _extra_results("worker packages", "worker")
        yield from _optional_results("gpu")
        yield from _optional_results("flash-attn")
    else:
        yield warning("worker packages", WORKER_EXTRA_ABSENT, f"where workers run here: {_INSTALL}[worker]'")


def requirements_of(extra: str) -> list[Requirement]:
    """What the metadata names for an extra, or for no extra, on this platform."""
    found = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        is_base = marker is None or marker.evaluate({"extra": ""})
        if is_base if not extra else marker is not None and not is_base and marker.evaluate({"extra": extra}):
            found.append(requirement)
    return found


def _extra_results(name: str, extra: str) -> Iterator[Result]:
    """A line for each package that is missing or out of its bounds, and one for all others."""
    install = f"{_INSTALL}[{extra}]'" if extra else f"{_INSTALL}'"
    requirements = requirements_of(extra)
    faults = list(_faults(requirements))
    for fault in faults:
        yield error(name, f"{fault.package}: {fault.found}", install if fault.is_missing else fault.command)
    if right := len(requirements) - len(faults):
        yield ok(name, f"{right} packages are within their bounds")


def _optional_results(extra: str) -> Iterator[Result]:
    """A line for each package that is installed and out of its bounds: absence is no fault."""
    for fault in _faults(requirements_of(extra)):
        if not fault.is_missing:
            yield warning(f"{extra} packages", f"{fault.package}: {fault.found}", fault.command)


def _faults(requirements: Iterable[Requirement]) -> Iterator[VersionFault]:
    for each in requirements:
        if fault := version_fault(each.name, str(each.specifier)):
            yield fault
