"""URLs of the request store: validation, and redaction of credentials in texts.

redis-py ignores unknown and malformed parts of a URL, or quotes them in its errors, including passwords. The fleet
therefore validates a URL before redis-py parses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

from common.errors import InvalidInput

SENTINEL = "redis+sentinel://"
HIDDEN = "***"

_EXAMPLES = "redis://host:6379/0 or unix:///path"
_PLACE = re.compile(r"[a-z+]+://[A-Za-z_][\w.-]*(:\d{1,5})?(/\d{0,4})?", re.ASCII)
_WORD = re.compile(r"[\w.-]+", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
# Redaction ends at the last "@", because an unquoted password may contain any character. Without "@", redaction ends at
# the end of the word, or at the end of the text if the URL has no user name.
_IN_TEXT = re.compile(r"\b([a-z][a-z+]*)://.*@", re.DOTALL)
_WITHOUT_HOST = re.compile(r"\b(rediss?)://:.*", re.DOTALL)
_UNFINISHED = re.compile(r"\b(rediss?)://[^\s/:]*:(?!\d{1,5}(?![^\s/?#'\",;.)]))\S*")
_SECRET_OPTION = re.compile(r"\b((?:ssl_)?password=)[^&\s]*")
# Servers without AUTH quote its arguments in their errors.
_ECHOED = re.compile(r"(with args beginning with:).*", re.DOTALL)


def without_password(text: str) -> str:
    """Redact user names, passwords and secret options of URLs in a text."""
    text = _IN_TEXT.sub(rf"\1://{HIDDEN}@", text)
    text = _WITHOUT_HOST.sub(rf"\1://{HIDDEN}", text)
    text = _UNFINISHED.sub(rf"\1://{HIDDEN}", text)
    return _ECHOED.sub(rf"\1 {HIDDEN}", _SECRET_OPTION.sub(rf"\1{HIDDEN}", text))


def check_url(url: str) -> None:
    """Raise InvalidInput unless redis-py interprets every part of the URL.

    The message contains no part of a malformed URL that may belong to a password.
    """
    if reason := _fault(url):
        shown = url if _PLACE.fullmatch(url) else HIDDEN
        message = f"redis: {shown!r} is not a Redis URL: {reason}; use a URL such as {_EXAMPLES}"
        raise InvalidInput(message, field="redis")


def _fault(url: str) -> str:
    """Return the rule that the URL violates, without parts of the URL; empty for a valid URL."""
    scheme, mark, rest = url.partition("://")
    if not mark or f"{scheme}{mark}" not in ("redis://", "rediss://", "unix://", SENTINEL):
        return "its scheme is none of redis, rediss, unix and redis+sentinel"
    if not url.isprintable() or " " in url:
        return "it contains a blank or a control character (percent-encode it)"
    if scheme == "redis+sentinel":
        return _sentinel_fault(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # Its message quotes the URL.
        return _quoting("its host or port is malformed")
    beyond = rest[len(parts.netloc) :]
    if parts.fragment or "#" in url or ("@" in beyond and (parts.netloc or scheme != "unix")):
        return _quoting("it contains '#', or an at sign after the host")
    if port == 0 or parts.netloc.endswith(":"):
        return "its port is not 1 to 65535"
    if scheme == "unix":
        if not parts.path.startswith("/") or parts.path == "/":
            return _quoting("it has no socket path")
    elif not parts.hostname:
        return _quoting("it has no host")
    elif not re.fullmatch(r"(/\d{0,9})?", parts.path, re.ASCII):
        return _quoting("its path is not a database number")
    return _option_fault(parts.query, scheme)


def _quoting(reason: str) -> str:
    encoded = "'#' as %23, '/' as %2F, '?' as %3F, an at sign as %40"
    return f"{reason} (percent-encode reserved characters in a password: {encoded})"


def sentinel_parts(url: str) -> tuple[list[tuple[str, str]], str, str]:
    """Return the sentinels (host, port), service and database of a redis+sentinel URL, unvalidated."""
    sentinels, _, path = url.removeprefix(SENTINEL).partition("/")
    service, _, database = path.partition("/")
    return [each.rpartition(":")[::2] for each in sentinels.split(",")], service, database


def _sentinel_fault(url: str) -> str:
    sentinels, service, database = sentinel_parts(url)
    if any(mark in url for mark in "@?#"):
        return "user, password and options are not supported with sentinels"
    if not service or not all(host and port.isascii() and port.isdecimal() for host, port in sentinels):
        return "its form is not redis+sentinel://host:26379,host:26379/service"
    return "" if not database or re.fullmatch(r"\d{1,9}", database, re.ASCII) else "its database is not a number"


def _option_fault(query: str, scheme: str) -> str:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:  # Its message quotes the query.
        return _quoting("its options are not of the form ?name=value&name=value")
    known = _OPTIONS | (_TLS_OPTIONS if scheme == "rediss" else {})
    names = [name for name, _ in pairs]
    for name, value in pairs:
        if name not in known:
            shown = repr(name) if len(name) <= 40 and _WORD.fullmatch(name) else "one of its options"
            why = " (replies are read as bytes)" if name == "decode_responses" else ""
            return f"option {shown} is not supported{why}; supported: {', '.join(known)}"
        rule, holds = known[name]
        if names.count(name) > 1:
            return f"option {name} is given more than once"
        if not holds(value):
            return f"option {name} is not {rule}"
    return ""


_Rule = tuple[str, Callable[[str], bool]]
_WHOLE: _Rule = ("a whole number", lambda value: value.isascii() and value.isdecimal() and len(value) <= 9)
_SECONDS: _Rule = ("a number of seconds", lambda value: _NUMBER.fullmatch(value) is not None)
_BOOLEAN: _Rule = ("true or false", lambda value: value.lower() in ("true", "false", "yes", "no", "1", "0"))
_TEXT: _Rule = ("a non-empty string", bool)
_OPTIONS: dict[str, _Rule] = {
    "db": _WHOLE,
    "client_name": (
        "one or more ASCII letters, digits, '.', '_' and '-'",
        lambda value: _WORD.fullmatch(value) is not None,
    ),
    "health_check_interval": _WHOLE,
    "max_connections": ("at least 1", lambda value: _WHOLE[1](value) and int(value) > 0),
    "socket_connect_timeout": _SECONDS,
    "socket_keepalive": _BOOLEAN,
    "socket_timeout": _SECONDS,
}
_TLS_OPTIONS: dict[str, _Rule] = {
    "ssl_ca_certs": _TEXT,
    "ssl_ca_path": _TEXT,
    "ssl_certfile": _TEXT,
    "ssl_cert_reqs": ("none, optional or required", lambda value: value in ("none", "optional", "required")),
    "ssl_check_hostname": _BOOLEAN,
    "ssl_ciphers": _TEXT,
    "ssl_keyfile": _TEXT,
    "ssl_min_version": ("771 (TLS 1.2) or 772 (TLS 1.3)", lambda value: value in ("771", "772")),
    "ssl_password": _TEXT,
}
