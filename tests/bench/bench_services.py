"""Single services as processes, for benchmarks with unusual numbers or settings of services."""

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
    """Run `fleet serve NAME ARGUMENTS` during the block, which starts when the service is ready.

    Raises RuntimeError with the last lines of output if the process exits before it is ready.
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
                raise RuntimeError(f"{name} did not become ready:\n" + "".join(notes.readlines()[-20:]))
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
