"""Interleaved requests on one pool of step memory: results equal those of separate eager runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from torch import Tensor

from common.errors import ResourceExhausted
from fake_graphs import FakeCapture
from loop_family import LoopTransformer
from loop_steps import EagerBranch, equal, loop_step, predict, tensor_bytes
from models.dits.base import Predictions
from models.stages.step_memory import NO_FLAGS, Flags, StepInputs, StepMemory, StepMemoryPool

EXPERTS = {"transformer": 1.0, "transformer_2": -0.5}
"""Gain of each expert; the experts have equal shapes."""
LIVE_BRANCHES = 4
"""Capacity of the pool, in branches with two outputs."""
GRAPH_BYTES = 100
FLAGS: st.SearchStrategy[Flags] = st.sampled_from([NO_FLAGS, (("skipped", 2),)])
SEEDS = st.integers(0, 1 << 16)


class Form(NamedTuple):
    """Kind of a branch: expert, number of outputs, and whether a block is skipped."""

    role: str
    batch: int
    is_perturbed: bool


FORMS = st.builds(Form, st.sampled_from(sorted(EXPERTS)), st.sampled_from([1, 2, 2]), st.booleans())


class LiveBranch(NamedTuple):
    """Form, leased memory and eager reference of a branch."""

    form: Form
    memory: StepMemory
    reference: EagerBranch


@dataclass(eq=False)
class Request:
    """A live request. `results` pairs predictions of its latest steps with expected predictions."""

    ends: ExitStack
    branches: list[LiveBranch] = field(default_factory=list)
    results: list[tuple[Predictions, Predictions]] = field(default_factory=list)


class LiveRequests(RuleBasedStateMachine):
    """Requests that lease branches, predict in any order, and end or fail at any time."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.experts = {role: LoopTransformer(gain, remembers=True) for role, gain in EXPERTS.items()}
        form = Form("transformer", 2, is_perturbed=False)
        self.max_bytes = LIVE_BRANCHES * tensor_bytes(self.experts[form.role], self.step(form, 0))
        self.capture = FakeCapture(GRAPH_BYTES)
        self.pool = StepMemoryPool(self.max_bytes, self.capture)
        self.live: list[Request] = []
        self.predicted: set[tuple[StepMemory, Flags]] = set()

    def step(self, form: Form, seed: int) -> StepInputs:
        """Inputs of a step of a branch."""
        flags = {"skipped": 1} if form.is_perturbed else {}
        return loop_step(self.experts[form.role], seed, batch=form.batch, flags=flags)

    @initialize(target=requests, forms=st.lists(FORMS, min_size=1, max_size=3), seed=SEEDS)
    def start_first(self, forms: list[Form], seed: int) -> object:
        """Start the first request."""
        return self.start(forms, seed)

    @rule(target=requests, forms=st.lists(FORMS, min_size=1, max_size=3), seed=SEEDS)
    def start(self, forms: list[Form], seed: int) -> object:
        """Lease all branches of a request, or no branch if their memory exceeds the bound."""
        request = Request(ExitStack())
        lease = request.ends.enter_context(self.pool.leases())
        leased = self.leased_bytes()
        for number, form in enumerate(forms):
            first = self.step(form, seed + number)
            expert = self.experts[form.role]
            size = tensor_bytes(expert, first)
            if leased + size > self.max_bytes:
                with pytest.raises(ResourceExhausted) as refused, request.ends:
                    lease(form.role, expert, first)
                assert refused.value.field == ""
                return multiple()
            memory = lease(form.role, expert, first)
            leased += memory.tensor_bytes
            request.branches.append(LiveBranch(form, memory, EagerBranch(expert, first)))
        self.live.append(request)
        return request

    @rule(request=requests, numbers=st.lists(st.integers(0, 2), min_size=1, max_size=6), seed=SEEDS, flags=FLAGS)
    def predict(self, request: Request, numbers: list[int], seed: int, flags: Flags) -> None:
        """Run a few steps of the branches."""
        for index, number in enumerate(numbers):
            branch = request.branches[number % len(request.branches)]
            step = self.step(branch.form, seed + index)
            replays, is_captured = self.capture.replays, (branch.memory, flags) in self.predicted
            got, expected = predict(branch.memory, step, flags), branch.reference.predict(step, flags)
            assert equal(got, expected)
            assert self.capture.replays == replays + is_captured, "only the first step runs eagerly"
            self.predicted.add((branch.memory, flags))
            request.results = [*request.results[-3:], (got, expected)]

    @rule(request=consumes(requests))
    def end(self, request: Request) -> None:
        """End a request, which returns its memory."""
        self.live.remove(request)
        request.ends.close()

    @rule(request=consumes(requests))
    def fail(self, request: Request) -> None:
        """Fail a request, which returns its memory and propagates the error."""
        self.live.remove(request)
        with pytest.raises(KeyError), request.ends:
            raise KeyError

    def leased_bytes(self) -> int:
        """Bytes of the branches of all live requests."""
        return sum(branch.memory.tensor_bytes for request in self.live for branch in request.branches)

    @invariant()
    def results_are_unchanged(self) -> None:
        """Neither later steps nor other requests overwrite results."""
        assert all(equal(got, expected) for request in self.live for got, expected in request.results)

    @invariant()
    def live_branches_share_no_memory(self) -> None:
        """Each live branch has its own memory, and the pool counts only this memory as leased."""
        memories = [branch.memory for request in self.live for branch in request.branches]
        assert len(set(memories)) == len(memories)
        assert set(self.pool._leased.values()) == set(memories)
        assert not set(self.pool._idle.values()) & set(memories)
        tensors = [each for memory in memories for each in tensors_of(memory)]
        assert len({each.untyped_storage().data_ptr() for each in tensors}) == len(tensors)

    @invariant()
    def the_pool_is_bounded_in_bytes(self) -> None:
        """Graphs that live requests have captured may exceed the bound until the requests end."""
        idle = [memory.byte_size for memory in self.pool._idle.values()]
        assert self.leased_bytes() + sum(each.tensor_bytes for each in self.pool._idle.values()) <= self.max_bytes
        assert self.pool.byte_size - sum(idle) >= self.leased_bytes()
        if not self.live:
            assert self.pool.byte_size == sum(idle) <= self.max_bytes

    @invariant()
    def graphs_belong_to_one_memory(self) -> None:
        """No two memories share a graph, and the bytes of each graph are counted."""
        memories = [*self.pool._leased.values(), *self.pool._idle.values()]
        graphs = [id(graph.graph) for memory in memories for graph in memory._graphs.values()]
        assert len(set(graphs)) == len(graphs)
        assert all(memory.graph_bytes == GRAPH_BYTES * len(memory._graphs) for memory in memories)


def tensors_of(memory: StepMemory) -> list[Tensor]:
    """The tensors of a step memory and the buffers of its graphs."""
    buffers = [] if memory._buffers is None else list(memory._buffers.values())
    return [each for tensors in (memory._memory, *buffers) for each in tensors.values()]


LiveRequests.TestCase.settings = settings(max_examples=25, stateful_step_count=20)
TestLiveRequests = LiveRequests.TestCase
