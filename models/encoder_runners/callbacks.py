"""Callbacks of encoder runners."""

from __future__ import annotations

from collections.abc import Callable

Warn = Callable[[str, str], None]
"""Called with the request field and the message of a warning."""

OnToken = Callable[[int, int], None]
"""Called with the number of generated tokens and the maximum; may raise to stop the generation."""
