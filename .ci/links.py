"""Lets a Docker build find what pip finds on this machine: writes a pip.conf, and serves local folders on loopback.

A build container sees no folder of the host. `python .ci/links.py PIP_CONF` reads pip's own settings, replaces every
local folder of find-links and extra-index-url by an address on loopback (the build runs with --network=host), writes
the rest as it is, and serves until it is ended. PIP_CONF belongs to the build alone: it is passed as a secret.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tempfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout")


def pip_settings() -> dict[str, str]:
    """What pip is set to here, by option; the environment wins over files, as it does for pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    pairs = [line.partition("=")[::2] for line in lines]
    ranked = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    settings = {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in ranked}
    return {name: value for name, value in settings.items() if name in KEYS}


def served(place: str, folder: Path, address: str) -> str:
    """Where a build finds `place`: a local folder is linked into the served `folder`, an address stays as it is.

    The link goes to the parent, since an index refers to its files by relative paths.
    """
    parts = urlsplit(place)
    if parts.scheme not in ("", "file"):
        return place
    path = Path(parts.path).resolve()
    link = folder / str(len(list(folder.iterdir())))
    link.symlink_to(path.parent, target_is_directory=True)
    return f"{address}/{link.name}/{path.name}/"


def main(target: Path) -> None:
    """Write the pip.conf and serve; the caller ends this process."""
    with tempfile.TemporaryDirectory() as directory:
        handler = functools.partial(SimpleHTTPRequestHandler, directory=directory)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            settings = pip_settings()
            for name in ("extra-index-url", "find-links"):
                places = settings.get(name, "").split()
                settings[name] = " ".join(served(place, Path(directory), address) for place in places)
            lines = [f"{name} = {value}" for name, value in settings.items() if value]
            target.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
            server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
