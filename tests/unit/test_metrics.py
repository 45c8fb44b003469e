"""Metrics: one module, a rule for each label, units, and measurements of stages, store and GPUs."""

from __future__ import annotations

import ast
import asyncio
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from async_tests import HANG_SECONDS
from common import metrics
from common.errors import Unavailable
from common.metrics import work_label
from common.rpc.framing import Packet
from common.rpc.method import TOKENS_KEY
from common.rpc.parsing import read_tokens
from common.stage import Call, Contract
from common.state.connection import command, connect, run_script
from common.state.leases import Leases
from fleet.v1 import artifacts_pb2
from metric_table import all_metrics, labels_of
from services import gpu_metrics
from services.coordinator.resume import NewestStepCheckpoint
from services.measured_stages import MeasuredStages

ROOT = Path(__file__).resolve().parents[2]
_UNITS = re.compile(r".*_(seconds|bytes|ratio)$")
_COUNTS = frozenset(
    {
        "fleet_rpc_in_flight",
        "fleet_open_requests",
        "fleet_queue_length",
        "fleet_workers_live",
        "fleet_workers_held",
        "fleet_workers_dead",
        "fleet_workers_incompatible",
        "fleet_store_repairs",
    }
)
"""Gauges without a unit, since they count objects."""


def _sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def metric_definitions(source: str) -> Iterator[str]:
    """Calls of metric classes of prometheus_client, also through aliases of imported classes."""
    kinds = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prometheus_client")
        for alias in node.names
        if alias.name in kinds
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(name) if name in imported:
                    yield name
                case ast.Attribute(ast.Name("prometheus_client"), name) if name in kinds:
                    yield name


def test_metrics_are_defined_in_one_module() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("common", "configs", "models", "services")
        for path in (ROOT / folder).rglob("*.py")
        if list(metric_definitions(path.read_text(encoding="utf-8")))
    }
    assert found == {"common/metrics.py"}


@pytest.mark.parametrize(
    "source",
    [
        "from prometheus_client import Counter as C\nX = C('a', 'b')",
        "import prometheus_client\nX = prometheus_client.Gauge('a', 'b')",
    ],
)
def test_a_metric_definition_is_found(source: str) -> None:
    assert list(metric_definitions(source))


def test_each_label_has_a_rule_and_each_rule_a_label() -> None:
    used = {label for each in all_metrics() for label in labels_of(each)}
    assert used == metrics.LABELS.keys()


def test_names_end_with_their_base_unit() -> None:
    for each in all_metrics():
        (family,) = each.describe()
        assert family.documentation
        if family.type == "gauge":
            assert _UNITS.match(family.name) or family.name in _COUNTS, family.name
        elif family.type != "counter":  # the name of a counter ends with _total
            assert _UNITS.match(family.name), family.name


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(0, "unknown"), (1, "65536"), (65_536, "65536"), (65_537, "262144"), (1 << 30, "1073741824"), (1 << 31, "more")],
)
def test_the_work_label_has_few_values(tokens: int, label: str) -> None:
    assert work_label(tokens) == label
    assert label in metrics.LABELS["work"]


@pytest.mark.parametrize(
    ("metadata", "tokens"),
    [
        ({TOKENS_KEY: "1024"}, 1_024),
        ({}, 0),
        ({TOKENS_KEY: "many"}, 0),
        ({TOKENS_KEY: "9" * 40}, 0),
        ({TOKENS_KEY: "-1"}, 0),
    ],
)
def test_tokens_are_read_from_metadata(metadata: Mapping[str, str], tokens: int) -> None:
    assert read_tokens(metadata) == tokens


class _Clock:
    """A settable replacement of time.monotonic()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class _Loop:
    """Stages that report `steps` and end at `ends`. A step is (step number, time in seconds)."""

    contract = Contract("loop", {}, {})

    def __init__(self, clock: _Clock, steps: list[tuple[int, float]], ends: float) -> None:
        self._clock = clock
        self._steps = steps
        self._ends = ends

    def contract_of(self, variant: str) -> Contract:
        del variant
        return self.contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        if values:
            raise ValueError("the stages fail")
        for step, at in self._steps:
            self._clock.now = at
            call.on_progress(step, 9)
        self._clock.now = self._ends
        return {}


def test_steps_and_times_of_the_device_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    stages = MeasuredStages(_Loop(clock, [(1, 103.0), (2, 104.0), (4, 110.0)], 111.0), "denoising", "measured")
    labels = {"service": "denoising", "model": "measured"}
    recorded: list[tuple[int, float]] = []

    def record(step: int, _: int) -> None:
        recorded.append((step, _sample("fleet_device_busy_seconds_total", **labels)))

    stages.run({}, Call("r", on_progress=record, tokens=70_000))
    assert recorded == [(1, 3.0), (2, 4.0), (4, 10.0)], "pairs of step and busy seconds"
    steps = {**labels, "work": "262144"}
    assert _sample("fleet_step_seconds_count", **steps) == 2, (
        "the first reported step includes the preparation and must not count"
    )
    assert _sample("fleet_step_seconds_sum", **steps) == 1.0 + 3.0
    assert _sample("fleet_device_busy_seconds_total", **labels) == 11.0
    assert _sample("fleet_device_idle_seconds_count", **labels) == 0, "idle time needs an earlier call"
    clock.now = 115.0
    with pytest.raises(ValueError, match="fail"):
        stages.run({"x": 1}, Call("r"))
    assert _sample("fleet_device_idle_seconds_sum", **labels) == 4.0
    assert _sample("fleet_device_idle_seconds_count", **labels) == 1


class _Overlapping:
    """Stages whose first call waits for `ends`, so that a second call overlaps it."""

    contract = Contract("sessions", {}, {})

    def __init__(self) -> None:
        self.began, self.ends = threading.Event(), threading.Event()

    def contract_of(self, variant: str) -> Contract:
        del variant
        return self.contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        del values
        if call.request_id == "first":
            self.began.set()
            assert self.ends.wait(HANG_SECONDS)
        return {}


def test_overlapping_calls_have_no_idle_time() -> None:
    inner = _Overlapping()
    stages = MeasuredStages(inner, "decoding", "overlapping")
    labels = {"service": "decoding", "model": "overlapping"}
    thread = threading.Thread(target=stages.run, args=({}, Call("first")))
    thread.start()
    assert inner.began.wait(HANG_SECONDS)
    stages.run({}, Call("second"))
    inner.ends.set()
    thread.join()
    assert _sample("fleet_device_idle_seconds_count", **labels) == 0
    assert _sample("fleet_device_busy_seconds_total", **labels) > 0
    stages.run({}, Call("third"))
    assert _sample("fleet_device_idle_seconds_count", **labels) == 1


def test_round_trips_of_the_store_are_measured_by_operation() -> None:
    async def refused() -> None:
        async with connect("redis://127.0.0.1:1") as redis:
            for work in (command(redis, "PING"), run_script(redis, "status", {"place": "a/b"})):
                with pytest.raises(Unavailable):
                    await work
            pipeline = redis.pipeline()
            pipeline.get("a")
            with pytest.raises(RedisConnectionError):
                await pipeline.execute()

    names = ("PING", "status", "pipeline")
    before = [_sample("fleet_store_operation_seconds_count", operation=name, result="error") for name in names]
    asyncio.run(refused())
    after = [_sample("fleet_store_operation_seconds_count", operation=name, result="error") for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 1]


def test_a_failed_command_of_a_pipeline_counts_as_an_error(store_url: str) -> None:
    """The error counts although `raise_on_error=False` suppresses the exception."""

    async def scenario(url: str) -> None:
        async with connect(url) as redis:
            for transaction in (False, True):
                pipeline = redis.pipeline(transaction=transaction)
                pipeline.set("a", "text")
                pipeline.hget("a", "field")
                assert isinstance((await pipeline.execute(raise_on_error=False))[1], ResponseError)
            pipeline = redis.pipeline(transaction=False)
            pipeline.execute_command("MULTI")
            pipeline.hget("a", "field")
            pipeline.execute_command("EXEC")
            await pipeline.execute(raise_on_error=False)
            pipeline.evalsha("0" * 40, 0)
            assert isinstance((await pipeline.execute(raise_on_error=False))[0], NoScriptError)

    results = ("error", "ok")
    before = [_sample("fleet_store_operation_seconds_count", operation="pipeline", result=each) for each in results]
    asyncio.run(scenario(store_url))
    after = [_sample("fleet_store_operation_seconds_count", operation="pipeline", result=each) for each in results]
    assert [new - old for new, old in zip(after, before, strict=True)] == [3, 1]


def test_a_cancelled_round_trip_is_not_counted_as_an_error() -> None:
    """A Watch cancels its round trip when its caller disconnects."""
    label = {"operation": "PING", "result": "cancelled"}
    before = _sample("fleet_store_operation_seconds_count", **label)

    async def cancelled_ping() -> None:
        async with connect("redis://127.0.0.1:1") as redis:
            task = asyncio.create_task(command(redis, "PING"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()

    asyncio.run(cancelled_ping())
    assert _sample("fleet_store_operation_seconds_count", **label) == before + 1


def test_a_failed_save_of_a_step_checkpoint_is_counted() -> None:
    labels = {"result": "failed"}
    before = _sample("fleet_step_checkpoint_saves_total", **labels)

    async def unavailable() -> None:
        async with connect("redis://127.0.0.1:1") as redis:
            newest = NewestStepCheckpoint(Leases(redis, "coordinator"), "r", 1)
            newest.remember("origin", Packet(artifacts_pb2.DenoiseState(step=1), {}))
            await newest.settle()

    asyncio.run(unavailable())
    assert _sample("fleet_step_checkpoint_saves_total", **labels) == before + 1


class _Properties:
    total_memory = 1_000


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs; NVML reads the memory of both, but only the utilization of the first."""

    def utilization(index: int) -> int:
        if index:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 25

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Properties())
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 100 * (1 + index))
    monkeypatch.setattr(torch.cuda, "utilization", utilization)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_read_at_each_scrape(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu_metrics.export_gpus(gpu_metrics.gpu_indices(torch.device("cuda", 0), 2))
    assert [_sample("fleet_gpu_memory_total_bytes", device=each) for each in "01"] == [1_000, 1_000]
    assert [_sample("fleet_gpu_memory_used_bytes", device=each) for each in "01"] == [100, 200]
    assert REGISTRY.get_sample_value("fleet_gpu_utilization_ratio", {"device": "0"}) == 0.25
    assert REGISTRY.get_sample_value("fleet_gpu_utilization_ratio", {"device": "1"}) is None
    assert "gpu=1 metric=fleet_gpu_utilization_ratio" in caplog.text
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda _: 300)
    assert _sample("fleet_gpu_memory_used_bytes", device="0") == 300

    def lost(_: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(torch.cuda, "device_memory_used", lost)
    value = REGISTRY.get_sample_value("fleet_gpu_memory_used_bytes", {"device": "0"})
    assert value != value, "a failed read must give NaN and must not fail the scrape"


def test_a_worker_on_a_cpu_exports_no_gpu() -> None:
    assert not gpu_metrics.gpu_indices(torch.device("cpu"), 1)


def test_the_metrics_module_defines_prometheus_metrics() -> None:
    assert all(isinstance(each, MetricWrapperBase) for each in all_metrics())
    assert len(all_metrics()) > 40
