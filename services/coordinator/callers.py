"""Authentication of callers: by API key or token if configured, else by client certificate, else none.

The keys file stores digests, so that a leaked file discloses no key:

    [callers.studio]
    key_sha256 = ["9f86d081…"]    # hex digest of each valid key; two during a key rotation
    max_open = 20                 # optional: bound on the open requests of this caller

API keys are long random strings, so an unsalted digest cannot be reversed. services.coordinator.tokens verifies
tokens. The keys file and the files for tokens are reread when they change.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput, Unauthenticated
from common.logs import get_logger
from common.rpc.interceptor import Admit, admit_all
from common.rpc.tls import peer_names
from common.rpc.wrapping import Context
from common.watched import WatchedFiles
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.tokens import TokenRules, TokenVerifier, looks_like_token, read_public_keys, read_secret

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("key_sha256", "max_open")
_SCHEME = "bearer "

_log = get_logger(__name__)


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. `max_open` bounds its open requests; None: the setting max_open_of_caller applies."""

    name: str
    max_open: int | None = None


ANYBODY = Caller("")
_current: ContextVar[Caller] = ContextVar("fleet_caller", default=ANYBODY)


def current_caller() -> Caller:
    """The caller of the RPC that the current task serves."""
    return _current.get()


def admission(settings: CoordinatorSettings) -> Admit:
    """The authentication check of RPCs. Raises InvalidInput for an unreadable or malformed file."""
    keys, tokens = _watched_keys(settings), _watched_tokens(settings)
    if keys is None and tokens is None:
        return by_certificate if settings.tls_client_ca is not None else admit_all
    if settings.tls_cert is None and settings.tls_public_cert is None:
        _log.warning("API keys and tokens are unencrypted unless a proxy terminates TLS", missing="tls_cert")
    return ByBearer(keys, tokens, settings.max_open_of_caller)


def _watched_keys(settings: CoordinatorSettings) -> WatchedFiles[Keys] | None:
    path = settings.api_keys
    if path is None:
        return None
    return WatchedFiles([path], lambda: Keys(read_keys(path)), check_seconds=settings.reload_seconds, name="api_keys")


def _watched_tokens(settings: CoordinatorSettings) -> WatchedFiles[TokenVerifier] | None:
    paths = [path for path in (settings.jwt_keys, settings.jwt_secret) if path is not None]
    if not paths:
        return None
    rules = TokenRules(
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        caller_claim=settings.jwt_caller_claim,
        leeway_seconds=settings.jwt_leeway_seconds,
    )

    def read() -> TokenVerifier:
        keys = read_public_keys(settings.jwt_keys) if settings.jwt_keys is not None else []
        if settings.jwt_secret is not None:
            keys.append(read_secret(settings.jwt_secret))
        return TokenVerifier(keys, rules)

    return WatchedFiles(paths, read, check_seconds=settings.reload_seconds, name="jwt_keys and jwt_secret")


def by_certificate(context: Context) -> None:
    """Set the caller from its client certificate. Raises Unauthenticated for a certificate without a usable name."""
    for name in peer_names(context):
        if _NAME.fullmatch(name):
            _current.set(Caller(name))
            return
    raise Unauthenticated("the certificate has no name of at most 64 letters, digits and ._@-")


class ByBearer:
    """Authenticates callers by `authorization: Bearer KEY` or `Bearer TOKEN` in the metadata.

    The keys file, else `max_open_of_caller`, bounds the open requests of a caller. A token can only lower this bound.
    """

    def __init__(
        self, keys: WatchedFiles[Keys] | None, tokens: WatchedFiles[TokenVerifier] | None, max_open_of_caller: int
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._max_open_of_caller = max_open_of_caller
        self._accepted = " or ".join(name for name, source in (("KEY", keys), ("TOKEN", tokens)) if source is not None)

    def __call__(self, context: Context) -> None:
        """Set the caller. Raises Unauthenticated for a missing or invalid key or token."""
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(given) != 1:
            raise Unauthenticated(
                f"send `authorization: Bearer {self._accepted}` once in the metadata; `fleet` reads FLEET_API_KEY"
            )
        text = given[0] if isinstance(given[0], str) else given[0].decode("ascii", "replace")
        if not text.lower().startswith(_SCHEME):
            raise Unauthenticated(f"authorization: the value is not `Bearer {self._accepted}`")
        _current.set(self.find(text[len(_SCHEME) :].strip()))

    def find(self, given: str) -> Caller:
        """The caller with this key or token. Raises Unauthenticated."""
        if self._keys is not None and (caller := self._keys.value.find(given)) is not None:
            return caller
        if self._tokens is not None and (self._keys is None or looks_like_token(given)):
            return self._by_token(self._tokens.value, given)
        raise Unauthenticated("the API key is unknown")

    def _by_token(self, tokens: TokenVerifier, token: str) -> Caller:
        claimed = tokens.verify(token)
        if not _NAME.fullmatch(claimed.name):
            raise Unauthenticated("the token has no caller's name of at most 64 letters, digits and ._@-")
        known = None if self._keys is None else self._keys.value.bound(claimed.name)
        if claimed.max_open is None:
            return Caller(claimed.name, known)
        return Caller(claimed.name, min(claimed.max_open, self._max_open_of_caller if known is None else known))


class Keys:
    """Callers by the SHA-256 of their keys."""

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = dict(callers)
        self._bounds = {caller.name: caller.max_open for caller in callers.values()}

    def find(self, key: str) -> Caller | None:
        """The caller with this key; None for an unknown key. Compares all digests in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found: Caller | None = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def bound(self, name: str) -> int | None:
        """The `max_open` of a caller in the keys file; None if the file has none."""
        return self._bounds.get(name)


def read_keys(path: Path) -> dict[bytes, Caller]:
    """Callers by the SHA-256 of their keys. Raises InvalidInput for an unreadable or malformed file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"api_keys: {path} is not readable: {error.strerror}", field="api_keys") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"api_keys: {path} is not TOML: {error}", field="api_keys") from None
    callers = table.get("callers")
    if set(table) != {"callers"} or not isinstance(callers, dict) or not callers:
        raise InvalidInput(f"api_keys: {path} does not consist of tables [callers.NAME]", field="api_keys")
    keys: dict[bytes, Caller] = {}
    for name, entry in callers.items():
        for digest, caller in _entries(path, name, entry):
            if digest in keys:
                raise InvalidInput(f"api_keys: {name} and {keys[digest].name} share a key in {path}", field="api_keys")
            keys[digest] = caller
    return keys


def _entries(path: Path, name: str, entry: Any) -> list[tuple[bytes, Caller]]:
    def wrong(what: str) -> InvalidInput:
        return InvalidInput(f"api_keys: [callers.{name[:64]}] in {path} {what}", field="api_keys")

    if not _NAME.fullmatch(name):
        raise wrong("does not have a name of at most 64 letters, digits and ._@-")
    if not isinstance(entry, dict) or entry.keys() - set(_FIELDS):
        raise wrong(f"is not a table of only {' and '.join(_FIELDS)}")
    digests, max_open = entry.get("key_sha256"), entry.get("max_open")
    if not isinstance(digests, list) or not digests:
        raise wrong("needs key_sha256, an array of SHA-256 digests")
    if any(not isinstance(each, str) or not _DIGEST.fullmatch(each) for each in digests):
        raise wrong("has a key_sha256 that is not 64 lower-case hex digits, as `sha256sum` prints")
    if max_open is not None and (type(max_open) is not int or max_open < 0):
        raise wrong("has a max_open that is not an integer of at least 0")
    return [(bytes.fromhex(each), Caller(name, max_open)) for each in digests]
