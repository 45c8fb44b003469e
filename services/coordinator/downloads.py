"""Streams result files for DownloadResult and Generate: stored files, and growing files item by item."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TypeAlias

from common.errors import FailedPrecondition, InvalidInput
from common.state.records import ResultFile, chunks_of
from common.state.requests import RequestStore
from common.state.result_items import StoredItem
from fleet.v1 import generation_pb2 as pb

Part: TypeAlias = pb.FileHeader | pb.FileData
"""The payload of one message of a download."""


def generate_response(part: Part, *, follow: bool) -> pb.GenerateResponse:
    """The message of Generate with this payload."""
    if isinstance(part, pb.FileHeader):
        return pb.GenerateResponse(file=part)
    return pb.GenerateResponse(file_data=part) if follow else pb.GenerateResponse(data=part.data)


def download_response(part: Part, *, follow: bool) -> pb.DownloadResultResponse:
    """The message of DownloadResult with this payload."""
    if isinstance(part, pb.FileHeader):
        return pb.DownloadResultResponse(file=part)
    return pb.DownloadResultResponse(file_data=part) if follow else pb.DownloadResultResponse(data=part.data)


def require_stored(record: pb.RequestRecord) -> None:
    """Raise FailedPrecondition for an output format that is never stored."""
    if record.parameters.output_format == pb.OUTPUT_FORMAT_SAFETENSORS:
        raise FailedPrecondition(
            f"the result of request {record.request_id} was streamed to its caller and never stored",
            field="request_id",
        )


def parts_in_memory(files: Sequence[ResultFile]) -> Iterator[Part]:
    """The header of each file, followed by its bytes."""
    for file in files:
        yield file.header
        offset = 0
        for chunk in chunks_of(file.pieces):
            yield pb.FileData(index=file.header.index, offset=offset, data=bytes(chunk))
            offset += len(chunk)


class Download:
    """Sends each byte of one result once: items while the request runs, the rest after its end.

    With `index`, sends only that file, from byte `offset`.
    """

    def __init__(self, store: RequestStore, request_id: str, index: int | None = None, offset: int = 0) -> None:
        if offset and index is None:
            raise InvalidInput(f"index: it is missing, although offset is {offset}; set both", field="index")
        self._store = store
        self._request_id = request_id
        self._index = index
        self._offset = offset
        self._begun: set[int] = set()

    async def item(self, stored: StoredItem) -> AsyncIterator[Part]:
        """Yield the bytes of the next item, after a header for the first item of a file.

        Raises InvalidInput, NotFound.
        """
        item = stored.item
        self._check_index(item.file_count)
        if self._index not in (None, item.file_index):
            return
        if item.file_index not in self._begun:
            self._begun.add(item.file_index)
            yield pb.FileHeader(
                index=item.file_index,
                count=item.file_count,
                content_type=item.content_type,
                height=item.height,
                width=item.width,
                is_growing=True,
            )
        async for part in self._bytes_of(stored):
            yield part

    async def rest(self, record: pb.RequestRecord) -> AsyncIterator[Part]:
        """Yield the remaining parts after the request has succeeded.

        For a file that item() has sent, yields only the final header. Yields all bytes of the other files. Raises
        InvalidInput, NotFound, FailedPrecondition.
        """
        require_stored(record)
        self._check_index(len(record.files))
        is_streamed = any(header.num_items for header in record.files)
        items = await self._store.delivered_items(self._request_id) if is_streamed else []
        for header in record.files:
            if self._index not in (None, header.index):
                continue
            if self._offset > header.byte_size:
                raise InvalidInput(
                    f"offset: {self._offset} is not at most {header.byte_size}, the size of file {header.index}",
                    field="offset",
                )
            if header.index in self._begun:
                yield header
                continue
            parts = self._whole(header, [each for each in items if each.item.file_index == header.index])
            first = await anext(parts, None)  # Read before the header is sent, because the file may have expired.
            yield header
            if first is not None:
                yield first
            async for part in parts:
                yield part

    def _check_index(self, count: int) -> None:
        if self._index is not None and self._index >= count:
            raise InvalidInput(
                f"index: {self._index} is not below {count}, the number of files in the result", field="index"
            )

    async def _whole(self, header: pb.FileHeader, items: Sequence[StoredItem]) -> AsyncIterator[Part]:
        for stored in items:
            async for part in self._bytes_of(stored):
                yield part
        if not header.num_items:
            position = self._offset
            chunks = self._store.result_chunks(self._request_id, header.index, header.byte_size, position)
            async for chunk in chunks:
                yield pb.FileData(index=header.index, offset=position, data=chunk)
                position += len(chunk)

    async def _bytes_of(self, stored: StoredItem) -> AsyncIterator[Part]:
        """The bytes of an item at or after the offset in its file."""
        item = stored.item
        skipped = min(max(self._offset - item.offset, 0), item.byte_size)
        position = item.offset + skipped
        if skipped < item.byte_size:
            async for chunk in self._store.items.chunks(self._request_id, stored, skipped):
                yield pb.FileData(index=item.file_index, offset=position, data=chunk)
                position += len(chunk)
