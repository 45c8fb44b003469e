"""CUDA graphs of leased step memory: when a step is captured, and which inputs a replay reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_graphs import FakeCapture
from loop_family import LoopTransformer
from loop_steps import EagerBranch, copied, equal, loop_step, predict
from models.dits.base import Predictions, Prepared
from models.layers.norms import Residual
from models.layers.step_cache import CacheUse, StepCache, run_blocks
from models.runtime import Runtime
from models.stages import step_memory
from models.stages.predictor import StepCaching, lease_branch
from models.stages.step_memory import (
    NO_FLAGS,
    Captured,
    Flags,
    Lease,
    StepInputs,
    StepMemory,
    StepMemoryPool,
    cuda_capture,
)


@dataclass
class Journal:
    """Records the eager predictions and the captures of denoisers in order."""

    capture: FakeCapture = field(default_factory=FakeCapture)
    entries: list[tuple[str, object]] = field(default_factory=list)
    is_capturing: bool = False

    def __call__(self, run: Callable[[], Predictions]) -> Captured:
        """Capture `run`."""
        self.is_capturing = True
        try:
            return self.capture(run)
        finally:
            self.is_capturing = False


class RecordingTransformer(LoopTransformer):
    """Records each call of predict(). A replay does not call predict()."""

    def __init__(self, name: str, journal: Journal) -> None:
        super().__init__(1.0, remembers=True)
        self._name = name
        self._journal = journal

    def predict(self, **inputs: Any) -> Predictions:  # type: ignore[override]
        """Record the call and predict."""
        kind = "captured" if self._journal.is_capturing else "eager"
        self._journal.entries.append((kind, (self._name, inputs["skipped"])))
        return super().predict(**inputs)


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


@pytest.fixture
def pool(capture: FakeCapture) -> StepMemoryPool:
    return StepMemoryPool(1 << 20, capture)


@pytest.fixture
def transformer() -> LoopTransformer:
    return LoopTransformer(1.0, remembers=True)


@contextmanager
def branch(pool: StepMemoryPool, transformer: LoopTransformer, first: StepInputs) -> Iterator[StepMemory]:
    """Lease the memory of a request that has one branch."""
    with pool.leases() as lease:
        yield lease("transformer", transformer, first)


def test_steps_are_replayed_from_one_graph_after_an_eager_step(
    pool: StepMemoryPool, capture: FakeCapture, transformer: LoopTransformer
) -> None:
    """The denoiser's Python code runs for the first step and for the capture only, in all requests."""
    for request in range(3):
        steps = [loop_step(transformer, 10 * request + index) for index in range(4)]
        reference = EagerBranch(transformer, steps[0])
        with branch(pool, transformer, steps[0]) as memory:
            assert all(equal(predict(memory, step), reference.predict(step)) for step in steps)
    assert transformer.eager_calls == 2
    assert [graph.replays for graph in capture.graphs] == [3 * 4 - 1]


def test_without_capture_every_step_runs_eagerly(transformer: LoopTransformer) -> None:
    step = loop_step(transformer)
    with branch(StepMemoryPool(1 << 20, None), transformer, step) as memory:
        for _ in range(3):
            predict(memory, step)
    assert transformer.eager_calls == 3


def test_every_denoiser_runs_eagerly_with_every_combination_of_flags_before_its_capture() -> None:
    """Two experts with two branches each, predicted with and without a flag, have eight separate graphs."""
    journal = Journal()
    pool = StepMemoryPool(1 << 20, journal)
    names = {"transformer": "one", "transformer_2": "two"}
    experts = {role: RecordingTransformer(name, journal) for role, name in names.items()}
    combinations: list[tuple[str, LoopTransformer, int, Flags]] = [
        (role, expert, skipped, flags)
        for role, expert in experts.items()
        for skipped in (1, 2)
        for flags in ((), (("skipped", 3 + skipped),))
    ]
    with pool.leases() as lease:
        memories: dict[tuple[str, int], StepMemory] = {}
        for role, expert, skipped, flags in combinations:
            step = loop_step(expert, flags={"skipped": skipped})
            if (role, skipped) not in memories:
                memories[role, skipped] = lease(role, expert, step)
            for _ in range(3):
                predict(memories[role, skipped], step, flags)
    expected: list[tuple[str, object]] = []
    for name in names.values():
        for skipped in (1, 4, 2, 5):
            expected += [("eager", (name, skipped)), ("captured", (name, skipped))]
    assert journal.entries == expected
    assert [graph.replays for graph in journal.capture.graphs] == [2] * len(combinations)


def test_a_branch_predicts_with_its_flags_and_the_row_of_the_step(
    pool: StepMemoryPool, transformer: LoopTransformer
) -> None:
    """Flags of a branch apply to all of its steps, flags of a prediction to one step."""
    step = loop_step(transformer)
    prepared = transformer.prepare(torch.tensor([[100.0, 200.0], [300.0, 400.0]]), text=step.constants["text"])
    reference = EagerBranch(transformer, replace(step, flags={"skipped": 1}))
    with pool.leases() as lease:
        leased_branch = lease_branch(lease, "transformer", transformer, prepared, step.latents, flags={"skipped": 1})
        for flags in (NO_FLAGS, (("skipped", 2),)):
            for index in (0, 1, 0, 1):
                expected = reference.predict(replace(step, row=prepared.row(index)), flags)
                assert equal(leased_branch.predict(step.latents, index, flags), expected)


def test_a_graph_reads_the_inputs_of_its_own_step(
    pool: StepMemoryPool, capture: FakeCapture, transformer: LoopTransformer
) -> None:
    """Latents, row and constants of the request are copied to the captured addresses."""
    first = loop_step(transformer, 0)
    with branch(pool, transformer, first) as memory:
        predict(memory, first)
        predict(memory, first)
    later = loop_step(transformer, 1)
    assert capture.graphs[0].replays == 1
    reference = EagerBranch(transformer, later)
    with branch(pool, transformer, later) as memory:
        expected = reference.predict(later)
        for name, changed in (
            ("latents", StepInputs(first.latents, later.row, later.constants, later.memory, {})),
            ("row", StepInputs(later.latents, first.row, later.constants, later.memory, {})),
            ("constants", StepInputs(later.latents, later.row, first.constants, later.memory, {})),
        ):
            assert not equal(EagerBranch(transformer, changed).predict(changed), expected), (
                f"{name} must change the prediction"
            )
        assert equal(predict(memory, later), expected)
    assert len(capture.graphs) == 1


def test_a_graph_owns_its_constants(pool: StepMemoryPool, transformer: LoopTransformer) -> None:
    """A request may change its tensors after the capture. A lease copies the constants of the next request."""
    for seed in range(2):
        step = loop_step(transformer, seed)
        expected = EagerBranch(transformer, loop_step(transformer, seed))
        with branch(pool, transformer, step) as memory:
            for _ in range(2):
                assert equal(predict(memory, step), expected.predict(step))
            step.constants["text"].zero_()
            assert equal(predict(memory, step), expected.predict(step))


def test_a_result_is_copied_before_the_next_replay(
    pool: StepMemoryPool, capture: FakeCapture, transformer: LoopTransformer
) -> None:
    """Neither the next step of the branch nor the graph of another branch overwrites the result."""
    step, next_step = loop_step(transformer, 1), loop_step(transformer, 2)
    with pool.leases() as lease:
        memory, other = lease("transformer", transformer, step), lease("transformer", transformer, step)
        for each in (memory, other):
            predict(each, step)
        result = predict(memory, step)
        original = copied(result)
        assert not equal(predict(memory, next_step), original)
        assert equal(result, original), "after the next step"
        predict(other, next_step)
        assert equal(result, original), "after a step of another branch"
    assert [graph.replays for graph in capture.graphs] == [2, 1]


def test_step_memory_is_reset_in_place_at_its_lease(pool: StepMemoryPool, transformer: LoopTransformer) -> None:
    """Step memory is also reset after a request that failed between two steps. Graphs use its address."""
    steps = [loop_step(transformer, seed) for seed in range(4)]
    addresses: set[int] = set()

    def request(steps_done: int) -> None:
        reference = EagerBranch(transformer, steps[0])
        with branch(pool, transformer, steps[0]) as memory:
            addresses.add(memory._memory["total"].data_ptr())
            assert not memory._memory["total"].any()
            for step in steps[:steps_done]:
                assert equal(predict(memory, step), reference.predict(step))
            assert memory._memory["total"].any()
            if steps_done < len(steps):
                raise KeyError

    for steps_done in (4, 3, 4, 1, 4):
        if steps_done < len(steps):
            with pytest.raises(KeyError):
                request(steps_done)
        else:
            request(steps_done)
    assert len(addresses) == 1


def test_a_capture_that_fails_is_repeated_by_the_next_step(transformer: LoopTransformer) -> None:
    """The error ends the request. The memory is leased again and computes the same bytes."""
    capture = FakeCapture()
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def failing(run: Callable[[], Predictions]) -> Captured:
        captured = capture(run)
        if failures:
            raise failures.pop()
        return captured

    pool, step = StepMemoryPool(1 << 20, failing), loop_step(transformer)
    leased: list[StepMemory] = []

    def request() -> None:
        reference = EagerBranch(transformer, step)
        with branch(pool, transformer, step) as memory:
            leased.append(memory)
            for _ in range(3):
                assert equal(predict(memory, step), reference.predict(step))

    with pytest.raises(torch.OutOfMemoryError):
        request()
    request()
    assert leased[0] is leased[1]
    assert [graph.replays for graph in capture.graphs] == [0, 3]


class CachingTransformer(LoopTransformer):
    """Scales its latents by a tensor that is cached per shape, as denoisers cache rotary embeddings."""

    def __init__(self) -> None:
        super().__init__(1.0, remembers=True)
        self.scales: dict[torch.Size, Tensor] = {}

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The scale for the shape of the latents."""
        shape = latents["video"].shape
        return self.scales.setdefault(shape, torch.full(shape, 1.5))

    def predict(self, video: Tensor, *args: Any, **inputs: Any) -> Predictions:  # type: ignore[override]
        """Predict for scaled latents."""
        return super().predict(video * self.cached_tensors({"video": video}), *args, **inputs)


def test_a_graph_retains_tensors_that_its_denoiser_caches(pool: StepMemoryPool, capture: FakeCapture) -> None:
    """A graph reads the tensor at its address, even after the denoiser's cache has dropped it."""
    transformer = CachingTransformer()
    step = loop_step(transformer)
    reference = EagerBranch(transformer, step)
    with branch(pool, transformer, step) as memory:
        for _ in range(4):
            assert equal(predict(memory, step), reference.predict(step))
            transformer.scales.clear()
    assert [graph.replays for graph in capture.graphs] == [3]


class BlocksTransformer(LoopTransformer):
    """Two blocks, of which a step cache reuses the second. The video latents are the residual stream."""

    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Prepare without step memory."""
        return Prepared({"time": timesteps}, {"text": conditioning["text"]})

    def predict(  # type: ignore[override]
        self, video: Tensor, sound: Tensor, time: Tensor, text: Tensor, use: CacheUse | None = None
    ) -> Predictions:
        """The residual stream after both blocks."""
        self.eager_calls += 1

        def first(residual: Residual) -> Residual:
            return Residual(residual.x + residual.x.sin() * text.mean())

        def second(residual: Residual) -> Residual:
            return Residual(residual.x * time.mean() / 1000)

        return {"video": run_blocks(Residual(video), (first, second), use).x, "sound": sound.cos()}


def predictions_with_step_cache(
    lease: Lease, transformer: BlocksTransformer, prepared: Prepared, latents: Mapping[str, Tensor]
) -> tuple[list[Predictions], int]:
    """Predictions of three steps on nearly equal latents, and the number of reused steps."""
    leased_branch = lease_branch(lease, "transformer", transformer, prepared, latents, caching=StepCaching(0.1))
    moving = [{**latents, "video": latents["video"] * (1 + index / 1000)} for index in range(3)]
    return [copied(leased_branch.predict(each, index)) for index, each in enumerate(moving)], leased_branch.reused


def test_a_step_cache_is_reset_at_its_lease() -> None:
    """Requests differ only in the second block. Without a reset, a first step reuses the block of another request."""
    transformer, capture = BlocksTransformer(1.0), FakeCapture()
    pool, step = StepMemoryPool(1 << 20, capture), loop_step(transformer)
    for request in range(3):
        timesteps = torch.full((3, 2), 500.0 + 100 * request)
        prepared = transformer.prepare(timesteps, text=step.constants["text"])
        make = partial(predictions_with_step_cache, transformer=transformer, prepared=prepared, latents=step.latents)
        with pool.leases() as lease, StepMemoryPool(1 << 20, None).leases() as fresh:
            (got, reused), (expected, expected_reused) = make(lease), make(fresh)
        assert reused == expected_reused == 2
        assert all(map(equal, got, expected))
    # Probes have a separate graph.
    assert [graph.replays for graph in capture.graphs] == [5, 2]


def test_a_step_with_a_cache_has_separate_memory(pool: StepMemoryPool) -> None:
    transformer = BlocksTransformer(1.0)
    step = loop_step(transformer)
    with pool.leases() as lease:
        plain = lease("transformer", transformer, step)
    with pool.leases() as lease:
        cached = lease("transformer", transformer, step, StepCache)
        assert cached is not plain
        assert lease("transformer", transformer, step) is plain


@dataclass
class FakeCuda:
    """torch.cuda of a GPU with 100 bytes. A capture adds 20 bytes to PyTorch's pool and 7 bytes to the driver."""

    free: int = 60
    reserved: int = 30
    pools: int = 0
    captures: list[tuple[object, object, str]] = field(default_factory=list)

    def graph_pool_handle(self) -> str:
        """A new pool."""
        self.pools += 1
        return f"pool {self.pools}"

    @contextmanager
    def graph(self, graph: object, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        """Capture: PyTorch's pool grows by 20 bytes, and the driver takes 7 bytes."""
        yield
        self.captures.append((graph, pool, capture_error_mode))
        self.free, self.reserved = self.free - 27, self.reserved + 20

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the functions of torch.cuda."""
        patch.setattr(torch.cuda, "CUDAGraph", object)
        patch.setattr(torch.cuda, "graph_pool_handle", self.graph_pool_handle)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (self.free, 100))
        patch.setattr(torch.cuda, "memory_reserved", lambda: self.reserved)


def test_cuda_graphs_share_one_pool_and_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a graph excludes bytes in PyTorch's pool. Other threads may use the GPU during a capture."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    capture = cuda_capture()
    runs: list[Predictions] = [{"video": torch.ones(1)}, {"video": torch.zeros(1)}]
    captured = [capture(lambda run=run: run) for run in runs]  # type: ignore[misc]
    assert [each.predictions for each in captured] == runs
    assert [each.byte_size for each in captured] == [7, 7]
    assert cuda.captures == [(each.graph, "pool 1", "thread_local") for each in captured]
    assert captured[0].graph is not captured[1].graph


def test_a_runtime_captures_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch, transformer: LoopTransformer) -> None:
    """Denoising stages lease from `Runtime.step_memory`."""
    capture = FakeCapture()
    monkeypatch.setattr("models.runtime.cuda_capture", lambda: capture)
    step = loop_step(transformer)
    for device, graphs in (("cpu", 0), ("cuda", 1)):
        with branch(Runtime(device=torch.device(device)).step_memory, transformer, step) as memory:
            for _ in range(3):
                predict(memory, step)
        assert len(capture.graphs) == graphs


def test_flags_beyond_the_bound_of_graphs_run_eagerly(
    pool: StepMemoryPool, capture: FakeCapture, transformer: LoopTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager steps compute the same bytes, and flags that have a graph are still replayed."""
    monkeypatch.setattr(step_memory, "MAX_GRAPHS", 2)
    step = loop_step(transformer)
    reference = EagerBranch(transformer, step)
    with branch(pool, transformer, step) as memory:
        for _ in range(3):
            for skipped in (1, 2, 3):
                flags = (("skipped", skipped),)
                assert equal(predict(memory, step, flags), reference.predict(step, flags))
    assert [graph.replays for graph in capture.graphs] == [2, 2]
    assert transformer.eager_calls == 2 * 2 + 3
