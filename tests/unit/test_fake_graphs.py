"""Fake CUDA graphs behave like real CUDA graphs, as far as tests of step memory require."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fake_graphs import FakeCapture
from models.dits.base import Predictions
from models.stages.step_memory import Captured


def captured(capture: FakeCapture, run: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
    """A captured call and the buffer of its result."""
    call = capture(lambda: {"video": run()})
    return call, call.predictions["video"]


def test_a_capture_computes_nothing() -> None:
    total, x = torch.zeros(3), torch.ones(3)
    call, result = captured(FakeCapture(), lambda: total.add_(x) * 2)
    assert not total.any()
    assert result.isnan().all()
    call.graph.replay()
    assert torch.equal(total, x)
    assert torch.equal(result, 2 * x)


def test_a_replay_reads_addresses_and_runs_no_python() -> None:
    """A replay reads in-place updates of captured tensors and their views, but no replacement tensors."""
    given = {"x": torch.ones(2, 3), "row": torch.ones(2)}
    calls: list[int] = []

    def run() -> Tensor:
        calls.append(len(calls))
        return given["x"][1:].sum(0, keepdim=True).T + given["row"].mean()

    old = given["x"]
    call, result = captured(FakeCapture(), run)
    given["x"] = torch.zeros(2, 3)
    old[1] = 5
    given["row"].copy_(torch.tensor([1.0, 2.0]))
    call.graph.replay()
    assert torch.equal(result, torch.full((3, 1), 6.5))
    assert calls == [0]


def test_a_graph_does_not_own_its_input_memory() -> None:
    given = [torch.ones(3)]
    call, _ = captured(FakeCapture(), lambda: given[0] * 2)
    call.graph.replay()
    given.clear()
    with pytest.raises(AssertionError, match="the graph reads memory that was freed"):
        call.graph.replay()


def test_graphs_of_one_pool_overwrite_each_other() -> None:
    capture, x = FakeCapture(), torch.ones(3)
    (one, first), (other, second) = captured(capture, lambda: x + 1), captured(capture, lambda: x + 2)
    one.graph.replay()
    assert torch.equal(first, x + 1)
    other.graph.replay()
    assert torch.equal(second, x + 2)
    assert first.isnan().all()
    assert [graph.replays for graph in capture.graphs] == [1, 1]


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero, lambda x: x[x > 0]], ids=["item", "nonzero", "mask"])
def test_values_cannot_be_read_during_a_capture(read: Callable[[Tensor], object]) -> None:
    x = torch.ones(1)

    def run() -> Predictions:
        read(x)
        return {"video": x * 2}

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        FakeCapture()(run)
