"""Each operation of the store's script takes named arguments, and refuses a call with other arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from common.errors import InternalError
from common.state import connection
from common.state.connection import SCRIPT_FILES, Arguments, command, run_script, script_call, script_source
from redis_servers import run_on_empty_store
from script_calls import OPERATIONS

NUL_AND_NEWLINE = b"\0\n\xff\r\nfleet"
LISTS = set(re.findall(r"'(\w+)\*'", script_source()))


def refusal(url: str, operation: str, arguments: Arguments) -> str:
    """The message of the InternalError of a call. Checks that the call changed nothing."""
    messages: list[str] = []

    async def scenario(redis: Redis) -> None:
        with pytest.raises(InternalError) as caught:
            await run_script(redis, operation, arguments)
        messages.append(str(caught.value))
        assert await command(redis, "DBSIZE") == 0

    run_on_empty_store(url, scenario)
    return messages[0]


def test_the_script_contains_all_files() -> None:
    folder = Path(connection.__file__).parent / "lua"
    assert {path.stem for path in folder.iterdir()} == set(SCRIPT_FILES)
    assert len(SCRIPT_FILES) == len(set(SCRIPT_FILES))


def test_each_operation_has_a_declaration_of_its_arguments() -> None:
    operations = re.findall(r"^function ops\.(\w+)\(a\)$", script_source(), re.MULTILINE)
    assert sorted(operations) == sorted(OPERATIONS)
    assert re.findall(r"^takes\.(\w+) = ", script_source(), re.MULTILINE) == operations


def test_arguments_are_sent_in_pairs() -> None:
    call = script_call("x", {"id": "r", "costs": {"a": 1, "b": 2}, "events": [b"e", b"f"], "running": []})
    assert call[2:] == [
        0,
        "x",
        "id",
        "r",
        "costs",
        "a",
        "costs",
        1,
        "costs",
        "b",
        "costs",
        2,
        "events",
        b"e",
        "events",
        b"f",
    ]


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_the_error_names_a_missing_an_unknown_and_a_repeated_argument(each_store_url: str, operation: str) -> None:
    arguments: dict[str, Any] = dict(OPERATIONS[operation][0])
    wrong = f"an operation of the request store was called wrongly: {operation}: "
    for name in arguments.keys() - LISTS:
        left = {each: value for each, value in arguments.items() if each != name}
        assert refusal(each_store_url, operation, left).startswith(f"{wrong}{name} is missing; it takes ")
        assert refusal(each_store_url, operation, {**left, name: ["1", "2"]}).startswith(
            f"{wrong}{name} is given twice; it takes "
        )
    message = refusal(each_store_url, operation, {**arguments, "color": "red"})
    assert message.startswith(f"{wrong}color is not an argument; it takes ")
    assert set(arguments) <= set(message.partition("it takes ")[2].replace("*", "").split(", "))


def test_a_name_without_a_value_and_an_unknown_operation_are_refused(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        with pytest.raises(InternalError, match="called wrongly: no_such is not an operation"):
            await run_script(redis, "no_such", {})
        call = script_call("resign", {"owner": "c"})
        with pytest.raises(InternalError, match="called wrongly: resign: owner has no value; it takes owner"):
            await command(redis, *call[:-1])

    run_on_empty_store(each_store_url, scenario)


def test_values_are_bytes_and_lists_may_be_empty(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        admission: dict[str, Any] = dict(OPERATIONS["admit"][0])
        admission |= {"record": NUL_AND_NEWLINE, "submission": b"id", "events": [NUL_AND_NEWLINE, b"", b"events"]}
        reply = await run_script(redis, "admit", {**admission, "costs": {}})
        assert reply[0] == b"admitted"
        assert await command(redis, "HGET", "fleet:request:new", "record") == NUL_AND_NEWLINE
        stored = await command(redis, "XRANGE", "fleet:events:new", "-", "+")
        assert [fields[b"event"] for _, fields in stored] == [NUL_AND_NEWLINE, b"", b"events"]
        assert not await redis.keys("fleet:work:*")
        more: Arguments = {"id": "new", "epoch": 1, "number": 0, "state": "", "extra": "", "events": []}
        assert await run_script(redis, "append", more) == [b"appended", []]

    run_on_empty_store(each_store_url, scenario)
