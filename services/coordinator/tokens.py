"""JSON Web Tokens (RFC 7519) that say who calls, signed by somebody whom the operator named.

Which key may sign with which algorithm is fixed when the keys are read, from the kind of key (and, in a JWK Set, its
`alg`): a token only picks one of the keys, by `kid`. So a token that calls itself unsigned, or takes a public key for
a secret, fits no key (RFC 8725, sections 2.1 and 3.1). Nothing is fetched: keys come from files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

from common.errors import InvalidInput, Unauthenticated
from common.logs import get_logger

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

MAX_KEYS = 32
_MAX_FILE_BYTES = 1 << 20
_LEAST_RSA_BITS = 2048
_LEAST_SECRET_BYTES = 32
_MAX_OPEN = "max_open"

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)

_log = get_logger(__name__)


@dataclass(frozen=True)
class VerificationKey:
    """A key, the one algorithm that it may verify, and its `kid`, empty where it has none."""

    key: PublicKey | bytes
    algorithm: str
    key_id: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """What a token must say: for whom it is, who made it, and in which claim the caller's name stands.

    Clocks may differ by `leeway_seconds`.
    """

    audience: str
    issuer: str
    caller_claim: str = "sub"
    leeway_seconds: float = 30.0


@dataclass(frozen=True)
class Claimed:
    """What a valid token says: a name, unchecked, and a bound on open requests, if it has one."""

    name: str
    max_open: int | None


class TokenVerifier:
    """Knows a good token from a bad one."""

    def __init__(self, keys: Sequence[VerificationKey], rules: TokenRules) -> None:
        self._keys = tuple(keys)
        self._rules = rules

    def verify(self, token: str) -> Claimed:
        """What a token says. Raises Unauthenticated, which tells no more than the token's own holder knows."""
        claims = self._claims(token)
        name, max_open = claims.get(self._rules.caller_claim), claims.get(_MAX_OPEN)
        if not isinstance(name, str):
            raise Unauthenticated(f"the token has no text as {self._rules.caller_claim}, which is to name its caller")
        if max_open is not None and (type(max_open) is not int or max_open < 0):
            raise Unauthenticated(f"the token has a {_MAX_OPEN} that is not a number of requests")
        return Claimed(name, max_open)

    def _claims(self, token: str) -> dict[str, Any]:
        for key in self._candidates(token):
            try:
                return self._decoded(token, key)
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
        raise Unauthenticated("the token is not signed by a key that counts here")

    def _candidates(self, token: str) -> list[VerificationKey]:
        """The keys that may have signed it: those of its `kid`, and those that have none."""
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
        except (jwt.InvalidTokenError, ValueError):
            raise Unauthenticated("the token is not a JSON Web Token") from None
        return [key for key in self._keys if not key_id or key.key_id in ("", key_id)]

    def _decoded(self, token: str, key: VerificationKey) -> dict[str, Any]:
        """The claims of a token that this key has signed. What else is wrong is told after the signature only."""
        try:
            return jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                leeway=self._rules.leeway_seconds,
                options={"require": ["exp", "aud", "iss"]},
            )
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
            raise
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("the token is not valid yet") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise Unauthenticated("the token is of another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks the claim {error.claim}") from None
        except (jwt.InvalidTokenError, ValueError):
            raise Unauthenticated("the token is not a JSON Web Token with claims of the right kinds") from None


def looks_like_token(text: str) -> bool:
    """Whether it has the three parts of a signed token. API keys are hex digits."""
    return text.count(".") == 2


def read_public_keys(path: Path) -> list[VerificationKey]:
    """The keys of a JWK Set, or of PEM public keys or certificates one after the other.

    Raises InvalidInput, with the field jwt_keys, for a file without a usable key, with one that is private, or weak.
    """
    data = _read(path, "jwt_keys")
    keys = _from_jwk_set(path, data) if data.lstrip().startswith(b"{") else _from_pem(path, data)
    if not 0 < len(keys) <= MAX_KEYS:
        raise _wrong(path, f"holds {len(keys)} keys to verify signatures with; 1 to {MAX_KEYS} are right")
    return keys


def read_secret(path: Path) -> VerificationKey:
    """The secret of a file, to which HS256 is bound; a line end after it does not count. Raises InvalidInput."""
    secret = _read(path, "jwt_secret").rstrip(b"\r\n")
    if len(secret) < _LEAST_SECRET_BYTES:
        message = f"jwt_secret: {path} holds {len(secret)} bytes; {_LEAST_SECRET_BYTES} or more make a secret"
        raise InvalidInput(message, field="jwt_secret")
    if _PEM.search(secret):
        raise InvalidInput(f"jwt_secret: {path} holds a key in PEM, which belongs in jwt_keys", field="jwt_secret")
    return VerificationKey(secret, "HS256")


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{name}: {path} cannot be read: {error.strerror}", field=name) from None
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidInput(f"{name}: {path} has more than {_MAX_FILE_BYTES} bytes", field=name)
    return data


def _from_pem(path: Path, data: bytes) -> list[VerificationKey]:
    keys = []
    for block in _PEM.finditer(data):
        kind = block.group(1).decode("ascii")
        try:
            if kind == "CERTIFICATE":
                key: Any = load_pem_x509_certificate(block.group()).public_key()
            elif kind.endswith("PUBLIC KEY"):
                key = load_pem_public_key(block.group())
            else:
                raise _wrong(path, f"holds a {kind.lower()}; only public keys and certificates belong there")
        except (ValueError, UnsupportedAlgorithm):
            raise _wrong(path, f"holds a {kind.lower()} that cannot be read") from None
        keys.append(VerificationKey(key, _algorithm_of(path, key, "")))
    return keys


def _from_jwk_set(path: Path, data: bytes) -> list[VerificationKey]:
    try:
        members = json.loads(data)["keys"]
    except (ValueError, KeyError, RecursionError):
        raise _wrong(path, "is no JWK Set: it must be a JSON object with `keys`") from None
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise _wrong(path, "has `keys` that are not an array of objects")
    return [_from_jwk(path, member) for member in members if _verifies(path, member)]


def _verifies(path: Path, member: dict[str, Any]) -> bool:
    """Whether a key is one for signatures: sets of identity providers hold keys to encrypt with, too."""
    if member.get("use", "sig") == "sig":
        return True
    _log.info("jwt_keys: a key that does not verify is ignored", file=path, use=repr(member["use"])[:40])
    return False


def _from_jwk(path: Path, member: dict[str, Any]) -> VerificationKey:
    key_id, algorithm = member.get("kid", ""), member.get("alg", "")
    if not isinstance(key_id, str) or not isinstance(algorithm, str):
        raise _wrong(path, "has a key whose kid or alg is not a text")
    if member.get("kty") == "oct":
        raise _wrong(path, f"has the secret {key_id[:64]!r}; one for HS256 stands in a file of its own, jwt_secret")
    if "d" in member:
        raise _wrong(path, f"has the private key {key_id[:64]!r}; only public keys belong there")
    try:
        # Without its alg, which PyJWT would believe, "none" included.
        key = jwt.PyJWK({name: value for name, value in member.items() if name != "alg"}).key
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, UnsupportedAlgorithm):
        raise _wrong(path, f"has the key {key_id[:64]!r}, which cannot be read or is of an unknown kind") from None
    return VerificationKey(key, _algorithm_of(path, key, algorithm), key_id)


def _algorithm_of(path: Path, key: Any, asked: str) -> str:
    """The algorithm that a key may verify: the one that its set names, if its kind has it, else its kind's first."""
    possible: tuple[str, ...] = ()
    if isinstance(key, RSAPublicKey):
        if key.key_size < _LEAST_RSA_BITS:
            raise _wrong(path, f"has an RSA key of {key.key_size} bits; {_LEAST_RSA_BITS} or more are right")
        possible = _RSA
    elif isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        possible = (_CURVES[key.curve.name],)
    elif isinstance(key, Ed25519PublicKey):
        possible = ("EdDSA",)
    if not possible:
        raise _wrong(path, "has a key that is neither RSA, nor Ed25519, nor on the curve P-256, P-384 or P-521")
    if asked and asked not in possible:
        raise _wrong(path, f"has a key with the alg {asked[:40]!r}; one of its kind has {', '.join(possible)}")
    return asked or possible[0]


def _wrong(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"jwt_keys: {path} {what}", field="jwt_keys")
