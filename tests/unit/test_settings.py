"""Settings come from flags, then environment variables, then TOML; every error is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.settings import SettingsError, load_settings, setting


@dataclass(frozen=True, kw_only=True)
class Example:
    """Settings with one field of each type."""

    model: str = setting(help="model to serve, 100% of it")
    capacity: int = setting(1, help="requests at a time")
    grace_seconds: float = setting(30.0, help="time to finish")
    metrics_port: int | None = setting(None, help="port of the metrics")
    plugins: tuple[Path, ...] = setting((), help="directories")
    dtype: Literal["float32", "bfloat16"] = setting("float32", help="precision")
    reflection: bool = setting(True, help="list the methods")


def load(*argv: str, environ: Mapping[str, str] | None = None) -> Example:
    """The example settings from these arguments and this environment only."""
    return load_settings(Example, argv, prog="example", environ=environ or {})


def test_unset_settings_have_their_defaults() -> None:
    assert load("--model", "m") == Example(model="m")


def test_a_flag_overrides_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    config = tmp_path / "example.toml"
    config.write_text('model = "file"\ncapacity = 2\ngrace_seconds = 3\nplugins = ["a"]\nreflection = false\n')
    environ = {"FLEET_CONFIG": str(config), "FLEET_MODEL": "variable", "FLEET_CAPACITY": "4", "FLEET_DTYPE": ""}
    loaded = load("--capacity", "5", environ=environ)
    assert loaded == Example(model="variable", capacity=5, grace_seconds=3.0, plugins=(Path("a"),), reflection=False)
    assert isinstance(loaded.grace_seconds, float)


def test_the_config_flag_overrides_its_variable(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f'model = "{name}"')
    environ = {"FLEET_CONFIG": str(tmp_path / "one")}
    assert load("--config", str(tmp_path / "two"), environ=environ).model == "two"


def test_a_tuple_is_read_from_repeated_flags_or_a_comma_separated_variable() -> None:
    assert load("--model", "m", "--plugins", "a", "--plugins", "b,c").plugins == (Path("a"), Path("b,c"))
    assert load("--model", "m", environ={"FLEET_PLUGINS": "a, b,"}).plugins == (Path("a"), Path("b"))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("No", False), ("YES", True)])
def test_booleans_are_read_from_the_environment(text: str, value: bool) -> None:
    assert load("--model", "m", environ={"FLEET_REFLECTION": text}).reflection is value


def test_a_boolean_setting_has_a_pair_of_flags() -> None:
    assert load("--model", "m", "--no-reflection").reflection is False
    assert load("--model", "m", "--reflection", environ={"FLEET_REFLECTION": "no"}).reflection is True


@pytest.mark.parametrize(
    ("argv", "field", "message"),
    [
        ([], "model", "FLEET_MODEL"),
        (["--model", "m", "--capacity", "many"], "capacity", "--capacity: 'many' is not a whole number; "),
        (["--model", "m", "--grace-seconds", "nan"], "grace_seconds", "finite"),
        (["--model", "m", "--dtype", "int4"], "dtype", "one of float32, bfloat16"),
        (["--model", "m", "--capacit", "1"], "", "--capacit"),
        (["--model", "m", "--config", "/nowhere.toml"], "config", "/nowhere.toml"),
    ],
)
def test_an_invalid_flag_is_refused(argv: list[str], field: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(*argv)
    assert caught.value.field == field
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("capasity = 1", "unknown key 'capasity'"),
        ("capacity = true", "True is not a whole number"),
        ("capacity = 1.5", "a whole number"),
        ('capacity = "1"', "a whole number"),
        ("model = 1", "a string"),
        ('plugins = "a"', "an array"),
        ("plugins = [1]", "a string"),
        ('reflection = "yes"', "true or false"),
        ("grace_seconds = inf", "finite"),
        ("model = ", "not TOML"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "example.toml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=r"example\.toml") as caught:
        load("--model", "m", "--config", str(config))
    assert message in caught.value.message


def test_the_error_names_an_invalid_variable() -> None:
    with pytest.raises(SettingsError, match="FLEET_CAPACITY: 'x' is not a whole number; write") as caught:
        load("--model", "m", environ={"FLEET_CAPACITY": "x"})
    assert caught.value.field == "capacity"


def test_help_lists_flags_and_required_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--grace-seconds" in text
    assert "100% of it (required)" in " ".join(text.split())


def test_the_process_environment_is_read_when_none_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_MODEL", "m")
    monkeypatch.delenv("FLEET_CONFIG", raising=False)
    assert load_settings(Example, [], prog="example").model == "m"


def test_a_field_of_an_unsupported_type_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong:
        """A class with a field of a type that settings do not support."""

        value: complex = setting(1j, help="no")

    with pytest.raises(TypeError, match="value"):
        load_settings(Wrong, [], prog="wrong", environ={})


def test_a_float_may_be_an_integer_in_toml(tmp_path: Path) -> None:
    config = tmp_path / "example.toml"
    config.write_text('model = "m"\ngrace_seconds = 2')
    assert math.isclose(load("--config", str(config)).grace_seconds, 2.0)
