"""How the machines of a worker group meet before each start, and how its ranks find each other after it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import pytest
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from common.errors import FailedPrecondition, Unavailable
from services.denoising.joining import GROUP_TOKEN, Connections, Place, Purpose, join
from services.denoising.meeting import Meeting
from services.denoising.messages import Kind, Link

T = TypeVar("T")


def at_once(*works: Callable[[], T]) -> list[T]:
    """What they return, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as executor:
        return [future.result(timeout=30) for future in [executor.submit(work) for work in works]]


def place_of(info: RendezvousInfo) -> RendezvousStoreInfo:
    """Where the ranks of a start find each other."""
    place: RendezvousStoreInfo | None = info.bootstrap_store_info
    assert place is not None
    return place


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_one_machine_meets_itself_where_nobody_else_can() -> None:
    meeting = Meeting(1, 0, "")
    first = meeting.next_rendezvous()
    place = place_of(first)
    assert (first.rank, first.world_size, place.master_addr) == (0, 1, "127.0.0.1")
    first.store.set("key", "value")
    token = meeting.token
    second = meeting.next_rendezvous()
    assert meeting.token != token
    assert not second.store.check(["key"]), "a key of an earlier start counts"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", place.master_port), 5).close()


def test_machines_meet_for_each_start_and_one_that_comes_back_waits_for_the_next() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    meetings = [Meeting(2, node, endpoint) for node in range(2)]

    def tokens(of: Sequence[Meeting]) -> set[str]:
        met: list[RendezvousInfo] = at_once(*(each.next_rendezvous for each in of))
        assert [info.rank for info in met] == [0, 1]
        return {each.token for each in of}

    (first,) = tokens(meetings)
    assert [each.num_nodes_waiting() for each in meetings] == [0, 0]
    # Another process takes the place of machine 1, and finds the offer of the start that it was not there for.
    gone, meetings[1] = meetings[1], Meeting(2, 1, endpoint)
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(meetings[1].next_rendezvous)
        while not meetings[0].num_nodes_waiting():
            assert not coming.done()
        meetings[0].next_rendezvous()
        coming.result(timeout=30)
    assert first != meetings[0].token == meetings[1].token
    assert gone.num_nodes_waiting() == 1
    assert [each.num_nodes_waiting() for each in meetings] == [0, 0]
    for each in meetings:
        each.shutdown()


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken,
        pytest.raises(FailedPrecondition, match="cannot listen for the other hosts on port"),
    ):
        Meeting(2, 0, f"127.0.0.1:{taken.getsockname()[1]}")


def places(world_size: int, meeting: Meeting) -> list[Place]:
    info = place_of(meeting.next_rendezvous())
    return [
        Place(rank, rank, world_size, 1, info.master_addr, info.master_port, meeting.token)
        for rank in range(world_size)
    ]


def test_ranks_connect_with_rank_0() -> None:
    def joined(place: Place) -> Connections:
        return join(place, place.store(20), 20)

    meeting = Meeting(1, 0, "")
    everybody = places(3, meeting)
    connections: list[Connections] = at_once(*((lambda place=place: joined(place)) for place in everybody))
    assert connections[0].keys() == {1, 2}
    for rank in (1, 2):
        Link(rank, connections[0][rank][Purpose.CONTROL]).send(Kind.CALL, b"%d" % rank)
        assert Link(0, connections[rank][0][Purpose.CONTROL]).receive(Kind.CALL) == (Kind.CALL, b"%d" % rank)
    for each in connections:
        for pair in each.values():
            for connection in pair.values():
                connection.close()


def test_strangers_are_turned_away_and_a_rank_that_does_not_come_is_named() -> None:
    meeting = Meeting(1, 0, "")
    (place, _) = places(2, meeting)
    store, strangers = place.store(20), place.store(20)  # a client of a store does one thing at a time

    def intrude() -> bytes:
        strangers.wait(["rank0"])
        host, port = strangers.get("rank0").decode().split()
        with socket.create_connection((host, int(port)), 20) as stranger:
            stranger.sendall(b"x" * 37)
            with suppress(ConnectionError):
                return stranger.recv(1)
        return b""

    def wait() -> bytes:
        with pytest.raises(Unavailable, match=r"ranks \[1\] of 2 have not joined in time"):
            join(place, store, 0.5)
        return b""

    assert at_once(wait, intrude) == [b"", b""]


def test_a_process_is_a_rank_only_by_the_word_of_an_agent() -> None:
    words = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    words |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert Place.from_environment(os.environ | words) is None
    place = Place.from_environment(words | {GROUP_TOKEN: "t"})
    assert place == Place(3, 1, 4, 2, "10.0.0.1", 29500, "t")
