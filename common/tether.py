"""Starts programs that do not outlive this one, however it ends, SIGKILL included.

On Linux the kernel is asked to kill the child when the thread that started it ends, so start it from a thread that
stays: the main one. Elsewhere a child outlives a parent that was killed by SIGKILL, and nothing else.

This file is also the child's first program: it asks the kernel, and then becomes the real one (same process id).
Doing so between fork and exec of a process with threads would not be safe. It imports nothing beyond the standard
library, and runs by its path without site-packages, in about 25 ms.
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
    """The command line that starts `command`, whose first word is a path, tied to this process."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def start_tethered(command: Sequence[str], *, directory: Path, output: int) -> subprocess.Popen[bytes]:
    """Start a command in a directory, its standard output and error going to a file descriptor.

    It gets a session of its own, so that Ctrl-C at the terminal reaches only this process.
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
    """Tie this process to its parent, then replace it by the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent ended before its child began")
    os.execv(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
