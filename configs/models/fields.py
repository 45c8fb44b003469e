"""Typed reading of a module's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class ConfigFields:
    """The entries of a module's config.json. A missing entry has the default that Diffusers gives it.

    Every method raises CheckpointError that names the module, the entry and the value.
    """

    module: str
    values: Mapping[str, Any]

    def integer(self, name: str, default: int, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._value(name, default)
        if type(value) is not int or value < minimum:
            raise self.error(name, f"must be a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._value(name, default)
        if type(value) not in (int, float):
            raise self.error(name, "must be a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, "must be true or false")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of positive whole numbers."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or not value or any(type(v) is not int or v < 1 for v in value):
            raise self.error(name, "must be a list of positive whole numbers")
        return tuple(value)

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or any(type(v) not in (int, float) for v in value):
            raise self.error(name, "must be a list of numbers")
        return tuple(float(v) for v in value)

    def flags(self, name: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
        """A list of truth values with at least one entry."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or not value or any(type(v) is not bool for v in value):
            raise self.error(name, "must be a list of truth values")
        return tuple(value)

    def only(self, name: str, supported: T) -> None:
        """Refuse every value but the one that this fleet supports, which is also the default."""
        if self._value(name, supported) != supported:
            raise self.error(name, f"is not supported; supported is {supported!r}")

    def error(self, name: str, sentence: str) -> CheckpointError:
        """An error about the entry."""
        return CheckpointError(f"{self.module}/config.json: {name} {self.values.get(name)!r} {sentence}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
