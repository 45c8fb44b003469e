"""Checks of Python and of package versions against the bounds in the metadata of the installed diffusion-fleet."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from services.cli.doctor_results import Result, error, ok, warning

DISTRIBUTION = "diffusion-fleet"
WORKER_EXTRA_ABSENT = "the worker extra is not installed (no torch): GPU, kernel packages and workers are not checked"

_INSTALL = f"pip install '{DISTRIBUTION}"


def has_worker_extra() -> bool:
    """Whether torch is installed, which the coordinator and client commands do without."""
    return installed_version("torch") is not None


def installed_version(package: str) -> str | None:
    """The version in a package's metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Result]:
    """The version of Python against Requires-Python."""
    version, bounds = platform.python_version(), importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if SpecifierSet(bounds).contains(version, prereleases=True):
        yield ok("python", f"{version}, which is {bounds}")
    else:
        yield error("python", f"{version} is not {bounds}", f"use Python {bounds}")


def check_packages() -> Iterator[Result]:
    """The packages that every process of the fleet needs, those of workers, and those of GPU workers."""
    yield from _extra_results("packages", "")
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
    right = 0
    for requirement in requirements_of(extra):
        version = installed_version(requirement.name)
        if version is None:
            yield error(name, f"{requirement.name} is not installed; it must be {requirement.specifier}", install)
        elif not requirement.specifier.contains(version, prereleases=True):
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            yield error(name, f"{requirement.name} {version} is not {requirement.specifier}", advice)
        else:
            right += 1
    if right:
        yield ok(name, f"{right} packages are within their bounds")


def _optional_results(extra: str) -> Iterator[Result]:
    """A line for each package that is installed and out of its bounds: absence is no fault."""
    for requirement in requirements_of(extra):
        version = installed_version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            yield warning(
                f"{extra} packages",
                f"{requirement.name} {version} is not {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
