"""Bursts of steps alternate between two checkouts, and every DiT has a workload."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, cast

import pytest
import step_pairs
import torch
from bench_works import TINY, WORKS
from step_pairs import Pairs, Side, SideEnded

from models import dits
from models.dits.base import DiffusionTransformer


class FakeSide:
    """A side that takes `ms` per step and appends its calls to a log shared with the other side."""

    def __init__(self, name: str, ms: float, log: list[tuple[str, int]], *, digest: str = "a", bad: str = "") -> None:
        self.name, self.ms, self.log, self.digest, self.bad = name, ms, log, digest, bad
        self.built = ""

    def send(self, *, build: str) -> None:
        self.built = build

    def receive(self) -> dict[str, str]:
        if self.built == self.bad:
            raise SideEnded(self.name)
        return {"digest": self.digest}

    def measure(self, steps: int) -> float:
        self.log.append((self.name, steps))
        return self.ms


def sides(**after: Any) -> tuple[Side, Side, list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    return cast(Side, FakeSide("before", 20.0, log)), cast(Side, FakeSide("after", 30.0, log, **after)), log


def test_bursts_alternate_and_have_the_number_of_steps_of_the_slower_side() -> None:
    before, after, log = sides()
    pairs = step_pairs.measure("flux", before, after, 2)
    assert log == [("before", 1), ("after", 1), *[("before", 10), ("after", 10)] * 2]
    assert pairs == Pairs(is_equal=True, before=[20.0, 20.0], after=[30.0, 30.0])
    assert step_pairs.row("flux", pairs) == ("flux", "20.00", "30.00", "1.5000", "1.5000 to 1.5000", "yes")


def test_different_predictions_are_not_equal() -> None:
    before, after, _ = sides(digest="b")
    pairs = step_pairs.measure("flux", before, after, 1)
    assert not pairs.is_equal
    assert step_pairs.row("flux", pairs)[-1] == "no"


def test_a_failed_workload_has_no_result_and_the_remaining_workloads_are_returned() -> None:
    before, after, _ = sides(bad="wan")
    found: dict[str, Pairs] = {}
    assert step_pairs.measure_all(["flux", "wan", "qwen"], before, after, 1, found) == ["qwen"]
    assert step_pairs.row("wan", found["wan"])[1] == "failed"
    assert not found["wan"].ratio <= step_pairs.LARGEST_RATIO


def dit_classes(kind: type[DiffusionTransformer] = DiffusionTransformer) -> Iterator[type[DiffusionTransformer]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("models.dits."):
            yield each
        yield from dit_classes(each)


@pytest.fixture(scope="module")
def built() -> set[type[DiffusionTransformer]]:
    """Classes of the DiTs that the workloads build in a tiny size."""
    with torch.device("meta"):
        references = [(work, work.reference(**{**work.sizes, **TINY[work.reference]})) for work in WORKS.values()]
        return {type(work.ours(dict(reference.config))) for work, reference in references}


def test_every_dit_class_has_a_workload(built: set[type[DiffusionTransformer]]) -> None:
    for module in pkgutil.iter_modules(dits.__path__):
        importlib.import_module(f"{dits.__name__}.{module.name}")
    assert built == set(dit_classes())
