"""Rendezvous of the hosts of a worker group before each start, and connections of its ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import pytest
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from async_tests import HANG_SECONDS
from common.errors import FailedPrecondition, Unavailable
from services.denoising import joining
from services.denoising.joining import GROUP_TOKEN, Connections, Place, Purpose, join
from services.denoising.meeting import Meeting
from services.denoising.messages import Kind, Link

T = TypeVar("T")


def run_parallel(*functions: Callable[[], T]) -> list[T]:
    """Results of functions, each of which runs in its own thread."""
    with ThreadPoolExecutor(len(functions)) as executor:
        return [future.result(timeout=HANG_SECONDS) for future in [executor.submit(function) for function in functions]]


def store_address_of(info: RendezvousInfo) -> RendezvousStoreInfo:
    """Address of the bootstrap store of a rendezvous."""
    address: RendezvousStoreInfo | None = info.bootstrap_store_info
    assert address is not None
    return address


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_single_host_uses_a_loopback_store() -> None:
    meeting = Meeting(1, 0, "")
    first = meeting.next_rendezvous()
    address = store_address_of(first)
    assert (first.rank, first.world_size, address.master_addr) == (0, 1, "127.0.0.1")
    first.store.set("key", "value")
    token = meeting.token
    second = meeting.next_rendezvous()
    assert meeting.token != token
    assert not second.store.check(["key"]), "keys of an earlier start must not exist"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", address.master_port), 5).close()


def test_hosts_meet_before_each_start_and_a_restarted_host_waits_for_the_next_start() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    meetings = [Meeting(2, node, endpoint) for node in range(2)]

    def tokens(of: Sequence[Meeting]) -> set[str]:
        met: list[RendezvousInfo] = run_parallel(*(each.next_rendezvous for each in of))
        assert [info.rank for info in met] == [0, 1]
        return {each.token for each in of}

    (first,) = tokens(meetings)
    assert [each.num_nodes_waiting() for each in meetings] == [0, 0]
    # A new process replaces the process of node 1. The new process must not join the earlier start.
    replaced, meetings[1] = meetings[1], Meeting(2, 1, endpoint)
    with ThreadPoolExecutor(1) as executor:
        pending = executor.submit(meetings[1].next_rendezvous)
        while not meetings[0].num_nodes_waiting():
            assert not pending.done()
        meetings[0].next_rendezvous()
        pending.result(timeout=HANG_SECONDS)
    assert first != meetings[0].token == meetings[1].token
    assert replaced.num_nodes_waiting() == 1
    assert [each.num_nodes_waiting() for each in meetings] == [0, 0]
    for each in meetings:
        each.shutdown()


def test_a_port_in_use_is_refused() -> None:
    with (
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        pytest.raises(FailedPrecondition, match="cannot listen for the other hosts on port"),
    ):
        Meeting(2, 0, f"127.0.0.1:{listener.getsockname()[1]}")


def places(world_size: int, meeting: Meeting) -> list[Place]:
    address = store_address_of(meeting.next_rendezvous())
    return [
        Place(rank, rank, world_size, 1, address.master_addr, address.master_port, meeting.token)
        for rank in range(world_size)
    ]


def test_ranks_connect_with_rank_0() -> None:
    def joined(place: Place) -> Connections:
        return join(place, place.store(20), 20)

    meeting = Meeting(1, 0, "")
    each_place = places(3, meeting)
    connections: list[Connections] = run_parallel(*((lambda place=place: joined(place)) for place in each_place))
    assert connections[0].keys() == {1, 2}
    for rank in (1, 2):
        Link(rank, connections[0][rank][Purpose.CONTROL]).send(Kind.CALL, b"%d" % rank)
        assert Link(0, connections[rank][0][Purpose.CONTROL]).receive(Kind.CALL) == (Kind.CALL, b"%d" % rank)
    for each in connections:
        for pair in each.values():
            for connection in pair.values():
                connection.close()


def test_unknown_peers_are_rejected_and_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(1, 0, "")
    (place, _) = places(2, meeting)
    strangers: list[socket.socket] = []
    listen = joining._listener

    def listen_and_intrude(place: Place) -> socket.socket:
        """Return the listener of rank 0, to which a stranger is connected for each purpose of rank 1."""
        listener = listen(place)
        for purpose in Purpose:
            strangers.append(socket.create_connection(listener.getsockname(), HANG_SECONDS))
            strangers[-1].sendall(joining._HELLO.pack(b"x" * 32, purpose, 1))
        return listener

    monkeypatch.setattr(joining, "_listener", listen_and_intrude)
    with pytest.raises(Unavailable, match=r"ranks \[1\] of 2 have not joined in time"):
        join(place, place.store(20), 0.5)
    assert len(strangers) == len(Purpose)
    for stranger in strangers:
        with stranger, suppress(ConnectionError):
            assert stranger.recv(1) == b""


def test_a_process_is_a_rank_only_with_the_token_of_an_agent() -> None:
    variables = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert Place.from_environment(os.environ | variables) is None
    place = Place.from_environment(variables | {GROUP_TOKEN: "t"})
    assert place == Place(3, 1, 4, 2, "10.0.0.1", 29500, "t")
