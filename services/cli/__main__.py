"""The `fleet` command: runs a subcommand and converts errors to one line on stderr and an exit code.

The module of a subcommand is imported only when the subcommand runs, so that `fleet status` does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Sequence

from services.cli.options import BAD_INPUT, FAILED, INTERRUPTED, SUCCESS, exit_code, interrupt
from services.start_up import escape_output, run_program

COMMANDS = {
    "generate": "generate an image or video, in this process or on a running fleet",
    "up": "run a whole fleet on this host, one process per service, until Ctrl-C",
    "serve": "run one service",
    "status": "show the models, their workers, the store, open requests and the latest ended ones",
    "watch": "follow a request until it ends",
    "trace": "show the timeline of a request, as text or as a PNG",
    "cancel": "cancel a request",
    "models": "list the models and the parameters of their requests",
    "size": "estimate the replicas of each service for a load",
    "doctor": "check this host, a checkpoint, the request store and a running fleet",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fleet ARGV` and return the exit code.

    0 for success, 1 for failure, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    escape_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return SUCCESS
    if name == "--version":
        sys.stdout.write(importlib.metadata.version("diffusion-fleet") + "\n")
        return SUCCESS
    if name not in COMMANDS:
        what = f"unknown command {name!r}" if name else "no command given"
        sys.stderr.write(f"fleet: {what}; commands are {', '.join(COMMANDS)}\n")
        return BAD_INPUT
    signal.signal(signal.SIGTERM, interrupt)
    # grpc reads this variable on import. At the default level, it logs each failed TLS handshake on stderr.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    rest = arguments[1:]
    try:
        code = run_program(f"fleet {name}", lambda: _run(name, rest), rest, exit_code=exit_code)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write(f"fleet {name}: interrupted\n")
    return code


def _run(name: str, arguments: Sequence[str]) -> int:
    """Import and run a subcommand."""
    command: Callable[[Sequence[str]], int] = vars(importlib.import_module(f"services.cli.{name}"))["main"]
    try:
        return command(arguments)
    except BrokenPipeError:  # The reader of stdout has closed the pipe.
        sys.stderr.close()
        return FAILED


def _usage() -> str:
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: fleet COMMAND ...", "", *lines, "", "`fleet COMMAND --help` lists the flags of a command.", ""]
    )


if __name__ == "__main__":
    sys.exit(main())
