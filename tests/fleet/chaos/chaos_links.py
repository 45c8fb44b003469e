"""The network between two processes, which can be made to fail: a TCP port whose connections lead to a unix socket."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

_PIECE_BYTES = 1 << 16

_ACCEPTING_ITERATIONS = 3
"""Of the event loop, between the acceptance of a connection and its writer: transport, protocol, callback."""


async def end(writer: asyncio.StreamWriter) -> None:
    """Reset a connection, and wait until its socket is closed: the event loop may end next."""
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


class Link:
    """Passes bytes on between whoever connects to `port` and the server at a socket.

    Held, it takes bytes and delivers them only once it is released, as a network does that comes back: what a peer has
    sent arrives, although that one gave up long ago. Cut, it ends its connections and refuses new ones.
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
        """Where to connect: HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Deliver nothing for now."""
        self._flows.clear()

    def cut(self) -> None:
        """End all connections, and each new one at once."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        """Work again, and deliver what was held."""
        self._is_cut = False
        self._flows.set()

    async def close(self) -> None:
        """End, with all connections; returns once they are closed."""
        writers = set(self._writers)
        self.cut()
        if self._server is not None:
            # asyncio leaks the socket of a connection that it accepts while the server closes: accept no more first.
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
        self._writers.add(writer)  # here: a task that is cancelled before it begins does nothing at all
        task = asyncio.get_running_loop().create_task(self._join(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until both sides have ended it."""
        onward: asyncio.StreamWriter | None = None
        try:
            await self._flows.wait()
            if self._is_cut:
                return
            back, onward = await asyncio.open_unix_connection(str(self._target))
            self._writers.add(onward)
            await asyncio.gather(self._pass_on(reader, onward), self._pass_on(back, writer))
        except OSError:
            return  # Nobody listens behind, or one side has reset the connection: so does the other.
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
        with suppress(OSError):  # the other direction may have been reset by now
            writer.write_eof()
