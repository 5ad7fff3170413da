"""Frames that cannot be changed, dropped, repeated or reordered unnoticed.

    u32 length of the payload | u8 kind | u32 stream | payload | 16 bytes MAC        (little-endian)

The MAC is HMAC-SHA256, truncated, over the frame's number in its direction (u64, never sent), the
header and the payload.  A kind with the bit `BARE` leaves the payload to its receiver, who knows from
elsewhere what it has to be: contents of files, of which an authenticated message told the hash, would
else be hashed twice on either side.  Anything amiss is a `WireError`, after which the connection is
worth nothing.  No I/O: `Session` holds keys and numbers, `Framer` the bytes received so far.  One user at
a time, no locks.  What kinds and streams mean is `wire/rpc.py`'s business.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator

from termite.errors import WireError

BARE = 0x80
"""Of a frame's kind: its payload is not under the MAC."""

MAX_PAYLOAD = 256 * 1024
HEAD_BYTES = 9
MAC_BYTES = 16
MAX_FRAME = HEAD_BYTES + MAX_PAYLOAD + MAC_BYTES

_HEAD = struct.Struct("<IBI")
_NUMBERED = struct.Struct("<QIBI")  # the frame's number, then the header as it is sent
_NUMBER_BYTES = 8
_STATE = struct.Struct("<32s32sQQ")
_BLOCK_BYTES = 64

Frame = tuple[int, int, memoryview]
"""(kind, stream, payload)"""


class _Mac:
    """HMAC-SHA256 with both keyed states prepared: a third of the cost of `hmac.digest` for small frames."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def __call__(self, numbered: bytes, payload: bytes | bytearray | memoryview) -> bytes:
        inner = self._inner.copy()
        inner.update(numbered)
        inner.update(payload)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()[:MAC_BYTES]


class Session:
    """Both directions of one authenticated connection: keys, and how many frames went each way."""

    __slots__ = ("_receive_key", "_receive_mac", "_received", "_send_key", "_send_mac", "_sent")

    def __init__(self, send_key: bytes, receive_key: bytes, sent: int = 0, received: int = 0) -> None:
        if len(send_key) != 32 or len(receive_key) != 32:
            raise ValueError("session keys are 32 bytes")
        self._send_key = send_key
        self._receive_key = receive_key
        self._send_mac = _Mac(send_key)
        self._receive_mac = _Mac(receive_key)
        self._sent = sent
        self._received = received

    def __repr__(self) -> str:
        return f"<Session sent={self._sent} received={self._received}>"

    def seal(self, kind: int, stream: int, payload: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
        """The next frame to send, in three parts so that a large payload is not copied for it."""
        if len(payload) > MAX_PAYLOAD:
            raise WireError(f"a frame of {len(payload)} bytes is over the limit of {MAX_PAYLOAD}")
        numbered = _NUMBERED.pack(self._sent, len(payload), kind, stream)
        self._sent += 1
        return numbered[_NUMBER_BYTES:], payload, self._send_mac(numbered, b"" if kind & BARE else payload)

    def check(self, kind: int, stream: int, payload: memoryview, mac: memoryview) -> None:
        """Accept a frame as the next one received, less the payload of a bare one; WireError if it is anything else."""
        numbered = _NUMBERED.pack(self._received, len(payload), kind, stream)
        if not hmac.compare_digest(self._receive_mac(numbered, b"" if kind & BARE else payload), mac):
            raise WireError(f"frame {self._received} was changed, lost, repeated or reordered on the way")
        self._received += 1

    def export(self) -> bytes:
        """Everything another process needs to carry on.  Secret: only for a pipe or socket to a child."""
        return _STATE.pack(self._send_key, self._receive_key, self._sent, self._received)

    @classmethod
    def restore(cls, state: bytes) -> Session:
        if len(state) != _STATE.size:
            raise WireError(f"exported session of {len(state)} bytes instead of {_STATE.size}")
        return cls(*_STATE.unpack(state))


class Framer:
    """Cuts what arrives into frames, each checked before it is shown.

    The owner receives into `space()` and then iterates over `take(count)`.  A payload is a view
    into the buffer: valid until the next `space()`.
    """

    _FIRST_BYTES = 64 * 1024
    _FULL_BYTES = 2 * MAX_FRAME  # room to receive the next piece while one is incomplete
    _WORTH_RECEIVING = 16 * 1024

    def __init__(self, session: Session) -> None:
        self._session = session
        self._view = memoryview(bytearray(self._FIRST_BYTES))
        self._start = 0  # of what was received and not yet taken
        self._end = 0

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return self._end - self._start

    def space(self) -> memoryview:
        """Where to receive to; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
            return self._view
        if len(self._view) - self._end < self._WORTH_RECEIVING or self._start + self._needed() > len(self._view):
            self._make_room()
        return self._view[self._end :]

    def take(self, count: int) -> Iterator[Frame]:
        """The frames that `count` more bytes in `space()` complete."""
        self._end += count
        view = self._view
        while self._end - self._start >= HEAD_BYTES:
            payload_at = self._start + HEAD_BYTES
            length, kind, stream = _HEAD.unpack_from(view, self._start)
            if length > MAX_PAYLOAD:
                raise WireError(f"a frame of {length} bytes is over the limit of {MAX_PAYLOAD}")
            mac_at = payload_at + length
            stop = mac_at + MAC_BYTES
            if stop > self._end:
                return
            payload = view[payload_at:mac_at]
            self._session.check(kind, stream, payload, view[mac_at:stop])
            self._start = stop
            yield kind, stream, payload

    def feed(self, data: bytes) -> Iterator[Frame]:
        """As `take`, for bytes that were received elsewhere."""
        rest = memoryview(data)
        while rest:
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            yield from self.take(count)

    def _needed(self) -> int:
        """Length of the incomplete frame, as far as it can be known."""
        if self._end - self._start < HEAD_BYTES:
            return HEAD_BYTES
        length: int = _HEAD.unpack_from(self._view, self._start)[0]
        return HEAD_BYTES + length + MAC_BYTES

    def _make_room(self) -> None:
        pending = self._view[self._start : self._end]
        if self._needed() > len(self._view) // 2 and len(self._view) < self._FULL_BYTES:
            self._view = memoryview(bytearray(self._FULL_BYTES))
        self._view[: len(pending)] = pending
        self._start, self._end = 0, len(pending)
