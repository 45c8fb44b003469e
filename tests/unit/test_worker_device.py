"""Devices that the `device` setting of a worker selects.

A CUDA device has an index, because torch.cuda.set_device() needs an index.
"""

from __future__ import annotations

import pytest
import torch

from common.errors import FailedPrecondition, InvalidInput
from services.worker_settings import device_of


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_named_by_its_index(name: str, index: int) -> None:
    assert device_of(name) == torch.device("cuda", index)


@pytest.mark.usefixtures("_two_gpus")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="2 CUDA devices"):
        device_of("cuda:2")


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "mps"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="auto, cpu, cuda or cuda:N"):
        device_of(name)
