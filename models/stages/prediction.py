"""One branch of a denoising loop: what its transformer predicts at each step, replayed from a CUDA graph on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.dits.base import DiffusionTransformer, Prepared
from models.layers.collectives import all_gather
from models.layers.mesh import Axis
from models.layers.step_cache import CacheUse, StepCache

MOST_GRAPHS = 8

_Key = tuple[object, ...]


@dataclass(frozen=True)
class StepCaching:
    """When a step reuses what blocks did before it: where its first block changed by less than the threshold.

    `axes` are those whose ranks must decide alike.
    """

    threshold: float
    axes: tuple[Axis, ...] = ()


class Branch:
    """The positive or the negative branch of a request: prepared once, asked at every step.

    `reused` counts the steps that took the work of all blocks but the first from an earlier one.
    """

    def __init__(
        self,
        transformer: DiffusionTransformer,
        prepared: Prepared,
        graphs: StepGraphs | None,
        caching: StepCaching | None = None,
    ) -> None:
        self._transformer = transformer
        self._prepared = prepared
        self._graphs = graphs
        self._graph: StepGraph | None = None
        self._ready: set[bool] = set()
        self._threshold = 0.0 if caching is None else caching.threshold
        self._cache = None if caching is None else StepCache(caching.axes)
        self.reused = 0

    def predict(self, hidden_states: Tensor, step: int) -> Tensor:
        """The prediction at a step."""
        modulation = self._prepared.steps[step]
        if self._cache is not None and self._cache.is_filled:
            prediction = self._predict(hidden_states, modulation, probe=True)
            if self._cache.change() < self._threshold:
                self.reused += 1
                return prediction
        return self._predict(hidden_states, modulation)

    def _predict(self, hidden_states: Tensor, modulation: Tensor, *, probe: bool = False) -> Tensor:
        """On CUDA the first call runs the kernels one by one, which readies them; then a graph is replayed."""
        if self._graphs is None or probe not in self._ready:
            self._ready.add(probe)
            use = _use(self._cache, probe)
            return self._transformer.predict(hidden_states, modulation, use=use, **self._prepared.constants)
        if self._graph is None:
            constants = self._prepared.constants
            self._graph = self._graphs.take(self._transformer, hidden_states, modulation, constants, self._cache)
            self._cache = self._graph.cache
        return self._graph.replay(hidden_states, modulation, probe=probe)

    def close(self) -> None:
        """Give the graph back, for the next request of its shapes."""
        if self._graphs is not None and self._graph is not None:
            self._graphs.give_back(self._graph)
            self._graph = None


def _use(cache: StepCache | None, probe: bool) -> CacheUse | None:
    return None if cache is None else CacheUse(cache, probe)


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

    @property
    def reused(self) -> int:
        """How many of this rank's predictions took the work of most blocks from earlier ones."""
        return sum(branch.reused for branch in self._branches)

    def close(self) -> None:
        """Give the branches' graphs back."""
        for branch in self._branches:
            branch.close()


class StepGraph:
    """A step's kernels with the places of their inputs and of their result; with a cache, also those of a probe."""

    def __init__(
        self,
        key: _Key,
        transformer: DiffusionTransformer,
        hidden_states: Tensor,
        modulation: Tensor,
        constants: Mapping[str, Tensor],
        cache: StepCache | None,
        pool: Any,
    ) -> None:
        self.key = key
        self.cache = None if cache is None else cache.copy()
        self._transformer = transformer
        self._hidden_states, self._modulation = hidden_states.clone(), modulation.clone()
        self._constants = {name: value.clone() for name, value in constants.items()}
        self._pool = pool
        self._captured: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def load(self, constants: Mapping[str, Tensor], cache: StepCache | None) -> None:
        """Take another request's constants and cache, of the same shapes."""
        for name, value in constants.items():
            self._constants[name].copy_(value)
        if self.cache is not None and cache is not None:
            self.cache.load(cache)

    def replay(self, hidden_states: Tensor, modulation: Tensor, *, probe: bool = False) -> Tensor:
        """The prediction, copied out of the memory that graphs share: the next replay may overwrite it there.

        What was not captured yet is captured before.
        """
        self._hidden_states.copy_(hidden_states)
        self._modulation.copy_(modulation)
        if probe not in self._captured:
            self._captured[probe] = self._capture(probe)
        graph, prediction = self._captured[probe]
        graph.replay()
        return prediction.clone()

    def _capture(self, probe: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        use = _use(self.cache, probe)
        # Other threads may use the card meanwhile: those of other services in one process, and NCCL's.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            prediction = self._transformer.predict(self._hidden_states, self._modulation, use=use, **self._constants)
        return graph, prediction


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
        cache: StepCache | None,
    ) -> StepGraph:
        """A graph for these shapes that holds these constants and what the cache holds; a new one if there is none."""
        key = (_form(hidden_states), _form(modulation), *((name, _form(each)) for name, each in constants.items()))
        for number, graph in reversed(self._free.items()):
            if graph.key == key:
                del self._free[number]
                graph.load(constants, cache)
                return graph
        return StepGraph(key, transformer, hidden_states, modulation, constants, cache, self._pool)

    def give_back(self, graph: StepGraph) -> None:
        """Keep it for another request."""
        self._free[id(graph)] = graph
        while len(self._free) > MOST_GRAPHS:
            self._free.popitem(last=False)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return (tuple(tensor.shape), tensor.dtype)
