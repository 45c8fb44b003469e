"""Keys and values that ranks write into each other's memory, with streams that run in any order that is allowed.

A rank's program is recorded first, as a GPU's queues are filled; then the operations of all ranks' streams are run in a
random order, each as soon as it may.
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
    """A stream: operations that run in order, each once it may."""

    def __init__(self) -> None:
        self.operations: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        self.given = 0
        self.done = 0

    def give(self, run: Callable[[], object], may: Callable[[], bool] = lambda: True) -> None:
        self.operations.append((may, run))
        self.given += 1

    def step(self) -> bool:
        """Run the first operation if it may; whether it did."""
        if not self.operations or not self.operations[0][0]():
            return False
        self.operations.popleft()[1]()
        self.done += 1
        return True


class RecordedStreams:
    """models.kernels.copy_streams.CopyStreams, on queues and the memory of this process."""

    def __init__(self) -> None:
        self.current, self.side = Queue(), Queue()

    def await_stream(self, waiting: Queue, other: Queue) -> None:
        given = other.given
        waiting.give(lambda: None, lambda: other.done >= given)

    def copy_rows(self, stream: Queue, to: int, source: int, pitch: int, width: int, rows: int) -> None:
        # One row at a time: a copy is nothing that happens at once.
        for row in range(rows):
            at = row * pitch
            stream.give(partial(ctypes.memmove, to + at, source + at, width))

    def write_flag(self, stream: Queue, address: int, value: int) -> None:
        def write() -> None:
            ctypes.c_uint32.from_address(address).value = value

        stream.give(write)

    def await_flag(self, stream: Queue, address: int) -> None:
        stream.give(lambda: None, lambda: ctypes.c_uint32.from_address(address).value == 1)


class Memory:
    """The memories of all ranks, by the order in which they are asked for."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.made: dict[tuple[int, int], Tensor] = {}

    def of(self, rank: int) -> Callable[[Axis, torch.device, int], PeerMemory]:
        number = count()

        def allocate(axis: Axis, _: torch.device, size: int) -> PeerMemory:
            index = next(number)
            whole = [
                self.made.setdefault((index, each), torch.zeros(size, dtype=torch.uint8)) for each in range(self.ranks)
            ]
            assert axis.index == rank
            assert all(len(each) == size for each in whole)
            return PeerMemory(whole[rank], [each.data_ptr() for each in whole])

        return allocate


def value_of(forward: int, layer: int, rank: int) -> float:
    return float(1 + rank + 10 * layer + 1000 * forward)


def record(
    rank: int, memory: Memory, forwards: Sequence[tuple[int, Sequence[int]]], joined: list[int], attended: list[str]
) -> RecordedStreams:
    """A rank's whole program: forwards of some layers each, which end with a join of all ranks."""
    streams = RecordedStreams()
    axis = Axis(memory.ranks, rank)
    gather = PeerGather(axis, CPU, cast("CopyStreams", streams), memory.of(rank))
    for forward, (layers, sizes) in enumerate(forwards):
        for layer in range(layers):
            sent = gather.key_values((2, sizes[rank], 2, HEADS, SIZE), torch.float32, sizes)
            streams.current.give(partial(sent.buffer.fill_, value_of(forward, layer, rank)))
            sent.send()
            expected = torch.cat([
                torch.full((2, tokens, HEADS, SIZE), value_of(forward, layer, other))
                for other, tokens in enumerate(sizes)
            ], dim=1)  # fmt: skip
            CHECK[:] = [partial(look_twice, streams.current, expected, f"{forward}.{layer}", attended)]
            sent.attend(torch.empty(2, 1, HEADS, SIZE))
        join(streams.current, rank, forward, memory.ranks, joined)
    return streams


CHECK: list[Callable[[Tensor, Tensor], None]] = []
"""What attention is, for the layer that is being recorded."""


def look_twice(stream: Queue, expected: Tensor, at: str, attended: list[str], k: Tensor, v: Tensor) -> None:
    """Have a stream look at keys and values when it begins to attend, and when it ends."""
    heads = k.shape[2]

    def look() -> None:
        assert torch.equal(k, expected[:, :, :heads]), at
        assert torch.equal(v, expected[:, :, :heads]), at
        attended.append(at)

    stream.give(look)
    stream.give(look)


def join(stream: Queue, rank: int, forward: int, ranks: int, joined: list[int]) -> None:
    """As a collective: a rank goes on when all have come."""

    def come() -> None:
        joined[rank] = forward + 1

    stream.give(come)
    stream.give(lambda: None, lambda: all(joined[other] > forward for other in range(ranks)))


def run_in_random_order(everyone: Sequence[RecordedStreams], seed: int) -> None:
    chance = random.Random(seed)
    # Some streams are slow throughout: ranks drift apart as far as they can.
    queues = [queue for streams in everyone for queue in (streams.current, streams.side)]
    weights = [chance.choice((1, 1, 10, 100)) for _ in queues]
    stuck = 0
    while any(queue.operations for queue in queues):
        (queue,) = chance.choices(queues, weights)
        stuck = 0 if queue.step() else stuck + 1
        if stuck > 10_000 and not any(queue.step() for queue in queues):
            raise AssertionError("no stream can go on")


@pytest.fixture(autouse=True)
def _attending(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, out: Any) -> None:
        del q, out
        CHECK[0](k, v)

    monkeypatch.setattr(peer_gather, "attention", attend)


@pytest.mark.parametrize("least", [peer_gather.MIN_GROUPED_WORK, 0], ids=["whole", "in-groups"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_attends_to_what_all_ranks_sent(monkeypatch: pytest.MonkeyPatch, ranks: int, least: int) -> None:
    """Forwards of odd and even numbers of layers, of lengths that outgrow the memory, with chunks of no tokens."""
    monkeypatch.setattr(peer_gather, "MIN_GROUPED_WORK", least)
    forwards = [(3, [2] * ranks), (1, [1, *[0] * (ranks - 1)]), (1, [5, *[4] * (ranks - 1)]), (4, [2] * ranks)]
    groups = 1 if least else peer_gather.MAX_GROUPS
    for seed in range(8):
        memory, joined, attended = Memory(ranks), [0] * ranks, list[str]()
        everyone = [record(rank, memory, forwards, joined, attended) for rank in range(ranks)]
        run_in_random_order(everyone, seed)
        assert len(attended) == 2 * groups * ranks * sum(layers for layers, _ in forwards)


def test_fewer_places_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above would find what it is for: with one place, a rank overwrites what another one still reads."""
    monkeypatch.setattr(peer_gather, "NUM_BUFFERS", 1)

    def all_runs() -> None:
        for seed in range(30):
            memory, joined = Memory(2), [0, 0]
            everyone = [record(rank, memory, [(4, [2, 2])], joined, []) for rank in range(2)]
            run_in_random_order(everyone, seed)

    with pytest.raises(AssertionError):
        all_runs()
