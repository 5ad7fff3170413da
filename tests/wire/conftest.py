"""Helpers for connections: every event loop we run on, real loopback sockets, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from termite.wire.framing import Session
from termite.wire.rpc import Connection, FileBody, Handler, refuse

# How long an example takes depends on what else the machine does.
settings.register_profile("wire", deadline=None)
settings.load_profile("wire")

LIMIT_S = 30.0
HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Pair = Callable[..., AbstractAsyncContextManager[tuple[Connection, Connection]]]


def _new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


@pytest.fixture(
    params=["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(not HAS_UVLOOP, reason="uvloop is not there"))]
)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine on either loop, within a bound; no descriptor or task may be left."""
    _new_loop(request.param).close()  # uvloop's first opens two descriptors for good
    gc.collect()
    gc.freeze()  # so that the next ones are quick
    before = len(os.listdir("/proc/self/fd"))
    with asyncio.Runner(loop_factory=lambda: _new_loop(request.param)) as runner:
        complaints: list[dict[str, Any]] = []
        runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))

        async def bounded(coroutine: Coroutine[Any, Any, Any]) -> Any:
            async with asyncio.timeout(LIMIT_S):
                result = await coroutine
            left = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
            if left:
                _, left = await asyncio.wait(left, timeout=2)
            assert not left, "tasks left behind"
            return result

        yield lambda coroutine: runner.run(bounded(coroutine))
        gc.collect()
        assert not complaints
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def sessions() -> tuple[Session, Session]:
    a, b = bytes(range(32)), bytes(range(32, 64))
    return Session(a, b), Session(b, a)


@asynccontextmanager
async def both_ends(
    sock_a: socket.socket, sock_b: socket.socket, ours: Handler, theirs: Handler, **options: Any
) -> AsyncIterator[tuple[Connection, Connection]]:
    """Connections over two sockets that are joined."""
    session_a, session_b = sessions()
    a = await Connection.from_socket(sock_a, session_a, ours, name="theirs", **options)
    b = await Connection.from_socket(sock_b, session_b, theirs, name="ours", **options)
    try:
        yield a, b
    finally:
        a.abort("test over")
        b.abort("test over")
        await a.wait_closed()
        await b.wait_closed()


@pytest.fixture
def session_pair() -> tuple[Session, Session]:
    return sessions()


@pytest.fixture
def raw_pair() -> Callable[[], tuple[socket.socket, socket.socket]]:
    return tcp_pair


@pytest.fixture
def pair() -> Pair:
    """Two connected ends: `async with pair(our_handler, their_handler, **options) as (ours, theirs)`."""

    @asynccontextmanager
    async def connected(
        ours: Handler = refuse, theirs: Handler = refuse, **options: Any
    ) -> AsyncIterator[tuple[Connection, Connection]]:
        async with both_ends(*tcp_pair(), ours, theirs, **options) as ends:
            yield ends

    return connected


@pytest.fixture
def zeros(tmp_path: Path) -> Iterator[Callable[[int], FileBody]]:
    """A sparse file's body of any length."""
    path = tmp_path / "zeros"
    path.touch()

    def body(length: int) -> FileBody:
        os.truncate(path, length)
        return FileBody(os.open(path, os.O_RDONLY), 0, length)

    yield body
