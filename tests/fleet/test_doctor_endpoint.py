"""`fleet doctor --endpoint` checks a running coordinator, its API, its models and their workers."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from async_tests import run_bounded, wait_until
from certificates import Authority
from common.errors import FailedPrecondition, Unavailable
from common.rpc.fleet_server import FleetServer
from common.state.connection import connect
from common.telemetry import start_metrics
from coordinator_fleet import FakeFleet, Script, run_on_fleet
from doctor_lines import lines
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from redis_servers import fill
from services.cli import doctor
from services.cli.access import IN_THE_CLEAR, Access
from services.cli.doctor_endpoint import check_endpoint, contract_result, elements_of, model_results, own_files
from services.cli.doctor_ports import check_endpoint_ports, reached_addresses

KEY = "key-of-alice"
SERVICE = "fleet.v1.GenerationService"


async def checked(endpoint: str, access: Access = IN_THE_CLEAR, **own: str) -> list[str]:
    """Check an endpoint; returns the results as lines."""
    return await asyncio.to_thread(lambda: lines(check_endpoint(endpoint, access, own)))


def test_complete_fleet_has_no_findings(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        coordinator, _ = await fleet.add_coordinator()
        fingerprint = fleet.model.checkpoint.fingerprint
        health, contract, model = await checked(coordinator.address, emoji=fingerprint)
        assert health == f"ok endpoint: {coordinator.address} is ready"
        assert contract.startswith("ok contract: same API as this installation: ")
        assert int(contract.split(": ")[2].split()[0]) > 100
        assert model == ("ok model emoji: live workers: text_encoding 1, latent_preparation 1, denoising 1, decoding 1")
        assert (await checked(coordinator.address, emoji="f" * 64))[-1].startswith(
            f"error model emoji: the fleet serves checkpoint {fingerprint[:12]}, but --model is ffffffffffff: "
        )

    run_on_fleet(store_url, scenario)


def test_missing_and_refused_workers_and_broken_kernels_are_warnings(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator()
        worker = await fleet.add_worker("denoising")
        broken = worker_pb2.KernelPackage(name="fa3-fwd", version="0.0.3", error="OSError: a", replacement="cuDNN")
        worker.info.kernels.append(broken)
        await worker.registry.announce(worker.info)
        refused = copy.deepcopy(worker.info)
        refused.worker_id, refused.model_fingerprint = "stranger", "0" * 64
        with pytest.raises(FailedPrecondition, match="from a checkpoint with fingerprint"):
            await worker.registry.announce(refused)
        _, _, without, stranger, kernel = await checked(coordinator.address)
        assert without.startswith(
            "warning model emoji: no worker serves text_encoding, latent_preparation, decoding: requests wait for a "
            "worker "
        )
        assert stranger.startswith("warning model emoji: worker stranger of denoising was refused at ")
        assert kernel.startswith(
            "warning model emoji: workers of denoising: fa3-fwd 0.0.3 is unusable, cuDNN is used: OSError: a -> "
        )

    run_on_fleet(store_url, scenario)


def test_incompatible_worker_is_a_warning(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator()
        await fleet.add_workers(("text_encoding", "latent_preparation", "decoding"))
        contract = fleet.scripts["denoising"].contract
        incompatible = await fleet.add_worker("denoising", Script(replace(contract, outputs={})))
        *_, without, line = await checked(coordinator.address)
        assert without.startswith("warning model emoji: no worker serves denoising: ")
        assert line.startswith(
            f"warning model emoji: worker {incompatible.info.worker_id} is incompatible: output 'denoised_latents': "
        )

    run_on_fleet(store_url, scenario)


def test_full_store_and_unready_coordinator_are_reported(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator()
        async with connect(fleet.url) as redis:
            await redis.config_set("maxmemory", 8 << 20)
            await fill(redis, 15 << 19)

            async def is_reported() -> bool:
                return "its store is full" in (await checked(coordinator.address))[0]

            await wait_until(is_reported)
            await redis.delete("filler")
            await redis.config_set("maxmemory", 0)
        coordinator_server: Any = coordinator
        coordinator_server._housekeeping.cancel()  # it would set the coordinator ready
        await asyncio.wait({coordinator_server._housekeeping})
        await coordinator_server._server.set_ready(False)
        line = (await checked(coordinator.address))[0]
        assert line.startswith(f"error endpoint: {coordinator.address} answers, but is not ready: server NOT_SERVING, ")

    run_on_fleet(store_url, scenario)


def test_caller_without_a_key_gets_health_and_contract(store_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[callers.alice]\nkey_sha256 = ["{hashlib.sha256(KEY.encode()).hexdigest()}"]\n')

    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator(api_keys=keys)
        health, contract, refused = await checked(coordinator.address)
        assert health.startswith("ok endpoint: ")
        assert contract.startswith("ok contract: ")
        assert refused.startswith("error endpoint: ")
        assert refused.endswith(" -> set FLEET_API_KEY to a valid key")
        known = await checked(coordinator.address, Access(None, KEY))
        assert known[-1].startswith("warning model emoji: no worker serves ")
        assert KEY not in "".join(known)

    run_on_fleet(store_url, scenario)


def test_tls_endpoint_is_checked(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    fleet_ca, others = Authority(tmp_path / "fleet"), Authority(tmp_path / "others", "others")
    certificate = fleet_ca.issue("localhost")

    async def scenario(fleet: FakeFleet) -> None:
        settings = {"listen": "localhost:0", "tls_public_cert": certificate.cert, "tls_public_key": certificate.key}
        coordinator, _ = await fleet.add_coordinator(**settings)
        command = ["--endpoint", coordinator.address]
        for ca, code in ((fleet_ca.ca, 1), (others.ca, 2)):
            assert await asyncio.to_thread(doctor.main, [*command, "--tls-ca", str(ca)]) == code
        out = capsys.readouterr().out
        assert f"ok       endpoint          {coordinator.address} is ready" in out
        assert f"error    endpoint          TLS handshake with {coordinator.address} failed" in out

    run_on_fleet(store_url, scenario)


def ports_of(endpoint: str, **values: object) -> list[str]:
    return lines(check_endpoint_ports(endpoint, values))


def test_health_scaler_and_metrics_ports_are_checked(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        health = f"unix:{fleet.directory}/health.sock"
        coordinator, _ = await fleet.add_coordinator(health_listen=health, scaler_listen="127.0.0.1:0")
        scaler, endpoint = coordinator.scaler_address, "127.0.0.1:1"
        metrics = start_metrics(0, "127.0.0.1")
        try:
            values = {"health_listen": health, "scaler_listen": scaler, "metrics_port": metrics.port}
            assert await asyncio.to_thread(lambda: ports_of(endpoint, **values)) == [
                f"ok endpoint ports: health_listen: {health} is ready",
                f"ok endpoint ports: scaler_listen: {scaler} is ready",
                f"ok endpoint ports: metrics_port: 127.0.0.1:{metrics.port} serves the metrics of a coordinator",
            ]
            assert await asyncio.to_thread(lambda: ports_of(endpoint, scaler_listen=scaler, tls_ca="x")) == [
                f"ok endpoint ports: scaler_listen: {scaler} accepts connections; callers need a client certificate"
            ]
            # Without tls_ca, only `listen` uses TLS.
            assert await asyncio.to_thread(lambda: ports_of(endpoint, scaler_listen=scaler, tls_cert="x")) == [
                f"ok endpoint ports: scaler_listen: {scaler} is ready"
            ]
        finally:
            metrics.stop()
        await coordinator.stop(0)
        stopped = await asyncio.to_thread(lambda: ports_of(endpoint, **values))
        assert [each.partition(" -> ")[0] for each in stopped] == [
            f"warning endpoint ports: health_listen: {health} does not respond: UNAVAILABLE",
            f"warning endpoint ports: scaler_listen: {scaler} does not respond: UNAVAILABLE",
            f"warning endpoint ports: metrics_port: 127.0.0.1:{metrics.port} does not answer: Connection refused",
        ]
        tls = await asyncio.to_thread(lambda: ports_of(endpoint, scaler_listen=scaler, tls_ca="x"))
        assert tls[0].startswith(f"warning endpoint ports: scaler_listen: {scaler} does not answer: Connection refused")

    run_on_fleet(store_url, scenario)


def test_port_of_another_program_is_a_warning() -> None:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        (line,) = ports_of("127.0.0.1:1", metrics_port=server.server_port)
        assert line.startswith(
            f"warning endpoint ports: metrics_port: 127.0.0.1:{server.server_port} serves no coordinator metri"
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_only_ports_that_are_reachable_at_the_endpoints_host_are_checked() -> None:
    values = {"listen": "0.0.0.0:1", "health_listen": "0.0.0.0:2", "scaler_listen": "127.0.0.1:3", "metrics_port": 4}
    remote = {"health_listen": "remote.example:2", "metrics_port": "remote.example:4"}
    assert reached_addresses("remote.example:1", values) == remote, (
        "a loopback address of another host is reported as reachable"
    )
    local = {"health_listen": "127.0.0.1:2", "scaler_listen": "127.0.0.1:3", "metrics_port": "127.0.0.1:4"}
    assert reached_addresses("unix:/run/fleet.sock", values) == local


def test_missing_server_and_server_of_another_api_are_errors(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(Unavailable, match="no fleet answers at"):
            await checked(f"unix:{tmp_path}/missing.sock")
        server = FleetServer("127.0.0.1:0")
        address = await server.start()
        await server.set_ready(True)
        health, _, refused = await checked(address)
        expected = f"error endpoint: {address} answers, but is not ready: server SERVING, {SERVICE} NOT_FOUND, "
        assert health.startswith(expected)
        unknown = "the method is not implemented by this server"
        assert refused == f"error endpoint: ListModels failed: {unknown} -> connect to a coordinator"
        await server.drain(0)

    run_bounded(scenario)


def test_silent_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.doctor_endpoint._SECONDS", 0.3)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(Unavailable, match=r"gave no answer within 0.3 s"):
            asyncio.run(checked(f"127.0.0.1:{port}"))


def test_api_versions_are_compared() -> None:
    ours = elements_of(own_files())
    name = "fleet.v1.Model.refused_workers"
    assert "fleet.v1.GenerationService.Submit" in ours
    older = {each: kind for each, kind in ours.items() if each != name}
    assert lines([contract_result(older, ours)]) == [
        f"warning contract: the fleet is older than this client: it lacks {name} -> update the fleet, or install its "
        "release here"
    ]
    assert lines([contract_result(ours, older)])[0].startswith("ok contract: the fleet is newer and compatible")
    other = {**ours, name: ours[name].replace("20 ", "21 ", 1)}
    assert lines([contract_result(other, ours)])[0].startswith(f"error contract: the fleet has another type for {name}")
    assert lines([contract_result({}, ours)])[0].startswith("error contract: the endpoint has no fleet.v1.Generation")


def test_unserved_variants_are_warnings() -> None:
    variant = pb.Variant(name="image", error="lacks image_encoder")
    listed = lines(model_results(pb.Model(name="a", variants=[variant]), ""))
    assert listed[-1].startswith("warning model a: variant image is not served: lacks image_encoder -> ")


def test_endpoint_without_reflection_is_a_warning() -> None:
    async def scenario() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        _, contract, _ = await checked(f"127.0.0.1:{port}")
        assert contract.startswith("warning contract: the API cannot be read: ")
        await server.stop(None)

    run_bounded(scenario)
