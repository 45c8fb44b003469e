"""Fixed-address memory of denoising steps, and the CUDA graphs captured for it.

Memory is leased to one branch of one request. CUDA graphs belong to the memory for which they were captured; the next
request with an equal key replays them. The key includes the expert and the static flags of the branch, because they
change the weights or blocks that a graph runs. Predictions with different call flags, such as blocks of a video with KV
cache prefixes of different lengths, share one memory and have separate graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import ResourceExhausted
from models.dits.base import DiffusionTransformer, MemorySpec, Predictions
from models.layers.step_cache import CacheUse, StepCache

Tensors = Mapping[str, Tensor]
Flags = tuple[tuple[str, Hashable], ...]
"""Static keywords of one prediction, such as the length of a cached prefix. Each combination has its own CUDA graph."""
NO_FLAGS: Flags = ()


class StepKind(NamedTuple):
    """Steps that share one CUDA graph. `flags` are static keywords.

    `probe`: the step computes only the first block, and reuses the cached contribution of the other blocks.
    """

    probe: bool = False
    flags: Flags = NO_FLAGS


MAX_GRAPHS = 64
"""Maximum number of graphs of one memory; predictions with further combinations of flags run eagerly."""


class Graph(Protocol):
    """A captured step, such as a torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Run the captured kernels on the captured buffers."""


class Captured(NamedTuple):
    """A captured step, its output buffers, and the graph's own device memory in bytes."""

    graph: Graph
    predictions: Predictions
    byte_size: int


Capture = Callable[[Callable[[], Predictions]], Captured]
"""Captures the kernels of a call as a graph."""


def cuda_capture() -> Capture:
    """Return a function that captures CUDA graphs in one memory pool. The graphs never run concurrently."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Predictions]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        before = _memory_outside_torch()
        # "thread_local" because other threads may use the GPU: other services in the process, and NCCL.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            predictions = run()
        return Captured(graph, predictions, max(0, _memory_outside_torch() - before))

    return capture


def _memory_outside_torch() -> int:
    """Bytes in use on the current GPU outside PyTorch's caching allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@dataclass(frozen=True)
class StepInputs:
    """Example inputs of a step.

    `latents` is keyed by the denoiser's keyword; `row` has one row of each prepared tensor.
    """

    latents: Tensors
    row: Tensors
    constants: Tensors
    memory: Mapping[str, MemorySpec]
    flags: Mapping[str, Hashable]

    def key(self, role: str, *, is_cached: bool) -> Hashable:
        """Key of steps that share a StepMemory: denoiser, static flags, shapes, dtypes, memory specs, step cache."""
        forms = tuple(
            tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(tensors.items()))
            for tensors in (self.latents, self.row, self.constants)
        )
        return role, tuple(sorted(self.flags.items())), forms, tuple(sorted(self.memory.items())), is_cached


class StepMemory:
    """Memory of one branch's steps: input buffers, tensors updated in place, and a step cache."""

    def __init__(
        self,
        key: Hashable,
        transformer: DiffusionTransformer,
        inputs: StepInputs,
        cache: StepCache | None,
        capture: Capture | None,
        tensor_bytes: int,
    ) -> None:
        self.key = key
        self.cache = cache
        self.tensor_bytes = tensor_bytes
        self.graph_bytes = 0
        self.transformer = transformer
        self._flags = dict(inputs.flags)
        self._capture = capture
        device = next(iter(inputs.latents.values())).device
        self._memory = {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in inputs.memory.items()
        }
        self._constants = dict(inputs.constants)
        self._buffers: dict[str, dict[str, Tensor]] | None = None
        self._ran: set[StepKind] = set()
        self._graphs: dict[StepKind, Captured] = {}
        self._cached_tensors: list[object] = []

    @property
    def byte_size(self) -> int:
        """Bytes of the tensors and the graphs."""
        return self.tensor_bytes + self.graph_bytes

    def load(self, constants: Tensors) -> None:
        """Reset the memory and load the constants of another request with the same shapes."""
        for tensor in self._memory.values():
            tensor.zero_()
        if self.cache is not None:
            self.cache.reset()
        if self._buffers is None:
            self._constants = dict(constants)
        else:
            for name, value in constants.items():
                self._buffers["constants"][name].copy_(value)

    def release(self) -> None:
        """Drop references to the request's constants; graph buffers retain their values until the next load()."""
        self._constants = {}

    def runs_eagerly(self, kind: StepKind) -> bool:
        """Whether a step runs without a graph. Records the step: call this method once per step.

        The first step of a kind runs eagerly, because it loads kernels. Kinds beyond MAX_GRAPHS always run eagerly.
        """
        is_full = len(self._graphs) >= MAX_GRAPHS and kind not in self._graphs
        if self._capture is None or kind not in self._ran or is_full:
            self._ran.add(kind)
            return True
        return False

    def keywords(self, latents: Tensors, row: Tensors, kind: StepKind) -> dict[str, Any]:
        """The keywords of the denoiser's predict() for a step."""
        constants = self._constants if self._buffers is None else self._buffers["constants"]
        use = None if self.cache is None else CacheUse(self.cache, kind.probe)
        return {"use": use, **latents, **row, **constants, **self._memory, **self._flags, **dict(kind.flags)}

    def replay(self, latents: Tensors, row: Tensors, kind: StepKind) -> Predictions:
        """Predict by the graph of this kind of step, which the first call captures.

        Returns copies, because the next replay may overwrite the graphs' shared memory pool.
        """
        assert self._capture is not None, "eager steps have no graphs"
        if self._buffers is None:
            given = {"latents": latents, "row": row, "constants": self._constants}
            self._buffers = {
                group: {name: each.clone() for name, each in part.items()} for group, part in given.items()
            }
            self._constants = {}
        buffers = self._buffers
        for group, tensors in (("latents", latents), ("row", row)):
            for name, value in tensors.items():
                buffers[group][name].copy_(value)
        if kind not in self._graphs:
            self._cached_tensors.append(self.transformer.cached_tensors(buffers["latents"]))
            inputs = self.keywords(buffers["latents"], buffers["row"], kind)
            self._graphs[kind] = self._capture(lambda: self.transformer.predict(**inputs))
            self.graph_bytes += self._graphs[kind].byte_size
        captured = self._graphs[kind]
        captured.graph.replay()
        return {name: value.clone() for name, value in captured.predictions.items()}


def byte_size_of(transformer: DiffusionTransformer, inputs: StepInputs, *, has_cache: bool, has_graphs: bool) -> int:
    """Maximum `tensor_bytes` of a StepMemory.

    Counts the tensors of `inputs.memory`, the step cache and, with graphs, their buffers.
    """
    size = sum(spec.byte_size for spec in inputs.memory.values())
    if has_cache:
        first = next(iter(inputs.latents.values()))
        # Two cached contributions: of the first block, and of all other blocks.
        size += 2 * transformer.residual_elements(inputs.latents, inputs.constants) * first.dtype.itemsize
    if has_graphs:
        # Predictions are as large as the latents.
        parts = (inputs.latents, inputs.latents, inputs.row, inputs.constants)
        size += sum(value.nbytes for tensors in parts for value in tensors.values())
    return size


class Lease(Protocol):
    """Callable that leases step memory."""

    def __call__(
        self,
        role: str,
        transformer: DiffusionTransformer,
        inputs: StepInputs,
        new_cache: Callable[[], StepCache] | None = None,
    ) -> StepMemory:
        """Lease memory for steps of these shapes on a role's denoiser. `new_cache` adds a step cache.

        The tensors that steps update in place are zero, and the cache is empty. Raises ResourceExhausted.
        """


class StepMemoryPool:
    """Pool of step memory of a process, leased to the branches of a call.

    The tensors take at most `max_bytes`. Graphs that a call captures may exceed this bound until the call ends; idle
    memory is then freed until tensors and graphs together take at most `max_bytes`. `capture` captures graphs; None:
    steps run eagerly.
    """

    def __init__(self, max_bytes: int, capture: Capture | None) -> None:
        self._max_bytes = max_bytes
        self._capture = capture
        self._idle: OrderedDict[int, StepMemory] = OrderedDict()
        self._leased: dict[int, StepMemory] = {}

    @contextmanager
    def leases(self) -> Iterator[Lease]:
        """Context manager that yields a Lease; leased memory returns to the pool when the context ends."""
        leased: list[StepMemory] = []

        def lease(
            role: str,
            transformer: DiffusionTransformer,
            inputs: StepInputs,
            new_cache: Callable[[], StepCache] | None = None,
        ) -> StepMemory:
            memory = self._lease(role, transformer, inputs, new_cache)
            self._leased[id(memory)] = memory
            leased.append(memory)
            return memory

        try:
            yield lease
        finally:
            for memory in leased:
                memory.release()
                self._idle[id(memory)] = self._leased.pop(id(memory))
            self._free_idle(self._max_bytes)  # Includes graphs captured during the lease.

    def _lease(
        self,
        role: str,
        transformer: DiffusionTransformer,
        inputs: StepInputs,
        new_cache: Callable[[], StepCache] | None,
    ) -> StepMemory:
        """Reuse idle memory with an equal key, or create memory, and load the constants.

        Frees the least recently used idle memory if necessary. Raises ResourceExhausted if leased memory leaves too few
        bytes.
        """
        key = inputs.key(role, is_cached=new_cache is not None)
        for number, memory in reversed(self._idle.items()):
            if memory.key == key and memory.transformer is transformer:
                del self._idle[number]
                memory.load(inputs.constants)
                return memory
        has_graphs = self._capture is not None
        size = byte_size_of(transformer, inputs, has_cache=new_cache is not None, has_graphs=has_graphs)
        self._evict_for(size)
        return StepMemory(key, transformer, inputs, new_cache() if new_cache else None, self._capture, size)

    def _evict_for(self, size: int) -> None:
        """Free idle memory until `size` bytes fit. Raises ResourceExhausted if they cannot fit."""
        # Measured graph sizes are excluded, so that all ranks of a worker group make the same decision.
        free = self._max_bytes - sum(memory.tensor_bytes for memory in self._leased.values())
        if size > free:
            message = f"step_memory_bytes: this request needs {size} bytes, but {free} of {self._max_bytes} are free"
            raise ResourceExhausted(f"{message}; a smaller request or a larger step_memory_bytes works")
        self._free_idle(self._max_bytes - size)

    @property
    def byte_size(self) -> int:
        """Bytes of leased and idle memory, including graphs."""
        return sum(memory.byte_size for memory in (*self._leased.values(), *self._idle.values()))

    def _free_idle(self, max_bytes: int) -> None:
        """Free idle memory, least recently used first, until at most `max_bytes` are in use."""
        while self._idle and self.byte_size > max_bytes:
            self._idle.popitem(last=False)
