"""How much a request asks of each service, so that queues and their bounds know a video from an icon.

A cost only compares requests of one model at one service: what a unit takes there is measured, as the service's pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.pipeline import Cost, ServiceSpec
from common.scaling import StageWork
from configs.sample.base import SamplingParams


def costs_of(services: Sequence[ServiceSpec], params: SamplingParams) -> dict[str, int]:
    """The cost of a request by service, as each service declares what its work is proportional to."""
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    units = {Cost.REQUEST: 1, Cost.PIXEL: pixels, Cost.PIXEL_STEP: pixels * params.num_inference_steps}
    return {spec.service: units[spec.cost] for spec in services}


def work_of(services: Sequence[ServiceSpec], params: SamplingParams, variant: str) -> dict[str, StageWork]:
    """The work of a request by service, as autoscaling counts it: steps of the loop where a service reports them."""
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    extent = "x".join(str(length) for length in params.extent.values())
    shape = f"{variant} {extent} outputs={params.num_outputs_per_prompt} branches={params.branches}".strip()
    return {
        spec.service: StageWork(
            steps=params.num_inference_steps if spec.reports_steps else 1,
            tokens={Cost.REQUEST: 1, Cost.PIXEL: pixels, Cost.PIXEL_STEP: pixels * params.branches}[spec.cost],
            shape=shape,
        )
        for spec in services
    }
