"""Provides the host's pip settings to a Docker build. Writes a pip.conf, and serves local folders on loopback.

A build container has no access to the host's folders. `python .ci/links.py PIP_CONF` reads pip's settings, replaces
every local folder in find-links and extra-index-url by a loopback address (the build runs with --network=host), copies
all other settings, and serves until it is terminated. PIP_CONF is passed to the build as a secret.
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
    """pip's settings on this host, by option; the environment overrides files, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    pairs = [line.partition("=")[::2] for line in lines]
    ranked = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    settings = {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in ranked}
    return {name: value for name, value in settings.items() if name in KEYS}


def served(location: str, folder: Path, address: str) -> str:
    """Address of `location` for a build. A local folder is linked into the served `folder`; a URL is unchanged.

    The link points to the parent, as an index refers to its files by relative paths.
    """
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return location
    path = Path(parts.path).resolve()
    link = folder / str(len(list(folder.iterdir())))
    link.symlink_to(path.parent, target_is_directory=True)
    return f"{address}/{link.name}/{path.name}/"


def main(target: Path) -> None:
    """Write the pip.conf and serve until the caller terminates this process."""
    with tempfile.TemporaryDirectory() as directory:
        handler = functools.partial(SimpleHTTPRequestHandler, directory=directory)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            settings = pip_settings()
            for name in ("extra-index-url", "find-links"):
                locations = settings.get(name, "").split()
                settings[name] = " ".join(served(each, Path(directory), address) for each in locations)
            lines = [f"{name} = {value}" for name, value in settings.items() if value]
            target.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
            server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
