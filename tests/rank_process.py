"""The process behind RankPool: imports torch once, then forks one process per rank.

    python rank_process.py KIND FD...

KIND is the device type; each FD is the file descriptor of a connected socket, one per rank. A rank reads commands, one
JSON object per line, `{"call": "module:function", ...keywords}`, and replies to each with `{"result": ...}` or
`{"error": traceback}`. Tensors are passed in files. The rank exits when the socket is closed.
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
    """Process commands until the peer closes the connection."""
    torch.set_num_threads(1)
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            command: dict[str, Any] = json.loads(line)
            try:
                answer = {"result": resolve(command.pop("call"))(rank, **command)}
            except Exception:  # noqa: BLE001  (every error is reported to the test)
                answer = {"error": traceback.format_exc()}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def main() -> None:
    """Fork one rank per socket, and wait until all have exited."""
    kind, *fds = sys.argv[1:]
    connections = [socket.socket(fileno=int(fd)) for fd in fds]
    if kind == "cpu":
        # Imports every dependency of the ranks once. On "cuda", each rank imports this module after the fork, because
        # the import initializes CUDA, and processes that are forked after that cannot use CUDA.
        importlib.import_module("rank_calls")
    children = []
    for rank, connection in enumerate(connections):
        if child := os.fork():
            children.append(child)
            continue
        for other in connections[:rank] + connections[rank + 1 :]:
            other.close()
        serve(rank, connection)
        # Skips interpreter shutdown, which takes about a second with torch and diffusers loaded.
        os._exit(0)
    for connection in connections:
        connection.close()
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
