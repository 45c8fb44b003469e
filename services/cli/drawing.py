"""One request of `fleet generate`: shows its progress, receives its files, reconnects."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from common.errors import FailedPrecondition, InternalError, Unavailable
from fleet.v1 import generation_pb2
from services.cli.client import FleetClient, pause, raise_unless_succeeded, retry_unavailable
from services.cli.output import ResultFiles
from services.cli.progress import TerminalReporter

Message = generation_pb2.GenerateResponse | generation_pb2.DownloadResultResponse


async def draw(
    client: FleetClient, request: generation_pb2.SubmitRequest, output: Path, report: TerminalReporter
) -> list[Path]:
    """Send the request, show its progress, write its files. Raises RequestFailed if the request does not succeed."""
    with ResultFiles(output) as files:
        client_request = _ClientRequest(client, files, report)
        # Set only for videos, because coordinators of earlier versions refuse the field `follow`.
        await client_request.generate(request, follow=output.suffix.lower() == ".mp4")
        report.finish()
        if not files.paths:
            raise InternalError(f"request {client_request.request_id} ended without a result")
        files.check_complete()
        report.note(f"request {client_request.request_id}, seed {client_request.seed}: {client_request.seconds:.1f} s")
        return files.paths


class _ClientRequest:
    """The state of a request in this client: its ID, its latest event, and the bytes received in `files`."""

    def __init__(self, client: FleetClient, files: ResultFiles, report: TerminalReporter) -> None:
        self.request_id, self.seed = "", 0
        self._client = client
        self._files = files
        self._report = report
        self._started = time.perf_counter()
        self._latest = ""
        self._frames = 0
        self._num_received = 0

    @property
    def seconds(self) -> float:
        """Time since the request was sent."""
        return time.perf_counter() - self._started

    async def generate(self, request: generation_pb2.SubmitRequest, *, follow: bool) -> None:
        """Receive all responses.

        Reconnects after a lost connection if the request is accepted and its result is not safetensors.
        """
        try:
            async with contextlib.aclosing(self._client.generate(request, follow=follow)) as responses:
                async for response in responses:
                    match response.WhichOneof("payload"):
                        case "accepted":
                            self._num_received += 1
                            self.request_id, self.seed = response.accepted.request_id, response.accepted.parameters.seed
                        case "event":
                            self._take_event(response.event)
                        case _:
                            self._take_part(response)
        except Unavailable as error:
            is_stored = request.parameters.output_format != generation_pb2.OUTPUT_FORMAT_SAFETENSORS
            if not (self.request_id and is_stored):
                raise
            self._report.note(f"request {self.request_id} continues; the connection was lost: {error.message}")
            await pause(0)
            await retry_unavailable(self._receive_rest, lambda: self._num_received)

    async def _receive_rest(self) -> None:
        """Receive the remaining events and bytes from any coordinator."""
        watching = asyncio.create_task(self._watch())
        try:
            await self._download()
            await watching
        except FailedPrecondition:
            await watching  # Raises RequestFailed with the reason if the request has failed.
            raise
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        async with contextlib.aclosing(self._client.watch(self.request_id, self._latest)) as events:
            async for event in events:
                self._take_event(event)

    async def _download(self) -> None:
        """Download each file in order, from its first missing byte."""
        index = 0
        while index < (1 if self._files.count is None else self._files.count):
            if not self._files.is_complete(index):
                offset = self._files.received(index)
                async with contextlib.aclosing(self._client.download(self.request_id, index, offset)) as responses:
                    async for response in responses:
                        self._take_part(response)
            index += 1

    def _take_event(self, event: generation_pb2.Event) -> None:
        self._latest = event.event_id
        self._num_received += 1
        match event.WhichOneof("kind"):
            case "progress":
                self._report.progress(event.progress)
            case "warning":
                self._report.warning(event.warning)
            case "item":
                self._show_item(event.item)
            case "state_change":
                raise_unless_succeeded(self.request_id, event.state_change)

    def _show_item(self, item: generation_pb2.ResultItem) -> None:
        self._frames += item.num_frames
        self._report.note(f"{self._frames} frames after {self.seconds:.1f} s")

    def _take_part(self, response: Message) -> None:
        """Process a file header, or bytes of a file."""
        self._num_received += 1
        match response.WhichOneof("payload"):
            case "file":
                file = response.file
                self._files.begin(file.index, file.count, None if file.is_growing else file.byte_size)
            case "file_data":
                part = response.file_data
                self._files.write_at(part.index, part.offset, part.data)
            case "data":
                self._files.write(response.data)
