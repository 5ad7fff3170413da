"""The handshake of `wire/auth.py` over a socket, each side as one coroutine.

Reads exactly the bytes of the handshake and not one more, so that the socket and the `Session` can
be handed to another process.  The caller bounds the time and closes the socket on failure.  Works
on every event loop that has `sock_recv` and `sock_sendall`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection

from termite.errors import AuthError, PeerLost, WireError
from termite.wire import auth
from termite.wire.auth import Purpose, Role, Status
from termite.wire.framing import Session

SSH_IDENTITY = b"SSH-2.0-termite"
"""How one of ours begins whose secret is an SSH key (`wire/ssh.py`)."""


async def dial_in(sock: socket.socket, key: bytes, purpose: Purpose) -> Session:
    """The dialer's side; `key` is an `auth.handshake_key`."""
    loop = asyncio.get_running_loop()
    challenge = await _read(loop, sock, auth.CHALLENGE_BYTES)
    if challenge.startswith(SSH_IDENTITY):
        await loop.sock_sendall(sock, auth.MAGIC)  # so that it knows who hangs up, and why
        raise _speaks_ssh()
    magic, nonce_acceptor = auth.unpack_challenge(challenge)
    _check_magic(magic)
    nonce_dialer = auth.new_nonce()
    proven = auth.proof(key, nonce_dialer, nonce_acceptor, Role.DIALER, purpose)
    await loop.sock_sendall(sock, auth.pack_answer(purpose, nonce_dialer, proven))
    status, proven = auth.unpack_verdict(await _read(loop, sock, auth.VERDICT_BYTES))
    if status is Status.WRONG_VERSION:
        raise WireError("speaks another version of the protocol; install the same version on both sides")
    if status is Status.WRONG_SECRET:
        raise AuthError("does not accept our secret; give both sides the same secret file")
    expected = auth.proof(key, nonce_dialer, nonce_acceptor, Role.ACCEPTOR, purpose, status)
    if not auth.is_proven(proven, expected):
        raise AuthError("does not hold our secret; give both sides the same secret file")
    if status is Status.NOT_WELCOME:
        raise AuthError(f"does not serve {purpose.name}; is it the port of another program?")
    keys = auth.session_keys(key, nonce_dialer, nonce_acceptor, purpose)
    return Session(send_key=keys.to_acceptor, receive_key=keys.to_dialer)


async def accept(sock: socket.socket, key: bytes, welcome: Collection[Purpose]) -> tuple[Purpose, Session]:
    """The acceptor's side."""
    loop = asyncio.get_running_loop()
    nonce_acceptor = auth.new_nonce()
    await loop.sock_sendall(sock, auth.pack_challenge(nonce_acceptor))
    begin = await _read(loop, sock, len(SSH_IDENTITY))
    if begin == SSH_IDENTITY:
        raise _speaks_ssh()  # it will not send a whole answer
    answer = auth.unpack_answer(begin + await _read(loop, sock, auth.ANSWER_BYTES - len(begin)))
    if auth.is_other_version(answer.magic):
        await loop.sock_sendall(sock, auth.pack_verdict(Status.WRONG_VERSION))
    _check_magic(answer.magic)
    expected = auth.proof(key, answer.nonce, nonce_acceptor, Role.DIALER, answer.purpose)
    if not auth.is_proven(answer.proof, expected):
        await loop.sock_sendall(sock, auth.pack_verdict(Status.WRONG_SECRET))
        raise AuthError("does not hold our secret")
    status = Status.WELCOME if answer.purpose in welcome else Status.NOT_WELCOME
    proven = auth.proof(key, answer.nonce, nonce_acceptor, Role.ACCEPTOR, answer.purpose, status)
    await loop.sock_sendall(sock, auth.pack_verdict(status, proven))
    if status is not Status.WELCOME:
        raise AuthError(f"holds our secret but wants purpose {answer.purpose}, which is not served here")
    keys = auth.session_keys(key, answer.nonce, nonce_acceptor, answer.purpose)
    return Purpose(answer.purpose), Session(send_key=keys.to_dialer, receive_key=keys.to_acceptor)


def _check_magic(magic: bytes) -> None:
    if auth.is_other_version(magic):
        raise WireError("speaks another version of the protocol; install the same version on both sides")
    if magic != auth.MAGIC:
        raise AuthError("does not speak our protocol; is it the port of another program?")


def _speaks_ssh() -> AuthError:
    return AuthError("speaks SSH: its secret is an SSH key, ours is not; give both sides the same secret file")


async def _read(loop: asyncio.AbstractEventLoop, sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await loop.sock_recv(sock, count - len(data))
        if not piece:
            raise PeerLost("hung up during the handshake")
        data += piece
    return data
