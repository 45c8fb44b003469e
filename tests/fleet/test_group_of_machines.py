"""A worker group whose ranks have an agent each, as on two machines: losses while nobody asks anything of it."""

from __future__ import annotations

import signal
import socket
import urllib.request
from pathlib import Path

from fleet.v1 import generation_pb2 as pb
from group_fleet import group_fleet
from services.cli.up_flags import free_port


def scraped(port: int) -> str:
    """The metrics that a process serves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        return str(reply.read().decode())


def test_ranks_that_stop_while_they_wait_and_while_they_load(tmp_path: Path) -> None:
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
        assert "process_cpu_seconds_total" in scraped(ports[1]), "the first rank of each machine serves metrics"
        serving = fleet.ranks()
        serving[1].send_signal(signal.SIGSTOP)
        loading = fleet.restarted(0, serving[0])
        # It imports its libraries, and no rank knows it yet: its agent alone can notice, and then tells the other one.
        loading.send_signal(signal.SIGSTOP)
        fleet.restarted(0, loading)
        assert fleet.generate().file == generated.file
        ranks = fleet.ranks()
        again = fleet.generate(2, fleet.agents[1].terminate)
        assert again.file == generated.file
        assert [fleet.run(agent.wait()) for agent in fleet.agents.values()] == [0, 0]
        assert not any(process.is_running() for process in ranks.values())
