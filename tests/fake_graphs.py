"""Fake CUDA graphs for tests on a CPU: a replay runs the captured call again, on the captured buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.dits.base import Predictions
from models.stages.step_memory import Captured


@dataclass
class FakeGraph:
    """A captured call and its output buffers; like a CUDA graph, every replay uses the captured buffers."""

    run: Callable[[], Predictions]
    predictions: dict[str, Tensor] = field(default_factory=dict)
    replays: int = 0

    def replay(self) -> None:
        """Write the predictions into the captured buffers."""
        self.replays += 1
        for name, value in self.run().items():
            self.predictions.setdefault(name, torch.empty_like(value)).copy_(value)


@dataclass
class FakeCapture:
    """Captures fake graphs of `byte_size` bytes each, and counts them."""

    byte_size: int = 0
    graphs: list[FakeGraph] = field(default_factory=list)

    def __call__(self, run: Callable[[], Predictions]) -> Captured:
        """Capture the call without running it."""
        graph = FakeGraph(run)
        self.graphs.append(graph)
        return Captured(graph, graph.predictions, self.byte_size)

    @property
    def replays(self) -> int:
        """Replays of all graphs."""
        return sum(graph.replays for graph in self.graphs)
