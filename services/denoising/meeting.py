"""Where the agents of a worker group's machines meet, before each start of its ranks.

Machine 0 keeps a store. For each start its agent makes a token and offers it; the others answer, and when all have,
it gives the word. An offer for which the word was given belongs to an earlier start: a machine that comes late, or
comes back, waits for the next one. torch's own dynamic rendezvous is not used because it unpickles what it finds in
its store, and lets any machine become the one that serves.
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
_WORD = "word"
_LATE = "late"
# Short, as signals are only heard in between: a machine may wait for another one for hours.
_WAIT = timedelta(seconds=1)
_PAUSE_SECONDS = 0.1


class Meeting(RendezvousHandler):
    """The rendezvous of `num_nodes` machines at a store, for the agent of one of them."""

    def __init__(self, num_nodes: int, node_rank: int, endpoint: str) -> None:
        """`endpoint` is HOST:PORT on machine 0; one machine alone needs none. Raises FailedPrecondition if taken."""
        self._num_nodes = num_nodes
        self._node_rank = node_rank
        self._host, self._port = "127.0.0.1", 0
        if num_nodes > 1:
            self._host, port = endpoint.rpartition(":")[::2]
            self._host, self._port = self._host.strip("[]"), int(port)
        self._kept = self._keep_store() if node_rank == 0 else None
        self._seen: Store | None = None
        self.token = ""

    def _keep_store(self) -> Store:
        """The store; for one machine alone, nobody else can reach it."""
        try:
            if self._num_nodes == 1:
                listener = socket.create_server((self._host, 0))
            elif socket.has_dualstack_ipv6():
                listener = socket.create_server(("", self._port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                listener = socket.create_server(("", self._port))
        except OSError as error:
            raise FailedPrecondition(
                f"cannot listen for the other machines on port {self._port}: {error.strerror}", field="rdzv_endpoint"
            ) from error
        self._port = listener.getsockname()[1]
        # The store closes the descriptor.
        return TCPStore(self._host, self._port, is_master=True, timeout=_WAIT, master_listen_fd=listener.detach())

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other machines, for as long as it takes."""
        if self._kept is not None:
            store = self._kept
            self.token = self._gather(store)
        else:
            store, self.token = self._come()
            self._seen = store
        # Keys of an earlier start do not count.
        of_this_start = PrefixStore(self.token, store)
        place = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(of_this_start, self._node_rank, self._num_nodes, place)

    def _gather(self, store: Store) -> str:
        token = secrets.token_hex(16)
        store.set(_OFFER, token)
        for node in range(1, self._num_nodes):
            _until(lambda key=f"{token}/{node}": store.check([key]))  # type: ignore[misc]
        store.set(f"{token}/{_WORD}", "1")
        return token

    def _come(self) -> tuple[Store, str]:
        while True:
            try:
                # The store's own client would fill the log with stack traces for as long as machine 0 is away.
                socket.create_connection((self._host, self._port), _WAIT.total_seconds()).close()
                store = TCPStore(self._host, self._port, is_master=False, timeout=_WAIT)
                return store, self._answer(store)
            except (OSError, DistError):  # Machine 0 is not there, or has gone.
                time.sleep(_PAUSE_SECONDS)

    def _answer(self, store: Store) -> str:
        """Answer offers until the word is given for one. Raises DistError when the store has gone."""
        answered = ""
        while True:
            token = store.get(_OFFER).decode() if store.check([_OFFER]) else ""
            given = bool(token) and store.check([f"{token}/{_WORD}"])
            if given and token == answered:
                return token
            if token and not given and token != answered:
                store.set(f"{token}/{self._node_rank}", "1")
                answered = token
            if given and token != answered:
                store.set(f"{token}/{_LATE}", "1")  # Machine 0 may not know yet that its group has lost this machine.
            time.sleep(_PAUSE_SECONDS)

    @property
    def use_agent_store(self) -> bool:
        """Ranks find each other in the store of the agents."""
        return True

    def get_backend(self) -> str:
        """Its name, for torch's records."""
        return "meeting"

    def get_run_id(self) -> str:
        """The name of what is run, for torch's records."""
        return "denoising"

    def is_closed(self) -> bool:
        """It never is."""
        return False

    def set_closed(self) -> None:
        """There is nothing to close for the others: they wait for the next start."""

    def num_nodes_waiting(self) -> int:
        """1 when another machine has turned to the next start: this one's ranks wait for its ranks, and in vain."""
        try:
            if self._kept is not None:
                return int(self._kept.check([f"{self.token}/{_LATE}"]))
            return int(self._seen is not None and self._seen.get(_OFFER).decode() != self.token)
        except DistError:
            return 0  # Machine 0's agent has gone, and its ranks with it: those here will notice.

    def shutdown(self) -> bool:
        """Let go of the store."""
        self._kept = None
        return True


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_PAUSE_SECONDS)
