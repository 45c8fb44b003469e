"""The processes of a pool of ranks: one that imports torch once, and then forks a process for each rank.

Run: python rank_process.py KIND FD...    with the kind of device, and a connected socket for each rank. A rank reads
commands, a JSON object a line, `{"call": "module:function", ...keywords}`, and answers each with `{"result": ...}` or
`{"error": traceback}`. Tensors pass through files. A closed socket ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from typing import Any

import torch

from models.registry import resolve


def serve(rank: int, connection: socket.socket) -> None:
    """Answer commands until the other side hangs up."""
    torch.set_num_threads(1)
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            command: dict[str, Any] = json.loads(line)
            try:
                answer = {"result": resolve(command.pop("call"))(rank, **command)}
            except Exception:  # noqa: BLE001  (whatever it is, the test shall see it)
                answer = {"error": traceback.format_exc()}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def main() -> None:
    """Fork a rank for each socket, and wait for all."""
    kind, *fds = sys.argv[1:]
    connections = [socket.socket(fileno=int(fd)) for fd in fds]
    if kind == "cpu":
        # All that a rank runs, so that it is imported once. It asks for GPUs, after which CUDA works in no fork.
        importlib.import_module("rank_calls")
    children = []
    for rank, connection in enumerate(connections):
        if child := os.fork():
            children.append(child)
            continue
        for other in connections[:rank] + connections[rank + 1 :]:
            other.close()
        serve(rank, connection)
        # At once, with the group that it is in: to take down an interpreter that has torch and diffusers in it costs a
        # second, and others of the group end as well.
        os._exit(0)
    for connection in connections:
        connection.close()
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
