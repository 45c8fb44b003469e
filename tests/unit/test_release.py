"""The release in tests/golden equals its tag: source, store script and the protos for `buf breaking`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import release
import write_release
from common.state.connection import script_call
from stored_requests import read_dump

RECORDED = {"queued", "running", "streaming", "succeeded", "failed", "cancelled", "expired", "store"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.unpack_release(tmp_path_factory.mktemp("release") / "tree")


def test_the_source_equals_that_of_the_commit(tree: Path) -> None:
    """The digest covers git's object IDs. In a checkout that has the commit, the test compares the IDs themselves."""
    lines = release.file_lines(tree)
    assert release.digest_of(lines) == release.facts()["files_sha256"]
    history = write_release.source_lines(release.facts()["commit"])
    assert history is None or history == lines


def test_another_source_has_another_digest(tree: Path) -> None:
    lines = release.file_lines(tree)
    assert release.digest_of(lines[1:]) != release.facts()["files_sha256"]


def test_the_protos_equal_those_of_the_source(tree: Path, tmp_path: Path) -> None:
    write_release.build_image(tree / "proto", tmp_path / "protos.binpb")
    assert (tmp_path / "protos.binpb").read_bytes() == release.PROTOS.read_bytes()


def test_the_script_equals_that_of_the_source(tree: Path) -> None:
    assert {path.stem for path in (tree / release.LUA_FOLDER).iterdir()} == set(release.facts()["script_files"])
    operations = re.findall(r"^function ops\.(\w+)\(a\)$", release.release_script(), re.MULTILINE)
    assert sorted(operations) == sorted(release.script_calls_of(tree).OPERATIONS)
    assert release.release_call("resign", {"owner": "c"})[2:] == script_call("resign", {"owner": "c"})[2:]


def test_a_request_of_each_state_is_recorded() -> None:
    dump = read_dump(release.REQUESTS)
    assert dump.keys() == RECORDED
    sizes = [path.stat().st_size for path in release.REQUESTS.iterdir()]
    assert sum(sizes) < 300_000, "golden files stay small enough for a review"


def test_a_checkout_without_the_tag_names_the_command_to_fetch_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        LookupError, match=r"^tag: v9\.9\.9 is not in this checkout; git fetch --unshallow --tags works$"
    ):
        write_release.commit_of("v9.9.9")
    assert write_release.source_lines("0" * 40) is None
    with pytest.raises(SystemExit) as ended:
        write_release.main(["v9.9.9"])
    assert ended.value.code == 2
    assert f"v9.9.9 is not v{release.VERSION}; set VERSION of tests/release.py" in capsys.readouterr().err
