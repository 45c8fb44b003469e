"""`fleet cancel ID`: cancels a request."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fleet.v1 import generation_pb2
from services.cli.access import Access, access_of
from services.cli.client import TERMINAL, connect, state_name
from services.cli.options import FAILED, SUCCESS, add_endpoint, add_request_id, command_parser, endpoint_of, run_async


def main(argv: Sequence[str]) -> int:
    """Print the state of the request; exit code 1 when it had already ended in another state."""
    parser = command_parser("cancel", "Cancel a request. A request that has ended keeps its state.")
    add_request_id(parser)
    add_endpoint(parser)
    args = parser.parse_args(argv)
    return run_async(_cancel(endpoint_of(args.endpoint), access_of(args), args.id))


async def _cancel(endpoint: str, access: Access, request_id: str) -> int:
    async with connect(endpoint, access) as client:
        record = await client.cancel(request_id)
    sys.stdout.write(f"{request_id} {state_name(record.state)}\n")
    ended_otherwise = record.state in TERMINAL and record.state != generation_pb2.REQUEST_STATE_CANCELLED
    return FAILED if ended_otherwise else SUCCESS
