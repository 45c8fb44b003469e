"""Log calls have a constant event and pass values as keyword arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.log_format import RESERVED

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "configs", "models", "services")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "announce")
# Fields that the log context adds. Lines outside of requests may pass `model` and `stage`.
FROM_CONTEXT = ("request_id", "trace_id", "attempt")
# Modules that configure logging.
OWN = ("common/logs.py", "common/log_repeats.py", "common/log_format.py")


def wrong_calls(path: str, source: str) -> Iterator[str]:
    """Invalid calls, each with path and line number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (fault := _fault(node, path)):
            yield f"{path}:{node.lineno}: {fault}"


def _fault(node: ast.Call, path: str) -> str:
    match node.func:
        case ast.Attribute(ast.Name("logging"), "getLogger") if node.args and ast.unparse(node.args[0]) == "__name__":
            return "" if path in OWN else "logging.getLogger(__name__) in place of get_logger(__name__)"
        case ast.Attribute(ast.Name("_log" | "log" | "logger"), level) if level in LEVELS:
            names = [each.arg for each in node.keywords if each.arg is not None]
            if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant):
                return "the event is not one constant string; pass values as keyword arguments"
            if "%" in str(node.args[0].value):
                return "the event has a placeholder; pass values as keyword arguments"
            if reserved := {*RESERVED, *FROM_CONTEXT}.intersection(names):
                return f"{', '.join(sorted(reserved))}: a field that the formatter or the log context adds"
    return ""


def test_log_calls_have_a_constant_event_and_keyword_arguments() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert sum("get_logger(__name__)" in source for source in sources.values()) > 30
    assert not [fault for path, source in sources.items() for fault in wrong_calls(path, source)]


@pytest.mark.parametrize(
    "line",
    [
        "_log = logging.getLogger(__name__)",
        "_log.info(f'request {name}')",
        "_log.info('request %s', name)",
        "_log.info('request %s')",
        "_log.error(text)",
        "_log.warning('lost', request_id=name)",
        "_log.warning('lost', service=name)",
    ],
)
def test_an_invalid_log_call_is_found(line: str) -> None:
    assert list(wrong_calls("services/x.py", line))
