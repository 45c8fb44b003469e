"""Documents have valid links and anchors and bounded lengths, and the names in them exist."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from readme import DOCUMENTS, FOLDERS, ROOT, SKIPPED, code_blocks
from release import VERSION as RELEASED

REQUIRED = {
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "proto/README.md",
    "services/README.md",
    "models/README.md",
    "k8s/README.md",
    "tests/README.md",
    "tests/bench/README.md",
}
MAX_LINES = {"README.md": 250, "CONTRIBUTING.md": 80, "CHANGELOG.md": 60}
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
"""The kinds of changes of Keep a Changelog."""
SERVICES = {"text_encoding", "image_encoding", "latent_preparation", "before_denoising", "denoising", "decoding"}

_LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")
_POINTER = re.compile(r"(?:[\w./-]*/)?(?:README|CONTRIBUTING|CHANGELOG)\.md#[\w-]+")
_SOURCES = (".py", ".yaml", ".toml", ".proto", ".lua", ".json")
_LINE_OF_PATH = re.compile(r"^ {4}[ │┌└]*(?P<path>[\w./]+\.(?:py|lua|proto)) +(?P<name>[\w.]+)  +(?P<task>\S.*)$")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def section(document: str, heading: str) -> str:
    """The text below a heading of level 2."""
    _, mark, rest = text_of(document).partition(f"\n## {heading}\n")
    assert mark, f"{document} has no heading {heading!r}"
    return rest.partition("\n## ")[0]


@cache
def anchors(document: str) -> frozenset[str]:
    """Anchors of a document's headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def broken_links(document: str, text: str) -> list[str]:
    """Targets of local links that do not exist, or whose anchor is not a heading of the target."""
    broken = []
    for target in _LINK.findall(text):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        found = path.resolve()
        is_document = found.is_file() and found.suffix == ".md"
        if not found.exists() or (anchor and not (is_document and anchor in anchors(str(found.relative_to(ROOT))))):
            broken.append(target)
    return broken


def names_in(path: Path) -> frozenset[str]:
    """Classes, functions, methods as Class.method, RPCs as Service.Method, and Lua functions of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".lua":
        return frozenset(re.findall(r"^(?:local )?function ([\w.]+)\(", text, re.MULTILINE))
    if path.suffix == ".proto":
        services = re.findall(r"^service (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL)
        return frozenset(f"{name}.{rpc}" for name, body in services for rpc in re.findall(r"rpc (\w+)\(", body))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            found.update(f"{node.name}.{each.name}" for each in methods)
    return frozenset(found)


def unresolved(text: str) -> list[str]:
    """Lines of a request's path whose file does not exist or does not define the name."""
    wrong = []
    for line in text.splitlines():
        if match := _LINE_OF_PATH.match(line):
            path = ROOT / match["path"]
            if not path.is_file() or match["name"] not in names_in(path):
                wrong.append(line.strip())
    return wrong


def test_every_document_that_the_root_readme_links_is_checked() -> None:
    assert set(DOCUMENTS) >= REQUIRED
    linked = {target.partition("#")[0] for target in _LINK.findall(section("README.md", "Where the rest is"))}
    assert linked == REQUIRED - {"README.md"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_local_links_and_anchors_exist(document: str) -> None:
    assert not broken_links(document, text_of(document))


def test_broken_links_are_found() -> None:
    text = "[a](LICENSE) [b](absent.md) [c](#models) [d](#absent) [e](k8s/README.md#scaling) [f](k8s/README.md#absent)"
    assert broken_links("README.md", text) == ["absent.md", "#absent", "k8s/README.md#absent"]


def test_pointers_in_source_files_lead_to_headings() -> None:
    files = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    checked = [path for path in files if path.suffix in _SOURCES and not SKIPPED.intersection(path.parts)]
    pointers = {
        (pointer, path.relative_to(ROOT).as_posix())
        for path in checked
        if path != Path(__file__).resolve()
        for pointer in _POINTER.findall(path.read_text(encoding="utf-8"))
    }
    wrong = [each for each in pointers if each[0].split("#")[1] not in anchors(each[0].split("#")[0])]
    assert len(pointers) > 10
    assert not wrong


def test_document_lengths_are_bounded() -> None:
    assert all(text_of(document).count("\n") <= max_lines for document, max_lines in MAX_LINES.items())


def test_the_first_block_has_the_two_commands_for_a_new_host() -> None:
    generate, check = code_blocks("bash")[0].strip().splitlines()
    assert "fleet generate" in generate
    assert "poe check" in check
    first = re.search(r"^```(\w*)$", text_of("README.md"), re.MULTILINE)
    assert first is not None
    assert first[1] == "bash"


def test_the_root_readme_has_its_sections_in_order() -> None:
    headings = re.findall(r"^## (.+)$", text_of("README.md"), re.MULTILINE)
    assert headings == [
        "Two commands",
        "Models",
        "Deploy",
        "Call",
        "Architecture",
        "Tree",
        "Add a model",
        "Where the rest is",
    ]
    assert "![" in section("README.md", "Two commands")


def test_the_short_client_has_at_most_ten_lines() -> None:
    assert len(code_blocks("python")[0].splitlines()) <= 10


def test_names_on_the_path_of_a_request_exist() -> None:
    text = section("README.md", "Architecture")
    assert not unresolved(text)
    steps = [line for line in text.splitlines() if re.search(r"\.(py|lua|proto)\b", line)]
    assert len(steps) >= 25
    assert all(_LINE_OF_PATH.match(line) for line in steps)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("services/coordinator/driver.py", "services/coordinator/pilot.py"),
        ("Driver.accept", "Driver.absent"),
        ("ops.admit", "ops.absent"),
        ("GenerationService.Submit ", "GenerationService.Absent "),
        ("run_pipeline", "run_absent"),
    ],
)
def test_a_wrong_name_on_the_path_of_a_request_is_found(old: str, new: str) -> None:
    text = section("README.md", "Architecture")
    assert text.count(old) == 1
    assert len(unresolved(text.replace(old, new))) == 1


def test_services_and_code_names_in_the_architecture_exist() -> None:
    text = section("README.md", "Architecture")
    drawn = set(re.findall(r"[a-z]+_[a-z]+|denoising|decoding", text.partition("The path of one request")[0]))
    assert drawn == SERVICES
    quoted = set(re.findall(r"`([^`]+)`", text))
    assert quoted <= SERVICES | {"model_index.json"}
    table = text_of("services/cli/serve.py")
    assert all(f'"{service}"' in table for service in SERVICES)


def test_the_tree_names_existing_files_and_folders() -> None:
    named: list[Path] = []
    top = Path()
    for line in re.findall(r"^ {4}( *)(\S.*)$", section("README.md", "Tree"), re.MULTILINE):
        names = [name.strip().removesuffix("/") for name in re.split(r" {2,}", line[1])[0].split(",")]
        if not line[0]:
            top = Path(names[0])
        named += [Path(name) if not line[0] else top / name for name in names]
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / path).with_suffix(".py").exists())]
    assert len(named) > 40
    assert not missing


def test_the_changelog_has_the_version_of_the_package_and_its_release() -> None:
    text = text_of("CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert versions[:2] == ["Unreleased", RELEASED]
    assert version in versions
    assert re.search(rf"^## \[{re.escape(RELEASED)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= CHANGES


def test_every_bench_is_described() -> None:
    text = text_of("tests/bench/README.md")
    benches = [path.name for path in (ROOT / "tests" / "bench").glob("*.py") if not path.name.startswith("bench_")]
    assert benches
    assert [name for name in benches if not re.search(rf"[`/]{re.escape(name)}[` ]", text)] == []


def test_folders_fixtures_and_helpers_of_the_tests_readme_exist() -> None:
    tests = ROOT / "tests"
    cells = re.findall(r"^\| (`.*?) \|", (tests / "README.md").read_text(), re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([\w*/]+)`", cell)]
    fixtures = re.findall(r"^def (\w+)", (tests / "conftest.py").read_text(), re.MULTILINE)
    found = [name for name in names if name in fixtures or [*tests.glob(name), *tests.glob(f"{name}.py")]]
    assert len(names) > 30
    assert found == names
