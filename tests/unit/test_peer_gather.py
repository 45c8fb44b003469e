"""Gather of keys and values in peer memory, with the streams of all ranks interleaved at random.

The program of each rank is recorded first, as operations enqueued on streams. The operations of all ranks then run in a
random order, which respects the order within each stream, stream waits and flags.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.kernels.copy_streams import CopyStreams
from models.parallel import peer_gather
from models.parallel.mesh import Axis
from models.parallel.peer_gather import PeerGather
from models.parallel.peer_memory import PeerMemory

CPU = torch.device("cpu")
HEADS, SIZE = 2, 3


class Queue:
    """A stream: operations that run in order, each once it is ready."""

    def __init__(self) -> None:
        self.operations: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        self.enqueued = 0
        self.done = 0

    def enqueue(self, run: Callable[[], object], is_ready: Callable[[], bool] = lambda: True) -> None:
        self.operations.append((is_ready, run))
        self.enqueued += 1

    def step(self) -> bool:
        """Run the first operation if it is ready. Returns whether it ran."""
        if not self.operations or not self.operations[0][0]():
            return False
        self.operations.popleft()[1]()
        self.done += 1
        return True


class RecordedStreams:
    """A CopyStreams that records operations, on the memory of this process."""

    def __init__(self) -> None:
        self.current, self.side = Queue(), Queue()

    def await_stream(self, waiting: Queue, other: Queue) -> None:
        enqueued = other.enqueued
        waiting.enqueue(lambda: None, lambda: other.done >= enqueued)

    def copy_rows(self, stream: Queue, to: int, source: int, pitch: int, width: int, rows: int) -> None:
        # One operation per row, because a copy is not atomic.
        for row in range(rows):
            at = row * pitch
            stream.enqueue(partial(ctypes.memmove, to + at, source + at, width))

    def write_flag(self, stream: Queue, address: int, value: int) -> None:
        def write() -> None:
            ctypes.c_uint32.from_address(address).value = value

        stream.enqueue(write)

    def await_flag(self, stream: Queue, address: int) -> None:
        stream.enqueue(lambda: None, lambda: ctypes.c_uint32.from_address(address).value == 1)


class Memory:
    """Peer memory of all ranks. The n-th allocations of all ranks form one symmetric buffer."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.allocated: dict[tuple[int, int], Tensor] = {}

    def of(self, rank: int) -> Callable[[Axis, torch.device, int], PeerMemory]:
        number = count()

        def allocate(axis: Axis, _: torch.device, size: int) -> PeerMemory:
            index = next(number)
            buffers = [
                self.allocated.setdefault((index, each), torch.zeros(size, dtype=torch.uint8))
                for each in range(self.ranks)
            ]
            assert axis.index == rank
            assert all(len(each) == size for each in buffers)
            return PeerMemory(buffers[rank], [each.data_ptr() for each in buffers])

        return allocate


def value_of(forward: int, layer: int, rank: int) -> float:
    return float(1 + rank + 10 * layer + 1000 * forward)


def record(
    rank: int, memory: Memory, forwards: Sequence[tuple[int, Sequence[int]]], arrived: list[int], attended: list[str]
) -> RecordedStreams:
    """Record the program of a rank: forwards of several layers. Each forward ends with a barrier of all ranks."""
    streams = RecordedStreams()
    axis = Axis(memory.ranks, rank)
    gather = PeerGather(axis, CPU, cast("CopyStreams", streams), memory.of(rank))
    for forward, (layers, sizes) in enumerate(forwards):
        for layer in range(layers):
            sent = gather.key_values((2, sizes[rank], 2, HEADS, SIZE), torch.float32, sizes)
            streams.current.enqueue(partial(sent.buffer.fill_, value_of(forward, layer, rank)))
            sent.send()
            expected = torch.cat([
                torch.full((2, tokens, HEADS, SIZE), value_of(forward, layer, other))
                for other, tokens in enumerate(sizes)
            ], dim=1)  # fmt: skip
            CHECK[:] = [partial(check_twice, streams.current, expected, f"{forward}.{layer}", attended)]
            sent.attend(torch.empty(2, 1, HEADS, SIZE))
        barrier(streams.current, rank, forward, memory.ranks, arrived)
    return streams


CHECK: list[Callable[[Tensor, Tensor], None]] = []
"""The replacement of attention() for the layer that is being recorded."""


def check_twice(stream: Queue, expected: Tensor, at: str, attended: list[str], k: Tensor, v: Tensor) -> None:
    """Enqueue checks of keys and values at the start and at the end of attention."""
    heads = k.shape[2]

    def check() -> None:
        assert torch.equal(k, expected[:, :, :heads]), at
        assert torch.equal(v, expected[:, :, :heads]), at
        attended.append(at)

    stream.enqueue(check)
    stream.enqueue(check)


def barrier(stream: Queue, rank: int, forward: int, ranks: int, arrived: list[int]) -> None:
    """Enqueue a barrier: a rank continues once all ranks have arrived."""

    def arrive() -> None:
        arrived[rank] = forward + 1

    stream.enqueue(arrive)
    stream.enqueue(lambda: None, lambda: all(arrived[other] > forward for other in range(ranks)))


def run_in_random_order(programs: Sequence[RecordedStreams], seed: int) -> None:
    generator = random.Random(seed)
    # Some streams are slow throughout, so that ranks drift apart as far as possible.
    queues = [queue for streams in programs for queue in (streams.current, streams.side)]
    weights = [generator.choice((1, 1, 10, 100)) for _ in queues]
    stuck = 0
    while any(queue.operations for queue in queues):
        (queue,) = generator.choices(queues, weights)
        stuck = 0 if queue.step() else stuck + 1
        if stuck > 10_000 and not any(queue.step() for queue in queues):
            raise AssertionError("deadlock: no stream can continue")


@pytest.fixture(autouse=True)
def _attending(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, out: Any) -> None:
        del q, out
        CHECK[0](k, v)

    monkeypatch.setattr(peer_gather, "attention", attend)


@pytest.mark.parametrize("min_work", [peer_gather.MIN_GROUPED_WORK, 0], ids=["whole", "in-groups"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_attends_to_the_keys_and_values_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, min_work: int
) -> None:
    """Forwards have odd and even numbers of layers. Lengths outgrow the buffers, and some chunks have no tokens."""
    monkeypatch.setattr(peer_gather, "MIN_GROUPED_WORK", min_work)
    forwards = [(3, [2] * ranks), (1, [1, *[0] * (ranks - 1)]), (1, [5, *[4] * (ranks - 1)]), (4, [2] * ranks)]
    groups = 1 if min_work else peer_gather.MAX_GROUPS
    for seed in range(8):
        memory, arrived, attended = Memory(ranks), [0] * ranks, list[str]()
        programs = [record(rank, memory, forwards, arrived, attended) for rank in range(ranks)]
        run_in_random_order(programs, seed)
        assert len(attended) == 2 * groups * ranks * sum(layers for layers, _ in forwards)


def test_a_rank_with_a_single_buffer_overwrites_data_that_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above detects the race that the second buffer prevents."""
    monkeypatch.setattr(peer_gather, "NUM_BUFFERS", 1)

    def all_runs() -> None:
        for seed in range(30):
            memory, arrived = Memory(2), [0, 0]
            programs = [record(rank, memory, [(4, [2, 2])], arrived, []) for rank in range(2)]
            run_in_random_order(programs, seed)

    with pytest.raises(AssertionError):
        all_runs()
