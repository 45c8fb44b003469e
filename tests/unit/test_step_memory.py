"""The pool of step memory: leases, their return, what is freed first, and what two live requests share (nothing)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ResourceExhausted
from fake_graphs import FakeCapture
from loop_family import SHAPES, LoopTransformer
from models.stages import step_memory
from models.stages.step_memory import Lease, StepInputs, StepMemory, StepMemoryPool, byte_size_of

DITS = Path(__file__).resolve().parents[2] / "models" / "dits"
TRANSFORMER = LoopTransformer(1.0, remembers=True)


def inputs(batch: int = 2, skipped: int = 0) -> StepInputs:
    """A step of the loop family for so many outputs."""
    prepared = TRANSFORMER.prepare(torch.ones(3, batch), text=torch.ones(batch, 3))
    latents = {"video": torch.ones(batch, *SHAPES["video"][1:]), "sound": torch.ones(batch, *SHAPES["audio"][1:])}
    row = {name: rows[0] for name, rows in prepared.steps.items()}
    flags = {"skipped": skipped} if skipped else {}
    return StepInputs(latents, row, prepared.constants, {}, flags)


def size_of(step: StepInputs) -> int:
    return byte_size_of(TRANSFORMER, step, has_cache=False, has_graphs=True)


def run(memory: StepMemory, step: StepInputs) -> dict[str, Tensor]:
    return dict(memory.predict(step.latents, step.row))


@pytest.fixture
def pool() -> StepMemoryPool:
    return StepMemoryPool(1 << 20, FakeCapture())


def test_live_leases_of_equal_steps_share_no_memory(pool: StepMemoryPool) -> None:
    with pool.leases() as lease:
        one, other = lease("transformer", TRANSFORMER, inputs()), lease("transformer", TRANSFORMER, inputs())
        assert one is not other
        first, second = inputs(), inputs()
        second.latents["video"].mul_(3)
        for _ in range(2):  # The second prediction is a replay.
            expected = [run(one, first), run(other, second)]
            again = [run(one, first), run(other, second)]
            assert all(torch.equal(a[name], b[name]) for a, b in zip(expected, again, strict=True) for name in a)
        assert not torch.equal(expected[0]["video"], expected[1]["video"])


class CachingTransformer(LoopTransformer):
    """Its predictions read a tensor of a cache that forgets it."""

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The tensor."""
        rotation = torch.ones(len(latents))
        self.cached = weakref.ref(rotation)
        return rotation


def test_a_graph_keeps_what_its_denoiser_caches(pool: StepMemoryPool) -> None:
    """A graph reads it at its address, although the denoiser's cache holds other shapes by then."""
    transformer, step = CachingTransformer(1.0, remembers=True), inputs()
    with pool.leases() as lease:
        memory = lease("transformer", transformer, step)
        run(memory, step)
        run(memory, step)
    gc.collect()
    assert transformer.cached() is not None, "the graph reads memory that was freed"


def test_every_denoiser_that_caches_tensors_names_them() -> None:
    """So that no graph of another family reads freed memory either."""
    caching = {path.stem for path in DITS.glob("*.py") if "@lru_cache" in path.read_text()}
    naming = {path.stem for path in DITS.glob("*.py") if "def cached_tensors" in path.read_text()} - {"base"}
    assert caching <= naming, f"{sorted(caching - naming)} cache tensors that a graph may read after their end"
    assert caching


def test_flags_of_a_prediction_have_graphs_of_their_own_in_one_memory(
    pool: StepMemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each first runs eagerly. Beyond the bound all run eagerly, to the same bytes."""
    monkeypatch.setattr(step_memory, "MOST_GRAPHS", 2)
    step = inputs()
    given: dict[str, Any] = {**step.latents, **step.row, **step.constants}
    with pool.leases() as lease:
        memory = lease("transformer", TRANSFORMER, step)
        for skipped in (1, 2, 3):
            flags = (("skipped", skipped),)
            expected = TRANSFORMER.predict(**given, skipped=skipped)
            for _ in range(3):
                got = memory.predict(step.latents, step.row, flags=flags)
                assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert list(memory._graphs) == [(False, (("skipped", 1),)), (False, (("skipped", 2),))]


def test_a_returned_memory_is_leased_again_to_an_equal_key_only(pool: StepMemoryPool) -> None:
    with pool.leases() as lease:
        first = lease("transformer", TRANSFORMER, inputs())
    with pool.leases() as lease:
        others = [
            lease("transformer_2", TRANSFORMER, inputs()),
            lease("transformer", TRANSFORMER, inputs(skipped=1)),
            lease("transformer", TRANSFORMER, inputs(batch=1)),
            lease("transformer", LoopTransformer(1.0, remembers=True), inputs()),
        ]
        assert first not in others
        assert lease("transformer", TRANSFORMER, inputs()) is first


def test_an_error_in_the_loop_returns_the_memory(pool: StepMemoryPool) -> None:
    leased: list[StepMemory] = []

    def fail() -> None:
        with pool.leases() as lease:
            leased.append(lease("transformer", TRANSFORMER, inputs()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pool.leases() as lease:
        assert lease("transformer", TRANSFORMER, inputs()) is leased[0]


def test_a_returned_memory_holds_no_tensor_of_the_request(pool: StepMemoryPool) -> None:
    step = inputs()
    with pool.leases() as lease:
        memory = lease("transformer", TRANSFORMER, step)
    assert not memory._constants


def test_the_least_recently_used_memory_is_freed_first() -> None:
    steps = [inputs(skipped=number) for number in (1, 2, 3)]
    pool = StepMemoryPool(2 * size_of(steps[0]), FakeCapture())
    found: list[StepMemory] = []
    for step in (steps[0], steps[1], steps[0], steps[2]):
        with pool.leases() as lease:
            found.append(lease("transformer", TRANSFORMER, step))
    assert found[2] is found[0]
    with pool.leases() as lease:
        assert lease("transformer", TRANSFORMER, steps[0]) is found[0], "used after the second"
        assert lease("transformer", TRANSFORMER, steps[2]) is found[3]


def test_graphs_count_once_they_are_captured() -> None:
    """Inputs of three steps fit; their graphs do not, and the oldest memory is freed as soon as it is idle."""
    steps = [inputs(skipped=number) for number in (1, 2, 3)]
    graph = 10 * size_of(steps[0])
    pool = StepMemoryPool(2 * (size_of(steps[0]) + graph), FakeCapture(byte_size=graph))
    found: list[StepMemory] = []
    for step in steps:
        with pool.leases() as lease:
            found.append(lease("transformer", TRANSFORMER, step))
            for _ in range(2):  # eager, then captured
                run(found[-1], step)
    assert list(pool._idle.values()) == found[1:]
    assert pool.byte_size == 2 * (size_of(steps[0]) + graph)


def test_leased_memory_is_never_freed_for_another() -> None:
    step = inputs()
    pool = StepMemoryPool(2 * size_of(step), FakeCapture())

    def lease_three(lease: Lease) -> None:
        for _ in range(3):
            lease("transformer", TRANSFORMER, step)

    with ExitStack() as stack:
        lease = stack.enter_context(pool.leases())
        with pytest.raises(ResourceExhausted, match=f"need {size_of(step)} bytes of step memory, but 0 of"):
            lease_three(lease)
    with pool.leases() as lease:  # What was leased before the error is free again.
        assert lease("transformer", TRANSFORMER, step) is not lease("transformer", TRANSFORMER, step)
