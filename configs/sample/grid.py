"""Check of sizes that are not rounded."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import InvalidInput


def check_multiples(sizes: Mapping[str, int], multiple: int) -> None:
    """Check that sizes (pixels, by parameter name) are multiples of `multiple`.

    Raises InvalidInput, which states the nearest valid sizes.
    """
    for name, size in sizes.items():
        if size % multiple:
            lower = size // multiple * multiple
            right = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
            raise InvalidInput(f"{name}: {size} is not a multiple of {multiple}; {right} works", field=name)
