"""No part of a password in a Redis URL reaches an error message or its causes."""

from __future__ import annotations

import traceback

import pytest

from common.errors import InvalidInput
from common.state.connection import connect

PASSWORDS = ("hunter2", "hunter2/x", "x/hunter2", "hunter2:hunter2", "p@hunter2", "hunter2#", "hunter2]")
PARTS = ("redi://u:{}@host:6379/0", "redis://u:{}@host:port/0", "redis://:{}@[host/0", "redis+sentinel://u:{}@h:1/")


@pytest.mark.parametrize("form", PARTS)
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_wrong_url_is_shown_without_any_part_of_its_password(form: str, password: str) -> None:
    with pytest.raises(InvalidInput, match="is no Redis URL") as caught:
        connect(form.format(password))
    assert "hunter" not in caught.value.message
    assert "hunter" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.field == "redis"


@pytest.mark.parametrize("url", ["redis://:hunter2/x@host:1/0", "redis://u:hunter2/@host/0"])
def test_a_password_that_is_not_encoded_is_not_taken_for_a_port(url: str) -> None:
    with pytest.raises(InvalidInput, match="percent-encode") as caught:
        connect(url)
    assert "hunter" not in caught.value.message
    assert caught.value.__cause__ is None


def test_a_wrong_url_without_a_password_names_the_reason() -> None:
    with pytest.raises(InvalidInput, match=r"'redis://host:port/0' is no Redis URL.*'port'"):
        connect("redis://host:port/0")
