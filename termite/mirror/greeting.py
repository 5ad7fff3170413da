"""How kernel and libfuse 2 agree on what they can do, with what libfuse has never heard of.

libfuse 2 answers the kernel's INIT with the features of 2012.  The kernel looks at the *flags* of that
answer, whatever the protocol version beside them, and these need nothing from libfuse:

- FUSE_CACHE_SYMLINKS: the kernel keeps the targets of links; else each is a call, dozens per compile.
- FUSE_PARALLEL_DIROPS: lookups in one directory do not wait for each other.
- FUSE_MAX_PAGES: reads of up to 1 MiB; libfuse allocates what a read asks for.

So INIT is read here, given to libfuse with a channel that leads nowhere, and libfuse's answer is sent
with those flags added that the kernel offered.  Must happen between mount(2) and the first loop.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from typing import Any

from termite.errors import MountError

MAX_PAGES = 256  # of 4 KiB: the most that kernels grant
MAX_READ = MAX_PAGES * 4096
LIMIT_S = 10.0  # the kernel asks right after mount(2)

# linux/fuse.h
INIT = 26
IN_HEADER = struct.Struct("=IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
OUT_HEADER = struct.Struct("=IiQ")  # length, error, unique
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags; more follows
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write
INIT_OUT_2012 = struct.Struct("=IIIIHHI")
INIT_OUT_REST = struct.Struct("=IHH32x")  # time granularity in ns, max_pages, map_alignment, unused

BIG_WRITES, ASYNC_READ = 1 << 5, 1 << 0
PARALLEL_DIROPS, HAS_MAX_PAGES, CACHE_SYMLINKS = 1 << 18, 1 << 22, 1 << 23
NO_OPENDIR = 1 << 24  # needs no consent: the kernel takes "not implemented" for an answer to OPENDIR
WANTED = ASYNC_READ | BIG_WRITES | PARALLEL_DIROPS | HAS_MAX_PAGES | CACHE_SYMLINKS


class Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


SEND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Piece), ctypes.c_size_t)


class ChannelOps(ctypes.Structure):
    """struct fuse_chan_ops"""

    _fields_ = [("receive", ctypes.c_void_p), ("send", SEND), ("destroy", ctypes.c_void_p)]


def greet(lib: Any, device: int, channel: int, session: int) -> int:
    """Answer the kernel's first request, so that both sides take the session for agreed; what the kernel offered."""
    if not select.select([device], [], [], LIMIT_S)[0]:
        raise MountError("the kernel did not open the FUSE connection; is the mount point in use?")
    size = lib.fuse_chan_bufsize(channel)
    request = os.read(device, size)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != INIT:
        raise MountError(f"the kernel opened the FUSE connection with request {opcode} instead of INIT")
    offered = INIT_IN.unpack_from(request, IN_HEADER.size)[3]
    answer = _answer_of_libfuse(lib, session, request, size)
    if len(answer) < OUT_HEADER.size + INIT_OUT_2012.size:
        raise MountError("libfuse did not answer the kernel's greeting; is it version 2.9?")
    os.write(device, extended(answer, offered, unique))
    return int(offered)


def extended(answer: bytes, offered: int, unique: int) -> bytes:
    """libfuse's answer with the wanted flags that the kernel offered."""
    major, minor, readahead, flags, *rest = INIT_OUT_2012.unpack_from(answer, OUT_HEADER.size)
    flags |= WANTED & offered
    body = INIT_OUT_2012.pack(major, minor, readahead, flags, *rest) + INIT_OUT_REST.pack(1, MAX_PAGES, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def _answer_of_libfuse(lib: Any, session: int, request: bytes, buffer_size: int) -> bytes:
    answer = bytearray()

    def send(channel: int, pieces: Any, count: int) -> int:
        for piece in pieces[:count]:
            answer.extend(ctypes.string_at(piece.base, piece.length))
        return 0

    ops = ChannelOps(None, SEND(send), None)
    nowhere = lib.fuse_chan_new(ctypes.byref(ops), -1, buffer_size, None)
    try:
        lib.fuse_session_process(session, request, len(request), nowhere)
    finally:
        lib.fuse_chan_destroy(nowhere)
    return bytes(answer)
