"""Checks of TLS files: certificate and key pairs, validity, signatures and names."""

from __future__ import annotations

import datetime
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from common.errors import InvalidInput
from common.rpc.tls import read_authority, read_identity
from services.cli.doctor_results import Result, error, ok, warning

_NOTICE = datetime.timedelta(days=14)
"""Remaining validity below which the result is a warning, for a validity of at least 56 days."""

_SHARE_LEFT = 0.25
"""Remaining fraction of the validity below which the result is a warning, for a validity of less than 56 days.

By default, cert-manager renews certificates earlier: when one third of their validity remains.
"""


@dataclass(frozen=True)
class TlsFiles:
    """Certificate, key and authority files with one prefix of settings, and the name that peers verify.

    `peers` describes the peers that verify `name`. `name` and `peers` are empty if any name is accepted.
    """

    prefix: str
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    name: str = ""
    peers: str = ""


def check_service_tls(values: Mapping[str, Any], service: str) -> Iterator[Result]:
    """Check the TLS files of a service's settings, and whether required files are missing.

    `service` is empty if the command names no service. The host may then run only clients, whose variables have the
    same names, and for which `tls_ca` without `tls_cert` is correct.
    """
    own = bool(values.get("tls_cert") or values.get("tls_key"))
    public = bool(values.get("tls_public_cert") or values.get("tls_public_key"))
    if service and values.get("tls_ca") and not own:
        yield _lacking("tls_ca", "tls_cert and tls_key, which the service must present")
    if service not in ("", "coordinator") and own and not values.get("tls_ca"):
        yield _lacking("tls_cert", "tls_ca, by which a worker verifies coordinators")
    if values.get("tls_client_ca") and not (own or public):
        yield _lacking("tls_client_ca", "tls_cert and tls_key, which clients verify")
    yield from check_tls(files_of(values, service))


def _lacking(given: str, missing: str) -> Result:
    return error("tls", f"{given} is set without {missing}", f"set both, or unset {given}")


def files_of(values: Mapping[str, Any], service: str) -> list[TlsFiles]:
    """The TLS files of a service's settings, with the name that peers verify by default."""
    ca = values.get("tls_ca")
    wanted = ("", "")
    if ca and service == "coordinator":
        wanted = ("coordinator", "workers (tls_callers)")
    elif ca and service:
        wanted = ("worker", "coordinators (tls_worker_name)")
    own = TlsFiles("tls", values.get("tls_cert"), values.get("tls_key"), ca, *wanted)
    public = TlsFiles("tls_public", values.get("tls_public_cert"), values.get("tls_public_key"))
    clients = TlsFiles("tls_client", ca=values.get("tls_client_ca"))
    return [each for each in (own, public, clients) if each.cert or each.key or each.ca]


def check_tls(files: Sequence[TlsFiles], now: datetime.datetime | None = None) -> Iterator[Result]:
    """Check each certificate, key and authority that is set."""
    now = now or datetime.datetime.now(datetime.UTC)
    for each in files:
        authorities = yield from _authority_results(each, now)
        if each.cert or each.key:
            yield from _identity_results(each, authorities, now)


def _authority_results(files: TlsFiles, now: datetime.datetime) -> Generator[Result, None, Sequence[x509.Certificate]]:
    """Results for an authority file; returns its certificates."""
    if files.ca is None:
        return []
    label = f"{files.prefix}_ca"
    try:
        certificates = x509.load_pem_x509_certificates(read_authority(files.ca, name=label))
    except InvalidInput as failure:
        yield error("tls", failure.message, f"set {label} to a readable PEM file of the authority's certificate")
        return []
    for certificate in certificates:
        yield _validity(f"{label} {files.ca} ({_subject(certificate)})", certificate, now)
    return certificates


def _identity_results(
    files: TlsFiles, authorities: Sequence[x509.Certificate], now: datetime.datetime
) -> Iterator[Result]:
    label = f"{files.prefix}_cert"
    try:
        identity = read_identity(files.cert, files.key, name=files.prefix)
    except InvalidInput as failure:
        yield error("tls", failure.message, f"set {label} and {files.prefix}_key to a certificate and its own key")
        return
    if identity is None:
        raise AssertionError("read_identity() returned None although a file is set")
    leaf, *chain = x509.load_pem_x509_certificates(identity.certificate)
    names = names_of(leaf)
    yield _validity(f"{label} {files.cert} (for {', '.join(names) or 'no name'}; key matches)", leaf, now)
    for certificate in chain:
        yield _validity(f"{label} {files.cert}, issuer {_subject(certificate)}", certificate, now)
    if authorities and not _is_signed(leaf, chain, authorities):
        yield error(
            "tls",
            f"{label} {files.cert} is not signed by {files.prefix}_ca {files.ca}, so peers refuse it",
            "issue the certificate by that authority, or set its own authority",
        )
    if not names:
        yield warning(
            "tls",
            f"{label} {files.cert} has no subject alternative name, so clients refuse it",
            "issue it with the DNS names or IP addresses of the service",
        )
    elif files.name and files.name not in names:
        yield warning(
            "tls",
            f"{label} {files.cert} is not for {files.name}, the name that {files.peers} verify by default",
            f"issue it with the DNS name {files.name}",
        )


def _validity(label: str, certificate: x509.Certificate, now: datetime.datetime) -> Result:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return error(
            "tls", f"{label} is not valid before {_day(begin)}", "correct this host's clock, or reissue the certificate"
        )
    if now > end:
        return error("tls", f"{label} expired on {_day(end)}", "renew it; services reread the file without a restart")
    if end - now < min(_NOTICE, _SHARE_LEFT * (end - begin)):
        return warning("tls", f"{label} expires on {_day(end)}", "renew it; services reread the file without a restart")
    return ok("tls", f"{label} is valid until {_day(end)}")


def _is_signed(
    leaf: x509.Certificate, chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> bool:
    """Whether an authority has signed the certificate, directly or through certificates of the chain."""
    reached, waiting = [leaf], list(chain)
    while reached:
        certificate = reached.pop()
        if certificate in authorities or any(_has_issued(each, certificate) for each in authorities):
            return True
        issuers = [each for each in waiting if _has_issued(each, certificate)]
        waiting = [each for each in waiting if each not in issuers]
        reached += issuers
    return False


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses of a certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _subject(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
