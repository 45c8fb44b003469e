"""How much a request asks of each service, so that queues and their bounds know a video from an icon.

A cost only compares requests of one model at one service: what a unit takes there is measured, as the service's pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.pipeline import ServiceSpec
from configs.sample.base import SamplingParams


def costs_of(services: Sequence[ServiceSpec], params: SamplingParams) -> dict[str, int]:
    """The cost by service: pixels of all outputs and frames where the canvas is read, times the steps of a loop.

    A service that reads neither canvas nor schedule, such as a text encoder, takes every request as one.
    """
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    costs: dict[str, int] = {}
    for spec in services:
        cost = pixels if "canvas" in spec.contract.inputs else 1
        costs[spec.service] = cost * params.num_inference_steps if "schedule" in spec.contract.inputs else cost
    return costs
