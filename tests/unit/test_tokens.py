"""Tokens of callers: accepted tokens, refused tokens and their messages, and key files."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest

from async_tests import HANG_SECONDS
from certificates import Authority
from common.errors import InvalidInput, Unauthenticated
from services.coordinator.tokens import (
    Claimed,
    TokenRules,
    TokenVerifier,
    looks_like_token,
    read_public_keys,
    read_secret,
)
from tokens import AUDIENCE, ISSUER, claims, jwk, jwk_set, private_key, private_pem, public_pem, token

RULES = TokenRules(audience=AUDIENCE, issuer=ISSUER, leeway_seconds=5)
SECRET = b"x" * 16 + b"0123456789abcdef"
UNKNOWN = "not signed by an accepted key"


def verifier(tmp_path: Path, content: str | bytes, rules: TokenRules = RULES) -> TokenVerifier:
    return TokenVerifier(read_public_keys(write_keys(tmp_path, content)), rules)


def write_keys(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def segment(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("RSA", "RS256"), ("P-256", "ES256"), ("P-384", "ES384"), ("P-52", "ES512"), ("Ed", "EdDSA")],
)
def test_each_kind_of_key_verifies_its_algorithm(kind: str, algorithm: str, tmp_path: Path) -> None:
    for content in (public_pem(kind), jwk_set(jwk(kind, kid="k"))):
        assert verifier(tmp_path, content).verify(token(kind, algorithm)) == Claimed("alice", None)


def test_a_key_of_a_set_verifies_only_the_algorithm_that_it_names(tmp_path: Path) -> None:
    tokens = verifier(tmp_path, jwk_set(jwk("RSA", alg="PS384")))
    assert tokens.verify(token("RSA", "PS384", max_open=3)) == Claimed("alice", 3)
    with pytest.raises(Unauthenticated, match=UNKNOWN):
        tokens.verify(token("RSA", "RS256"))


def test_a_certificate_is_a_key_and_a_file_may_hold_several_keys(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("issuer")
    tokens = verifier(tmp_path, public_pem("Ed") + issued.cert.read_bytes())
    assert tokens.verify(jwt.encode(claims(), issued.key.read_bytes(), "ES256")).name == "alice"
    assert tokens.verify(token("Ed", "EdDSA", {"kid": "whatever"})).name == "alice"


def test_a_token_selects_a_key_by_its_kid(tmp_path: Path) -> None:
    tokens = verifier(tmp_path, jwk_set(jwk("Ed", kid="old"), jwk("Ed2", kid="new"), {"kty": "RSA", "use": "enc"}))
    assert tokens.verify(token("Ed2", "EdDSA", {"kid": "new"})).name == "alice"
    assert tokens.verify(token("Ed", "EdDSA")).name == "alice"
    for kid in ("old", "none"):
        with pytest.raises(Unauthenticated, match=UNKNOWN):
            tokens.verify(token("Ed2", "EdDSA", {"kid": kid}))


def test_only_a_secret_verifies_hs256_and_a_secret_verifies_nothing_else(tmp_path: Path) -> None:
    path = write_keys(tmp_path, SECRET + b"\n")
    signed = jwt.encode(claims(), SECRET, "HS256")
    assert TokenVerifier([read_secret(path)], RULES).verify(signed).name == "alice"
    with pytest.raises(Unauthenticated, match=UNKNOWN):
        TokenVerifier([read_secret(path)], RULES).verify(jwt.encode(claims(), SECRET * 2, "HS512"))
    with pytest.raises(Unauthenticated, match=UNKNOWN):
        verifier(tmp_path, public_pem("RSA")).verify(signed)


def forged(kind: str) -> dict[str, str]:
    """Forged tokens by defect. A verifier with the key of this kind must refuse each token."""
    good = token(kind, "RS256")
    header, payload, signature = good.split(".")
    as_secret = f"{segment({'alg': 'HS256'})}.{payload}"
    mac = hmac.new(public_pem(kind), as_secret.encode(), hashlib.sha256).digest()
    return {
        "unsigned": f"{segment({'alg': 'none'})}.{payload}.",
        "unsigned, in capitals": f"{segment({'alg': 'NONE'})}.{payload}.",
        "no algorithm": f"{segment({})}.{payload}.{signature}",
        "the public key as a secret": f"{as_secret}.{segment(mac)}",
        "other claims": f"{header}.{segment(claims(sub='root'))}.{signature}",
        "no signature": f"{header}.{payload}.",
        "another key's": token("RSA2", "RS256"),
        "another algorithm of the key's kind": token(kind, "RS512"),
        "a key of its own": jwt.encode(claims(), private_key("RSA2"), "RS256", {"jwk": jwk("RSA2"), "jku": "http://x"}),
    }


def test_no_forged_token_is_accepted(tmp_path: Path) -> None:
    tokens = verifier(tmp_path, jwk_set(jwk("RSA", kid="k")))
    assert tokens.verify(token("RSA", "RS256")).name == "alice"
    for name, forged_token in forged("RSA").items():
        with pytest.raises(Unauthenticated, match=UNKNOWN) as caught:
            tokens.verify(forged_token)
        assert forged_token not in str(caught.value), name


def test_the_defect_of_a_signed_token_is_reported(tmp_path: Path) -> None:
    now, leeway = int(time.time()), int(HANG_SECONDS)
    tokens = verifier(tmp_path, public_pem("Ed"), replace(RULES, leeway_seconds=leeway))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"exp": now - 2 * leeway}, "has expired"),
        ({"exp": None}, "has no claim exp"),
        ({"nbf": now + 2 * leeway}, "is not valid yet"),
        ({"iat": now + 2 * leeway}, "is not valid yet"),
        ({"aud": "another"}, "has another audience"),
        ({"aud": ["a", "b"]}, "has another audience"),
        ({"aud": None}, "has no claim aud"),
        ({"iss": f"{ISSUER}/"}, "has another issuer"),
        ({"iss": None}, "has no claim iss"),
        ({"sub": None}, "has no string in the claim sub"),
        ({"max_open": -1}, "max_open that is not an integer"),
        ({"max_open": True}, "max_open that is not an integer"),
        ({"max_open": "3"}, "max_open that is not an integer"),
        ({"exp": "soon"}, "with valid claims"),
        ({"exp": float("inf")}, "with valid claims"),
        ({"sub": ["alice"]}, "with valid claims"),
    ]
    for changed, message in cases:
        with pytest.raises(Unauthenticated, match=message) as caught:
            tokens.verify(token("Ed", "EdDSA", **changed))
        assert AUDIENCE not in caught.value.message
        assert ISSUER not in caught.value.message
    for changed in (
        {"exp": now - 3},
        {"nbf": now + leeway // 2},
        {"aud": ["a", AUDIENCE]},
        {"nbf": None},
        {"max_open": 0},
    ):
        assert tokens.verify(token("Ed", "EdDSA", **changed)).name == "alice"


def test_a_malformed_token_is_refused(tmp_path: Path) -> None:
    tokens = verifier(tmp_path, public_pem("Ed"))
    deep = "[" * 9_000
    for text in (
        "",
        "a.b.c",
        "..",
        f"{segment(deep.encode())}.e30.e30",
        f"{segment({'kid': 3})}.e30.e30",
        "a.b.c.d",
        "ü.ü.ü",
    ):
        with pytest.raises(Unauthenticated, match="is not a JSON Web Token"):
            tokens.verify(text)
    assert looks_like_token(token("Ed", "EdDSA"))
    assert not looks_like_token("0123456789abcdef" * 4)


def test_another_claim_may_name_the_caller(tmp_path: Path) -> None:
    rules = TokenRules(audience=AUDIENCE, issuer=ISSUER, caller_claim="client_id")
    tokens = verifier(tmp_path, public_pem("Ed"), rules)
    assert tokens.verify(token("Ed", "EdDSA", client_id="studio", sub=None)).name == "studio"
    with pytest.raises(Unauthenticated, match="has no string in the claim client_id"):
        tokens.verify(token("Ed", "EdDSA"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains 0 signature keys"),
        ("hello", "contains 0 signature keys"),
        ("{", "is not a JWK Set"),
        ('{"keys": 3}', "not an array of objects"),
        ('{"keys": []}', "contains 0 signature keys"),
        ('{"x": []}', "is not a JWK Set"),
        ("{" + '"a":[' * 9_000, "is not a JWK Set"),
        (jwk_set(*([jwk("Ed")] * 33)), "contains 33 signature keys"),
        (jwk_set({"kty": "oct", "k": "c2VjcmV0"}), "jwt_secret"),
        (jwk_set(jwk("Ed", kid=3)), "not a string"),
        (jwk_set(jwk("Ed", d="AAAA")), "private key"),
        (jwk_set(jwk("Ed", alg="HS256")), "its kind of key supports EdDSA"),
        (jwk_set(jwk("RSA", alg="none")), "its kind of key supports RS256"),
        (jwk_set({"kty": "EC", "crv": "P-256"}), "unreadable"),
        (jwk_set({"kty": "EC", "crv": 3, "x": [], "y": {}}), "unreadable"),
        (jwk_set({"kid": "k"}), "unreadable"),
        (jwk_set(jwk("weak")), "1024 bits"),
        (private_pem("Ed"), "only public keys"),
        (public_pem("weak"), "1024 bits"),
        (public_pem("K"), "neither RSA"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "unreadable"),
        (b" " * (1 << 20) + b"x", "more than 1048576 bytes"),
    ],
)
def test_an_invalid_key_file_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        read_public_keys(write_keys(tmp_path, content))
    assert caught.value.field == "jwt_keys"
    assert "\n" not in caught.value.message


def test_an_invalid_secret_is_refused(tmp_path: Path) -> None:
    for content, message in ((b"short\n", "has 5 bytes"), (public_pem("Ed"), "belongs in jwt_keys")):
        with pytest.raises(InvalidInput, match=message) as caught:
            read_secret(write_keys(tmp_path, content))
        assert caught.value.field == "jwt_secret"
    with pytest.raises(InvalidInput, match="is not readable: No such file"):
        read_secret(tmp_path / "none")
