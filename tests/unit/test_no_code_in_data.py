"""Data from outside a process is never executed, and requests never name files to open."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "configs", "models", "services")

# Modules with imports that can access files. No request names a file that they open.
FILE_READERS = {
    "common/checkpoint.py",
    "common/json_file.py",
    "common/otlp.py",
    "common/process_exit.py",
    "common/rpc/address.py",
    "common/rpc/probe.py",
    "common/rpc/tls.py",
    "common/safetensors_header.py",
    "common/settings.py",
    "common/state/embedded.py",
    "common/tether.py",
    "common/tracing.py",
    "common/vocabulary.py",
    "common/watched.py",
    "common/weight_files.py",
    "common/wrong_model.py",
    "models/catalog.py",
    "models/loader.py",
    "models/registry.py",
    "models/sources.py",
    "models/weights.py",
    "services/coordinator/callers.py",
    "services/coordinator/settings.py",
    "services/coordinator/tokens.py",
    "services/denoising/__main__.py",
    "services/denoising/launcher.py",
    "services/denoising/rank.py",
    "services/start_up.py",
    "services/worker.py",
    "services/worker_settings.py",
}
COMMAND_LINE = "services/cli/"

_CODE = {"eval", "exec", "compile", "__import__"}
_FILES = {"pathlib", "os", "shutil", "tempfile", "glob", "subprocess", "fileinput", "linecache"}
_PICKLED = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def code_from_data(source: str) -> Iterator[str]:
    """Calls that execute their arguments, each with its line number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := _runs(node)):
            yield f"{node.lineno}: {name}"


def _runs(call: ast.Call) -> str:
    """Name of the function or keyword that executes an argument; empty for a harmless call."""
    match call.func:
        case ast.Name(name) if name in _CODE:
            return name
        case ast.Attribute(ast.Name("torch" | "np" | "numpy" | "joblib" | "yaml" as module), "load"):
            return f"{module}.load"
        case ast.Attribute(ast.Name("os"), "system" | "popen" as name):
            return f"os.{name}"
        case ast.Attribute(_, name) | ast.Name(name) if name in _PICKLED:
            return f"{name}, which pickles"
    for keyword in call.keywords:
        if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not _is_false(keyword.value):
            return f"{keyword.arg}="
    return ""


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def files_of(source: str) -> Iterator[str]:
    """Imports of modules that can access files, and calls of open()."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _FILES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in _FILES:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            yield "open"


def sources() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_module_executes_data() -> None:
    assert not [f"{path}:{found}" for path, source in sources() for found in code_from_data(source)]


def test_only_listed_modules_can_access_files() -> None:
    found = {path for path, source in sources() if list(files_of(source)) and not path.startswith(COMMAND_LINE)}
    assert not found - FILE_READERS
    assert not FILE_READERS - found, "remove modules from FILE_READERS that access no files"


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "torch.load(file)",
        "np.load(file)",
        "yaml.load(file)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "dist.broadcast_object_list(values)",
        "all_gather_object(values, value)",
    ],
)
def test_a_call_that_executes_data_is_found(source: str) -> None:
    assert list(code_from_data(source))


@pytest.mark.parametrize("source", ["import os.path", "from pathlib import Path", "open(name)", "import shutil as s"])
def test_an_access_to_files_is_found(source: str) -> None:
    assert list(files_of(source))


@pytest.mark.parametrize("source", ["re.compile(text)", "json.load(file)", "model.eval()", "run(x, shell=False)"])
def test_a_harmless_call_is_not_reported(source: str) -> None:
    assert not list(code_from_data(source))
