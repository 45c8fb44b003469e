"""Versions of installed packages against their bounds."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class VersionFault:
    """A package that is absent, or of a version outside its bounds."""

    package: str
    found: str
    """What is wrong, without the name of the package."""
    command: str
    """The shell command that installs a version within the bounds."""
    is_missing: bool = False


def installed_version(package: str) -> str | None:
    """The version in a package's metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_within(version: str, bounds: str) -> bool:
    """Whether a version is within bounds, such as ">=2,<3". Raises InvalidVersion.

    Pre-releases are, too: distributors name their builds so.
    """
    return SpecifierSet(bounds).contains(Version(version), prereleases=True)


def version_fault(package: str, bounds: str) -> VersionFault | None:
    """What is wrong with the installed version of a package; None for a version within the bounds."""
    command = f"pip install '{package}{bounds}'"
    try:
        version = importlib.metadata.version(package)
        fits = is_within(version, bounds)
    except importlib.metadata.PackageNotFoundError:
        return VersionFault(package, f"not installed; it must be {bounds}", command, is_missing=True)
    except (InvalidVersion, TypeError):  # importlib returns None for the version of damaged metadata.
        return VersionFault(package, f"the installed version cannot be read; it must be {bounds}", command)
    return None if fits else VersionFault(package, f"{version} is not {bounds}", command)
