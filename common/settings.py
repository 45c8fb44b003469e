"""Loads the settings of a process into a frozen dataclass. Precedence: flags, environment variables, TOML file.

    @dataclass(frozen=True, kw_only=True)
    class WorkerSettings:
        model: str = setting(help="checkpoint directory or model name")
        capacity: int = setting(1, help="number of concurrent requests")

    settings = load_settings(WorkerSettings, argv, prog="fleet serve denoising")

The field `queue_bound` is the flag --queue-bound, the variable FLEET_QUEUE_BOUND and the TOML key queue_bound.
Supported types: bool, int, float, str, Path and Literal of strings, `T | None` for each of these types T, and tuples of
these types. A tuple is a repeated flag, a comma-separated variable or a TOML array. Annotations must be importable when
the settings are loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar

from common.errors import InvalidInput

T = TypeVar("T")

_HELP = "help"
_NUMBER_RULE = "a finite number; write digits, such as 1.5"


class SettingsError(InvalidInput):
    """A flag, variable or TOML key is unknown, missing or has an invalid value. The message is one line."""


def setting(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """Return a field of a settings dataclass. A field without a default is required."""
    metadata = {_HELP: help}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Kind:
    """Type of a field: a scalar, or a tuple of scalars."""

    scalar: type[Any]
    many: bool
    choices: tuple[str, ...]

    @property
    def rule(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        rules = {bool: "true or false", int: "a whole number; write digits, such as 8", float: _NUMBER_RULE}
        return rules.get(self.scalar, "a string; write it in quotes")


def load_settings(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    environ: Mapping[str, str] | None = None,
    readers: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> T:
    """Load a settings dataclass. Flags override FLEET_* variables, which override the file of --config or FLEET_CONFIG.

    Empty variables count as unset; FLEET_* variables without a field are ignored, because they may be for other
    processes. --help prints the flags and raises SystemExit(0). Errors raise SettingsError. `readers` maps settings
    that this process does not read to the services that read them, for error messages.
    """
    environ = os.environ if environ is None else environ
    kinds = _kinds(cls)
    given = _flags(_parser(cls, kinds, prog), argv, readers)
    flags = {name: value for name, value in given.items() if value is not None}
    config = flags.pop("config", None) or environ.get("FLEET_CONFIG")
    values = _from_toml(Path(config), kinds, readers) if config else {}
    values |= _from_environment(environ, kinds)
    values |= {name: _from_flag(value, kinds[name], "--" + name.replace("_", "-")) for name, value in flags.items()}
    for item in dataclasses.fields(typing.cast(Any, cls)):
        if item.name not in values and item.default is dataclasses.MISSING:
            raise SettingsError(
                f"--{item.name.replace('_', '-')} is missing: give the flag, FLEET_{item.name.upper()}, "
                f"or {item.name} in the --config file",
                field=item.name,
            )
    return cls(**values)


class FlagParser(argparse.ArgumentParser):
    """ArgumentParser that raises SettingsError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _parser(cls: type[Any], kinds: Mapping[str, _Kind], prog: str) -> FlagParser:
    """Return the parser. Flags are parsed as strings, so that all sources share one conversion."""
    parser = FlagParser(prog=prog, allow_abbrev=False, description=(cls.__doc__ or "").strip().splitlines()[0])
    config_help = "TOML file with settings; flags and FLEET_* variables override it"
    parser.add_argument("--config", metavar="FILE", help=config_help)
    for item in dataclasses.fields(cls):
        kind = kinds[item.name]
        flag, text = "--" + item.name.replace("_", "-"), _describe(item)
        if kind.scalar is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = "{" + ",".join(kind.choices) + "}" if kind.choices else item.name.upper()
            parser.add_argument(flag, action="append" if kind.many else "store", metavar=metavar, help=text)
    return parser


def _flags(parser: FlagParser, argv: Sequence[str], readers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the values of the flags as strings, by field. Raises SettingsError for unknown flags."""
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag, name = word.partition("=")[0], word.partition("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and (services := readers.get(name, readers.get(name.removeprefix("no_")))):
            raise _not_read(flag, services, name)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return vars(given)


def _not_read(source: str, services: Sequence[str], name: str) -> SettingsError:
    return SettingsError(
        f"{source} is not a setting of this service; services that read it: {', '.join(services)}", field=name
    )


def _describe(item: dataclasses.Field[Any]) -> str:
    text = str(item.metadata.get(_HELP, "")).replace("%", "%%")
    if item.default is dataclasses.MISSING:
        return f"{text} (required)"
    if item.default in (None, (), ""):
        return text
    return f"{text} (default: {str(item.default).replace('%', '%%')})"


def _kinds(cls: type[Any]) -> dict[str, _Kind]:
    hints = typing.get_type_hints(cls)
    return {item.name: _kind(cls, item.name, hints[item.name]) for item in dataclasses.fields(cls)}


def _kind(cls: type[Any], name: str, annotation: Any) -> _Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (UnionType, typing.Union):
        rest = [each for each in arguments if each is not NoneType]
        if len(rest) == 1:
            return _kind(cls, name, rest[0])
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return dataclasses.replace(_kind(cls, name, arguments[0]), many=True)
    if origin is Literal:
        return _Kind(str, False, tuple(arguments))
    if annotation in (bool, int, float, str, Path):
        return _Kind(annotation, False, ())
    raise TypeError(f"{cls.__name__}.{name}: settings cannot be {annotation}")


def _from_flag(value: Any, kind: _Kind, source: str) -> Any:
    if kind.many:
        return tuple(_convert(each, kind, source) for each in value)
    return _convert(value, kind, source)


def _from_environment(environ: Mapping[str, str], kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        source = "FLEET_" + name.upper()
        if text := environ.get(source, ""):
            parts = [part.strip() for part in text.split(",") if part.strip()]
            values[name] = _from_flag(parts if kind.many else text, kind, source)
    return values


def _from_toml(path: Path, kinds: Mapping[str, _Kind], readers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the config file {path}: {error.strerror}", field="config") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the config file {path} is not TOML: {error}", field="config") from error
    if unknown := sorted(table.keys() - kinds.keys()):
        if services := readers.get(unknown[0]):
            raise _not_read(f"{unknown[0]} in {path}", services, unknown[0])
        raise SettingsError(
            f"{path} has the unknown key {unknown[0]!r}; known keys are {', '.join(sorted(kinds))}", field=unknown[0]
        )
    return {name: _from_toml_value(value, kinds[name], f"{name} in {path}") for name, value in table.items()}


def _from_toml_value(value: Any, kind: _Kind, source: str) -> Any:
    if kind.many:
        if not isinstance(value, list):
            raise _wrong(value, "an array; write it in brackets", source)
        return tuple(_from_toml_value(each, dataclasses.replace(kind, many=False), source) for each in value)
    typed = {bool: (bool,), int: (int,), float: (int, float)}.get(kind.scalar, (str,))
    if not isinstance(value, typed) or (isinstance(value, bool) and kind.scalar is not bool):
        raise _wrong(value, kind.rule, source)
    return _convert(value, kind, source)


def _convert(value: Any, kind: _Kind, source: str) -> Any:
    """Convert a string or a TOML value to the field's type. Raises SettingsError."""
    if kind.choices and value not in kind.choices:
        raise _wrong(value, kind.rule, source)
    if kind.scalar is bool and isinstance(value, str):
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() not in truth:
            raise _wrong(value, kind.rule, source)
        return truth[value.lower()]
    try:
        result = kind.scalar(value)
    except ValueError as error:
        raise _wrong(value, kind.rule, source) from error
    if isinstance(result, float) and not math.isfinite(result):
        raise _wrong(value, _NUMBER_RULE, source)
    return result


def _wrong(value: object, rule: str, source: str) -> SettingsError:
    name = source.removeprefix("--").removeprefix("FLEET_").partition(" ")[0].replace("-", "_").lower()
    return SettingsError(f"{source}: {value!r} is not {rule}", field=name)
