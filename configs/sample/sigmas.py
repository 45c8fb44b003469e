"""Noise levels that a request sets itself: they decide the number of steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from common.errors import InvalidInput
from configs.sample.base import ParamWarning

SMALLEST_SIGMA = 1e-6


def steps_of_sigmas(
    sigmas: Sequence[float], steps: int, given: Collection[str]
) -> tuple[int, tuple[ParamWarning, ...]]:
    """The number of steps, with a warning where the request sets another one; `steps` without sigmas.

    `given` are the names that the caller set. Raises InvalidInput for sigmas that rise.
    """
    if not sigmas:
        return steps, ()
    for earlier, later in pairwise(sigmas):
        if later > earlier:
            raise InvalidInput(f"sigmas must not rise, but {later} follows {earlier}", field="sigmas")
    if "num_inference_steps" not in given or steps == len(sigmas):
        return len(sigmas), ()
    message = f"sigmas has {len(sigmas)} values, so {len(sigmas)} steps are taken instead of {steps}"
    return len(sigmas), (ParamWarning("num_inference_steps", message),)
