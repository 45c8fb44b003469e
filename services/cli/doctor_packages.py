"""Checks of Python and package versions against the metadata of the installed diffusion-fleet."""

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
    """Whether torch is installed. The coordinator and client commands do not need it."""
    return installed_version("torch") is not None


def check_python() -> Iterator[Result]:
    """Check the Python version against Requires-Python."""
    version, bounds = platform.python_version(), importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if is_within(version, bounds):
        yield ok("python", f"{version} satisfies {bounds}")
    else:
        yield error("python", f"{version} does not satisfy {bounds}", f"use Python {bounds}")


def check_packages() -> Iterator[Result]:
    """Check the base packages, and the packages of the extras tracing, worker, gpu and flash-attn."""
    yield from _extra_results("packages", "")
    yield from _optional_results("tracing")
    if has_worker_extra():
        yield from _extra_results("worker packages", "worker")
        yield from _optional_results("gpu")
        yield from _optional_results("flash-attn")
    else:
        yield warning("worker packages", WORKER_EXTRA_ABSENT, f"if workers run on this host: {_INSTALL}[worker]'")


def requirements_of(extra: str) -> list[Requirement]:
    """The requirements of an extra that apply to this platform; for "", the base requirements."""
    found = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        is_base = marker is None or marker.evaluate({"extra": ""})
        if is_base if not extra else marker is not None and not is_base and marker.evaluate({"extra": extra}):
            found.append(requirement)
    return found


def _extra_results(name: str, extra: str) -> Iterator[Result]:
    """One result per package that is missing or out of bounds, and one result for all other packages."""
    install = f"{_INSTALL}[{extra}]'" if extra else f"{_INSTALL}'"
    requirements = requirements_of(extra)
    faults = list(_faults(requirements))
    for fault in faults:
        yield error(name, f"{fault.package}: {fault.found}", install if fault.is_missing else fault.command)
    if right := len(requirements) - len(faults):
        yield ok(name, f"{right} packages are within their version bounds")


def _optional_results(extra: str) -> Iterator[Result]:
    """One result per installed package that is out of bounds. Missing packages are permitted."""
    for fault in _faults(requirements_of(extra)):
        if not fault.is_missing:
            yield warning(f"{extra} packages", f"{fault.package}: {fault.found}", fault.command)


def _faults(requirements: Iterable[Requirement]) -> Iterator[VersionFault]:
    for each in requirements:
        if fault := version_fault(each.name, str(each.specifier)):
            yield fault
