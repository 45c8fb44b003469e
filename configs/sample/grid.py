"""Sizes that no rounding makes right: multiples of a number of pixels."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import InvalidInput


def check_multiples(sizes: Mapping[str, int], multiple: int) -> None:
    """Refuse sizes (pixels, by parameter name) off a grid. Raises InvalidInput that names the sizes that work."""
    for name, size in sizes.items():
        if size % multiple:
            lower = size // multiple * multiple
            right = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
            raise InvalidInput(f"{name}: {size} is not a multiple of {multiple}; {right} works", field=name)
