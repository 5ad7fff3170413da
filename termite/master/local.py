"""The 0700 unix socket `.termite-socket`, where the wrappers knock.

Speaks the little protocol of `mkbox/shell_wrapper.c`: one request, then frames until an exit status
or "run it yourself".  Decides nothing; a complete request is handed to `serve`.  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import cast

import msgspec

from termite.errors import TermiteError, UsageError, WireError

log = logging.getLogger(__name__)

SOCKET_NAME = b".termite-socket"
MAGIC = b"TMW1"
MAX_REQUEST = 16 << 20
"""More than any argument list and environment that the kernel lets a command have (6 MiB by default)."""

LITTLE_BYTES = 64 << 10
"""Output up to this size may wait for what comes next."""

LAST_WORDS_S = 1.0
"""How long a master that ends waits for its wrappers to hear that their commands have ended."""

_HEAD = struct.Struct("<4sI")
_FIXED = struct.Struct("<BBHIII")
_FRAME = struct.Struct("<BI")


class Kind(IntEnum):
    RUN = 1
    REFRESH = 2
    SHUTDOWN = 3
    INSPECT = 4
    LOCAL = 5
    SUMMARY = 6


FLAG_DEBUG = 1
FLAG_MERGED = 2
FLAG_STDIN = 4


class LocalRequest(msgspec.Struct):
    """What one wrapper asks for.  `argv` of INSPECT are the files to look at."""

    kind: Kind
    flags: int
    umask: int
    cwd: bytes
    program: bytes  # empty: find argv[0] on PATH
    worker: bytes  # preferred worker; empty: any
    argv: list[bytes]
    env: list[bytes]


def decode_request(body: bytes) -> LocalRequest:
    """The request behind magic and length; WireError if it is not one."""
    try:
        kind, flags, _, umask, argc, envc = _FIXED.unpack_from(body)
        strings = body[_FIXED.size :].split(b"\0")
        if len(strings) != 3 + argc + envc + 1 or strings[-1]:
            raise WireError(f"a wrapper's request announces {argc}+{envc} strings and has {len(strings) - 4}")
        return LocalRequest(
            Kind(kind), flags, umask, strings[0], strings[1], strings[2], strings[3 : 3 + argc], strings[3 + argc : -1]
        )
    except (struct.error, ValueError) as e:
        raise WireError(f"a wrapper's request is malformed: {e}") from e


class Caller(asyncio.Protocol):
    """One connected wrapper.  `gone` is set when it hung up before its answer was complete."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()
        self._stdin: asyncio.Future[bytes] | None = None
        self._request_seen = False
        self._frames: list[bytes] = []  # still to be sent
        self._task: asyncio.Task[None] | None = None
        self.on_gone: Callable[[], object] | None = None
        self.gone = False
        self.finished = False
        self.pid = 0
        self.transport = cast(asyncio.Transport, None)  # from connection_made on

    # -- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, uid, _ = struct.unpack("3i", raw)
        if uid not in (0, self._server.uid):
            log.warning("refused a wrapper of uid %d (pid %d)", uid, self.pid)
            self.transport.abort()
            return
        self._server.callers.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            if not self._request_seen:
                self._take_request()
            if self._request_seen:
                self._take_stdin()
        except WireError as e:
            log.warning("wrapper of pid %d: %s", self.pid, e)
            self.transport.abort()

    def _take_request(self) -> None:
        if len(self._buffer) < _HEAD.size:
            return
        magic, length = _HEAD.unpack_from(self._buffer)
        if magic != MAGIC or length > MAX_REQUEST:
            raise WireError("not a wrapper of this version")
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return
        request = decode_request(bytes(self._buffer[_HEAD.size : end]))
        del self._buffer[:end]
        self._request_seen = True
        self._task = asyncio.get_running_loop().create_task(self._serve(request))

    def _take_stdin(self) -> None:
        while len(self._buffer) >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._buffer)
            if kind != ord("S") or length > 1 << 20:
                raise WireError("a wrapper sent something that is not stdin")
            end = _FRAME.size + length
            if len(self._buffer) < end:
                return
            piece = bytes(self._buffer[_FRAME.size : end])
            del self._buffer[:end]
            if self._stdin is None or self._stdin.done():
                raise WireError("a wrapper sent stdin unasked")
            self._stdin.set_result(piece)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._writable.set()
        self._server.callers.discard(self)
        if self._stdin is not None and not self._stdin.done():
            self._stdin.set_result(b"")
        if not self.finished and self.on_gone is not None:
            self.on_gone()

    async def _serve(self, request: LocalRequest) -> None:
        try:
            await self._server.serve(request, self)
        except TermiteError as e:
            self.message(str(e))
            self.exit_status(e.exit_status << 8)
        except Exception:
            log.exception("serving a wrapper of pid %d", self.pid)
            self.message("internal error in the master; its log has the details")
            self.exit_status(1 << 8)

    # -- answers -------------------------------------------------------------------------------------

    def _frame(self, kind: str, payload: bytes) -> None:
        """Goes out at the end of this step of the loop, or with what ends the conversation."""
        if not self.gone:
            if not self._frames:
                asyncio.get_running_loop().call_soon(self._flush)
            self._frames += (_FRAME.pack(ord(kind), len(payload)), payload)

    def _flush(self) -> None:
        frames, self._frames = self._frames, []
        if frames and not self.gone:
            self.transport.write(b"".join(frames))

    def output(self, stream: int, data: bytes) -> None:
        """Bytes for the wrapper's stdout (1) or stderr (2)."""
        if data:
            self._frame("O" if stream == 1 else "E", data)

    async def drained(self) -> None:
        """Waits until the wrapper has taken most of what was written (or is gone)."""
        if sum(map(len, self._frames)) > LITTLE_BYTES:
            self._flush()
        await self._writable.wait()

    def message(self, text: str) -> None:
        """One line on the wrapper's stderr."""
        self._frame("M", text.encode("utf-8", "replace"))

    def exit_status(self, status: int) -> None:
        """Ends the conversation with a raw wait status."""
        self._end("X", struct.pack("<i", status))

    def _end(self, kind: str, payload: bytes) -> None:
        self.finished = True
        self._frame(kind, payload)
        self._flush()
        if not self.gone:
            self.transport.close()

    def run_locally(self, recurse: bool) -> None:
        """Ends the conversation: the wrapper becomes the command itself."""
        self._end("L", bytes([1 if recurse else 0]))

    async def read_stdin(self) -> bytes:
        """The next piece of the wrapper's stdin; empty at its end or when the wrapper is gone."""
        if self.gone:
            return b""
        self._stdin = asyncio.get_running_loop().create_future()
        self._frame("W", b"")
        return await self._stdin


Serve = Callable[[LocalRequest, Caller], Awaitable[None]]


class LocalServer:
    """Listens on the socket in `directory`; `serve` is called once per request."""

    def __init__(self, path: bytes, serve: Serve) -> None:
        self.path = path
        self.serve = serve
        self.uid = os.getuid()
        self.callers: set[Caller] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Binds the socket, mode 0700; UsageError if another master answers on it, or if something else is there."""
        shown = os.fsdecode(self.path)
        try:
            directory = os.open(os.path.dirname(self.path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise UsageError(f"cannot make the socket {shown}: its directory: {e.strerror}") from e
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Through the descriptor, because a socket's address has room for 107 bytes only.
        address = b"/proc/self/fd/%d/%s" % (directory, os.path.basename(self.path))
        try:
            try:
                sock.connect(address)
            except OSError:
                pass
            else:
                raise UsageError(
                    f"another master already serves {shown}; "
                    "stop it with `termite-shell-wrapper -shutdown` in this directory"
                )
            sock.close()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            if os.path.lexists(self.path):
                if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                    raise UsageError(f"cannot make the socket {shown}: something else is there; name another place")
                os.unlink(self.path)
            old = os.umask(0o077)
            try:
                sock.bind(address)
            except OSError as e:
                raise UsageError(f"cannot make the socket {shown}: {e.strerror}") from e
            finally:
                os.umask(old)
            os.chmod(self.path, 0o700)
            sock.listen(1024)
            sock.setblocking(False)
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Caller(self), sock=sock)
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(directory)

    async def last_words(self, limit_s: float = LAST_WORDS_S) -> None:
        """Lets those who are being answered hear the end of it."""
        until = time.monotonic() + limit_s
        while self.callers and time.monotonic() < until:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Closes everything and removes the socket."""
        if self._server is not None:
            self._server.close()
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
        for caller in list(self.callers):
            caller.transport.abort()
