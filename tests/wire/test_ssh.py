"""Everything that connections do, inside SSH, and the ways in which its peers can be wrong.

The tests of `test_rpc*.py` are all run again here: `pair` connects their two ends through a tunnel.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from pathlib import Path
from typing import Any

import paramiko
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    PrivateFormat,
)

from termite.errors import AuthError
from termite.wire import ssh, transport
from termite.wire.auth import Purpose
from termite.wire.messages import ReadDir, StatusText
from termite.wire.rpc import Reply
from termite.wire.secret import load_secret
from tests.wire.conftest import tcp_pair
from tests.wire.inside_ssh import (
    KINDS,
    MIB,
    check_served,
    client,
    dial,
    key_file,
    nothing_left,  # noqa: F401  (a fixture)
    pair,  # noqa: F401  (a fixture)
    refusals,
    relay,
    secret,
    serving,
    told,
)
from tests.wire.test_rpc import *  # noqa: F403  (run again, through this file's `pair`)
from tests.wire.test_rpc_bodies import *  # noqa: F403
from tests.wire.test_rpc_life import *  # noqa: F403

# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_hold_the_key_talk(run: Any, kind: str) -> None:
    data = os.urandom(5 * MIB)

    async def body() -> None:
        async with serving(secret(kind)) as listener:
            conn = await dial(listener, secret(kind))
            assert await conn.call(ReadDir(b"a"), body=data, timeout_s=10) == Reply(StatusText(b"a"), data)
            await conn.close()

    run(body())


def test_a_key_is_the_same_secret_in_every_format_and_under_a_passphrase(run: Any, tmp_path: Path) -> None:
    locked = key_file(tmp_path / "a", lock=BestAvailableEncryption(b"open"))
    bare = key_file(tmp_path / "b", encoding=PrivateFormat.PKCS8)

    async def body() -> None:
        async with serving(load_secret(locked, {"TERMITE_SSH_PASSPHRASE": "open"})) as listener:
            await check_served(listener, load_secret(bare, {}))

    run(body())


def test_nothing_readable_crosses_the_network(run: Any) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        heard: list[bytes] = []
        relay_a = tcp_pair()
        relays = [asyncio.create_task(relay(ours, relay_a[0], heard)), asyncio.create_task(relay(relay_a[0], ours))]
        a, b = await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(relay_a[1], secret()))
        loop = asyncio.get_running_loop()
        for sock in (a, b):
            sock.setblocking(False)
        await loop.sock_sendall(a, b"words" * 1000)
        assert await loop.sock_recv(b, 5) == b"words"
        a.close()
        b.close()
        await asyncio.gather(*relays)
        ours.close()
        relay_a[0].close()
        assert heard and b"words" not in b"".join(heard)

    run(body())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_another_key_is_refused_and_both_are_told(
    run: Any, kind: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with serving(secret(kind)) as listener:
            with pytest.raises(AuthError, match=r"127\.0\.0\.1:\d+ (shows another|holds another kind of) SSH key"):
                await dial(listener, secret(other, 1))
            await told(caplog, "same secret file")
            await check_served(listener, secret(kind))

    run(body())
    assert re.search(r"refused 127\.0\.0\.1: it .*holds another", refusals(caplog))


def paramiko_key(serial: int = 0) -> paramiko.PKey:
    return ssh._key(secret("ed25519", serial))


@pytest.mark.parametrize("way", ["other key", "password", "none", "a channel without signing in"])
def test_nothing_but_a_signature_with_the_key_lets_a_client_in(
    run: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    def attempt(port: int) -> None:
        stranger = client(socket.create_connection(("127.0.0.1", port)))
        try:
            stranger.start_client()
            with pytest.raises(paramiko.SSHException):
                if way == "other key":
                    stranger.auth_publickey("termite", paramiko_key(1))
                elif way == "password":
                    stranger.auth_password("termite", "x", fallback=False)
                elif way == "none":
                    stranger.auth_none("root")
                else:
                    stranger.open_session(timeout=5)
        finally:
            stranger.close()

    async def body() -> None:
        async with serving() as listener:
            await asyncio.to_thread(attempt, listener.port)
            await told(caplog, "SSH key")
            await check_served(listener)

    run(body())


def test_behind_the_key_is_one_channel_and_nothing_else(run: Any) -> None:
    def attempt(port: int) -> None:
        holder = client(socket.create_connection(("127.0.0.1", port)))
        try:
            holder.start_client()
            holder.auth_publickey("termite", paramiko_key())
            for kind in ("direct-tcpip", "x11", "forwarded-tcpip"):
                with pytest.raises(paramiko.ChannelException):
                    holder.open_channel(kind, ("127.0.0.1", 1), ("127.0.0.1", 1))
            with pytest.raises(paramiko.SSHException):
                holder.request_port_forward("127.0.0.1", 0)
            channel = holder.open_session(timeout=5)
            with pytest.raises(paramiko.ChannelException):
                holder.open_session(timeout=5)
            with pytest.raises(paramiko.SSHException):
                channel.exec_command("id")
        finally:
            holder.close()

    async def body() -> None:
        async with serving() as listener:
            await asyncio.to_thread(attempt, listener.port)

    run(body())


def test_a_server_without_the_key_is_not_believed(run: Any) -> None:
    """Even one that lets everybody in."""

    class Open(paramiko.ServerInterface):  # type: ignore[misc]
        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            raise AssertionError("it should not have come to that")

    def serve(server: socket.socket) -> None:
        sock, _ = server.accept()
        imposter = client(sock)
        imposter.add_server_key(paramiko_key(1))
        try:
            imposter.start_server(server=Open())
        except EOFError:
            pass  # the dialer has gone already
        imposter.join(5)

    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            serving = asyncio.create_task(asyncio.to_thread(serve, server))
            with pytest.raises(AuthError, match="shows another SSH key than ours"):
                await transport.dial(*server.getsockname(), secret(), Purpose.CONTROL)
            await serving

    run(body())


def test_a_purpose_that_is_not_served_is_told_to_both(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(purposes={Purpose.CONTROL}) as listener:
            with pytest.raises(AuthError, match="does not serve MASTER_MIRROR"):
                await dial(listener, purpose=Purpose.MASTER_MIRROR)
            await told(caplog, "wants purpose 3")

    run(body())
