"""Single services as processes, for benches that run them in unusual numbers or settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from common.tether import tethered


@contextmanager
def service(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `fleet serve NAME ARGUMENTS` for as long as the block, from when it says that it serves.

    Raises RuntimeError with its last words when it ends before.
    """
    command = [sys.executable, "-m", "services.cli", "serve", name, *arguments]
    with tempfile.TemporaryFile("w+") as notes:
        process = subprocess.Popen(tethered(command), env=os.environ, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                notes.write(line)
                if " serves " in line or " listens " in line:
                    break
            else:
                notes.seek(0)
                raise RuntimeError(f"{name} did not get ready:\n" + "".join(notes.readlines()[-20:]))
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
