from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from termite.errors import NoWorker, UsageError, WireError
from termite.master.local import MAX_REQUEST, Caller, Kind, LocalRequest, LocalServer, decode_request
from termite.master.localruns import LocalRuns


def body(kind: int = 1, argv: tuple[bytes, ...] = (b"cc", b"-c"), env: tuple[bytes, ...] = (b"A=b",)) -> bytes:
    head = struct.pack("<BBHIII", kind, 0, 0, 0o22, len(argv), len(env))
    return head + b"".join(s + b"\0" for s in (b"/cwd", b"/usr/bin/cc", b"", *argv, *env))


def packet(rest: bytes) -> bytes:
    return b"TMW1" + struct.pack("<I", len(rest)) + rest


def test_a_request_is_taken_apart() -> None:
    request = decode_request(body())
    assert request == LocalRequest(Kind.RUN, 0, 0o22, b"/cwd", b"/usr/bin/cc", b"", [b"cc", b"-c"], [b"A=b"])


@pytest.mark.parametrize("bad", [b"", b"\1", body()[:-1], body() + b"x\0", body(kind=99), body()[:20]])
def test_a_malformed_request_is_an_error(bad: bytes) -> None:
    with pytest.raises(WireError):
        decode_request(bad)


def run(directory: Path, serve: Callable[[LocalRequest, Caller], Awaitable[None]], data: bytes) -> bytes:
    """What a client gets that sends these bytes and waits for the end."""

    async def main() -> bytes:
        server = LocalServer(os.fsencode(directory / "sock"), serve)
        await server.start()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_unix_connection(directory / "sock")
                writer.write(data)
                answer = await reader.read()
                writer.close()
                return answer
        finally:
            await server.stop()

    return asyncio.run(main())


async def hello(request: LocalRequest, caller: Caller) -> None:
    caller.output(1, b"out")
    caller.output(2, b"err")
    caller.message("note")
    caller.exit_status(7 << 8)


def test_output_messages_and_status_are_framed(tmp_path: Path) -> None:
    answer = run(tmp_path, hello, packet(body()))
    frames = [(b"O", b"out"), (b"E", b"err"), (b"M", b"note"), (b"X", struct.pack("<i", 7 << 8))]
    assert answer == b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in frames)


def test_a_request_may_come_in_any_pieces(tmp_path: Path) -> None:
    whole = packet(body())

    async def main() -> None:
        server = LocalServer(os.fsencode(tmp_path / "sock"), hello)
        await server.start()
        async with asyncio.timeout(20):
            for cut in range(1, len(whole)):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "sock")
                writer.write(whole[:cut])
                await writer.drain()
                await asyncio.sleep(0)
                writer.write(whole[cut:])
                assert (await reader.read()).startswith(b"O")
                writer.close()
        await server.stop()

    asyncio.run(main())


TOO_LONG = b"TMW1" + struct.pack("<I", MAX_REQUEST + 1)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n\r\n", TOO_LONG, packet(b"x" * 20)])
def test_garbage_ends_the_connection(tmp_path: Path, data: bytes) -> None:
    try:
        assert run(tmp_path, hello, data) == b""
    except ConnectionResetError:
        pass


def test_a_failure_is_a_message_and_a_status(tmp_path: Path) -> None:
    async def fail(request: LocalRequest, caller: Caller) -> None:
        raise NoWorker("nobody")

    assert run(tmp_path, fail, packet(body())) == b"M\6\0\0\0nobody" + b"X\4\0\0\0" + struct.pack("<i", 1 << 8)


def test_a_caller_that_hangs_up_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def wait(request: LocalRequest, caller: Caller) -> None:
            caller.on_gone = gone.set
            await gone.wait()

        server = LocalServer(os.fsencode(tmp_path / "sock"), wait)
        await server.start()
        _, writer = await asyncio.open_unix_connection(tmp_path / "sock")
        writer.write(packet(body()))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(10):
            await gone.wait()
        await server.stop()

    asyncio.run(main())


def test_a_second_server_is_refused_and_a_dead_ones_socket_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "sock"))

    async def main() -> None:
        first, second = (LocalServer(os.fsencode(tmp_path / "sock"), hello) for _ in range(2))
        await first.start()
        assert (tmp_path / "sock").stat().st_mode & 0o777 == 0o700
        with pytest.raises(UsageError, match="another master"):
            await second.start()
        await first.stop()
        assert not (tmp_path / "sock").exists()

    asyncio.run(main())


def test_a_socket_in_a_very_long_path_works(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200)
    deep.mkdir()

    async def main() -> None:
        server = LocalServer(os.fsencode(deep / "sock"), hello)
        await server.start()
        assert (deep / "sock").is_socket()
        await server.stop()

    asyncio.run(main())


def test_the_end_of_a_local_command_makes_the_view_stale_exactly_if_it_says_so() -> None:
    async def main() -> None:
        for makes_stale in (True, False):
            runs = LocalRuns(1)
            process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
            runs.watch(process.pid, makes_stale=makes_stale)
            runs.notice_ends()
            assert not runs.stale and runs.running == 1
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
            runs.notice_ends()
            assert runs.stale is makes_stale
            assert runs.running == 0
            runs.close()

    asyncio.run(main())


def test_fallback_commands_wait_for_a_slot() -> None:
    async def main() -> None:
        runs = LocalRuns(1)
        await runs.slot()
        second = asyncio.ensure_future(runs.slot())
        await asyncio.sleep(0)
        assert not second.done()
        process = await asyncio.create_subprocess_exec("true")
        runs.watch(process.pid, makes_stale=True, holds_slot=True)
        async with asyncio.timeout(10):
            await second
        await process.wait()
        runs.close()

    asyncio.run(main())
