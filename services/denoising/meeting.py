"""The rendezvous of a worker group's hosts, before each start of its ranks.

Node 0 serves a store. For each start, its agent offers a new token. When the agents of all other nodes have accepted
the offer, node 0 confirms it. A node that finds a confirmed offer without having accepted it is late, and waits for the
next offer. torch's dynamic rendezvous is not used, because it unpickles values from its store, and because its store
may be on any node.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from common.errors import FailedPrecondition

_OFFER = "offer"
_CONFIRMED = "word"
"""Key of a confirmed offer. It must not change, because agents of two releases may share a store."""

_LATE = "late"
# Python handles signals only between two waits, and a node may wait for hours.
_WAIT = timedelta(seconds=1)
_PAUSE_SECONDS = 0.1


class Meeting(RendezvousHandler):
    """The rendezvous of `num_nodes` hosts at a store, for the agent of one host."""

    def __init__(self, num_nodes: int, node_rank: int, endpoint: str) -> None:
        """Serve the store on node 0. `endpoint` is HOST:PORT of node 0, unused for one node.

        Raises FailedPrecondition if the port cannot be bound.
        """
        self._num_nodes = num_nodes
        self._node_rank = node_rank
        self._host, self._port = "127.0.0.1", 0
        if num_nodes > 1:
            self._host, port = endpoint.rpartition(":")[::2]
            self._host, self._port = self._host.strip("[]"), int(port)
        self._served = self._serve_store() if node_rank == 0 else None
        self._seen: Store | None = None
        self.token = ""

    def _serve_store(self) -> Store:
        """Serve the store. A group on one host uses the loopback interface."""
        try:
            if self._num_nodes == 1:
                listener = socket.create_server((self._host, 0))
            elif socket.has_dualstack_ipv6():
                listener = socket.create_server(("", self._port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                listener = socket.create_server(("", self._port))
        except OSError as error:
            raise FailedPrecondition(
                f"cannot listen for the other hosts on port {self._port}: {error.strerror}", field="rdzv_endpoint"
            ) from error
        self._port = listener.getsockname()[1]
        # The store closes the descriptor.
        return TCPStore(self._host, self._port, is_master=True, timeout=_WAIT, master_listen_fd=listener.detach())

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all other nodes, without a timeout."""
        if self._served is not None:
            store = self._served
            self.token = self._gather(store)
        else:
            store, self.token = self._join()
            self._seen = store
        # The prefix separates the keys of this start from the keys of earlier starts.
        of_this_start = PrefixStore(self.token, store)
        address = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(of_this_start, self._node_rank, self._num_nodes, address)

    def _gather(self, store: Store) -> str:
        token = secrets.token_hex(16)
        store.set(_OFFER, token)
        for node in range(1, self._num_nodes):
            _until(lambda key=f"{token}/{node}": store.check([key]))  # type: ignore[misc]
        store.set(f"{token}/{_CONFIRMED}", "1")
        return token

    def _join(self) -> tuple[Store, str]:
        while True:
            try:
                # Connect first, because TCPStore logs a stack trace per attempt while node 0 is unavailable.
                socket.create_connection((self._host, self._port), _WAIT.total_seconds()).close()
                store = TCPStore(self._host, self._port, is_master=False, timeout=_WAIT)
                return store, self._answer(store)
            except (OSError, DistError):
                time.sleep(_PAUSE_SECONDS)

    def _answer(self, store: Store) -> str:
        """Accept offers until one is confirmed. Raises DistError when the store is unavailable."""
        accepted = ""
        while True:
            token = store.get(_OFFER).decode() if store.check([_OFFER]) else ""
            confirmed = bool(token) and store.check([f"{token}/{_CONFIRMED}"])
            if confirmed and token == accepted:
                return token
            if token and not confirmed and token != accepted:
                store.set(f"{token}/{self._node_rank}", "1")
                accepted = token
            if confirmed and token != accepted:
                store.set(f"{token}/{_LATE}", "1")  # Node 0 may not have detected the loss of this node's ranks yet.
            time.sleep(_PAUSE_SECONDS)

    @property
    def use_agent_store(self) -> bool:
        """True, because ranks use the store of the agents."""
        return True

    def get_backend(self) -> str:
        """The name of this rendezvous, for torch's records."""
        return "meeting"

    def get_run_id(self) -> str:
        """The name of the job, for torch's records."""
        return "denoising"

    def is_closed(self) -> bool:
        """False, because nodes can always join the next start."""
        return False

    def set_closed(self) -> None:
        """Do nothing, because the other nodes may wait for the next start."""

    def num_nodes_waiting(self) -> int:
        """1 if another node waits for the next start, because its ranks of this start are lost; else 0."""
        try:
            if self._served is not None:
                return int(self._served.check([f"{self.token}/{_LATE}"]))
            return int(self._seen is not None and self._seen.get(_OFFER).decode() != self.token)
        except DistError:
            return 0  # Node 0 is lost. The ranks of this host detect the loss of its rank 0.

    def shutdown(self) -> bool:
        """Close the store."""
        self._served = None
        return True


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_PAUSE_SECONDS)
