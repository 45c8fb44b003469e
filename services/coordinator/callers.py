"""Who calls: by API key where there are keys, else by the certificate that was asked for, else anybody.

The keys file holds digests, so that reading it lets nobody in:

    [callers.studio]
    key_sha256 = ["9f86d081…"]    # of each key that is valid, in hex: a new one can be added before an old one goes
    max_open = 20                 # optional: requests that this caller may have open

Keys are random and long, so that a plain digest of them cannot be reversed; they are not passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput, Unauthenticated
from common.rpc.interceptor import Admit, admit_all
from common.rpc.tls import peer_names
from common.rpc.wrapping import Context
from services.coordinator.settings import CoordinatorSettings

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("key_sha256", "max_open")
_SCHEME = "bearer "

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Somebody with a name; `max_open` None takes the fleet's bound."""

    name: str
    max_open: int | None = None


ANYBODY = Caller("")
_current: ContextVar[Caller] = ContextVar("fleet_caller", default=ANYBODY)


def current_caller() -> Caller:
    """Who makes the call that this task serves."""
    return _current.get()


def admission(settings: CoordinatorSettings) -> Admit:
    """What finds out who calls. Raises InvalidInput for a keys file that cannot be read or understood."""
    if settings.api_keys is not None:
        if settings.tls_cert is None and settings.tls_public_cert is None:
            _log.warning("api_keys without tls_cert: keys travel in the clear unless something before this encrypts")
        return ByKey(read_keys(settings.api_keys))
    return by_certificate if settings.tls_client_ca is not None else admit_all


def by_certificate(context: Context) -> None:
    """The caller is who its certificate says. Raises Unauthenticated for one without a usable name."""
    for name in peer_names(context):
        if _NAME.fullmatch(name):
            _current.set(Caller(name))
            return
    raise Unauthenticated("no name in the certificate is of letters, digits and ._@- alone, 64 at most")


class ByKey:
    """The caller is whose key came along, as `authorization: Bearer KEY`."""

    def __init__(self, keys: Mapping[bytes, Caller]) -> None:
        self._keys = dict(keys)

    def __call__(self, context: Context) -> None:
        """Raise Unauthenticated without a key, or with one that nobody has."""
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(given) != 1:
            raise Unauthenticated("send one key, in the metadata `authorization: Bearer KEY` (fleet: FLEET_API_KEY)")
        text = given[0] if isinstance(given[0], str) else given[0].decode("ascii", "replace")
        if not text.lower().startswith(_SCHEME):
            raise Unauthenticated("authorization must read `Bearer KEY`")
        _current.set(self.find(text[len(_SCHEME) :].strip()))

    def find(self, key: str) -> Caller:
        """Whose key it is; takes the same time for every key. Raises Unauthenticated."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found: Caller | None = None
        for known, caller in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found


def read_keys(path: Path) -> dict[bytes, Caller]:
    """The callers by the SHA-256 of their keys. Raises InvalidInput that names what is wrong in the file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"api_keys: {path} cannot be read: {error.strerror}", field="api_keys") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"api_keys: {path} is not TOML: {error}", field="api_keys") from None
    callers = table.get("callers")
    if set(table) != {"callers"} or not isinstance(callers, dict) or not callers:
        raise InvalidInput(f"api_keys: {path} must be tables [callers.NAME] and nothing else", field="api_keys")
    keys: dict[bytes, Caller] = {}
    for name, entry in callers.items():
        for digest, caller in _entries(path, name, entry):
            if digest in keys:
                raise InvalidInput(f"api_keys: {name} and {keys[digest].name} have one key in {path}", field="api_keys")
            keys[digest] = caller
    return keys


def _entries(path: Path, name: str, entry: Any) -> list[tuple[bytes, Caller]]:
    def wrong(what: str) -> InvalidInput:
        return InvalidInput(f"api_keys: [callers.{name[:64]}] in {path} {what}", field="api_keys")

    if not _NAME.fullmatch(name):
        raise wrong("must have a name of letters, digits and ._@-, 64 at most")
    if not isinstance(entry, dict) or entry.keys() - set(_FIELDS):
        raise wrong(f"must be a table of {' and '.join(_FIELDS)}, and of nothing else")
    digests, max_open = entry.get("key_sha256"), entry.get("max_open")
    if not isinstance(digests, list) or not digests:
        raise wrong("needs key_sha256, an array of SHA-256 digests")
    if any(not isinstance(each, str) or not _DIGEST.fullmatch(each) for each in digests):
        raise wrong("has a key_sha256 that is not 64 digits of lower case hex; `sha256sum` prints such")
    if max_open is not None and (type(max_open) is not int or max_open < 0):
        raise wrong("has a max_open that is not a number of requests")
    return [(bytes.fromhex(each), Caller(name, max_open)) for each in digests]
