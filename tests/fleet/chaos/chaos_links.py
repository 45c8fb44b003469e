"""A network link between two processes that can fail: a TCP port that forwards to a Unix socket."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

_PIECE_BYTES = 1 << 16

_ACCEPTING_ITERATIONS = 3
"""Event-loop iterations between accepting a connection and its callback: transport, protocol, callback."""


async def end(writer: asyncio.StreamWriter) -> None:
    """Reset a connection and wait until its socket is closed, as the caller may close the event loop."""
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


class Link:
    """Forwards bytes between connections to `port` and the server at a Unix socket.

    A held link buffers bytes and delivers them after heal(), as a recovering network does, even if the sender has given
    up. A cut link resets all its connections, including new connections.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port of the loopback interface."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        """HOST:PORT of the link."""
        return f"127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Buffer all bytes until heal()."""
        self._flows.clear()

    def cut(self) -> None:
        """Reset all connections, and each new one."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        """Forward again, and deliver buffered bytes."""
        self._is_cut = False
        self._flows.set()

    async def close(self) -> None:
        """Close the link and all connections; returns once they are closed."""
        writers = set(self._writers)
        self.cut()
        if self._server is not None:
            # asyncio leaks the socket of a connection accepted while the server closes: stop accepting first.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(_ACCEPTING_ITERATIONS):
                await asyncio.sleep(0)
            self._server.close()
        writers |= self._writers
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in writers:
            await end(writer)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)  # not in _join(): a task that is cancelled before it starts runs no code
        task = asyncio.get_running_loop().create_task(self._join(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until both sides have closed it."""
        onward: asyncio.StreamWriter | None = None
        try:
            await self._flows.wait()
            if self._is_cut:
                return
            back, onward = await asyncio.open_unix_connection(str(self._target))
            self._writers.add(onward)
            await asyncio.gather(self._pass_on(reader, onward), self._pass_on(back, writer))
        except OSError:
            return  # The server does not listen, or one side has reset the connection: reset the other side, too.
        finally:
            for each in (writer, onward):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE_BYTES):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        await self._flows.wait()
        with suppress(OSError):  # the other direction may have been reset
            writer.write_eof()
