"""`fleet watch ID`: follows a request until it ends, and reconnects when its coordinator stops."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from fleet.v1 import generation_pb2
from services.cli.access import Access, access_of
from services.cli.client import FleetClient, connect, raise_unless_succeeded, retry_unavailable, state_name
from services.cli.options import (
    FAILED,
    SUCCESS,
    add_endpoint,
    add_request_id,
    command_parser,
    endpoint_of,
    run_async,
)
from services.start_up import plain


def main(argv: Sequence[str]) -> int:
    """Print one line per event. The exit code is 0 if the request succeeds, 1 if it ends otherwise."""
    parser = command_parser("watch", "Follow a request, from its first event to its terminal state.")
    add_request_id(parser)
    add_endpoint(parser)
    args = parser.parse_args(argv)
    return run_async(_watch(endpoint_of(args.endpoint), access_of(args), args.id))


async def _watch(endpoint: str, access: Access, request_id: str) -> int:
    async with connect(endpoint, access) as client:
        watch = _Watch(client, request_id)
        return await retry_unavailable(watch.follow, lambda: watch.num_received)


class _Watch:
    """Follows the events of a request, and prints each event once."""

    def __init__(self, client: FleetClient, request_id: str) -> None:
        self.num_received = 0
        self._client = client
        self._request_id = request_id
        self._after = ""

    async def follow(self) -> int:
        """Print the events after the last one received; returns the exit code. Raises RequestFailed."""
        async with contextlib.aclosing(self._client.watch(self._request_id, self._after)) as events:
            async for event in events:
                self._after = event.event_id
                self.num_received += 1
                if await _print_event(self._client, self._request_id, event):
                    return SUCCESS
        return FAILED


async def _print_event(client: FleetClient, request_id: str, event: generation_pb2.Event) -> bool:
    """Print an event. Returns True for success; raises RequestFailed for another terminal state."""
    lines = [f"{event.time.ToDatetime():%H:%M:%S.%f} {_text(event)}"]
    succeeded = event.state_change.state == generation_pb2.REQUEST_STATE_SUCCEEDED
    if succeeded:
        record = await client.get(request_id)
        lines += [f"  file {file.index}: {file.content_type}, {file.byte_size} bytes" for file in record.files]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    raise_unless_succeeded(request_id, event.state_change)
    return succeeded


def _text(event: generation_pb2.Event) -> str:
    match event.WhichOneof("kind"):
        case "progress":
            progress = event.progress
            steps = f" {progress.step}/{progress.total_steps}" if progress.total_steps else ""
            return f"{progress.service}{steps}"
        case "warning":
            about = f"{event.warning.field}: " if event.warning.field else ""
            return plain(f"warning: {about}{event.warning.message}")
        case "item":
            item = event.item
            end = f"bytes {item.offset} to {item.offset + item.byte_size} of file {item.file_index}"
            return plain(f"item {item.item_index}: {item.num_frames} frames, {end} ({item.content_type})")
        case _:
            saved = event.state_change.steps_saved
            return state_name(event.state_change.state) + (f", steps saved: {saved}" if saved else "")
