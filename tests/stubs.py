"""Generates the Python stubs of proto/. `python -m tests.stubs` writes them next to the .proto files.

Only proto/ is an import root: with the repository as root, the modules would be named proto.fleet.v1.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def script(name: str) -> str:
    """Path of a console script of this environment. The script may be missing from PATH."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def sources(proto: Path = PROTO) -> list[str]:
    """The sorted .proto files, relative to `proto`."""
    return sorted(path.relative_to(proto).as_posix() for path in proto.rglob("*.proto"))


def generate(output: Path, proto: Path = PROTO) -> None:
    """Generate messages, services and type stubs in `output`. Raises CalledProcessError if protoc fails."""
    plugins = [f"--plugin={name}={script(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    targets = [f"--{kind}_out={output}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *plugins, *targets, *sources(proto)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    generate(PROTO)
