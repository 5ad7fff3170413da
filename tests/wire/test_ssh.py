"""Everything that connections do, inside SSH, and the ways in which its peers can be wrong.

The tests of `test_rpc*.py` are all run again here: `pair` connects their two ends through a tunnel.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from termite.errors import AuthError, PeerLost, TermiteError, Timeout, WireError
from termite.wire import auth, handshake, ssh, transport
from termite.wire.auth import Purpose
from termite.wire.framing import Session
from termite.wire.messages import Message, Ok, ReadDir, StatusText
from termite.wire.rpc import Connection, Handler, Reply, refuse
from termite.wire.secret import load_secret, plain_ssh_key
from termite.wire.transport import Accepted, Listener
from tests.wire.conftest import Pair, sessions, tcp_pair
from tests.wire.test_rpc import *  # noqa: F403  (run again, through this file's `pair`)
from tests.wire.test_rpc_bodies import *  # noqa: F403
from tests.wire.test_rpc_life import *  # noqa: F403
from tests.wire.test_transport import fake_acceptor, raw, read_to_end

REPO = Path(__file__).parents[2]
MIB = 1024 * 1024
KINDS = ["rsa", "ecdsa", "ed25519"]
PLAIN = b"a secret that is no key"


@functools.cache
def private_key(kind: str, serial: int = 0) -> Any:
    """The same for the same serial."""
    if kind == "rsa":
        return rsa.generate_private_key(65537, 3072)
    if kind == "ecdsa":
        return ec.generate_private_key(ec.SECP256R1())
    return Ed25519PrivateKey.generate()


def key_file(
    path: Path,
    kind: str = "ed25519",
    encoding: PrivateFormat = PrivateFormat.OpenSSH,
    lock: KeySerializationEncryption | None = None,
) -> Path:
    path.write_bytes(private_key(kind).private_bytes(Encoding.PEM, encoding, lock or NoEncryption()))
    path.chmod(0o600)
    return path


@functools.cache
def secret(kind: str = "ed25519", serial: int = 0) -> bytes:
    contents = private_key(kind, serial).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return plain_ssh_key(contents)


def tunnels() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ssh ")]


@pytest.fixture(autouse=True)
def nothing_left(run: Any) -> Iterator[None]:
    """No thread stays; `run` looks at the descriptors after this."""
    yield
    for thread in tunnels():
        thread.join(5)
    assert not tunnels()


async def tunnel() -> tuple[socket.socket, socket.socket]:
    ours, theirs = tcp_pair()
    return tuple(await asyncio.gather(ssh.dial(ours, secret()), ssh.accept(theirs, secret())))  # type: ignore[return-value]


@pytest.fixture
def pair() -> Pair:
    @asynccontextmanager
    async def connected(
        ours: Handler = refuse, theirs: Handler = refuse, **options: Any
    ) -> AsyncIterator[tuple[Connection, Connection]]:
        sock_a, sock_b = await tunnel()
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

    return connected


def echo(conn: Connection, message: Message, body: bytes) -> Reply:
    return Reply(StatusText(message.path), body) if isinstance(message, ReadDir) else Reply(Ok())


@asynccontextmanager
async def serving(key: bytes | None = None, handler: Handler = echo, **options: Any) -> AsyncIterator[Listener]:
    conns: list[Connection] = []

    async def on_accept(accepted: Accepted) -> None:
        conns.append(await accepted.connect(handler))

    listener = await transport.listen("127.0.0.1", 0, secret() if key is None else key, on_accept, **options)
    try:
        yield listener
    finally:
        await listener.close()
        for conn in conns:
            conn.abort("test over")
            await conn.wait_closed()


async def dial(listener: Listener, key: bytes | None = None, purpose: Purpose = Purpose.CONTROL) -> Connection:
    return await transport.dial("127.0.0.1", listener.port, secret() if key is None else key, purpose)


async def check_served(listener: Listener, key: bytes | None = None) -> None:
    conn = await dial(listener, key)
    assert (await conn.call(ReadDir(b"x"), timeout_s=5)).message == StatusText(b"x")
    await conn.close()


def refusals(caplog: pytest.LogCaptureFixture) -> str:
    """What was logged; nothing of it may be a traceback or come from paramiko."""
    assert not [record for record in caplog.records if "paramiko" in record.name or record.exc_info]
    return "\n".join(record.getMessage() for record in caplog.records)


async def told(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Once it stands in the log; the bound is that of `run`."""
    while text not in refusals(caplog):
        await asyncio.sleep(0.002)


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


def client(sock: socket.socket) -> paramiko.Transport:
    made = paramiko.Transport(sock, packetizer_class=ssh._Packetizer)
    made.name = "ssh stranger"
    made.set_log_channel(ssh._PARAMIKO_LOG)
    made.get_security_options().ciphers = ssh._CIPHERS
    return made


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


# -- the tunnel -----------------------------------------------------------------------------------


async def relay(
    source: socket.socket, sink: socket.socket, heard: list[bytes] | None = None, flip_at: int | None = None
) -> None:
    """Bytes of one direction; `flip_at` changes one of them."""
    loop, count = asyncio.get_running_loop(), 0
    try:
        while data := await loop.sock_recv(source, 65536):
            if heard is not None:
                heard.append(data)
            if flip_at is not None and count <= flip_at < count + len(data):
                changed = bytearray(data)
                changed[flip_at - count] ^= 1
                data = bytes(changed)
            count += len(data)
            await loop.sock_sendall(sink, data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_handed_over_socket_goes_on_with_what_was_exported(run: Any) -> None:
    async def body() -> None:
        handed: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

        def on_accept(accepted: Accepted) -> None:
            assert accepted.local_host == "127.0.0.1"
            with accepted.sock:
                handed.put_nowait((os.dup(accepted.sock.fileno()), accepted.session.export()))

        listener = await transport.listen("127.0.0.1", 0, secret(), on_accept)
        ours = await dial(listener, purpose=Purpose.MASTER_MIRROR)
        call = asyncio.create_task(ours.call(ReadDir(b"early"), timeout_s=5))  # before anyone reads it
        fd, state = await handed.get()
        await listener.close()
        theirs = await Connection.from_socket(socket.socket(fileno=fd), Session.restore(state), echo)
        assert (await call).message == StatusText(b"early")
        await ours.close()
        await theirs.wait_closed()

    run(body())


def test_another_process_carries_on_and_its_death_is_noticed(run: Any) -> None:
    program = (
        "import socket, sys\n"
        "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        "sock.setblocking(True)\n"
        "sock.sendall(sock.recv(100).upper())\n"
    )

    async def body() -> None:
        a, b = await tunnel()
        child = subprocess.Popen([sys.executable, "-c", program, str(b.fileno())], pass_fds=[b.fileno()])
        b.close()
        a.setblocking(False)
        with a:
            await asyncio.get_running_loop().sock_sendall(a, b"hello")
            assert await read_to_end(a) == b"HELLO"
        assert child.wait(5) == 0

    run(body())


def test_all_that_was_written_before_the_end_arrives(run: Any) -> None:
    data = os.urandom(20 * MIB)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        a, b = await tunnel()
        a.setblocking(False)
        b.setblocking(False)

        async def write() -> None:
            with a:
                await loop.sock_sendall(a, data)

        writing = asyncio.create_task(write())
        received = bytearray()
        with b:
            while piece := await loop.sock_recv(b, MIB):
                received += piece
        await writing
        assert received == data

    run(body())


def test_a_reader_that_stands_still_stops_the_writer(run: Any) -> None:
    async def body() -> None:
        a, b = await tunnel()
        a.settimeout(0.5)

        def write() -> int:
            written = 0
            try:
                while True:
                    written += a.send(bytes(MIB))
            except TimeoutError:
                return written

        written = await asyncio.to_thread(write)
        assert ssh._WINDOW_BYTES <= written < ssh._WINDOW_BYTES + 16 * MIB
        a.close()
        b.close()

    run(body())


def test_new_keys_are_agreed_on_while_both_ends_send(run: Any, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh._Packetizer, "REKEY_BYTES", 2 * MIB)
    data = os.urandom(8 * MIB)

    async def body() -> None:
        async with pair(echo, echo) as (ours, theirs):
            for _ in range(2):
                replies = await asyncio.gather(
                    *(end.call(ReadDir(b"x"), body=data, timeout_s=20) for end in (ours, theirs) for _ in range(2))
                )
                assert all(reply.body == data for reply in replies)

    run(body())


@pytest.mark.parametrize("how", ["the peer ends", "the network breaks"])
def test_an_end_in_the_middle_of_a_transfer_is_a_lost_peer(run: Any, how: str) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        far = tcp_pair()
        relays = [asyncio.create_task(relay(ours, far[0])), asyncio.create_task(relay(far[0], ours))]
        a, b = await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(far[1], secret()))
        session_a, session_b = sessions()
        begun = asyncio.Event()
        conn_a = await Connection.from_socket(a, session_a)
        conn_b = await Connection.from_socket(b, session_b, lambda *_: Reply(Ok(), bytes(100 * MIB)))
        call = asyncio.create_task(conn_a.call(Ok(), timeout_s=10, sink=lambda _: begun.set()))
        await begun.wait()
        if how == "the peer ends":
            conn_b.abort("gone")
        else:
            for sock in (ours, far[0]):
                sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerLost):
            await call
        await conn_a.wait_closed()
        await conn_b.wait_closed()
        await asyncio.gather(*relays)
        ours.close()
        far[0].close()

    run(body())


def test_a_byte_changed_on_the_way_ends_the_tunnel_and_is_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        far = tcp_pair()
        relays = [
            asyncio.create_task(relay(ours, far[0], flip_at=500_000)),
            asyncio.create_task(relay(far[0], ours)),
        ]
        a, b = await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(far[1], secret()))
        loop = asyncio.get_running_loop()
        a.setblocking(False)
        b.setblocking(False)
        with a, b:
            sending = asyncio.create_task(loop.sock_sendall(a, b"w" * MIB))
            received = await read_to_end(b)
            assert len(received) < MIB and set(received) <= set(b"w")
            await asyncio.gather(sending, return_exceptions=True)
        await asyncio.gather(*relays)
        ours.close()
        far[0].close()
        await told(caplog, "the SSH tunnel with 127.0.0.1:")

    run(body())


def test_a_program_that_ends_has_said_goodbye(run: Any, tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from termite.wire import transport\n"
        "from termite.wire.secret import load_secret\n"
        "async def main():\n"
        "    key = load_secret(Path(sys.argv[1]))\n"
        "    conn = await transport.dial('127.0.0.1', int(sys.argv[2]), key, transport.Purpose.CONTROL)\n"
        "    await conn.close('bye for now')\n"
        "asyncio.run(main())\n"
    )

    async def body() -> None:
        ends: asyncio.Queue[str] = asyncio.Queue()

        async def on_accept(accepted: Accepted) -> None:
            conn = await accepted.connect()
            await conn.wait_closed()
            ends.put_nowait(conn.close_reason)

        listener = await transport.listen("127.0.0.1", 0, load_secret(path, {}), on_accept)
        arguments = (sys.executable, "-W", "error", "-c", program, path, str(listener.port))
        child = await asyncio.create_subprocess_exec(*arguments, cwd=REPO)
        assert await ends.get() == "closed by the other side: bye for now"
        assert await child.wait() == 0
        await listener.close()

    run(body())


def test_a_program_that_ends_is_not_held_up_by_its_tunnels(run: Any, tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    program = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from termite.wire import transport\n"
        "from termite.wire.secret import load_secret\n"
        "async def main():\n"
        "    key = load_secret(Path(sys.argv[1]))\n"
        "    return await transport.dial('127.0.0.1', int(sys.argv[2]), key, transport.Purpose.CONTROL)\n"
        "loop = asyncio.new_event_loop()\n"
        "conn = loop.run_until_complete(main())\n"
        "print('ends', flush=True)\n"
    )

    async def body() -> None:
        async with serving(load_secret(path, {})) as listener:
            arguments = (sys.executable, "-W", "ignore", "-c", program, path, str(listener.port))
            child = await asyncio.create_subprocess_exec(*arguments, cwd=REPO, stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert await child.stdout.readline() == b"ends\n"
            assert await asyncio.wait_for(child.wait(), 5) == 0
            child._transport.close()  # type: ignore[attr-defined]

    run(body())


def test_a_thread_that_cannot_be_started_is_a_lost_peer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def body() -> None:
        ours, theirs = tcp_pair()
        monkeypatch.setattr(ssh._Tunnel, "start", start)
        with theirs, pytest.raises(PeerLost, match="can't start new thread"):
            await ssh.dial(ours, secret())

    run(body())


def test_what_paramiko_stumbles_over_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: Any) -> None:
        raise paramiko.SSHException("two\nlines")

    async def body() -> None:
        ours, theirs = tcp_pair()
        monkeypatch.setattr(ssh, "_transport", stumble)
        with theirs, pytest.raises(WireError, match="broke the SSH protocol: two lines"):
            await ssh.dial(ours, secret())

    run(body())
