"""Shared fixtures: stores, TLS authorities, small checkpoints, rank processes, and the root logger."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Runs Triton kernels on the CPU. Triton reads this variable at its first import, which `import torch` triggers.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from async_tests import HANG_SECONDS
from certificates import Authority
from common.state import presence
from flux_pair import Pair, open_pair
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from rank_pool import RankPool
from redis_servers import RedisServer, running_server, server_binaries
from tiny_flux import build_tiny_flux
from toy_checkpoint import build_toy_checkpoint, toy_family

# A loaded host makes single examples slow, which is no failure of the tested code.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Restore the root logger, which a service's main() configures for its process.

    Without this, a later log record is written to a closed stream, and logging prints an error on stderr.
    """
    root = logging.getLogger()
    level, handlers, logger_class = root.level, list(root.handlers), logging.getLoggerClass()
    yield
    logging.captureWarnings(False)
    logging.setLoggerClass(logger_class)
    root.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    for handler in set(handlers) - set(root.handlers):
        root.addHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def long_leave_timeout() -> Iterator[None]:
    """Give a withdrawal from the store HANG_SECONDS, because a slow store is no failure of the tested code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presence, "_LEAVE_SECONDS", HANG_SECONDS)
        yield


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    """URL of a Valkey server of this module."""
    with running_server("valkey") as server:
        yield server.url


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def each_store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server of this module. Each test runs with Valkey and, if Redis is installed, with Redis."""
    with running_server(request.param) as server:
        yield server.url


@pytest.fixture(params=sorted(server_binaries()))
def each_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server that the test may kill and restart. Each test runs with Valkey and, if installed, with Redis."""
    with running_server(request.param) as server:
        yield server


@pytest.fixture
def fleet_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority of the fleet."""
    return Authority(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority that the fleet does not trust."""
    return Authority(tmp_path_factory.mktemp("others"), "somebody else")


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The model "toy" of the toy family, whose plugin is loaded for this module."""
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as directory:
        path = build_toy_checkpoint(tmp_path_factory.mktemp("toy"))
        yield open_model(f"toy={path}", load_registry([directory]))


@pytest.fixture
def rounded_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.randn() draw bfloat16 noise as rounded float32 noise, as torch 2.13 and later do."""
    draw = torch.randn

    def rounded(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(*size, **options).to(dtype or torch.get_default_dtype())

    monkeypatch.setattr(torch, "randn", rounded)


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A checkpoint like FLUX.1-dev: guidance embedding, schedule shifted by image size."""
    with open_pair(str(build_tiny_flux(tmp_path_factory.mktemp("dev")))) as pair:
        yield pair


@pytest.fixture(scope="session")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A checkpoint like FLUX.1-schnell: no guidance embedding, schedule with a fixed shift."""
    path = tmp_path_factory.mktemp("schnell")
    with open_pair(str(build_tiny_flux(path, guidance_embeds=False, dynamic_shift=False, seed=1))) as pair:
        yield pair


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four CPU processes that form worker groups of any layout, one layout at a time."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
