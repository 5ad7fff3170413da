"""Peers without SSH, other programs, silence and floods: nobody else is disturbed."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from termite.errors import AuthError, PeerLost, TermiteError, Timeout
from termite.wire import auth, handshake, ssh, transport
from termite.wire.auth import Purpose
from termite.wire.messages import ReadDir, StatusText
from termite.wire.rpc import Connection
from tests.wire.conftest import tcp_pair
from tests.wire.inside_ssh import (
    PLAIN,
    check_served,
    client,
    dial,
    nothing_left,  # noqa: F401  (a fixture)
    refusals,
    relay,
    secret,
    serving,
    told,
    tunnels,
)
from tests.wire.test_transport import fake_acceptor, raw, read_to_end

# -- peers without SSH, and strangers -------------------------------------------------------------


def test_a_dialer_without_ssh_is_refused_and_both_are_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving() as listener:
            with pytest.raises(AuthError, match=r"127\.0\.0\.1:\d+ speaks SSH: its secret is an SSH key, ours is not"):
                await dial(listener, PLAIN)
            await told(caplog, "it speaks without SSH: its secret is no SSH key, ours is")
            await check_served(listener)

    run(body())


def test_a_dialer_with_ssh_is_refused_by_a_plain_listener_and_both_are_told(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with serving(PLAIN) as listener:
            with pytest.raises(AuthError, match=r"127\.0\.0\.1:\d+ speaks without SSH: its secret is no SSH key"):
                await dial(listener)
            await told(caplog, "it speaks SSH: its secret is an SSH key, ours is not")
            await check_served(listener, PLAIN)

    run(body())


@pytest.mark.parametrize(
    ("greeting", "error", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" + b"x" * 100, TermiteError, "SSH|handshake"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", AuthError, "does not speak our protocol"),
        (b"\x00" * 100, AuthError, "does not speak our protocol"),
        (b"SSH-1.5-old\r\n", AuthError, "does not speak our protocol"),
        (b"SS", PeerLost, "hung up"),
        (b"", PeerLost, "hung up"),
    ],
)
def test_another_program_on_the_port_is_recognised(
    run: Any, greeting: bytes, error: type[TermiteError], says: str
) -> None:
    async def other(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        await loop.sock_sendall(sock, greeting)
        await handshake._read(loop, sock, len(ssh._IDENTITY))
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone already

    async def body() -> None:
        task, port = await fake_acceptor(other)
        with pytest.raises(error, match=says):
            await transport.dial("127.0.0.1", port, secret(), Purpose.CONTROL)
        await task

    run(body())


def test_a_listener_that_says_nothing_is_a_timeout(run: Any) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            for _ in range(3):
                with pytest.raises(Timeout, match=r"did not answer within 0\.05 s"):
                    await transport.dial(*silent.getsockname(), secret(), Purpose.CONTROL, timeout_s=0.05)

    run(body())


def test_garbage_disturbs_nobody(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    identity = b"SSH-2.0-x\r\n"
    pieces = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        os.urandom(100_000),
        b"SSH-2.0-" + b"x" * 100_000,  # a line without an end
        identity + bytes(100_000),
        identity + b"\xff" * 100_000,  # a packet of four gigabytes
        identity + os.urandom(100_000),
        identity + b"\x00\x00\x00\x0c\x0a\x14" + bytes(100_000),
        identity + b"\x00\x00\x00\x0c\x0a\x63" + bytes(100_000),  # a message that does not exist
    ]

    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with serving(handshake_limit_s=1.0) as listener:
            for garbage in pieces:
                with raw(listener) as sock:
                    try:
                        await loop.sock_sendall(sock, garbage)
                    except (ConnectionResetError, BrokenPipeError):
                        pass
                    await check_served(listener)
                    await read_to_end(sock)

    run(body())
    assert "Traceback" not in refusals(caplog)


def test_silence_ends_after_the_limit(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(handshake_limit_s=0.05) as listener:
            with raw(listener) as sock:
                assert (await read_to_end(sock)).startswith(b"SSH-2.0-termite")
            await told(caplog, "did not prove that it holds our secret within 0.05 s")

    run(body())


def test_silence_after_the_key_exchange_ends_after_the_limit(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    def attempt(port: int) -> None:
        idle = client(socket.create_connection(("127.0.0.1", port)))
        idle.start_client()
        idle.join(10)
        assert not idle.is_alive()

    async def body() -> None:
        async with serving(handshake_limit_s=0.3) as listener:
            await asyncio.to_thread(attempt, listener.port)
            await told(caplog, "did not prove that it holds our secret within 0.3 s")

    run(body())


def test_silence_within_the_tunnel_ends_after_the_limit(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The limit is for both handshakes together."""

    async def body() -> None:
        async with serving(handshake_limit_s=0.3) as listener:
            sock = await ssh.dial(raw(listener), secret())
            sock.setblocking(False)
            with sock:
                assert len(await read_to_end(sock)) == auth.CHALLENGE_BYTES
            await told(caplog, "did not prove that it holds our secret within 0.3 s")

    run(body())


def test_a_dialer_that_hangs_up_anywhere_disturbs_nobody(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    said: list[bytes] = []

    async def body() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = tcp_pair()
        relay_a = tcp_pair()
        relays = [asyncio.create_task(relay(ours, relay_a[0], said)), asyncio.create_task(relay(relay_a[0], ours))]
        for sock in await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(relay_a[1], secret())):
            sock.close()
        await asyncio.gather(*relays)
        ours.close()
        relay_a[0].close()
        whole = b"".join(said)
        async with serving() as listener:
            for count in range(0, len(whole), 50):
                with raw(listener) as sock:
                    await loop.sock_sendall(sock, whole[:count])
            await check_served(listener)

    run(body())
    refusals(caplog)


def test_silent_strangers_give_way_to_an_honest_peer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_GRACE_S", 0.0)

    async def body() -> None:
        async with serving(max_unproven=4) as listener:
            strangers = [raw(listener) for _ in range(20)]
            await check_served(listener)
            assert len(tunnels()) < 20
            for sock in strangers:
                sock.close()

    run(body())


def test_connections_made_go_on_during_a_flood(run: Any) -> None:
    async def body() -> None:
        async with serving(max_unproven=4) as listener:
            conn = await dial(listener)
            strangers = []
            for n in range(50):
                strangers.append(raw(listener))
                assert (await conn.call(ReadDir(b"%d" % n), timeout_s=5)).message == StatusText(b"%d" % n)
            for sock in strangers:
                sock.close()
            await conn.close()

    run(body())


def test_a_dial_that_is_cancelled_leaves_nothing(run: Any) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            dialing = asyncio.create_task(transport.dial(*silent.getsockname(), secret(), Purpose.CONTROL))
            await asyncio.wait([dialing], timeout=0.05)
            dialing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialing

    run(body())


@pytest.mark.parametrize("serial", range(5))
def test_a_dial_that_is_cancelled_when_it_succeeds_leaves_nothing(
    run: Any, serial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        accepting = asyncio.create_task(ssh.accept(theirs, secret()))
        dialing = asyncio.create_task(ssh.dial(ours, secret()))
        offer = ssh._Tunnel._offer
        loop = asyncio.get_running_loop()

        def offer_and_cancel(tunnel: Any, result: Any) -> None:
            offer(tunnel, result)
            loop.call_soon_threadsafe(dialing.cancel)

        monkeypatch.setattr(ssh._Tunnel, "_offer", offer_and_cancel)
        await asyncio.wait([dialing, accepting])
        for end in await asyncio.gather(dialing, accepting, return_exceptions=True):
            if isinstance(end, socket.socket):
                end.close()

    run(body())


def test_a_listener_closed_in_the_middle_of_it_leaves_nothing(run: Any) -> None:
    async def body() -> None:
        for _ in range(5):
            async with serving() as listener:
                dialing = asyncio.create_task(dial(listener))
                await asyncio.wait([dialing], timeout=0.003 * _)
            (end,) = await asyncio.gather(dialing, return_exceptions=True)
            if isinstance(end, Connection):
                await end.wait_closed()
            else:
                assert isinstance(end, TermiteError)

    run(body())
