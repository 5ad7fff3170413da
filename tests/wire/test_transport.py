"""Dialing and listening over loopback, with peers that are wrong, silent, too many, or half there."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from termite.errors import AuthError, PeerLost, TermiteError, Timeout, WireError
from termite.wire import auth, handshake, transport
from termite.wire.auth import Purpose, Role, Status
from termite.wire.framing import Session
from termite.wire.messages import Message, Ok, ReadDir, StatusText
from termite.wire.rpc import Connection
from termite.wire.transport import Accepted, Listener

SECRET = b"the secret"
KEY = auth.handshake_key(SECRET)


def echo(conn: Connection, message: Message, body: bytes) -> Message:
    return StatusText(message.path) if isinstance(message, ReadDir) else Ok()


@asynccontextmanager
async def serving(key: bytes = SECRET, **options: Any) -> AsyncIterator[Listener]:
    """A listener whose connections echo."""
    conns: list[Connection] = []

    async def on_accept(accepted: Accepted) -> None:
        conns.append(await accepted.connect(echo))

    listener = await transport.listen("127.0.0.1", 0, key, on_accept, **options)
    try:
        yield listener
    finally:
        await listener.close()
        for conn in conns:
            conn.abort("test over")
            await conn.wait_closed()


async def check_served(listener: Listener) -> None:
    """An honest peer still gets in and is answered."""
    conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
    assert (await conn.call(ReadDir(b"x"), timeout_s=5)).message == StatusText(b"x")
    await conn.close()


def raw(listener: Listener) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", listener.port))
    sock.setblocking(False)
    return sock


async def read_to_end(sock: socket.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    try:
        while piece := await loop.sock_recv(sock, 4096):
            data += piece
    except ConnectionResetError:
        pass
    return data


# -- dialing --------------------------------------------------------------------------------------


def test_two_that_hold_the_secret_talk(run: Any) -> None:
    async def body() -> None:
        async with serving() as listener:
            await check_served(listener)
            conn = await transport.dial("localhost", listener.port, SECRET, Purpose.PEER_FETCH, name="worker x")
            assert conn.name == "worker x"
            await conn.close()

    run(body())


def test_a_wrong_secret_is_told_to_both(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving() as listener:
            with pytest.raises(AuthError, match=r"127\.0\.0\.1:\d+ does not accept our secret"):
                await transport.dial("127.0.0.1", listener.port, b"other", Purpose.CONTROL)
            await check_served(listener)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "refused 127.0.0.1: it does not hold our secret" in caplog.text


def test_a_purpose_that_is_not_served_is_told_to_both(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(purposes={Purpose.CONTROL}) as listener:
            with pytest.raises(AuthError, match="does not serve MASTER_MIRROR"):
                await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.MASTER_MIRROR)
            await check_served(listener)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "wants purpose 3" in caplog.text


def test_nobody_there_is_a_lost_peer_with_its_address(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    async def body() -> None:
        with pytest.raises(PeerLost, match=rf"127\.0\.0\.1:{port} cannot be reached.*is the program running"):
            await transport.dial("127.0.0.1", port, SECRET, Purpose.CONTROL)
        with pytest.raises(PeerLost, match=r"no\.such\.host\.invalid:1 cannot be reached"):
            await transport.dial("no.such.host.invalid", 1, SECRET, Purpose.CONTROL)

    run(body())


def test_a_listener_that_says_nothing_is_a_timeout(run: Any) -> None:
    async def body() -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(Timeout, match=r"did not answer within 0\.05 s"),
        ):
            await transport.dial(*silent.getsockname(), SECRET, Purpose.CONTROL, timeout_s=0.05)

    run(body())


async def fake_acceptor(script: Any) -> tuple[asyncio.Task[None], int]:
    """A server that runs `script(loop, sock)` with the first one to dial it."""
    loop = asyncio.get_running_loop()
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)

    async def serve() -> None:
        with server:
            sock, _ = await loop.sock_accept(server)
            with sock:
                await script(loop, sock)

    return loop.create_task(serve()), server.getsockname()[1]


def test_an_acceptor_without_the_secret_is_not_believed(run: Any) -> None:
    async def imposter(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        await loop.sock_sendall(sock, auth.pack_challenge(b"n" * 32))
        await handshake._read(loop, sock, auth.ANSWER_BYTES)
        await loop.sock_sendall(sock, auth.pack_verdict(Status.WELCOME, b"p" * 32))

    async def body() -> None:
        task, port = await fake_acceptor(imposter)
        with pytest.raises(AuthError, match="does not hold our secret"):
            await transport.dial("127.0.0.1", port, SECRET, Purpose.CONTROL)
        await task

    run(body())


def test_the_dialers_own_proof_sent_back_is_not_believed(run: Any) -> None:
    async def mirror(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        await loop.sock_sendall(sock, auth.pack_challenge(b"n" * 32))
        answer = auth.unpack_answer(await handshake._read(loop, sock, auth.ANSWER_BYTES))
        await loop.sock_sendall(sock, auth.pack_verdict(Status.WELCOME, answer.proof))

    async def body() -> None:
        task, port = await fake_acceptor(mirror)
        with pytest.raises(AuthError, match="does not hold our secret"):
            await transport.dial("127.0.0.1", port, SECRET, Purpose.CONTROL)
        await task

    run(body())


@pytest.mark.parametrize(
    ("greeting", "error", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\nxxxxxxxxxxxx", AuthError, "does not speak our protocol"),
        (b"TERMITE\x01" + bytes(32), WireError, "another version"),
        (b"HTTP", PeerLost, "hung up"),
        (b"", PeerLost, "hung up"),
    ],
)
def test_another_program_on_the_port_is_recognised(
    run: Any, greeting: bytes, error: type[TermiteError], says: str
) -> None:
    async def other(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        await loop.sock_sendall(sock, greeting)

    async def body() -> None:
        task, port = await fake_acceptor(other)
        with pytest.raises(error, match=says):
            await transport.dial("127.0.0.1", port, SECRET, Purpose.CONTROL)
        await task

    run(body())


def test_an_acceptor_that_hangs_up_at_any_byte_is_a_lost_peer(run: Any) -> None:
    async def body() -> None:
        for count in range(auth.CHALLENGE_BYTES + auth.VERDICT_BYTES):

            async def quit_early(loop: asyncio.AbstractEventLoop, sock: socket.socket, count: int = count) -> None:
                nonce = auth.new_nonce()
                await loop.sock_sendall(sock, auth.pack_challenge(nonce)[:count])
                if count >= auth.CHALLENGE_BYTES:
                    a = auth.unpack_answer(await handshake._read(loop, sock, auth.ANSWER_BYTES))
                    proven = auth.proof(KEY, a.nonce, nonce, Role.ACCEPTOR, a.purpose)
                    verdict = auth.pack_verdict(Status.WELCOME, proven)
                    await loop.sock_sendall(sock, verdict[: count - auth.CHALLENGE_BYTES])

            task, port = await fake_acceptor(quit_early)
            with pytest.raises(PeerLost):
                await transport.dial("127.0.0.1", port, SECRET, Purpose.CONTROL)
            await task

    run(body())


# -- listening ------------------------------------------------------------------------------------


async def answer_for(loop: asyncio.AbstractEventLoop, sock: socket.socket, purpose: int = 5) -> tuple[bytes, bytes]:
    """(acceptor's nonce, a right answer to its challenge)"""
    _, nonce = auth.unpack_challenge(await handshake._read(loop, sock, auth.CHALLENGE_BYTES))
    mine = b"d" * 32
    return nonce, auth.pack_answer(purpose, mine, auth.proof(KEY, mine, nonce, Role.DIALER, purpose))


def test_the_handshake_may_come_in_two_pieces_cut_anywhere(run: Any) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            for cut in range(auth.ANSWER_BYTES):
                with raw(listener) as sock:
                    _, answer = await answer_for(loop, sock)
                    await loop.sock_sendall(sock, answer[:cut])
                    await asyncio.sleep(0)
                    await loop.sock_sendall(sock, answer[cut:])
                    assert (await handshake._read(loop, sock, auth.VERDICT_BYTES))[0] == Status.WELCOME

    run(body())


def test_a_dialer_that_hangs_up_at_any_byte_disturbs_nobody(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            for count in range(auth.ANSWER_BYTES):
                with raw(listener) as sock:
                    _, answer = await answer_for(loop, sock)
                    await loop.sock_sendall(sock, answer[:count])
            await check_served(listener)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert len([r for r in caplog.records if "refused" in r.message]) <= 2  # rate limited


@pytest.mark.parametrize("at", range(0, auth.ANSWER_BYTES, 6))
def test_an_answer_with_a_changed_byte_is_refused(run: Any, at: int) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            with raw(listener) as sock:
                answer = bytearray((await answer_for(loop, sock))[1])
                answer[at] ^= 0x80
                await loop.sock_sendall(sock, answer)
                verdict = await read_to_end(sock)
                assert verdict == b"" or verdict[0] != Status.WELCOME

    run(body())


def test_an_answer_heard_on_another_connection_is_refused(run: Any) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            with raw(listener) as first, raw(listener) as second:
                _, answer = await answer_for(loop, first)
                await handshake._read(loop, second, auth.CHALLENGE_BYTES)
                await loop.sock_sendall(second, answer)
                assert await read_to_end(second) == auth.pack_verdict(Status.WRONG_SECRET)

    run(body())


def test_the_listeners_own_challenge_sent_back_is_refused(run: Any) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            with raw(listener) as one, raw(listener) as other:
                _, nonce = auth.unpack_challenge(await handshake._read(loop, one, auth.CHALLENGE_BYTES))
                # Use the other connection's acceptor to make proofs with this nonce.
                await handshake._read(loop, other, auth.CHALLENGE_BYTES)
                await loop.sock_sendall(other, auth.pack_answer(5, nonce, nonce))
                verdict = await read_to_end(other)
                assert verdict == auth.pack_verdict(Status.WRONG_SECRET)  # no proof in it
                await loop.sock_sendall(one, auth.pack_answer(5, nonce, verdict[1:]))
                assert (await read_to_end(one))[0] == Status.WRONG_SECRET

    run(body())


def test_a_dialer_of_another_version_is_told_so(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            with raw(listener) as sock:
                await loop.sock_sendall(sock, b"TERMITE\x09" + bytes(auth.ANSWER_BYTES - 8))
                assert (await read_to_end(sock))[auth.CHALLENGE_BYTES :] == auth.pack_verdict(Status.WRONG_VERSION)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "another version" in caplog.text


def test_garbage_disturbs_nobody(run: Any) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as listener:
            for garbage in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(100_000), os.urandom(100_000)):
                with raw(listener) as sock:
                    try:
                        await loop.sock_sendall(sock, garbage)
                    except (ConnectionResetError, BrokenPipeError):
                        pass
                    await check_served(listener)

    run(body())


def test_silence_ends_after_the_limit(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(handshake_limit_s=0.05) as listener:
            with raw(listener) as sock:
                assert len(await read_to_end(sock)) == auth.CHALLENGE_BYTES

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "did not prove that it holds our secret within 0.05 s" in caplog.text


def test_one_stranger_too_many_is_closed_at_once(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(max_unproven=3) as listener:
            strangers = [raw(listener) for _ in range(10)]
            reads = [asyncio.create_task(read_to_end(sock)) for sock in strangers]
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 7:
                more, _ = await asyncio.wait(set(reads) - done, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            for sock in strangers:
                sock.shutdown(socket.SHUT_WR)
            await asyncio.gather(*reads)
            assert sum(task.result() == b"" for task in reads) == 7
            for sock in strangers:
                sock.close()
            await check_served(listener)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "too many others" in caplog.text


def test_silent_strangers_give_way_to_an_honest_peer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_GRACE_S", 0.0)

    async def body() -> None:
        async with serving(max_unproven=4) as listener:
            strangers = [raw(listener) for _ in range(20)]
            await check_served(listener)
            for sock in strangers:
                sock.close()

    run(body())


def test_connections_made_go_on_during_a_flood(run: Any) -> None:
    async def body() -> None:
        async with serving(max_unproven=4) as listener:
            conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
            strangers = []
            for n in range(100):
                strangers.append(raw(listener))
                assert (await conn.call(ReadDir(b"%d" % n), timeout_s=5)).message == StatusText(b"%d" % n)
            for sock in strangers:
                sock.close()
            await conn.close()

    run(body())


def test_a_handed_over_connection_goes_on_with_what_was_exported(run: Any) -> None:
    """As a daemon does it for its child: nothing beyond the handshake has been read."""

    async def body() -> None:
        handed: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

        def on_accept(accepted: Accepted) -> None:
            with accepted.sock:
                handed.put_nowait((os.dup(accepted.sock.fileno()), accepted.session.export()))

        listener = await transport.listen("127.0.0.1", 0, SECRET, on_accept)
        ours = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.MASTER_MIRROR)
        call = asyncio.create_task(ours.call(ReadDir(b"early"), timeout_s=5))  # before anyone reads it
        fd, state = await handed.get()
        await listener.close()
        theirs = await Connection.from_socket(socket.socket(fileno=fd), Session.restore(state), echo)
        assert (await call).message == StatusText(b"early")
        await ours.close()
        await theirs.wait_closed()

    run(body())


def test_an_on_accept_that_fails_closes_its_socket_only(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async def on_accept(accepted: Accepted) -> None:
            raise ZeroDivisionError(accepted.address)

        listener = await transport.listen("127.0.0.1", 0, SECRET, on_accept)
        for _ in range(2):
            conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
            with pytest.raises(PeerLost):
                await conn.call(Ok(), timeout_s=5)
            await conn.wait_closed()
        await listener.close()

    run(body())
    assert "ZeroDivisionError" in caplog.text


def test_closing_a_listener_leaves_the_connections_it_made(run: Any) -> None:
    async def body() -> None:
        conns: list[Connection] = []

        async def on_accept(accepted: Accepted) -> None:
            conns.append(await accepted.connect(echo))

        listener = await transport.listen("127.0.0.1", 0, SECRET, on_accept)
        conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
        await conn.call(Ok(), timeout_s=5)
        await listener.close()
        await conn.call(Ok(), timeout_s=5)
        with pytest.raises(PeerLost):
            await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
        await conn.close()
        await conns[0].wait_closed()

    run(body())


def test_closing_a_listener_ends_an_on_accept_that_lasts_and_its_connection(run: Any) -> None:
    async def body() -> None:
        async def on_accept(accepted: Accepted) -> None:
            await (await accepted.connect(echo)).wait_closed()

        listener = await transport.listen("127.0.0.1", 0, SECRET, on_accept)
        conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.CONTROL)
        await conn.call(Ok(), timeout_s=5)
        await listener.close()
        await conn.wait_closed()

    run(body())


def test_what_a_peer_is_called_is_an_address_to_dial(run: Any) -> None:
    async def body() -> None:
        seen: asyncio.Queue[Accepted] = asyncio.Queue()
        listener = await transport.listen("", 0, SECRET, seen.put_nowait)
        conn = await transport.dial("127.0.0.1", listener.port, SECRET, Purpose.WORKER_REGISTER)
        accepted = await seen.get()
        assert (accepted.host, accepted.purpose) == ("127.0.0.1", Purpose.WORKER_REGISTER)
        assert repr(accepted) == f"<Accepted WORKER_REGISTER from 127.0.0.1:{accepted.port}>"
        accepted.sock.close()
        await conn.wait_closed()
        await listener.close()

    run(body())


def test_a_taken_port_is_one_line_with_the_remedy(run: Any) -> None:
    async def body() -> None:
        async with serving() as listener:
            with pytest.raises(TermiteError, match=r"is taken.*-port"):
                await transport.listen("127.0.0.1", listener.port, SECRET, lambda _: None)
            second = await transport.listen("127.0.0.1", listener.port, SECRET, lambda _: None, retries=20)
            assert listener.port < second.port <= listener.port + 20
            await second.close()

    run(body())


def test_a_dial_that_is_cancelled_leaves_nothing(run: Any) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            dialing = asyncio.create_task(transport.dial(*silent.getsockname(), SECRET, Purpose.CONTROL))
            begun = time.monotonic()
            await asyncio.wait([dialing], timeout=0.02)
            dialing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialing
            assert time.monotonic() - begun < 2

    run(body())
