"""The number of metric series is independent of the numbers of requests and callers.

run_monitoring.py checks this with 1,000 requests and a Prometheus server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from common import metrics
from common.state.records import State
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet_parts import Parts, run_parts
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from toy_checkpoint import build_toy_checkpoint, toy_family

_CALLERS = 50
_REQUESTS = 200
_CONCURRENT_REQUESTS = 8
_OUR_PREFIXES = ("fleet_", "grpc_")
_OUTCOMES = ("result", "reason", "begun", "state", "grpc_status", "operation")
"""Labels with a fixed set of values; rare values may appear late."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as directory:
        checkpoint = build_toy_checkpoint(tmp_path_factory.mktemp("toy") / "series")
        yield open_model(f"series={checkpoint}", load_registry([directory]))


def _label_sets() -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """(metric, label set) of all series, without the buckets of histograms."""
    return {
        (family.name, frozenset((name, value) for name, value in sample.labels.items() if name != "le"))
        for family in REGISTRY.collect()
        if family.name.startswith(_OUR_PREFIXES)
        for sample in family.samples
    }


def _values(label_sets: Iterable[tuple[str, frozenset[tuple[str, str]]]]) -> set[tuple[str, str]]:
    """(label, value) of all labels except _OUTCOMES."""
    return {(name, value) for _, labels in label_sets for name, value in labels if name not in _OUTCOMES}


def _write_keys(path: Path) -> list[str]:
    """Write the API keys file; returns the keys."""
    keys = [f"key-of-caller-{number:03}" for number in range(_CALLERS)]
    digests = (hashlib.sha256(key.encode()).hexdigest() for key in keys)
    path.write_text("".join(f'[callers.caller{n:03}]\nkey_sha256 = ["{each}"]\n' for n, each in enumerate(digests)))
    return keys


def _request(number: int, key: str) -> pb.SubmitRequest:
    """A request with its own prompt, seed and idempotency key; sizes and step counts repeat."""
    size = 8 * (1 + number % 12)
    parameters = pb.GenerationParameters(
        prompt=f"prompt {number}", seed=number, height=size, width=size, num_inference_steps=1 + number % 3
    )
    return pb.SubmitRequest(parameters=parameters, idempotency_key=f"{key}-{number}")


async def _run(stub: Stub, numbers: range, keys: list[str]) -> set[int]:
    """Submit requests and wait for them; returns the terminal states."""
    queue = iter(numbers)
    states: set[int] = set()

    async def client() -> None:
        for number in queue:
            key = keys[number % len(keys)]
            metadata = (("authorization", f"Bearer {key}"),)
            request_id = (await stub.Submit(_request(number, key), metadata=metadata)).request.request_id
            state = 0
            async for response in stub.Watch(pb.WatchRequest(request_id=request_id), metadata=metadata):
                state = response.event.state_change.state or state
            states.add(state)

    await asyncio.gather(*(client() for _ in range(_CONCURRENT_REQUESTS)))
    return states


def test_number_of_series_is_independent_of_requests_and_callers(toy: ServedModel, tmp_path: Path) -> None:
    keys = _write_keys(tmp_path / "keys.toml")

    async def scenario(parts: Parts) -> None:
        for spec in toy.services:
            await parts.add_worker(spec.service)
        _, stub = await parts.add_coordinator(api_keys=tmp_path / "keys.toml", step_seconds=10.0)
        succeeded = {State.REQUEST_STATE_SUCCEEDED}
        assert await _run(stub, range(50), keys[:1]) == succeeded
        before = _label_sets()
        assert await _run(stub, range(50, _REQUESTS), keys) == succeeded
        after = _label_sets()
        assert _values(after) == _values(before)
        assert {name for _, labels in after for name, _ in labels} <= metrics.LABELS.keys()
        assert len(after) <= len(before) + len(_OUTCOMES) * 4

    run_parts(toy, tmp_path, scenario)
