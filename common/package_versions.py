"""Compares versions of installed packages with version specifiers."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class VersionFault:
    """A package that is not installed, or whose version is outside its bounds or unreadable."""

    package: str
    found: str
    """Description of the fault, without the package name."""
    command: str
    """Shell command that installs a version within the bounds."""
    is_missing: bool = False


def installed_version(package: str) -> str | None:
    """Return the version in a package's metadata; None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_within(version: str, bounds: str) -> bool:
    """Return whether a version matches a specifier, such as ">=2,<3". Raises InvalidVersion.

    Pre-releases match too, because distributors use pre-release versions for their builds.
    """
    return SpecifierSet(bounds).contains(Version(version), prereleases=True)


def version_fault(package: str, bounds: str) -> VersionFault | None:
    """Return the fault of the installed version of a package; None for a version within the bounds."""
    command = f"pip install '{package}{bounds}'"
    try:
        version = importlib.metadata.version(package)
        fits = is_within(version, bounds)
    except importlib.metadata.PackageNotFoundError:
        return VersionFault(package, f"not installed; the fleet needs {bounds}", command, is_missing=True)
    except (InvalidVersion, TypeError):  # importlib returns None for the version of damaged metadata.
        return VersionFault(package, f"the installed version cannot be read; the fleet needs {bounds}", command)
    return None if fits else VersionFault(package, f"{version} is not {bounds}", command)
