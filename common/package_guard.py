"""Startup checks of packages whose private APIs the fleet uses: versions and properties of the APIs.

A process runs the checks before it opens a port, and a worker group before it starts a rank. Private APIs may change in
any release. Without a check, a change would cause wrong results, or errors far from their cause.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import FailedPrecondition
from common.package_versions import version_fault


@dataclass(frozen=True)
class Supported:
    """Supported versions of a package: the range in pyproject.toml, and a version that passes the tests."""

    versions: str
    tested: str


SUPPORTED = {
    "grpcio": Supported(">=1.85.1,<2", "1.85.3"),
    "torch": Supported(">=2.11,<2.14", "2.13.0"),
    "diffusers": Supported("==0.42.1", "0.42.1"),
    "transformers": Supported(">=5.23,<6", "5.24.0"),
}
"""Supported versions by PyPI name."""

COORDINATOR_PACKAGES = ("grpcio",)
WORKER_PACKAGES = ("grpcio", "torch", "diffusers", "transformers")


class UnsupportedPackage(FailedPrecondition):
    """An installed package has an unsupported version, or lacks a private API that the fleet uses."""


class Missing(Exception):
    """A fact does not hold. The message completes "X relies on ...": "NAME, which does not exist"."""


class Fact(Protocol):
    """A property of a package that code relies on."""

    def check(self) -> None:
        """Raise Missing if the fact does not hold."""


@dataclass(frozen=True)
class PrivateApi:
    """Facts about a package that one part of the fleet relies on. `user` is the name of that part in errors."""

    package: str
    user: str
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Called:
    """Fact: the callable `path` accepts this number of positional arguments and these keywords.

    `path` is "module:name" or "module:Class.name".
    """

    path: str
    positional: int = 0
    keywords: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise Missing if the object does not exist or does not accept the arguments."""
        signature = _signature(self.path)
        try:
            signature.bind(*range(self.positional), **dict.fromkeys(self.keywords))
        except TypeError as error:
            raise Missing(f"{_name(self.path)}, which does not accept the arguments ({error})") from None


@dataclass(frozen=True)
class Parameters:
    """Fact: the parameters of `path` start with `required`, in this order. "a|b" is a parameter with the name a or b.

    If the fleet overrides the method (`overridden`), any further parameters must be the first parameters of `optional`,
    because the overriding method must accept all arguments.
    """

    path: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    overridden: bool = True

    def check(self) -> None:
        """Raise Missing if the object does not exist or has other parameters."""
        names = tuple(_signature(self.path).parameters)
        expected = (*self.required, *self.optional)
        found = names if self.overridden else names[: len(expected)]
        matches = all(name in each.split("|") for name, each in zip(found, expected, strict=False))
        if not matches or not len(self.required) <= len(found) <= len(expected):
            raise Missing(f"{_name(self.path)}, which has other parameters ({', '.join(names)})")


@dataclass(frozen=True)
class Attributes:
    """Fact: the class `path` defines these attributes, or its __init__ assigns them."""

    path: str
    names: tuple[str, ...]

    def check(self) -> None:
        """Raise Missing if the class or an attribute does not exist."""
        cls = find(self.path)
        stored = set(dir(cls)).union(*map(_stored, inspect.getmro(cls)))
        if missing := [name for name in self.names if name not in stored]:
            raise Missing(f"{_name(self.path)}.{missing[0]}, which does not exist")


@dataclass(frozen=True)
class Abstract:
    """Fact: a subclass of the abstract class `path` that implements these methods can be instantiated."""

    path: str
    methods: tuple[str, ...]

    def check(self) -> None:
        """Raise Missing if the class does not exist or has further abstract methods."""
        if further := sorted(set(getattr(find(self.path), "__abstractmethods__", ())).difference(self.methods)):
            raise Missing(f"{_name(self.path)}, which has the further abstract method {further[0]}")


def check_versions(*packages: str) -> None:
    """Check installed versions against SUPPORTED. Raises UnsupportedPackage with all packages out of range."""
    faults = [version_fault(each, SUPPORTED[each].versions) for each in packages]
    if wrong := [f"{each.package}: {each.found}, the versions that work; {each.command}" for each in faults if each]:
        raise UnsupportedPackage("; ".join(wrong))


def check_private_api(api: PrivateApi) -> None:
    """Check the package's version and each fact. Raises UnsupportedPackage with the version to install."""
    check_versions(api.package)
    for fact in api.facts:
        try:
            fact.check()
        except Missing as error:
            raise unsupported(api.package, f"{api.user} relies on {error}") from None


def unsupported(package: str, reason: str) -> UnsupportedPackage:
    """Return the error for a version within the supported range for which a fact does not hold."""
    supported = SUPPORTED[package]
    return UnsupportedPackage(
        f"{package}: {importlib.metadata.version(package)} is not usable: {reason}; versions {supported.versions} were "
        f"expected to work, and {supported.tested} does; pip install '{package}=={supported.tested}'"
    )


def find(path: str) -> Any:
    """Return the object at "module:name". Raises Missing if it does not exist."""
    module, _, qualified = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in qualified.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise Missing(f"{_name(path)}, which does not exist") from None
    return found


def _name(path: str) -> str:
    return path.replace(":", ".")


def _signature(path: str) -> inspect.Signature:
    found = find(path)
    try:
        return inspect.signature(found)
    except (ValueError, TypeError):
        raise Missing(f"{_name(path)}, which has no signature") from None


def _stored(cls: type) -> Iterator[str]:
    """Yield the names of the attributes that the class's own __init__ assigns."""
    init = inspect.unwrap(vars(cls).get("__init__", object.__init__))
    if inspect.isfunction(init):
        yield from (each.argval for each in dis.get_instructions(init) if each.opname == "STORE_ATTR")
