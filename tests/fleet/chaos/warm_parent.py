"""Starts services quickly: a process that has imported all dependencies forks for each service.

    python warm_parent.py MODEL...

It loads and discards the models once, for their imports, and writes {"ready": PID}. Then it reads JSON lines from
stdin, {"program", "arguments", "log", "skew"}, and replies {"started": PID} in order; it writes {"ended": PID, "code":
N} for each process that exits (N below 0 is a signal). At the end of stdin, it kills the remaining processes. It has a
single thread, as a forked child inherits held locks without the threads that would release them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

import torch  # noqa: E402
from clock_skew import skew_clock  # noqa: E402

from models.catalog import open_model  # noqa: E402
from models.loader import load_stages  # noqa: E402
from models.registry import load_registry  # noqa: E402
from models.runtime import Runtime  # noqa: E402
from services.cli.serve import settings_class  # noqa: E402
from services.coordinator.__main__ import main as coordinator  # noqa: E402
from services.worker import main_for  # noqa: E402

Main = Callable[[Sequence[str]], int]

SERVICES = ("text_encoding", "image_encoding", "latent_preparation", "before_denoising", "denoising", "decoding")
PROGRAMS: dict[str, Main] = {
    "coordinator": coordinator,
    **{service: main_for(service, settings_class(service)) for service in SERVICES},
}
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _run_child(command: dict[str, Any], parent: int) -> int:
    """Run the program in the forked child; returns its exit code."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    os.setsid()
    with open(os.devnull, "rb") as nothing, open(command["log"], "ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if command["skew"]:
        skew_clock(command["skew"])
    return PROGRAMS[command["program"]](command["arguments"])


class WarmParent:
    """Executes the commands on stdin, which start services, until end of file."""

    def __init__(self) -> None:
        self._children: set[int] = set()
        self._woken, wakes = socket.socketpair()
        self._woken.setblocking(False)
        wakes.setblocking(False)
        self._wakes = wakes
        signal.set_wakeup_fd(wakes.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> None:
        """Fork on command, and report exited processes."""
        rest = b""
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._woken in ready:
                self._woken.recv(4096)
                self._reap()
            if 0 in ready:
                data = os.read(0, 1 << 16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._fork(json.loads(line))
        self._restore_signal_handlers()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _restore_signal_handlers(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _fork(self, command: dict[str, Any]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._children.add(pid)
            _reply({"started": pid})
            return
        code = 1
        try:
            self._restore_signal_handlers()
            self._selector.close()
            self._woken.close()
            self._wakes.close()
            code = _run_child(command, parent)
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        except BaseException:  # noqa: BLE001 -- ends the process; the error is in its log
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._children.remove(pid)
                _reply({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _reply(reply: dict[str, int]) -> None:
    os.write(1, json.dumps(reply).encode() + b"\n")


def main(references: Sequence[str]) -> None:
    """Import the models' dependencies, report readiness, and serve."""
    torch.set_num_threads(1)
    for reference in references:
        model = open_model(reference, load_registry())
        for spec in model.services:
            load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.float32))
    gc.collect()
    gc.freeze()  # otherwise the first garbage collection in a child copies every page
    _reply({"ready": os.getpid()})
    WarmParent().serve()


if __name__ == "__main__":
    main(sys.argv[1:])
