"""Bounds on size, imports and patterns that linters do not check. Each check has its own test."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "configs", "models", "services", "tests")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

# Path, or path:function, with the reason for its length.
LONGER: dict[str, str] = {}

# Single-device code: the layers of DiTs, and the DiTs themselves.
SINGLE_DEVICE = ("models.layers.", "models.dits.")
# Modules of SINGLE_DEVICE that shard a DiT.
SHARDING = ("models.dits.loading",)

# Denoising stages, each with its file. A further model has its own config, and its pipeline uses one of these stages.
DENOISING_LOOPS = {
    "DenoisingStage": "models/stages/denoising.py",
    "DmdDenoisingStage": "models/stages/dmd_denoising.py",
    "CausalDMDDenoisingStage": "models/stages/causal_dmd_denoising.py",
}

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _sources() -> dict[str, str]:
    """The Python files written by hand, by path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "node_modules" not in path.parts
    }


def too_long(path: str, source: str) -> Iterator[str]:
    """PATH if the file exceeds its bound, and PATH:FUNCTION for each function that exceeds its bound."""
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield path
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES:
            yield f"{path}:{node.name}"


def forbidden_patterns(path: str, source: str) -> Iterator[str]:
    """Patterns that this project forbids, each with its path and line."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if pattern := _bad_call(node) or _bad_import(node) or _bad_raise(node):
            yield f"{path}:{node.lineno}: {pattern}"  # type: ignore[attr-defined]
        if isinstance(node, _FUNCTIONS):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom) and not _explained(lines, inner.lineno):
                    yield f"{path}:{inner.lineno}: an import inside a function, with no comment that says why"


def _bad_call(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    match node.func:
        case ast.Name("getattr" | "hasattr" as name):
            second = node.args[1] if len(node.args) > 1 else None
            literal = isinstance(second, ast.Constant) and not str(second.value).startswith("__")
            return f"{name} with a literal name" if literal else ""
        case ast.Attribute(ast.Name("pytest"), "skip" | "xfail" as name):
            return f"pytest.{name}: a test that cannot fail"
        case ast.Attribute(ast.Attribute(ast.Name("pytest"), "mark"), "skip" | "skipif" | "xfail" as name):
            return f"pytest.mark.{name}: a test that cannot fail"
    return ""


def _bad_import(node: ast.AST) -> str:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
    found = {"pickle", "dill", "cloudpickle", "marshal"}.intersection(name.split(".")[0] for name in names)
    return f"{', '.join(found)}: bytes that run code when they are read" if found else ""


def _bad_raise(node: ast.AST) -> str:
    if not isinstance(node, ast.Raise):
        return ""
    error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return "NotImplementedError" if isinstance(error, ast.Name) and error.id == "NotImplementedError" else ""


def _explained(lines: list[str], number: int) -> bool:
    """Whether an import has a comment on its line, or directly above the block of imports that ends with it."""
    above = number - 2
    while above >= 0 and lines[above].lstrip().startswith(("import ", "from ")):
        above -= 1
    return "#" in lines[number - 1] or (above >= 0 and lines[above].lstrip().startswith("#"))


def denoising_loops(sources: Mapping[str, str]) -> dict[str, str]:
    """Stages that read a denoising loop's input, or derive from such a stage, each with its file."""
    classes = {
        node.name: (path, {_last_name(each) for base in node.bases for each in ast.walk(base)})
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    found = {name: path for name, (path, bases) in classes.items() if "DenoisingInput" in bases}
    while more := {n: path for n, (path, bases) in classes.items() if n not in found and bases & found.keys()}:
        found |= more
    return found


def _last_name(node: ast.AST) -> str:
    """The name of a reference such as `DenoisingInput` or `contracts.DenoisingInput`. Empty for another node."""
    match node:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
    return ""


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports: at its top, inside functions and under TYPE_CHECKING."""
    modules = {_module_of(path): source for path, source in sources.items()}
    return {name: set(_imported(name, source, modules)) for name, source in modules.items()}


def _imported(name: str, source: str, modules: Collection[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{each}" for each in names]
            names = [part if part in modules else str(node.module) for part in parts]
        yield from (each for each in names if each in modules and each != name)


def import_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sorted groups of modules that import each other, directly or indirectly."""
    reached = {name: _reached(name, graph) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reached(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    pending = list(graph[name])
    while pending:
        each = pending.pop()
        if each not in found:
            found.add(each)
            pending += graph[each]
    return found


def test_imports_have_no_cycles() -> None:
    sources = {path: source for path, source in _sources().items() if not path.startswith("tests/")}
    assert not import_cycles(import_graph(sources))


def reaching_parallel(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Single-device modules, each with the parallel modules that it imports, directly or indirectly."""
    single = [name for name in graph if name.startswith(SINGLE_DEVICE) and not _shards(name)]
    reached = {name: {each for each in _reached(name, graph) if _shards(each)} for name in single}
    return {name: found for name, found in reached.items() if found}


def _shards(module: str) -> bool:
    return f"{module}.".startswith("models.parallel.") or module in SHARDING or module.endswith("_plan")


def test_layers_and_dits_import_no_parallel_modules() -> None:
    graph = import_graph({path: source for path, source in _sources().items() if not path.startswith("tests/")})
    assert {"models.layers.linear", "models.dits.flux"} <= graph.keys()
    assert not reaching_parallel(graph)


@pytest.mark.parametrize(
    "source",
    [
        "import models.parallel.mesh",
        "from models import parallel",
        "from models.parallel import mesh",
        "from models.parallel.mesh import Axis",
        "if TYPE_CHECKING:\n    from models.parallel.mesh import Axis",
        "def f():\n    from models.parallel.mesh import Axis",
        "from models.dits.flux_plan import PLAN",
        "from models.dits.loading import load",
        "from models.stages import predictor",
    ],
)
def test_a_layer_or_dit_that_imports_a_parallel_module_is_found(source: str) -> None:
    sources = {
        "models/parallel/__init__.py": "",
        "models/parallel/mesh.py": "",
        "models/dits/flux_plan.py": "from models.parallel.mesh import Axis",
        "models/dits/loading.py": "import models.parallel.mesh",
        "models/stages/predictor.py": "from models.parallel.mesh import Axis",
    }
    assert not reaching_parallel(import_graph(sources))
    for path in ("models/dits/flux.py", "models/layers/linear.py"):
        found = reaching_parallel(import_graph({**sources, path: source}))
        assert list(found) == [path.removesuffix(".py").replace("/", ".")]


def test_three_denoising_stages_share_two_loops() -> None:
    served = {path: source for path, source in _sources().items() if not path.startswith("tests/")}
    assert denoising_loops(served) == DENOISING_LOOPS
    paced = {name for name, imports in import_graph(served).items() if "models.stages.pacing" in imports}
    assert paced == {"models.stages.denoising", "models.stages.causal_dmd_denoising"}, "other stages have no loop"


def test_a_further_denoising_stage_is_found() -> None:
    sources = {
        "a.py": "class A(PipelineStage[contracts.DenoisingInput, Out]): ...\nclass B(A): ...",
        "b.py": "class C(PipelineStage[DenoisingInput, Out]): ...\nclass D(C): ...\nclass E(Other): ...",
    }
    assert denoising_loops(sources) == {"A": "a.py", "B": "a.py", "C": "b.py", "D": "b.py"}


def test_files_and_functions_are_short() -> None:
    found = {name for path, source in _sources().items() for name in too_long(path, source)}
    assert not found - LONGER.keys()
    assert not LONGER.keys() - found, "remove these entries from LONGER: they are within the bounds"


def test_no_file_has_a_forbidden_pattern() -> None:
    assert not [pattern for path, source in _sources().items() for pattern in forbidden_patterns(path, source)]


def _duplicate_classes(sources: Mapping[str, str]) -> list[str]:
    """Names of top-level classes that several modules define, with the modules."""
    modules: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(path)
    return [f"{name}: {', '.join(paths)}" for name, paths in modules.items() if len(paths) > 1]


def test_class_names_outside_tests_are_unique() -> None:
    assert not _duplicate_classes({path: text for path, text in _sources().items() if not path.startswith("tests/")})


def test_a_class_name_of_two_modules_is_found() -> None:
    sources = {"a.py": "class One: ...", "b.py": "class Two: ...\nclass One: ..."}
    assert _duplicate_classes(sources) == ["One: a.py, b.py"]


def test_test_files_have_unique_names_and_no_package() -> None:
    names = [path.name for path in sorted((ROOT / "tests").rglob("*.py")) if "node_modules" not in path.parts]
    assert "__init__.py" not in names
    assert sorted(set(names)) == sorted(names)


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert list(too_long("a.py", f"async def f() -> None:\n{body}")) == ["a.py:f"]
    assert not list(too_long("a.py", f"def f() -> None:\n{body[10:]}"))


def test_a_long_file_is_found() -> None:
    assert list(too_long("a.py", "x = 1\n" * (MAX_FILE_LINES + 1))) == ["a.py"]
    assert not list(too_long("a.py", "x = 1\n" * MAX_FILE_LINES))


@pytest.mark.parametrize(
    "source",
    [
        "import a.c",
        "from a import c",
        "from a.c import value",
        "def f():\n    from a.c import value",
        "if TYPE_CHECKING:\n    from a import other, c",
    ],
)
def test_an_import_cycle_is_found(source: str) -> None:
    sources = {
        "a/__init__.py": "",
        "a/b.py": source,
        "a/c.py": "import a.d",
        "a/d.py": "from a import b",
        "e.py": "import a.b",
    }
    assert import_cycles(import_graph(sources)) == [["a.b", "a.c", "a.d"]]
    assert not import_cycles(import_graph({**sources, "a/d.py": "from a import other"}))


@pytest.mark.parametrize(
    "source",
    [
        "getattr(x, 'name')",
        "hasattr(x, 'name')",
        "import pickle",
        "from pickle import loads",
        "raise NotImplementedError",
        "raise NotImplementedError('later')",
        "pytest.skip('no')",
        "@pytest.mark.skipif(True, reason='no')\ndef test(): pass",
        "def f():\n    import torch",
        "def f():\n    # Slow to load.\n    x = 1\n    import torch",
    ],
)
def test_a_forbidden_pattern_is_found(source: str) -> None:
    assert list(forbidden_patterns("a.py", source))


@pytest.mark.parametrize(
    "source",
    [
        "getattr(x, '__name__', '')",
        "getattr(x, name)",
        "def f():\n    # Slow to load.\n    import torch\n    from torch import nn",
        "def f():\n    import torch  # slow to load",
        "raise ValueError('no')",
    ],
)
def test_a_permitted_pattern_is_not_reported(source: str) -> None:
    assert not list(forbidden_patterns("a.py", source))
