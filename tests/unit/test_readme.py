"""Links and names in the README files exist, and the changelog has the released version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from readme import ROOT, code_blocks
from release import VERSION as RELEASED

DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "k8s/README.md",
    "services/README.md",
    "models/checkpoints/emoji/README.md",
    "tests/README.md",
    "tests/bench/README.md",
)

CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
"""The kinds of changes of Keep a Changelog."""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_of_local_links_exist(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert targets
    assert not missing


def test_anchors_are_headings_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_first_block_has_the_two_commands_for_a_new_host() -> None:
    draw, check = code_blocks("bash")[0].strip().splitlines()
    assert "fleet generate" in draw
    assert "poe check" in check


def test_the_paths_of_the_tree_exist() -> None:
    section = (ROOT / "README.md").read_text().partition("## The tree")[2].partition("\n## ")[0]
    named: list[Path] = []
    top = Path()
    for line in re.findall(r"^ {4}( *)(\S.*)$", section, re.MULTILINE):
        names = [name.strip().removesuffix("/") for name in re.split(r" {2,}", line[1])[0].split(",")]
        if not line[0]:
            top = Path(names[0])
        named += [Path(name) if not line[0] else top / name for name in names]
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / path).with_suffix(".py").exists())]
    assert len(named) > 20
    assert not missing


def test_the_changelog_has_the_version_of_the_package_and_its_release() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert versions[:2] == ["Unreleased", RELEASED]
    assert version in versions
    assert re.search(rf"^## \[{re.escape(RELEASED)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= CHANGES
    assert text.count("\n") <= 60


def test_every_benchmark_is_described() -> None:
    text = (ROOT / "README.md").read_text()
    benches = [path.name for path in (ROOT / "tests" / "bench").glob("*.py") if not path.name.startswith("bench_")]
    assert benches
    assert all(f"tests/bench/{name}" in text for name in benches)


def test_folders_fixtures_and_helpers_of_the_tests_readme_exist() -> None:
    tests = ROOT / "tests"
    cells = re.findall(r"^\| (`.*?) \|", (tests / "README.md").read_text(), re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([\w*/]+)`", cell)]
    fixtures = re.findall(r"^def (\w+)", (tests / "conftest.py").read_text(), re.MULTILINE)
    found = [name for name in names if name in fixtures or [*tests.glob(name), *tests.glob(f"{name}.py")]]
    assert len(names) > 30
    assert found == names
