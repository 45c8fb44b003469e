"""Finds modules by patterns of their paths.

`*` matches any part of one name, `[qkv]` matches one of the letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def matches(path: str, pattern: str) -> bool:
    """Whether the pattern matches the path. A wildcard matches a name or a part of it, never a dot."""
    names, patterns = path.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def matching(model: nn.Module, pattern: str, kind: type[M]) -> Iterator[tuple[str, M]]:
    """Modules of type `kind` with a matching path. Raises TypeError for a matching module of another type."""
    for path, module in list(model.named_modules()):
        if matches(path, pattern):
            if not isinstance(module, kind):
                raise TypeError(f"{path}: {type(module).__name__} is not {kind.__name__}; correct pattern {pattern}")
            yield path, module
