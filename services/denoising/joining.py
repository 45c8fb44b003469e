"""Connects rank 0 of a worker group with each follower.

Rank 0 listens, and publishes its address in the agents' store. Each follower opens two connections, for control
(services.denoising.messages) and for heartbeats (services.denoising.liveness). A follower authenticates with the
group's token, which the agent of node 0 creates for each start.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from common.errors import Unavailable
from services.denoising.messages import read_exactly

GROUP_TOKEN = "DIFFUSION_FLEET_GROUP_TOKEN"
"""Environment variable with the token of this start of the group. A process started with it is a rank."""

_ADDRESS_KEY = "rank0"
_HELLO = struct.Struct(">32sBI")
_HELLO_SECONDS = 5.0


class Purpose(IntEnum):
    """The purpose of a connection to rank 0."""

    CONTROL = 1
    HEARTBEATS = 2


@dataclass(frozen=True)
class Place:
    """The rank of this process in its group, and the address of the group's store."""

    rank: int
    local_rank: int
    world_size: int
    num_nodes: int
    store_host: str
    store_port: int
    token: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Place | None:
        """Read the environment variables that the agent sets; None for a process that no agent has started."""
        if not environ.get(GROUP_TOKEN):
            return None
        return cls(
            rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            num_nodes=int(environ["GROUP_WORLD_SIZE"]),
            store_host=environ["MASTER_ADDR"],
            store_port=int(environ["MASTER_PORT"]),
            token=environ[GROUP_TOKEN],
        )

    def store(self, seconds: float) -> Store:
        """Connect to the agents' store, with a prefix for the keys of this start. Raises Unavailable."""
        timeout = timedelta(seconds=seconds)
        try:
            whole = TCPStore(self.store_host, self.store_port, is_master=False, timeout=timeout)
        except DistError as error:
            at = f"{self.store_host}:{self.store_port}"
            raise Unavailable(f"rank {self.rank} cannot reach the agents' store at {at}") from error
        return PrefixStore(self.token, whole)


Connections = dict[int, dict[Purpose, socket.socket]]
"""Connections by peer and purpose."""


def join(place: Place, store: Store, seconds: float) -> Connections:
    """Connect rank 0 with every follower. All ranks call it. Raises Unavailable if a rank does not join in time."""
    deadline = time.monotonic() + seconds
    return _connect(place, store, deadline) if place.rank else _accept(place, store, deadline)


def _accept(place: Place, store: Store, deadline: float) -> Connections:
    with _listener(place) as listener:
        store.set(_ADDRESS_KEY, f"{place.store_host} {listener.getsockname()[1]}")
        joined: Connections = {rank: {} for rank in range(1, place.world_size)}
        while missing := [rank for rank, each in joined.items() if len(each) < len(Purpose)]:
            listener.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise Unavailable(f"ranks {missing} of {place.world_size} have not joined in time") from None
            hello = _hello_of(connection, place)
            if hello is None or hello[0] not in joined or hello[1] in joined[hello[0]]:
                connection.close()  # The peer is not a rank of this start.
            else:
                joined[hello[0]][hello[1]] = connection
    return joined


def _listener(place: Place) -> socket.socket:
    """A server socket; on the loopback interface for a group on one host, else on all interfaces."""
    if place.num_nodes == 1:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _hello_of(connection: socket.socket, place: Place) -> tuple[int, Purpose] | None:
    """Read the rank and purpose of a connection. Returns None if the peer does not send the group's token."""
    connection.settimeout(_HELLO_SECONDS)
    try:
        token, purpose, rank = _HELLO.unpack(read_exactly(connection, _HELLO.size))
    except OSError:
        return None
    if not hmac.compare_digest(token, place.token.encode()) or purpose not in set(Purpose):
        return None
    _prepare(connection)
    return rank, Purpose(purpose)


def _connect(place: Place, store: Store, deadline: float) -> Connections:
    try:
        store.wait([_ADDRESS_KEY], timedelta(seconds=max(0.0, deadline - time.monotonic())))
        host, port = store.get(_ADDRESS_KEY).decode().split()
        connections = {}
        for purpose in Purpose:
            connection = socket.create_connection((host, int(port)), max(0.1, deadline - time.monotonic()))
            connection.sendall(_HELLO.pack(place.token.encode(), purpose, place.rank))
            _prepare(connection)
            connections[purpose] = connection
    except (OSError, DistError) as error:
        raise Unavailable(f"rank {place.rank} cannot reach rank 0: {error}") from error
    return {0: connections}


def _prepare(connection: socket.socket) -> None:
    """Disable Nagle's algorithm, which delays small messages, and the receive timeout."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)
