"""Exit codes of the containers' health probe."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.rpc.probe import main

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def address_and_servicer(tmp_path: Path) -> Iterator[tuple[str, health.HealthServicer]]:
    address = f"unix:{tmp_path}/s"
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    yield address, servicer
    server.stop(None).wait()


def test_a_serving_process_gives_exit_code_0(address_and_servicer: tuple[str, health.HealthServicer]) -> None:
    address, servicer = address_and_servicer
    servicer.set("", Status.SERVING)
    assert main([address]) == 0


def test_a_draining_process_gives_exit_code_1(
    address_and_servicer: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]
) -> None:
    address, servicer = address_and_servicer
    servicer.set("", Status.NOT_SERVING)
    assert main([address]) == 1
    assert "not serving" in capsys.readouterr().err


def test_an_address_without_a_server_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"unix:{tmp_path}/none"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_a_missing_address_gives_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
