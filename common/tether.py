"""Starts child processes that end when this process ends, even by SIGKILL.

On Linux, the child sets PR_SET_PDEATHSIG: the kernel kills it when the thread that started it ends. Start children from
the main thread. On other systems, a child survives if SIGKILL ends its parent.

This file is also the program that the child executes first: it calls prctl and then execs the command, with the same
process id, because calling prctl between fork and exec of a multi-threaded process would not be safe. The program
imports only the standard library and runs without site-packages, in about 25 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """Return the command line that runs `command`, whose first element is a path, as a tethered child."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def start_tethered(command: Sequence[str], *, directory: Path, output: int) -> subprocess.Popen[bytes]:
    """Start a tethered command in a directory, with stdout and stderr redirected to a file descriptor.

    The child runs in a new session, so that Ctrl-C at the terminal interrupts only this process.
    """
    return subprocess.Popen(
        tethered(command),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _become(parent: int, command: Sequence[str]) -> None:
    """Set the parent-death signal of this process, then exec the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent process ended before its child started")
    os.execv(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
