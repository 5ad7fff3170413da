"""A coordinator in the test's own process, which tells workers what a person would tell them through its pages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from termite.wire import transport
from termite.wire.auth import Purpose
from termite.wire.messages import Message, Ok, Register, WorkerCommand, WorkerInfo
from termite.wire.rpc import Connection
from tests.cluster.farm import wait_for

T = TypeVar("T")


class Commander:
    """Workers register with it as with any coordinator: `-coordinator 127.0.0.1:PORT` once more."""

    def __init__(self, key: bytes) -> None:
        self.port = 0
        self.workers: dict[int, WorkerInfo] = {}  # by port, as they registered last
        self._key = key
        self._conns: dict[int, Connection] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listener = self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> transport.Listener:
        listener = await transport.listen(
            "127.0.0.1", 0, self._key, self._accept, purposes={Purpose.WORKER_REGISTER}
        )
        self.port = listener.port
        return listener

    async def _accept(self, accepted: transport.Accepted) -> None:
        await accepted.connect(self._handle)

    def _handle(self, conn: Connection, message: Message, body: bytes) -> Message:
        if isinstance(message, Register):
            self.workers[message.info.port] = message.info
            self._conns[message.info.port] = conn
        return Ok()

    def wait_for(self, port: int) -> WorkerInfo:
        wait_for("the worker to register", lambda: port in self.workers)
        return self.workers[port]

    def tell(self, port: int, kind: str) -> None:
        """Gives a command to the worker that listens on this port."""
        self.wait_for(port)

        async def notify() -> None:
            self._conns[port].notify(WorkerCommand(kind))

        self._run(notify())

    def close(self) -> None:
        async def end() -> None:
            await self._listener.close()
            for conn in self._conns.values():
                conn.abort("the test ends")

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
