"""Signing keys, signed JWTs, and the public key files that a coordinator reads."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any, TypeAlias

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

AUDIENCE, ISSUER = "fleet", "https://issuer.test"
PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@cache
def private_key(kind: str) -> PrivateKey:
    """A signing key of a kind, cached because RSA keys are slow to create. KIND2 and KIND3 are further keys of KIND."""
    match kind.rstrip("23"):
        case "RSA":
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "weak":
            return rsa.generate_private_key(public_exponent=65537, key_size=1024)
        case "Ed":
            return ed25519.Ed25519PrivateKey.generate()
        case curve:
            curves = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-5": ec.SECP521R1(), "K": ec.SECP256K1()}
            return ec.generate_private_key(curves[curve])


def public_pem(kind: str) -> bytes:
    """The public key in PEM."""
    return private_key(kind).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_pem(kind: str) -> bytes:
    """The private key in PEM."""
    return private_key(kind).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def jwk(kind: str, **members: Any) -> dict[str, Any]:
    """The public key as a JSON Web Key."""
    algorithm = {"RSA": "RS256", "weak": "RS256", "Ed": "EdDSA"}.get(kind.rstrip("23"), "ES256")
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(private_key(kind).public_key(), as_dict=True)
    return {**made, **members}


def jwk_set(*keys: dict[str, Any]) -> str:
    """Content of a JWK Set file."""
    return json.dumps({"keys": keys})


def claims(**changed: Any) -> dict[str, Any]:
    """Claims of a valid token of alice; a value of None removes the claim."""
    now = int(time.time())
    made = {"sub": "alice", "aud": AUDIENCE, "iss": ISSUER, "iat": now, "nbf": now, "exp": now + 600} | changed
    return {name: value for name, value in made.items() if value is not None}


def token(kind: str, algorithm: str, headers: dict[str, Any] | None = None, **changed: Any) -> str:
    """A JWT signed by the key of that kind."""
    return jwt.encode(claims(**changed), private_key(kind), algorithm, headers)
