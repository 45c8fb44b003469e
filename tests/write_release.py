"""Writes the directory tests/golden/vVERSION of a release: `python tests/write_release.py v0.1.0`.

It reads the source at the tag from git, and runs a fleet of this source to store requests. Run it once, after setting
VERSION in tests/release.py; a release never changes.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fleet" / "chaos"), str(ROOT), str(ROOT / "proto")]

import release  # noqa: E402
from record_requests import record_requests  # noqa: E402
from stubs import script  # noqa: E402


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


def commit_of(tag: str) -> str:
    """The commit of a tag. Raises LookupError if this checkout lacks the tag."""
    try:
        return _git("rev-parse", "--verify", f"{tag}^{{commit}}").decode().strip()
    except subprocess.CalledProcessError as error:
        raise LookupError(f"tag: {tag} is not in this checkout; git fetch --unshallow --tags works") from error


def source_lines(commit: str) -> list[str] | None:
    """release.file_lines() of the source at a commit, from git; None if this checkout lacks the commit."""
    try:
        rows = _git("ls-tree", "-r", commit, *release.SOURCE, *release.TEST_SOURCE).decode().splitlines()
    except subprocess.CalledProcessError:
        return None
    named = [re.split(r"\s", row, maxsplit=3)[2:] for row in rows]
    return sorted(f"{blob} {path}" for blob, path in named if not path.startswith(release.WEIGHTS))


def _write_source(commit: str) -> None:
    """Write the bundle, whose bytes depend only on the commit, and the script's files."""
    archive = _git("archive", commit, *release.SOURCE, *release.TEST_SOURCE)
    shutil.rmtree(release.LUA, ignore_errors=True)
    release.LUA.mkdir(parents=True)
    bundle = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as every, tarfile.open(fileobj=bundle, mode="w") as chosen:
        for member in every:
            if not member.isfile() or member.name.startswith(release.WEIGHTS):
                continue
            file = every.extractfile(member)
            assert file is not None
            if member.name.startswith(release.LUA_FOLDER):
                (release.LUA / Path(member.name).name).write_bytes(file.read())
            else:
                chosen.addfile(member, file)
    release.BUNDLE.write_bytes(lzma.compress(bundle.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def _script_files(tree: Path) -> list[str]:
    """The order of the script's files, from the release's source."""
    code = "import json, common.state.connection as c; print(json.dumps(c.SCRIPT_FILES))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True)
    names: list[str] = json.loads(found.stdout)
    return names


def build_image(protos: Path, path: Path) -> None:
    """Write protos as a buf image."""
    command = [script("buf"), "build", str(protos), "--exclude-source-info", "-o", str(path)]
    subprocess.run(command, check=True)


def write_release(tag: str) -> None:
    """Write all files of the release. Raises LookupError if this checkout lacks the tag."""
    commit = commit_of(tag)
    _write_source(commit)
    with tempfile.TemporaryDirectory(prefix="release-") as directory:
        tree = release.unpack_release(Path(directory) / "tree")
        digest = release.digest_of(release.file_lines(tree))
        found = {"commit": commit, "files_sha256": digest, "script_files": _script_files(tree)}
        release.FACTS.write_text(json.dumps(found, indent=2) + "\n")
        build_image(tree / "proto", release.PROTOS)
        release.REQUESTS.mkdir(exist_ok=True)
        asyncio.run(record_requests(tree, Path(directory), release.REQUESTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the directory; errors are reported in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="tag of the release, such as v0.1.0")
    tag = parser.parse_args(argv).tag
    if tag != f"v{release.VERSION}":
        parser.error(f"tag: {tag} is not v{release.VERSION}; set VERSION of tests/release.py")
    try:
        write_release(tag)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
