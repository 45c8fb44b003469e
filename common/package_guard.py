"""Checks of installed packages whose private API this code relies on: their versions, and the facts relied on.

A process checks both before it opens a port, and a worker group before it starts a rank. A private function may change
in any release: without a check, a changed one gives a wrong result, or an error far from its cause.
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
    """Versions of a package: the range that pyproject.toml has too, and a version in it that passes the tests."""

    versions: str
    tested: str


SUPPORTED = {
    "grpcio": Supported(">=1.85.1,<2", "1.85.3"),
    "torch": Supported(">=2.11,<2.14", "2.13.0"),
    "diffusers": Supported("==0.42.1", "0.42.1"),
    "transformers": Supported(">=5.23,<6", "5.24.0"),
}
"""By name on PyPI."""

COORDINATOR_PACKAGES = ("grpcio",)
WORKER_PACKAGES = ("grpcio", "torch", "diffusers", "transformers")


class UnsupportedPackage(FailedPrecondition):
    """An installed package is of another version than this code was written against, or lacks what it relies on."""


class Missing(Exception):
    """A fact does not hold. The text says what is missing or different, as an object of `relies on`."""


class Fact(Protocol):
    """A fact about a package that code relies on."""

    def check(self) -> None:
        """Raises Missing where the fact does not hold."""


@dataclass(frozen=True)
class PrivateApi:
    """The facts about a package that one part of this code relies on; `user` names that part in errors."""

    package: str
    user: str
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Called:
    """`path` ("module:name" or "module:Class.name") takes so many positional arguments, and these keywords."""

    path: str
    positional: int = 0
    keywords: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises Missing where the object is missing or refuses the arguments."""
        signature = _signature(self.path)
        try:
            signature.bind(*range(self.positional), **dict.fromkeys(self.keywords))
        except TypeError as error:
            raise Missing(f"{_name(self.path)} with other parameters ({error})") from None


@dataclass(frozen=True)
class Parameters:
    """The parameters of `path` begin with `required`, in this order. "a|b" stands for a parameter named a or b.

    A method that is overridden has no others than these and the first of `optional`, as the caller passes all of them.
    """

    path: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    overridden: bool = True

    def check(self) -> None:
        """Raises Missing where the object is missing or its parameters differ."""
        names = tuple(_signature(self.path).parameters)
        expected = (*self.required, *self.optional)
        found = names if self.overridden else names[: len(expected)]
        matches = all(name in each.split("|") for name, each in zip(found, expected, strict=False))
        if not matches or not len(self.required) <= len(found) <= len(expected):
            raise Missing(f"{_name(self.path)} with other parameters ({', '.join(names)})")


@dataclass(frozen=True)
class Attributes:
    """Instances of the class `path` have these attributes: its __init__ stores them, or the class has them."""

    path: str
    names: tuple[str, ...]

    def check(self) -> None:
        """Raises Missing where the class or an attribute is missing."""
        cls = find(self.path)
        stored = set(dir(cls)).union(*map(_stored, inspect.getmro(cls)))
        if missing := [name for name in self.names if name not in stored]:
            raise Missing(f"{_name(self.path)}.{missing[0]}")


@dataclass(frozen=True)
class Abstract:
    """A subclass of the abstract class `path` that has these methods can be instantiated."""

    path: str
    methods: tuple[str, ...]

    def check(self) -> None:
        """Raises Missing where the class is missing, or has further abstract methods."""
        if further := sorted(set(getattr(find(self.path), "__abstractmethods__", ())).difference(self.methods)):
            raise Missing(f"{_name(self.path)} without the abstract method {further[0]}")


def check_versions(*packages: str) -> None:
    """Check installed versions against SUPPORTED. Raises UnsupportedPackage that names each package out of range."""
    faults = [version_fault(each, SUPPORTED[each].versions) for each in packages]
    if wrong := [f"{each.package}: {each.found}, the versions that work; {each.command}" for each in faults if each]:
        raise UnsupportedPackage("; ".join(wrong))


def check_private_api(api: PrivateApi) -> None:
    """Check the package's version and each fact. Raises UnsupportedPackage that says what to install."""
    check_versions(api.package)
    for fact in api.facts:
        try:
            fact.check()
        except Missing as error:
            raise unsupported(api.package, f"{api.user} relies on {error}, which is not there") from None


def unsupported(package: str, reason: str) -> UnsupportedPackage:
    """The error for a version within the range that does not do what code relies on."""
    supported = SUPPORTED[package]
    return UnsupportedPackage(
        f"{package}: {importlib.metadata.version(package)} is not usable: {reason}; versions {supported.versions} were "
        f"expected to work, and {supported.tested} does; pip install '{package}=={supported.tested}'"
    )


def find(path: str) -> Any:
    """The object at "module:name". Raises Missing where there is none."""
    module, _, qualified = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in qualified.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise Missing(_name(path)) from None
    return found


def _name(path: str) -> str:
    return path.replace(":", ".")


def _signature(path: str) -> inspect.Signature:
    found = find(path)
    try:
        return inspect.signature(found)
    except (ValueError, TypeError):
        raise Missing(f"{_name(path)} as a function with a signature") from None


def _stored(cls: type) -> Iterator[str]:
    """Names of the attributes that the class's own __init__ stores."""
    init = inspect.unwrap(vars(cls).get("__init__", object.__init__))
    if inspect.isfunction(init):
        yield from (each.argval for each in dis.get_instructions(init) if each.opname == "STORE_ATTR")
