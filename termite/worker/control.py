"""What the worker's daemon and its mirror processes say to each other, over a socket pair.

One packet, one message; the first one, daemon to mirror, is `Start`.  The end of the socket is the
end of the other process.
"""

from __future__ import annotations

import socket

import msgspec

from termite.errors import WireError

MAX_PACKET = 1 << 20


class ControlMessage(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all."""


class Start(ControlMessage, frozen=True):
    """Everything a mirror process needs to know."""

    name: str  # the worker's, for messages
    session: bytes  # the authenticated connection's state, see wire/framing.py
    directory: bytes  # of this mirror alone
    store: bytes  # the content store's directory
    store_bytes: int
    mkbox: bytes
    uid: int  # of the tasks
    gid: int
    jobs: int  # the worker's slots
    arch: str
    heartbeat_s: float
    silence_limit_s: float
    log_level: int
    logfile: str  # empty: stderr
    paranoia: bool
    own_files: bool  # may large files be read from this machine's own?
    heap_bytes: int  # a mirror that is larger makes way for a fresh one; 0: no bound
    reap_count: int  # tasks after which a mirror makes way for a fresh one; 0: no bound


class Wants(ControlMessage, frozen=True):
    """Mirror -> daemon: how many slots its master has use for."""

    jobs: int
    master: str


class Grant(ControlMessage, frozen=True):
    """Daemon -> mirror."""

    jobs: int


class Stop(ControlMessage, frozen=True):
    """Daemon -> mirror: end now."""

    reason: str


class Drain(ControlMessage, frozen=True):
    """Daemon -> mirror: take no new tasks, finish the others, end."""

    reason: str


class Get(ControlMessage, frozen=True):
    """Mirror -> daemon: get these contents from one of these workers."""

    number: int
    hash: bytes
    size: int
    peers: list[tuple[str, int]]


class Got(ControlMessage, frozen=True):
    """Daemon -> mirror: the contents are in the store, or could not be had."""

    number: int
    found: bool


class Report(ControlMessage, frozen=True):
    """Mirror -> daemon, now and then, for the status pages."""

    tasks_running: int
    tasks_done: int
    json: bytes


AnyControl = Start | Wants | Grant | Stop | Drain | Get | Got | Report
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyControl)


def encode(message: ControlMessage) -> bytes:
    return _encoder.encode(message)


def decode(packet: bytes) -> AnyControl:
    try:
        message: AnyControl = _decoder.decode(packet)
        return message
    except msgspec.DecodeError as e:
        raise WireError(f"control message: {e}") from e


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; packets keep their boundaries."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET)
    return ours, theirs
