"""Keys, tunnels and listeners for the tests of SSH."""

from __future__ import annotations

import asyncio
import functools
import socket
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
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from termite.wire import ssh, transport
from termite.wire.auth import Purpose
from termite.wire.messages import Message, Ok, ReadDir, StatusText
from termite.wire.rpc import Connection, Handler, Reply, refuse
from termite.wire.secret import plain_ssh_key
from termite.wire.transport import Accepted, Listener
from tests.wire.conftest import Pair, both_ends, tcp_pair

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
        async with both_ends(*await tunnel(), ours, theirs, **options) as ends:
            yield ends

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


def client(sock: socket.socket) -> paramiko.Transport:
    made = paramiko.Transport(sock, packetizer_class=ssh._Packetizer)
    made.name = "ssh stranger"
    made.set_log_channel(ssh._PARAMIKO_LOG)
    made.get_security_options().ciphers = ssh._CIPHERS
    return made


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
