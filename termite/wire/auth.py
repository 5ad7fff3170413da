"""Two sides prove to each other that they hold the same secret, and get fresh keys from it.

Pure functions and exact layouts; `wire/transport.py` moves the bytes.  The side that accepted the
connection speaks first:

    acceptor -> dialer    MAGIC (8) | nonce (32)
    dialer   -> acceptor  MAGIC (8) | purpose (1) | nonce (32) | proof (32)
    acceptor -> dialer    status (1) | proof (32; zeros if the status is WRONG_SECRET or WRONG_VERSION)

Every message has a fixed length, so nothing of a stranger's is parsed before he has proven himself.
A proof is an HMAC over the role that speaks, the purpose, the status and both nonces: it is worth
nothing in the other direction, for another purpose, or on another connection.  The session keys are
bound to the same values, one key per direction, so whoever only relays a handshake gets no keys.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from enum import IntEnum
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from termite.errors import WireError

MAGIC = b"TERMITE\x02"
"""The last byte is the version of handshake and framing; the messages have their own."""

NONCE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_LIMIT_S = 5.0

_CHALLENGE = struct.Struct(f"8s{NONCE_BYTES}s")
_ANSWER = struct.Struct(f"8sB{NONCE_BYTES}s{PROOF_BYTES}s")
_VERDICT = struct.Struct(f"B{PROOF_BYTES}s")
CHALLENGE_BYTES = _CHALLENGE.size
ANSWER_BYTES = _ANSWER.size
VERDICT_BYTES = _VERDICT.size


class Purpose(IntEnum):
    """What a connection is for; the dialer says it and proves it together with the secret."""

    WORKER_REGISTER = 1
    MASTER_SUBSCRIBE = 2
    MASTER_MIRROR = 3
    PEER_FETCH = 4
    CONTROL = 5


class Role(IntEnum):
    DIALER = 1
    ACCEPTOR = 2


class Status(IntEnum):
    """The acceptor's verdict."""

    WELCOME = 0
    WRONG_SECRET = 1
    WRONG_VERSION = 2
    NOT_WELCOME = 3  # the secret is right, but this port does not serve that purpose


class Answer(NamedTuple):
    """What a dialer sent, not yet believed."""

    magic: bytes
    purpose: int
    nonce: bytes
    proof: bytes


class SessionKeys(NamedTuple):
    to_acceptor: bytes
    to_dialer: bytes

    def __repr__(self) -> str:
        return "SessionKeys(...)"


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def handshake_key(secret: bytes) -> bytes:
    """What proofs are made with: 32 bytes derived from the contents of the secret file."""
    return _hkdf(secret, b"", b"termite handshake", 32)


def proof(
    key: bytes, nonce_dialer: bytes, nonce_acceptor: bytes, role: Role, purpose: int, status: int = Status.WELCOME
) -> bytes:
    """HMAC-SHA256 under `handshake_key`; all parts have fixed lengths, so none can pass for another."""
    said = b"termite proof" + bytes((role, purpose, status)) + nonce_dialer + nonce_acceptor
    return hmac.digest(key, said, "sha256")


def is_proven(given: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(given, expected)


def session_keys(key: bytes, nonce_dialer: bytes, nonce_acceptor: bytes, purpose: int) -> SessionKeys:
    """One key per direction, different for every connection."""
    salt = nonce_dialer + nonce_acceptor
    both = _hkdf(key, salt, b"termite session" + bytes((purpose,)), 64)
    return SessionKeys(to_acceptor=both[:32], to_dialer=both[32:])


def _hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt or None, info=info).derive(key)


# -- the three messages as bytes ------------------------------------------------------------------


def pack_challenge(nonce_acceptor: bytes) -> bytes:
    return _CHALLENGE.pack(MAGIC, nonce_acceptor)


def unpack_challenge(data: bytes) -> tuple[bytes, bytes]:
    """(magic, nonce)"""
    magic, nonce = _CHALLENGE.unpack(data)
    return magic, nonce


def pack_answer(purpose: int, nonce_dialer: bytes, proven: bytes) -> bytes:
    return _ANSWER.pack(MAGIC, purpose, nonce_dialer, proven)


def unpack_answer(data: bytes) -> Answer:
    return Answer(*_ANSWER.unpack(data))


def pack_verdict(status: Status, proven: bytes = bytes(PROOF_BYTES)) -> bytes:
    return _VERDICT.pack(status, proven)


def unpack_verdict(data: bytes) -> tuple[Status, bytes]:
    """(status, proof); WireError for a status that does not exist."""
    status, proven = _VERDICT.unpack(data)
    try:
        return Status(status), proven
    except ValueError:
        raise WireError(f"unknown handshake status {status}") from None


def is_other_version(magic: bytes) -> bool:
    """True for a peer that is a termite, but not one we can talk to."""
    return magic != MAGIC and magic[:-1] == MAGIC[:-1]
