"""The pool of step memory: leases, returns, order of eviction, and isolation of live requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ResourceExhausted
from fake_graphs import FakeCapture
from loop_family import SHAPES, LoopTransformer
from loop_steps import EagerBranch, equal, loop_step, predict
from models.dits.base import MemorySpec
from models.stages.predictor import predict_step
from models.stages.step_memory import Lease, StepInputs, StepKind, StepMemory, StepMemoryPool, byte_size_of

DITS = Path(__file__).resolve().parents[2] / "models" / "dits"
TRANSFORMER = LoopTransformer(1.0, remembers=True)


def inputs(batch: int = 2, skipped: int = 0) -> StepInputs:
    """A step of the loop family for `batch` outputs."""
    prepared = TRANSFORMER.prepare(torch.ones(3, batch), text=torch.ones(batch, 3))
    latents = {"video": torch.ones(batch, *SHAPES["video"][1:]), "sound": torch.ones(batch, *SHAPES["audio"][1:])}
    row = {name: rows[0] for name, rows in prepared.steps.items()}
    flags = {"skipped": skipped} if skipped else {}
    return StepInputs(latents, row, prepared.constants, {}, flags)


def size_of(step: StepInputs) -> int:
    return byte_size_of(TRANSFORMER, step, has_cache=False, has_graphs=True)


def run(memory: StepMemory, step: StepInputs) -> dict[str, Tensor]:
    return dict(predict_step(memory, step.latents, step.row, StepKind()))


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


def test_every_denoiser_that_caches_tensors_names_its_cached_tensors() -> None:
    """Graphs of a family that does not name its cached tensors could read freed memory."""
    caching = {path.stem for path in DITS.glob("*.py") if "@lru_cache" in path.read_text()}
    naming = {path.stem for path in DITS.glob("*.py") if "def cached_tensors" in path.read_text()} - {"base"}
    assert caching <= naming, (
        f"{sorted(caching - naming)} cache tensors without cached_tensors(): graphs may read freed memory"
    )
    assert caching


def test_a_returned_memory_is_leased_again_only_to_an_equal_key(pool: StepMemoryPool) -> None:
    """Another expert, branch, number of outputs or module gets other memory."""
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


def longer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with one more element along the last dimension."""
    return {name: torch.cat((each, each[..., :1]), -1) for name, each in tensors.items()}


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in half the bytes."""
    return {name: each.half() for name, each in tensors.items()}


STEP = inputs()
OTHER_STEPS: dict[str, StepInputs] = {
    "shape of latents": replace(STEP, latents=longer(STEP.latents)),
    "shape of the row": replace(STEP, row=longer(STEP.row)),
    "shape of constants": replace(STEP, constants=longer(STEP.constants)),
    "dtype of latents": replace(STEP, latents=halved(STEP.latents)),
    "dtype of the row": replace(STEP, row=halved(STEP.row)),
    "dtype of constants": replace(STEP, constants=halved(STEP.constants)),
    "a memory tensor": replace(STEP, memory={"total": MemorySpec(SHAPES["video"], torch.float32)}),
    "length of a memory tensor": replace(STEP, memory={"total": MemorySpec((8, 3, 4), torch.float32)}),
    "dtype of a memory tensor": replace(STEP, memory={"total": MemorySpec(SHAPES["video"], torch.float16)}),
    "a flag": replace(STEP, flags={"skipped": 0}),
    "value of a flag": replace(STEP, flags={"skipped": 1}),
    "name of a flag": replace(STEP, flags={"halved": 1}),
}


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_steps_of_another_form_have_separate_memory(pool: StepMemoryPool, name: str) -> None:
    """A graph of the wrong form would write past the ends of its buffers, or run other kernels."""
    with pool.leases() as lease:
        first = lease("transformer", TRANSFORMER, STEP)
        others = [lease("transformer", TRANSFORMER, each) for other, each in OTHER_STEPS.items() if other != name]
    with pool.leases() as lease:
        assert lease("transformer", TRANSFORMER, OTHER_STEPS[name]) not in (first, *others)
    with pool.leases() as lease:
        assert lease("transformer", TRANSFORMER, inputs()) is first


def test_the_most_recently_used_memory_is_leased_first(pool: StepMemoryPool) -> None:
    """Memory left by a burst of requests can then be freed when other steps need the bytes."""
    with ExitStack() as stack:
        leases = [stack.enter_context(pool.leases()) for _ in range(3)]
        found = [lease("transformer", TRANSFORMER, inputs()) for lease in leases]
    for _ in range(2):
        with pool.leases() as lease:
            assert lease("transformer", TRANSFORMER, inputs()) is found[0], "memory of the context that exited last"


@pytest.mark.parametrize("error", [KeyError, ResourceExhausted, KeyboardInterrupt], ids=lambda each: each.__name__)
@pytest.mark.parametrize("steps", [0, 1, 2], ids=["leased", "eager", "captured"])
def test_an_error_in_the_loop_returns_all_memory(error: Callable[[str], BaseException], steps: int) -> None:
    """Errors before the first step, after the eager step and after the captured step return all memory."""
    step = loop_step(TRANSFORMER)
    pool = StepMemoryPool(2 * size_of(step), FakeCapture())
    leased: list[StepMemory] = []

    def request() -> None:
        with pool.leases() as lease:
            leased[:] = [lease("transformer", TRANSFORMER, step) for _ in range(2)]
            for memory in leased * steps:
                predict(memory, step)
            raise error("in the loop")

    for _ in range(3):
        with pytest.raises(error, match="in the loop"):  # type: ignore[call-overload]
            request()
        assert not pool._leased
        assert list(pool._idle.values()) == leased
    with pool.leases() as lease:
        found = [lease("transformer", TRANSFORMER, step) for _ in range(2)]
        assert set(found) == set(leased)
        reference = EagerBranch(TRANSFORMER, step)
        assert equal(predict(found[0], step), reference.predict(step)), "failed requests leave no state behind"


def test_an_ended_request_returns_only_its_own_memory(pool: StepMemoryPool) -> None:
    with pool.leases() as lease:
        running = lease("transformer", TRANSFORMER, inputs())
        with pool.leases() as other:
            ended = other("transformer", TRANSFORMER, inputs())
        assert list(pool._leased.values()) == [running]
        assert lease("transformer", TRANSFORMER, inputs()) is ended


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
        assert lease("transformer", TRANSFORMER, steps[0]) is found[0], "used more recently than the second memory"
        assert lease("transformer", TRANSFORMER, steps[2]) is found[3]


def test_idle_memory_is_bounded_in_bytes_rather_than_in_number() -> None:
    """Ten small memories fit within the bound. A lease of a large memory frees only as many of them as it needs."""
    small = [inputs(batch=1, skipped=number) for number in range(1, 11)]
    large = inputs(batch=8)
    spare = size_of(small[0]) // 2
    retained = 2
    pool = StepMemoryPool(
        max(10 * size_of(small[0]), size_of(large) + retained * size_of(small[0]) + spare), FakeCapture()
    )

    def use(step: StepInputs) -> StepMemory:
        with pool.leases() as lease:
            return lease("transformer", TRANSFORMER, step)

    found = [use(step) for step in small]
    assert [use(step) for step in small] == found
    big = use(large)
    assert list(pool._idle.values()) == [*found[-retained:], big]
    assert use(small[0]) is not found[0]


def test_captured_graphs_count_towards_the_bound() -> None:
    """Inputs of three steps fit, but their graphs do not. The third lease frees the oldest memory."""
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


def test_leased_memory_is_never_freed_for_another_lease() -> None:
    step = inputs()
    pool = StepMemoryPool(2 * size_of(step), FakeCapture())

    def lease_three(lease: Lease) -> None:
        for _ in range(3):
            lease("transformer", TRANSFORMER, step)

    with ExitStack() as stack:
        lease = stack.enter_context(pool.leases())
        with pytest.raises(ResourceExhausted, match=f"needs {size_of(step)} bytes, but 0 of") as refused:
            lease_three(lease)
        assert refused.value.field == "", "no field of the request is wrong"
    with pool.leases() as lease:  # Memory leased before the error is free again.
        assert lease("transformer", TRANSFORMER, step) is not lease("transformer", TRANSFORMER, step)


def test_graphs_that_exceed_the_bound_are_freed_when_their_request_ends() -> None:
    """A live request retains its graphs. At its end, the pool retains only memories that fit within the bound."""
    step = inputs()
    pool = StepMemoryPool(3 * size_of(step), FakeCapture(byte_size=size_of(step)))
    with pool.leases() as lease:
        found = [lease("transformer", TRANSFORMER, step) for _ in range(2)]
        for memory in found * 2:
            run(memory, step)
        assert pool.byte_size == 4 * size_of(step)
        # Ranks must agree on refusals but measure different graph sizes, so graphs alone refuse no lease.
        with pool.leases() as other:
            other("transformer", TRANSFORMER, step)
    assert list(pool._idle.values()) == found[1:]
