"""`fleet doctor`: certificates, keys and authorities of settings."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest

from certificates import Authority
from doctor_lines import lines
from services.cli import doctor
from services.cli.__main__ import main
from services.cli.doctor_settings import ServiceSource
from services.cli.doctor_tls import TlsFiles, check_service_tls, check_tls, files_of

DAY = datetime.timedelta(days=1)


def test_valid_files_are_reported_with_names_and_expiry(fleet_ca: Authority) -> None:
    issued = fleet_ca.issue("coordinator", "fleet.example", "10.0.0.1")
    files = files_of({"tls_cert": issued.cert, "tls_key": issued.key, "tls_ca": fleet_ca.ca}, "coordinator")
    authority, certificate = lines(check_tls(files))
    assert authority.startswith(f"ok tls: tls_ca {fleet_ca.ca} (authority) is valid until 20")
    expected = (
        f"ok tls: tls_cert {issued.cert} (for coordinator, fleet.example, 10.0.0.1; key matches) is valid until 20"
    )
    assert certificate.startswith(expected)


def test_no_line_is_printed_without_files() -> None:
    assert not lines(check_tls(files_of(ServiceSource().values, "coordinator")))


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        (-DAY, "error tls: tls_cert .* expired on 20.* -> renew it"),
        (DAY / 24, "warning tls: tls_cert .* expires on 20.* -> renew it"),
        (13 * DAY, "ok tls: tls_cert"),
        (400 * DAY, "ok tls: tls_cert"),
    ],
)
def test_expired_and_expiring_certificates_are_reported(
    valid: datetime.timedelta, expected: str, fleet_ca: Authority
) -> None:
    issued = fleet_ca.issue("worker", valid=valid)
    (line,) = lines(check_tls([TlsFiles("tls", issued.cert, issued.key)]))
    assert re.match(expected, line)


def test_long_lived_certificates_are_a_warning_two_weeks_before_expiry(fleet_ca: Authority) -> None:
    issued = fleet_ca.issue("worker", valid=400 * DAY)
    now = datetime.datetime.now(datetime.UTC)
    states = [
        lines(check_tls([TlsFiles("tls", issued.cert, issued.key)], now + days * DAY))[0].split()[0]
        for days in (-3, 0, 385, 387, 401)
    ]
    assert states == ["error", "ok", "ok", "warning", "error"]


def test_an_expired_authority_is_an_error(fleet_ca: Authority) -> None:
    later = datetime.datetime.now(datetime.UTC) + 2 * DAY
    (line,) = lines(check_tls([TlsFiles("tls_client", ca=fleet_ca.ca)], later))
    assert line.startswith(f"error tls: tls_client_ca {fleet_ca.ca} (authority) expired on ")


def test_mismatched_keys_and_missing_files_are_errors(fleet_ca: Authority, tmp_path: Path) -> None:
    one, other = fleet_ca.issue("one"), fleet_ca.issue("other")
    (line,) = lines(check_tls([TlsFiles("tls", one.cert, other.key)]))
    assert f"{one.cert} and {other.key} cannot be used: the key is of another certificate -> set tls_cert" in line
    (line,) = lines(check_tls([TlsFiles("tls_public", one.cert)]))
    assert line.startswith("error tls: tls_public_cert is set without tls_public_key -> ")
    (line,) = lines(check_tls([TlsFiles("tls", ca=tmp_path / "nowhere.pem")]))
    assert "nowhere.pem cannot be read: No such file" in line


def test_a_certificate_of_another_authority_is_an_error(
    fleet_ca: Authority, other_ca: Authority, tmp_path: Path
) -> None:
    issued = other_ca.issue("worker")
    found = lines(check_tls([TlsFiles("tls", issued.cert, issued.key, fleet_ca.ca)]))
    assert found[-1].startswith(
        f"error tls: tls_cert {issued.cert} is not signed by tls_ca {fleet_ca.ca}, so peers refuse"
    )
    bundle = tmp_path / "both.pem"
    bundle.write_bytes(fleet_ca.ca.read_bytes() + other_ca.ca.read_bytes())
    found = lines(check_tls([TlsFiles("tls", issued.cert, issued.key, bundle)]))
    assert [line.split()[0] for line in found] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(("service", "name"), [("coordinator", "coordinator"), ("decoding", "worker")])
def test_a_certificate_without_the_name_that_peers_expect_is_a_warning(
    service: str, name: str, fleet_ca: Authority
) -> None:
    issued = fleet_ca.issue("unrelated")
    values = {"tls_cert": issued.cert, "tls_key": issued.key, "tls_ca": fleet_ca.ca}
    assert lines(check_tls(files_of(values, service)))[-1].startswith(
        f"warning tls: tls_cert {issued.cert} is not for {name}, the name that "
    )
    assert len(lines(check_tls(files_of({**values, "tls_ca": None}, service)))) == 1, (
        "without tls_ca, clients verify the host name"
    )


@pytest.mark.parametrize(
    ("valid", "expected"),
    [(DAY, ["ok", "ok", "ok"]), (-DAY, ["ok", "ok", "error"])],
)
def test_a_certificate_chain_is_verified_up_to_the_authority(
    valid: datetime.timedelta, expected: list[str], tmp_path: Path
) -> None:
    root = Authority(tmp_path / "root", path_length=1)
    intermediate = root.subordinate("intermediate", valid)
    issued = intermediate.issue("worker")
    files = [TlsFiles("tls", issued.cert, issued.key, root.ca)]
    assert "is not signed by tls_ca" in lines(check_tls(files))[-1]
    issued.cert.write_bytes(issued.cert.read_bytes() + intermediate.ca.read_bytes())
    found = lines(check_tls(files))
    assert [line.split()[0] for line in found] == expected
    assert f"tls_cert {issued.cert}, issuer intermediate " in found[-1]


def test_a_certificate_before_its_validity_is_an_error(fleet_ca: Authority) -> None:
    issued = fleet_ca.issue("worker")
    earlier = datetime.datetime.now(datetime.UTC) - 3 * DAY
    (line,) = lines(check_tls([TlsFiles("tls", issued.cert, issued.key)], earlier))
    assert "(for worker; key matches) is not valid before 20" in line
    assert line.startswith("error tls: ")


def test_a_client_certificate_may_have_any_name(fleet_ca: Authority) -> None:
    issued = fleet_ca.issue("unrelated")
    values = {"tls_cert": issued.cert, "tls_key": issued.key, "tls_ca": fleet_ca.ca}
    assert [line.split()[0] for line in lines(check_service_tls(values, ""))] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("service", "names", "expected"),
    [
        (
            "coordinator",
            ["tls_ca"],
            "error tls: tls_ca is set without tls_cert and tls_key, which the service must present",
        ),
        ("", ["tls_ca"], ""),
        ("decoding", ["tls_cert", "tls_key"], "error tls: tls_cert is set without tls_ca, by which a worker verifies"),
        ("coordinator", ["tls_cert", "tls_key"], ""),
        (
            "coordinator",
            ["tls_client_ca"],
            "error tls: tls_client_ca is set without tls_cert and tls_key, which clients",
        ),
        ("coordinator", ["tls_client_ca", "tls_public_cert", "tls_public_key"], ""),
    ],
)
def test_incomplete_sets_of_files_are_errors(
    service: str, names: list[str], expected: str, fleet_ca: Authority
) -> None:
    issued = fleet_ca.issue("coordinator", "worker")
    files = {"ca": fleet_ca.ca, "cert": issued.cert, "key": issued.key}
    values = {name: files[name.rpartition("_")[2]] for name in names}
    wrong = [line for line in lines(check_service_tls(values, service)) if not line.startswith("ok ")]
    assert wrong[0].startswith(expected) if expected else not wrong


def test_variables_and_flags_name_the_files(
    fleet_ca: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expired, own = fleet_ca.issue("expired", valid=-DAY), fleet_ca.issue("own")
    monkeypatch.setenv("FLEET_TLS_PUBLIC_CERT", str(expired.cert))
    monkeypatch.setenv("FLEET_TLS_PUBLIC_KEY", str(expired.key))
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    assert main(["doctor", "--tls-cert", str(own.cert), "--tls-key", str(own.key)]) == 2
    out = capsys.readouterr().out
    assert f"error    tls               tls_public_cert {expired.cert} (for expired; key matches) expired on" in out
    assert f"ok       tls               tls_cert {own.cert} (for own; key matches) is valid until" in out
