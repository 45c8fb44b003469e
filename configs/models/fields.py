"""Typed access to a module's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class ConfigFields:
    """The entries of a module's config.json. The caller passes Diffusers' default for a missing entry.

    For an invalid value, the methods raise the CheckpointError that error() returns.
    """

    module: str
    values: Mapping[str, Any]

    def integer(self, name: str, default: int, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self._value(name, default)
        if type(value) is not int or value < minimum:
            raise self.error(name, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._value(name, default)
        if type(value) not in (int, float):
            raise self.error(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A non-empty list of positive integers."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or not value or any(type(v) is not int or v < 1 for v in value):
            raise self.error(name, "a list of positive whole numbers")
        return tuple(value)

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or any(type(v) not in (int, float) for v in value):
            raise self.error(name, "a list of numbers")
        return tuple(float(v) for v in value)

    def flags(self, name: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
        """A non-empty list of booleans."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or not value or any(type(v) is not bool for v in value):
            raise self.error(name, "a list of true and false")
        return tuple(value)

    def only(self, name: str, supported: T) -> None:
        """Check that the value is the only supported one, which is also the default."""
        if self._value(name, supported) != supported:
            raise self.error(name, f"{supported!r}, the only supported value")

    def error(self, name: str, rule: str) -> CheckpointError:
        """The error "FILE: NAME: VALUE is not RULE"."""
        return CheckpointError(f"{self.module}/config.json: {name}: {self.values.get(name)!r} is not {rule}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
