"""One branch of a denoising loop: what its transformer predicts at each step, replayed from a CUDA graph on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.dits.base import DiffusionTransformer, Prepared
from models.layers.collectives import all_gather
from models.layers.mesh import Axis

MOST_GRAPHS = 8

_Key = tuple[object, ...]


class Branch:
    """The positive or the negative branch of a request: prepared once, asked at every step."""

    def __init__(self, transformer: DiffusionTransformer, prepared: Prepared, graphs: StepGraphs | None) -> None:
        self._transformer = transformer
        self._prepared = prepared
        self._graphs = graphs
        self._graph: StepGraph | None = None
        self._asked = 0

    def predict(self, hidden_states: Tensor, step: int) -> Tensor:
        """The prediction at a step.

        On CUDA the first call runs the kernels one by one, which readies them; from the second on a graph is replayed.
        """
        modulation = self._prepared.steps[step]
        self._asked += 1
        if self._graphs is None or self._asked == 1:
            return self._transformer.predict(hidden_states, modulation, **self._prepared.constants)
        if self._graph is None:
            self._graph = self._graphs.take(self._transformer, hidden_states, modulation, self._prepared.constants)
        return self._graph.replay(hidden_states, modulation)

    def close(self) -> None:
        """Give the graph back, for the next request of its shapes."""
        if self._graphs is not None and self._graph is not None:
            self._graphs.give_back(self._graph)
            self._graph = None


class Branches:
    """The branches of a request, positive first, and what they predict together.

    Two ranks on the cfg axis take one each and exchange what they predict, which changes no bit: the branches are never
    one batch. Where there is no negative branch there is nothing to share out: both ranks predict the same.
    """

    def __init__(self, prepare: Sequence[Callable[[], Branch]], cfg: Axis) -> None:
        self._exchanging = cfg.size > 1 and len(prepare) > 1
        self._cfg = cfg
        self._branches = [make() for make in ((prepare[cfg.index],) if self._exchanging else prepare)]

    def predict(self, hidden_states: Tensor, step: int, output: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The predictions of all branches, through `output`."""
        own = [output(branch.predict(hidden_states, step)) for branch in self._branches]
        return list(all_gather(own[0], self._cfg).unbind()) if self._exchanging else own

    def close(self) -> None:
        """Give the branches' graphs back."""
        for branch in self._branches:
            branch.close()


class StepGraph:
    """A step's kernels with the places of their inputs and of their result."""

    def __init__(
        self,
        key: _Key,
        transformer: DiffusionTransformer,
        hidden_states: Tensor,
        modulation: Tensor,
        constants: Mapping[str, Tensor],
        pool: Any,
    ) -> None:
        self.key = key
        self._hidden_states, self._modulation = hidden_states.clone(), modulation.clone()
        self._constants = {name: value.clone() for name, value in constants.items()}
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the card meanwhile: those of other services in one process, and NCCL's.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._prediction = transformer.predict(self._hidden_states, self._modulation, **self._constants)

    def load(self, constants: Mapping[str, Tensor]) -> None:
        """Take another request's constants, of the same shapes."""
        for name, value in constants.items():
            self._constants[name].copy_(value)

    def replay(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        """The prediction, copied out of the memory that graphs share: the next replay may overwrite it there."""
        self._hidden_states.copy_(hidden_states)
        self._modulation.copy_(modulation)
        self._graph.replay()
        return self._prediction.clone()


class StepGraphs:
    """The graphs that no branch uses, by the shapes of their inputs; those unused for longest are dropped first."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._free: OrderedDict[int, StepGraph] = OrderedDict()

    def take(
        self,
        transformer: DiffusionTransformer,
        hidden_states: Tensor,
        modulation: Tensor,
        constants: Mapping[str, Tensor],
    ) -> StepGraph:
        """A graph for these shapes that holds these constants, captured unless there is one."""
        key = (_form(hidden_states), _form(modulation), *((name, _form(each)) for name, each in constants.items()))
        for number, graph in reversed(self._free.items()):
            if graph.key == key:
                del self._free[number]
                graph.load(constants)
                return graph
        return StepGraph(key, transformer, hidden_states, modulation, constants, self._pool)

    def give_back(self, graph: StepGraph) -> None:
        """Keep it for another request."""
        self._free[id(graph)] = graph
        while len(self._free) > MOST_GRAPHS:
            self._free.popitem(last=False)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return (tuple(tensor.shape), tensor.dtype)
