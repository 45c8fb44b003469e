"""X.509 certificate authorities for tests, and the certificates that they issue."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """The PEM files of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority with a self-signed root; `ca` is the PEM file of its certificate."""

    def __init__(self, directory: Path, name: str = "authority", *, path_length: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=path_length)
        certificate = _builder(self._name, self._name, self._key.public_key()).add_extension(constraints, critical=True)
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(_pem(certificate.sign(self._key, hashes.SHA256())))

    def subordinate(self, name: str, valid: datetime.timedelta = _DAY) -> Authority:
        """An intermediate authority signed by this authority, whose `path_length` must be at least 1."""
        other = Authority(self._directory / name, name)
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        builder = _builder(other._name, self._name, other._key.public_key(), valid)
        certificate = builder.add_extension(constraints, critical=True).sign(self._key, hashes.SHA256())
        other.ca.write_bytes(_pem(certificate))
        return other

    def issue(
        self, *names: str, valid: datetime.timedelta = _DAY, usage: x509.ObjectIdentifier | None = None
    ) -> Certificate:
        """Issue a certificate for DNS names or IP addresses; replaces the files of the same first name.

        `valid` is the time until the certificate expires, negative for an expired certificate. `usage` is its only
        extended key usage; None: no restriction.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([_general(name) for name in names])
        builder = _builder(subject, self._name, key.public_key(), valid).add_extension(alternatives, critical=False)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        files = Certificate(self._directory / f"{names[0]}.pem", self._directory / f"{names[0]}.key")
        files.cert.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: datetime.timedelta = _DAY
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * _DAY)
        .not_valid_after(now + valid)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
