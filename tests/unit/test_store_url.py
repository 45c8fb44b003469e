"""URLs of the request store: refused forms, and messages that show no part of a password."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import AuthenticationError, ConnectionError, RedisError, ResponseError

from common.errors import FleetError, InvalidInput
from common.state.connection import connect, store_errors
from common.state.store_url import check_url, without_password
from services.start_up import describe

FORMS_WITH_HOST = (
    "redis://:{}@host:6379/0",
    "redis://me:{}@host",
    "rediss://:{}@host:6379/0?ssl_ca_certs=/ca.pem",
    "unix://:{}@/run/store.sock",
    "redis+sentinel://:{}@host:26379/service",
    "redi://:{}@host",
    ":{}@host",
)
FORMS = (*FORMS_WITH_HOST, "redis://:{}")
ERRORS: tuple[type[RedisError], ...] = (AuthenticationError, ConnectionError, ResponseError, RedisError)


async def _all_messages(password: str) -> str:
    """All messages about URLs with this password."""
    messages = []
    # Without a host, the text after an at sign is the host.
    for form in FORMS if "@" not in password else FORMS_WITH_HOST:
        url = form.format(password)
        try:
            await connect(url).aclose()
        except InvalidInput as error:
            messages += [describe(error), str(error), repr(error.__cause__)]
        if form != ":{}@host":
            messages.append(without_password(f"{url} is not served"))
    for url in (form.format(password) for form in FORMS[:5]):
        messages.append(describe(ValueError(f"cannot read {url}")).partition(" (")[0])
        for kind in ERRORS:
            try:
                with store_errors():
                    raise kind(f"cannot log in at {url}")
            except FleetError as error:
                messages.append(describe(error))
    return "\n".join(messages)


def _messages(password: str) -> str:
    return asyncio.run(_all_messages(password))


@settings(max_examples=150)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=20) | st.text("a1:/?#@[]%&= ", min_size=4)
)
def test_no_message_shows_four_characters_of_a_password(password: str) -> None:
    shown, fixed_text = _messages(password), _messages("\x00") + _messages("7") + _messages("/") + _messages("#x")
    parts = {password[i : i + 4] for i in range(len(password) - 3)}
    assert [part for part in parts if part in shown and part not in fixed_text] == []


@given(st.text(min_size=1))
def test_a_quoted_password_is_accepted(password: str) -> None:
    secret = quote(password.encode("utf-8", "surrogatepass"), safe="")
    check_url(f"redis://:{secret}@host:6379/0")
    assert without_password(f"redis://:{secret}@host:6379/0") == "redis://***@host:6379/0"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host?foo=1", "option 'foo' is not supported; supported: db,"),
        ("redis://host?db=x", "option db is not a whole number"),
        ("redis://host?db=1&db=2", "option db is given more than once"),
        ("redis://host?db=", "option db is not a whole number"),
        ("redis://host?decode_responses=true", "option 'decode_responses' is not supported .replies are read as bytes"),
        ("redis://host?protocol=3", "option 'protocol' is not supported"),
        ("redis://host?ssl_ca_certs=/x", "option 'ssl_ca_certs' is not supported"),
        ("rediss://host?ssl_cert_reqs=maybe", "option ssl_cert_reqs is not none, optional or required"),
        ("redis://host?socket_timeout=nan", "option socket_timeout is not a number of seconds"),
        ("redis://host?max_connections=0", "option max_connections is not at least 1"),
        ("redis://host?db", "options are not of the form"),
        ("redis://host/first", "its path is not a database number"),
        ("redis://host:port/0", "its host or port is malformed"),
        ("redis://host:99999/0", "its host or port is malformed"),
        ("redis://", "it has no host"),
        ("unix://", "no socket path"),
        ("redis://:pa#ss@host", "percent-encode reserved characters in a password: '#' as %23"),
        ("redis://:pa/ss@host", "percent-encode"),
        ("redis://:pa?ss@host", "percent-encode"),
        ("redis://:pa ss@host", "it contains a blank or a control character .percent-encode it"),
        ("redis+sentinel://:pass@host:1/service", "user, password and options are not supported"),
        ("redis+sentinel://host:1/service/x", "its database is not a number"),
        ("http://x", "'http://x' is not a Redis URL"),
    ],
)
def test_invalid_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        connect(url)
    assert caught.value.field == "redis"


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://[::1]:6379/3?client_name=fleet&socket_keepalive=true&health_check_interval=5",
        "redis://me:pa@ss@host:6379/0",
        "rediss://host:6379/0?ssl_ca_certs=/a.pem&ssl_certfile=/b.pem&ssl_keyfile=/c.pem&ssl_check_hostname=false",
        "unix:///run/a%20b/store.sock?db=2",
        "unix:///run/user@host/store.sock",
        "redis+sentinel://a:26379,[::1]:26379/service/2",
    ],
)
def test_valid_urls_are_accepted(url: str) -> None:
    asyncio.run(connect(url).aclose())


def test_arguments_that_a_server_repeats_are_not_shown() -> None:
    text = "unknown command 'AUTH', with args beginning with: 'me' 'pass'"
    assert without_password(text) == "unknown command 'AUTH', with args beginning with: ***"
    assert without_password("rediss://host/0?ssl_password=word&db=1") == "rediss://host/0?ssl_password=***&db=1"
    assert without_password("it reads like redis://host:6379/0, or so") == "it reads like redis://host:6379/0, or so"
