"""Guidance branches sharded over the cfg axis: the branches that each rank computes and receives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.pipeline_configs.base import Parts
from models.parallel.mesh import Axis
from models.stages import predictor as module
from models.stages.predictor import Branch, Branches, StepCaching

NAMES = ("positive", "negative", "perturbed", "isolated")
LATENTS = {"video": torch.zeros(2, 3), "audio": torch.zeros(2, 5)}


class Exchange:
    """all_gather() between threads, one thread per rank; `counts` has the number of gathers per rank."""

    def __init__(self, ranks: int) -> None:
        self.sent: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.counts = [0] * ranks

    def gather(self, x: Tensor, axis: Axis) -> Tensor:
        self.sent[axis.index] = x
        self.counts[axis.index] += 1
        self.barrier.wait()
        gathered = torch.stack([each for each in self.sent if each is not None])
        self.barrier.wait()
        return gathered


def value_of(name: str) -> float:
    return float(NAMES.index(name) + 1)


def predict(name: Any) -> Parts:
    """Prediction of a fake branch: all elements equal `value_of(name)`."""
    return {part: torch.full_like(each, value_of(name)) for part, each in LATENTS.items()}


def run_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, names: Sequence[str], active: Sequence[str]
) -> tuple[list[dict[str, Parts]], list[list[str]], Exchange]:
    """Predictions per rank, names of the branches that each rank created, and the exchange."""
    exchange = Exchange(ranks)
    monkeypatch.setattr(module, "all_gather", exchange.gather)
    created: list[list[str]] = [[] for _ in range(ranks)]

    def on_rank(index: int) -> dict[str, Parts]:
        def make(name: str, _: str) -> Branch:
            created[index].append(name)
            return name  # type: ignore[return-value]

        branches = Branches(names, ("transformer",), make, Axis(ranks, index, "cfg"), torch.float32)
        return branches.predict(active, "transformer", predict, LATENTS)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(on_rank, range(ranks))), created, exchange


@pytest.mark.parametrize("active", [NAMES, NAMES[:1], NAMES[1:2], NAMES[:3], (NAMES[0], NAMES[2]), NAMES[2:]], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_every_active_branch(
    monkeypatch: pytest.MonkeyPatch, ranks: int, active: tuple[str, ...]
) -> None:
    results, created, exchange = run_ranks(monkeypatch, ranks, NAMES, active)
    for index in range(ranks):
        assert created[index] == list(NAMES[index::ranks])
    for result in results:
        assert list(result) == list(active)
        for name, parts in result.items():
            assert parts.keys() == LATENTS.keys()
            assert all(bool((each == value_of(name)).all()) for each in parts.values())
    assert len(set(exchange.counts)) == 1, "ranks with fewer branches must send padding"


def test_a_single_branch_is_computed_by_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    results, created, exchange = run_ranks(monkeypatch, 2, NAMES[:1], NAMES[:1])
    assert created == [["positive"], ["positive"]]
    assert exchange.counts == [0, 0]
    assert [list(result) for result in results] == [["positive"]] * 2


def test_one_rank_computes_all_branches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    results, created, exchange = run_ranks(monkeypatch, 1, NAMES, NAMES[1:])
    assert (created, exchange.counts) == ([list(NAMES)], [0])
    assert list(results[0]) == list(NAMES[1:])


def test_step_cache_change_is_reduced_over_the_ranks_of_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are reduced over the ranks that compute one branch. An axis with one rank has no process group."""
    added: list[str] = []

    def all_reduce(sums: Tensor, axis: Axis) -> Tensor:
        added.append(axis.group)
        return sums + torch.tensor([6.0, 0.0])

    monkeypatch.setattr(module, "all_reduce", all_reduce)
    changes = []
    for caching in (StepCaching(0.1), StepCaching(0.1, (Axis(2, 0, "tp"), Axis(), Axis(2, 1, "ring")))):
        cache = caching.new_cache()
        cache.store(torch.full((1, 2, 2), 1.0), torch.zeros(1, 2, 2))
        cache.reuse(torch.full((1, 2, 2), 2.0))
        changes.append(cache.change())
    assert changes == [1.0, (4.0 + 2 * 6.0) / 4.0]
    assert added == ["tp", "ring"]
