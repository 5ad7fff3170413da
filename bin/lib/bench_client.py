"""Asks a master something over its socket, as the programs around make do, without starting a process for it."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from termite.errors import TermiteError
from termite.master.local import MAGIC, Kind

_HEAD = struct.Struct("<4sI")
_FIXED = struct.Struct("<BBHIII")
_FRAME = struct.Struct("<BI")
LIMIT_S = 120.0


def request(kind: Kind, cwd: Path, argv: Sequence[str] = ()) -> bytes:
    """What a wrapper without environment sends."""
    strings = [os.fsencode(cwd), b"", b"", *map(os.fsencode, argv)]
    body = _FIXED.pack(kind, 0, 0, 0o022, len(argv), 0) + b"".join(s + b"\0" for s in strings)
    return _HEAD.pack(MAGIC, len(body)) + body


def ask(root: Path, kind: Kind, argv: Sequence[str] = ()) -> bytes:
    """What the master of `root` writes in answer; TermiteError if it refuses or goes away."""
    received = b""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(LIMIT_S)
        try:
            s.connect(os.fspath(root / ".termite-socket"))
            s.sendall(request(kind, root, argv))
            while piece := s.recv(1 << 16):
                received += piece
        except OSError as e:
            raise TermiteError(f"the master of {root} does not answer: {e}") from e
    output, at = b"", 0
    while at + _FRAME.size <= len(received):
        frame, length = _FRAME.unpack_from(received, at)
        payload = received[at + _FRAME.size : at + _FRAME.size + length]
        at += _FRAME.size + length
        if frame == ord("O"):
            output += payload
        elif frame == ord("X"):
            if any(payload):
                raise TermiteError(f"the master of {root} refused: {received!r}")
            return output
    raise TermiteError(f"the master of {root} went away")


def timed_refresh(root: Path) -> float:
    """Seconds that a refresh took, as termite-make waits for it."""
    started = time.monotonic()
    ask(root, Kind.REFRESH)
    return time.monotonic() - started
