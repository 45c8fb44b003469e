"""`fleet doctor`: certificates, keys and authorities that settings name."""

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


@pytest.fixture
def fleet(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "fleet")


def test_files_of_a_fleet_are_right(fleet: Authority) -> None:
    shown = fleet.issue("coordinator", "fleet.example", "10.0.0.1")
    files = files_of({"tls_cert": shown.cert, "tls_key": shown.key, "tls_ca": fleet.ca}, "coordinator")
    authority, certificate = lines(check_tls(files))
    assert authority.startswith(f"ok tls: tls_ca {fleet.ca} (authority) is valid until 20")
    named = f"ok tls: tls_cert {shown.cert} (for coordinator, fleet.example, 10.0.0.1; key matches) is valid until 20"
    assert certificate.startswith(named)


def test_without_files_there_is_no_line() -> None:
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
def test_certificates_end(valid: datetime.timedelta, expected: str, fleet: Authority) -> None:
    shown = fleet.issue("worker", valid=valid)
    (line,) = lines(check_tls([TlsFiles("tls", shown.cert, shown.key)]))
    assert re.match(expected, line)


def test_long_certificates_are_announced_two_weeks_before_their_end(fleet: Authority) -> None:
    shown = fleet.issue("worker", valid=400 * DAY)
    now = datetime.datetime.now(datetime.UTC)
    states = [
        lines(check_tls([TlsFiles("tls", shown.cert, shown.key)], now + days * DAY))[0].split()[0]
        for days in (-3, 0, 385, 387, 401)
    ]
    assert states == ["error", "ok", "ok", "warning", "error"]


def test_an_authority_that_has_expired(fleet: Authority) -> None:
    later = datetime.datetime.now(datetime.UTC) + 2 * DAY
    (line,) = lines(check_tls([TlsFiles("tls_client", ca=fleet.ca)], later))
    assert line.startswith(f"error tls: tls_client_ca {fleet.ca} (authority) expired on ")


def test_keys_of_other_certificates_and_files_that_are_none(fleet: Authority, tmp_path: Path) -> None:
    one, other = fleet.issue("one"), fleet.issue("other")
    (line,) = lines(check_tls([TlsFiles("tls", one.cert, other.key)]))
    assert f"{one.cert} and {other.key} cannot be used: the key is of another certificate -> set tls_cert" in line
    (line,) = lines(check_tls([TlsFiles("tls_public", one.cert)]))
    assert line.startswith("error tls: tls_public_cert is set without tls_public_key -> ")
    (line,) = lines(check_tls([TlsFiles("tls", ca=tmp_path / "nowhere.pem")]))
    assert "nowhere.pem cannot be read: No such file" in line


def test_a_certificate_of_another_authority(fleet: Authority, tmp_path: Path) -> None:
    others = Authority(tmp_path / "others", "others")
    shown = others.issue("worker")
    found = lines(check_tls([TlsFiles("tls", shown.cert, shown.key, fleet.ca)]))
    assert found[-1].startswith(f"error tls: tls_cert {shown.cert} is not signed by tls_ca {fleet.ca}, so peers refuse")
    bundle = tmp_path / "both.pem"
    bundle.write_bytes(fleet.ca.read_bytes() + others.ca.read_bytes())
    found = lines(check_tls([TlsFiles("tls", shown.cert, shown.key, bundle)]))
    assert [line.split()[0] for line in found] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(("service", "name"), [("coordinator", "coordinator"), ("decoding", "worker")])
def test_the_name_that_peers_look_for(service: str, name: str, fleet: Authority) -> None:
    shown = fleet.issue("somebody")
    values = {"tls_cert": shown.cert, "tls_key": shown.key, "tls_ca": fleet.ca}
    assert lines(check_tls(files_of(values, service)))[-1].startswith(
        f"warning tls: tls_cert {shown.cert} is not for {name}, the name that "
    )
    assert len(lines(check_tls(files_of({**values, "tls_ca": None}, service)))) == 1, "clients look for the host"


@pytest.mark.parametrize(
    ("valid", "expected"),
    [(DAY, ["ok", "ok", "ok"]), (-DAY, ["ok", "ok", "error"])],
)
def test_a_chain_of_issuers_leads_to_the_authority(
    valid: datetime.timedelta, expected: list[str], tmp_path: Path
) -> None:
    root = Authority(tmp_path / "root", path_length=1)
    between = root.subordinate("between", valid)
    shown = between.issue("worker")
    files = [TlsFiles("tls", shown.cert, shown.key, root.ca)]
    assert "is not signed by tls_ca" in lines(check_tls(files))[-1]
    shown.cert.write_bytes(shown.cert.read_bytes() + between.ca.read_bytes())
    found = lines(check_tls(files))
    assert [line.split()[0] for line in found] == expected
    assert f"tls_cert {shown.cert}, issuer between " in found[-1]


def test_a_certificate_that_is_not_valid_yet(fleet: Authority) -> None:
    shown = fleet.issue("worker")
    earlier = datetime.datetime.now(datetime.UTC) - 3 * DAY
    (line,) = lines(check_tls([TlsFiles("tls", shown.cert, shown.key)], earlier))
    assert "(for worker; key matches) is not valid before 20" in line
    assert line.startswith("error tls: ")


def test_a_client_s_certificate_may_have_any_name(fleet: Authority) -> None:
    shown = fleet.issue("somebody")
    values = {"tls_cert": shown.cert, "tls_key": shown.key, "tls_ca": fleet.ca}
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
def test_files_that_need_others(service: str, names: list[str], expected: str, fleet: Authority) -> None:
    shown = fleet.issue("coordinator", "worker")
    files = {"ca": fleet.ca, "cert": shown.cert, "key": shown.key}
    values = {name: files[name.rpartition("_")[2]] for name in names}
    wrong = [line for line in lines(check_service_tls(values, service)) if not line.startswith("ok ")]
    assert wrong[0].startswith(expected) if expected else not wrong


def test_variables_and_flags_name_the_files(
    fleet: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expired, own = fleet.issue("expired", valid=-DAY), fleet.issue("own")
    monkeypatch.setenv("FLEET_TLS_PUBLIC_CERT", str(expired.cert))
    monkeypatch.setenv("FLEET_TLS_PUBLIC_KEY", str(expired.key))
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    assert main(["doctor", "--tls-cert", str(own.cert), "--tls-key", str(own.key)]) == 2
    out = capsys.readouterr().out
    assert f"error    tls               tls_public_cert {expired.cert} (for expired; key matches) expired on" in out
    assert f"ok       tls               tls_cert {own.cert} (for own; key matches) is valid until" in out
