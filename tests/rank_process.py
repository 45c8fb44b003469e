"""The processes of a pool of ranks: one that imports torch once, and then forks a process for each rank.

Run: python rank_process.py FD...    with a connected socket for each rank. A rank reads commands, a JSON object a line,
`{"call": "module:function", ...keywords}`, and answers each with `{"result": ...}` or `{"error": traceback}`. Tensors
pass through files. A closed socket ends it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from typing import Any

import torch

# Imported before the fork, so that it is done once: all that a rank runs.
import rank_calls
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
        rank_calls.leave()


def main() -> None:
    """Fork a rank for each socket, and wait for all."""
    connections = [socket.socket(fileno=int(fd)) for fd in sys.argv[1:]]
    children = []
    for rank, connection in enumerate(connections):
        if child := os.fork():
            children.append(child)
            continue
        for other in connections[:rank] + connections[rank + 1 :]:
            other.close()
        serve(rank, connection)
        # At once: to take an interpreter down that has torch and diffusers in it costs each rank a second.
        os._exit(0)
    for connection in connections:
        connection.close()
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
