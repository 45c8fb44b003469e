"""A worker group with one agent per rank, as on two nodes. Ranks that SIGSTOP stops are replaced."""

from __future__ import annotations

import signal
import socket
import urllib.request
from pathlib import Path

from fleet.v1 import generation_pb2 as pb
from group_fleet import group_fleet
from services.cli.up_flags import free_port


def scraped(port: int) -> str:
    """The text of a process's metrics endpoint."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        return str(reply.read().decode())


def test_stopped_idle_and_loading_ranks_are_replaced(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    ports = [free_port(0) for _ in range(2)]
    nodes = [
        (*("--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", endpoint), "--metrics-port", str(port))
        for node, port in enumerate(ports)
    ]
    with group_fleet(tmp_path, "--ulysses", "2", nodes=nodes) as fleet:
        generated = fleet.generate()
        assert generated.state == pb.REQUEST_STATE_SUCCEEDED
        assert 'fleet_step_seconds_count{model="emoji",service="denoising"' in scraped(ports[0])
        assert "process_cpu_seconds_total" in scraped(ports[1]), "the first rank of the second node serves no metrics"
        serving = fleet.ranks()
        serving[1].send_signal(signal.SIGSTOP)
        loading = fleet.restarted(0, serving[0])
        # The new rank still imports its libraries and has not joined: only its agent can detect the stop.
        loading.send_signal(signal.SIGSTOP)
        fleet.restarted(0, loading)
        assert fleet.generate().file == generated.file
        ranks = fleet.ranks()
        again = fleet.generate(2, fleet.agents[1].terminate)
        assert again.file == generated.file
        assert [fleet.run(agent.wait()) for agent in fleet.agents.values()] == [0, 0]
        assert not any(process.is_running() for process in ranks.values())
