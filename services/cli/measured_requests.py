"""Measures the seconds per service of a request to a running fleet, from its events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from common.errors import Unavailable
from fleet.v1 import generation_pb2
from services.cli.access import Access
from services.cli.client import FleetClient, connect, raise_unless_succeeded

_PROMPTS = ("a red apple on a table", "a blue boat on a lake")


async def measure_request(endpoint: str, access: Access, model: str, parameters: Mapping[str, int]) -> dict[str, float]:
    """Run a warm-up request and a measured request, and return the seconds of the latter by service.

    Services are in pipeline order. Raises Unavailable if no fleet answers, InvalidInput for an unknown model or an
    invalid parameter, and RequestFailed for a failed request.
    """
    async with connect(endpoint, access) as client:
        for prompt in _PROMPTS:
            request = generation_pb2.SubmitRequest(model=model)
            # Random, because workers cache the replies to the prompts of earlier measurements.
            request.parameters.prompt = f"{prompt} {secrets.token_hex(4)}"
            for name, value in parameters.items():
                setattr(request.parameters, name, value)
            seconds = await _run(client, request)
        served = next(each for each in await client.models() if each.name == model)
    if not seconds:
        raise Unavailable(f"{model} at {endpoint} reported no progress events, so nothing was measured")
    return {each.service: seconds[each.service] for each in served.services if each.service in seconds}


async def _run(client: FleetClient, request: generation_pb2.SubmitRequest) -> dict[str, float]:
    """Seconds from the first to the last progress event of each service."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    request_id = ""
    async for reply in client.generate(request):
        if reply.HasField("accepted"):
            request_id = reply.accepted.request_id
        elif reply.event.HasField("progress"):
            service, now = reply.event.progress.service, time.perf_counter()
            first.setdefault(service, now)
            last[service] = now
        elif reply.event.HasField("state_change"):
            raise_unless_succeeded(request_id, reply.event.state_change)
    return {service: last[service] - first[service] for service in first}
