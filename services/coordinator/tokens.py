"""Authentication by JSON Web Tokens (RFC 7519), verified with the keys of the operator's issuer.

The kind of a key (and its `alg` in a JWK Set) determines the only algorithm that the key verifies. A token can select a
key by `kid`, but no algorithm. Tokens with alg "none", and tokens with a public key as HMAC secret, are therefore
refused (RFC 8725, sections 2.1 and 3.1). Keys are read from files, never over the network.
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
    """A key, the only algorithm that it verifies, and its `kid` (empty for a key without `kid`)."""

    key: PublicKey | bytes
    algorithm: str
    key_id: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Required audience and issuer of tokens, claim with the caller's name, tolerated clock skew."""

    audience: str
    issuer: str
    caller_claim: str = "sub"
    leeway_seconds: float = 30.0


@dataclass(frozen=True)
class Claimed:
    """The claims of a valid token: the caller's name, unchecked, and an optional bound on open requests."""

    name: str
    max_open: int | None


class TokenVerifier:
    """Verifies tokens."""

    def __init__(self, keys: Sequence[VerificationKey], rules: TokenRules) -> None:
        self._keys = tuple(keys)
        self._rules = rules

    def verify(self, token: str) -> Claimed:
        """Verify a token and read its claims.

        Raises Unauthenticated, whose message contains neither keys nor the required audience and issuer.
        """
        claims = self._claims(token)
        name, max_open = claims.get(self._rules.caller_claim), claims.get(_MAX_OPEN)
        if not isinstance(name, str):
            raise Unauthenticated(
                f"the token has no string in the claim {self._rules.caller_claim}, which names the caller"
            )
        if max_open is not None and (type(max_open) is not int or max_open < 0):
            raise Unauthenticated(f"the token has a {_MAX_OPEN} that is not an integer of at least 0")
        return Claimed(name, max_open)

    def _claims(self, token: str) -> dict[str, Any]:
        for key in self._candidates(token):
            try:
                return self._decoded(token, key)
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
        raise Unauthenticated("the token is not signed by an accepted key")

    def _candidates(self, token: str) -> list[VerificationKey]:
        """The keys that may have signed a token: keys with its `kid` and keys without `kid`.

        For a token without `kid`, all keys.
        """
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
        except (jwt.InvalidTokenError, ValueError):
            raise Unauthenticated("the token is not a JSON Web Token") from None
        return [key for key in self._keys if not key_id or key.key_id in ("", key_id)]

    def _decoded(self, token: str, key: VerificationKey) -> dict[str, Any]:
        """The claims of a token signed by this key.

        Raises Unauthenticated for an invalid claim, which is checked only after the signature.
        """
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
            raise Unauthenticated("the token has another audience") from None
        except jwt.InvalidIssuerError:
            raise Unauthenticated("the token has another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token has no claim {error.claim}") from None
        except (jwt.InvalidTokenError, ValueError):
            raise Unauthenticated("the token is not a JSON Web Token with valid claims") from None


def looks_like_token(text: str) -> bool:
    """Whether a text has the three parts of a signed token."""
    return text.count(".") == 2


def read_public_keys(path: Path) -> list[VerificationKey]:
    """The keys of a JWK Set, or of concatenated PEM public keys or certificates.

    Raises InvalidInput, with the field jwt_keys, for a file without a usable key, or with a private or weak key.
    """
    data = _read(path, "jwt_keys")
    keys = _from_jwk_set(path, data) if data.lstrip().startswith(b"{") else _from_pem(path, data)
    if not 0 < len(keys) <= MAX_KEYS:
        raise _wrong(path, f"contains {len(keys)} signature keys; 1 to {MAX_KEYS} work")
    return keys


def read_secret(path: Path) -> VerificationKey:
    """The HS256 secret in a file, without trailing line ends. Raises InvalidInput."""
    secret = _read(path, "jwt_secret").rstrip(b"\r\n")
    if len(secret) < _LEAST_SECRET_BYTES:
        message = f"jwt_secret: {path} has {len(secret)} bytes, less than the minimum of {_LEAST_SECRET_BYTES}"
        raise InvalidInput(message, field="jwt_secret")
    if _PEM.search(secret):
        raise InvalidInput(f"jwt_secret: {path} contains a PEM key, which belongs in jwt_keys", field="jwt_secret")
    return VerificationKey(secret, "HS256")


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{name}: {path} is not readable: {error.strerror}", field=name) from None
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
                raise _wrong(path, f"contains a {kind.lower()}; only public keys and certificates work")
        except (ValueError, UnsupportedAlgorithm):
            raise _wrong(path, f"contains an unreadable {kind.lower()}") from None
        keys.append(VerificationKey(key, _algorithm_of(path, key, "")))
    return keys


def _from_jwk_set(path: Path, data: bytes) -> list[VerificationKey]:
    try:
        members = json.loads(data)["keys"]
    except (ValueError, KeyError, RecursionError):
        raise _wrong(path, "is not a JWK Set, a JSON object with `keys`") from None
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise _wrong(path, "has `keys` that are not an array of objects")
    return [_from_jwk(path, member) for member in members if _verifies(path, member)]


def _verifies(path: Path, member: dict[str, Any]) -> bool:
    """Whether a key is for signatures. JWK Sets of identity providers also contain encryption keys."""
    if member.get("use", "sig") == "sig":
        return True
    _log.info("jwt_keys: key ignored, it is not for signatures", file=path, use=repr(member["use"])[:40])
    return False


def _from_jwk(path: Path, member: dict[str, Any]) -> VerificationKey:
    key_id, algorithm = member.get("kid", ""), member.get("alg", "")
    if not isinstance(key_id, str) or not isinstance(algorithm, str):
        raise _wrong(path, "contains a key whose kid or alg is not a string")
    if member.get("kty") == "oct":
        raise _wrong(path, f"contains the secret {key_id[:64]!r}; a secret for HS256 belongs in jwt_secret")
    if "d" in member:
        raise _wrong(path, f"contains the private key {key_id[:64]!r}; only public keys work")
    try:
        # PyJWT would trust any `alg`, even "none".
        key = jwt.PyJWK({name: value for name, value in member.items() if name != "alg"}).key
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, UnsupportedAlgorithm):
        raise _wrong(path, f"contains the key {key_id[:64]!r}, which is unreadable or of an unsupported kind") from None
    return VerificationKey(key, _algorithm_of(path, key, algorithm), key_id)


def _algorithm_of(path: Path, key: Any, asked: str) -> str:
    """`asked`, or the default algorithm of this kind of key if `asked` is empty. Raises InvalidInput."""
    possible: tuple[str, ...] = ()
    if isinstance(key, RSAPublicKey):
        if key.key_size < _LEAST_RSA_BITS:
            raise _wrong(path, f"contains an RSA key of {key.key_size} bits; at least {_LEAST_RSA_BITS} work")
        possible = _RSA
    elif isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        possible = (_CURVES[key.curve.name],)
    elif isinstance(key, Ed25519PublicKey):
        possible = ("EdDSA",)
    if not possible:
        raise _wrong(path, "contains a key that is neither RSA, nor Ed25519, nor on the curve P-256, P-384 or P-521")
    if asked and asked not in possible:
        raise _wrong(
            path, f"contains a key with the alg {asked[:40]!r}; its kind of key supports {', '.join(possible)}"
        )
    return asked or possible[0]


def _wrong(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"jwt_keys: {path} {what}", field="jwt_keys")
