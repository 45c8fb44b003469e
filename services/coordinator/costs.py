"""The cost of a request at each service: its relative amount of work.

Queues use costs for fair shares of callers, and admission uses them to estimate the open work of a service. Costs are
comparable only between requests of one model at one service.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.pipeline import Cost, ServiceSpec
from common.scaling import StageWork
from configs.sample.base import SamplingParams


def costs_of(services: Sequence[ServiceSpec], params: SamplingParams) -> dict[str, int]:
    """The cost of a request by service, in the unit that each service declares."""
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    units = {Cost.REQUEST: 1, Cost.PIXEL: pixels, Cost.PIXEL_STEP: pixels * params.num_inference_steps}
    return {spec.service: units[spec.cost] for spec in services}


def work_of(services: Sequence[ServiceSpec], params: SamplingParams, variant: str) -> dict[str, StageWork]:
    """The work of a request by service, for autoscaling. A service without reported steps has one step per request."""
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
