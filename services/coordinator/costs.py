"""How much a request asks of each service, so that queues and their bounds know a video from an icon.

A cost only compares requests of one model at one service: what a unit takes there is measured, as the service's pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.pipeline import Cost, ServiceSpec
from configs.sample.base import SamplingParams


def costs_of(services: Sequence[ServiceSpec], params: SamplingParams) -> dict[str, int]:
    """The cost of a request by service, as each service declares what its work is proportional to."""
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    units = {Cost.REQUEST: 1, Cost.PIXEL: pixels, Cost.PIXEL_STEP: pixels * params.num_inference_steps}
    return {spec.service: units[spec.cost] for spec in services}
