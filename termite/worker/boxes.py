"""Starts boxes: through one long-lived `mkbox --serve`, or, for very long command lines, mkbox directly.

Starting a program from a large interpreter costs more than the rest of a box; the server is small and
only forks.  A box's end is seen by its owner on the status pipe.  Loop only: the kernel ends a server
whose starting thread ends, and with it every box.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence

from termite.errors import BoxError

log = logging.getLogger(__name__)

FIRST_EXTRA = 10
"""The number that the first descriptor after stdin, stdout and stderr has in a box's setup."""

MAX_PACKET = 200 << 10
"""Longer command lines go to a mkbox of their own."""

CLOSE_LIMIT_S = 5.0
_HEAD = struct.Struct("<cI")


class Boxes:
    """`start` a box, `kill` it by its number; `close` ends all of them."""

    def __init__(self, mkbox: bytes) -> None:
        self._mkbox = mkbox
        self._serial = 0
        self._direct: dict[int, int] = {}  # box -> pid of a mkbox of its own
        self._failed: dict[int, Callable[[str], None]] = {}  # box -> whom to tell that it could not be started
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET)
            ours.setblocking(False)
            theirs.set_inheritable(True)
            argv = [b"termite-mkbox", b"--serve", b"%d" % theirs.fileno()]
            try:
                self._pid = os.posix_spawn(mkbox, argv, {}, setsigdef=_RESET)
            except OSError as e:
                raise BoxError(f"cannot start {os.fsdecode(mkbox)}: {e.strerror}") from e
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._answer)

    def start(
        self, argv: Sequence[bytes], stdio: Sequence[int], extra: Sequence[int], failed: Callable[[str], None]
    ) -> int:
        """A number for the new box; `failed` is called with a reason if the server could not start it.

        `argv` is mkbox's; `stdio` are three descriptors, `extra` have the numbers from FIRST_EXTRA on in it.
        """
        self._serial += 1
        packet = _HEAD.pack(b"R", self._serial) + b"\0".join(argv) + b"\0"
        if len(packet) > MAX_PACKET:
            self._direct[self._serial] = self._spawn(argv, stdio, extra)
            return self._serial
        try:
            fds = array.array("i", [*stdio, *extra])
            self._socket.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except BlockingIOError:  # the server has fallen behind
            self._direct[self._serial] = self._spawn(argv, stdio, extra)
        except OSError as e:
            raise BoxError(f"mkbox's server is gone: {e.strerror}") from e
        else:
            self._failed[self._serial] = failed
        return self._serial

    def _spawn(self, argv: Sequence[bytes], stdio: Sequence[int], extra: Sequence[int]) -> int:
        copies = [os.dup(fd) for fd in (*stdio, *extra)]
        highest = FIRST_EXTRA + len(extra)
        try:
            # Out of the way first, so that no dup2 overwrites a descriptor that is still to be used.
            high = [_above(fd, highest) for fd in copies]
            targets = [0, 1, 2, *range(FIRST_EXTRA, highest)]
            actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(high, targets, strict=True)]
            copies += high
            return os.posix_spawn(self._mkbox, list(argv), {}, file_actions=actions, setsigdef=_RESET)
        except OSError as e:
            raise BoxError(f"cannot start {os.fsdecode(self._mkbox)}: {e.strerror}") from e
        finally:
            for fd in copies:
                os.close(fd)

    def kill(self, box: int) -> None:
        """Ends the box now; no effect if it has ended."""
        pid = self._direct.get(box)
        with contextlib.suppress(OSError):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            else:
                self._socket.send(_HEAD.pack(b"K", box))

    def ended(self, box: int) -> None:
        """To be called once for each box that was started, when its status pipe has ended."""
        self._failed.pop(box, None)
        pid = self._direct.pop(box, None)
        if pid is not None:
            os.waitpid(pid, 0)

    def _answer(self) -> None:
        """The server speaks only of boxes that it could not start, and by ending."""
        try:
            packet = self._socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            asyncio.get_running_loop().remove_reader(self._socket)
            log.error("mkbox's server has ended")
            return
        _, box = _HEAD.unpack_from(packet)
        failed = self._failed.pop(box, None)
        if failed is not None:
            failed(packet[_HEAD.size :].decode("utf-8", "replace"))

    async def close(self) -> None:
        """Ends every box and the server; no process and no mount of theirs is left when it returns."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()  # the server kills and reaps its boxes, then ends
        for pid in self._direct.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + CLOSE_LIMIT_S
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                log.error("mkbox's server did not end in %g s; killed", CLOSE_LIMIT_S)
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            await asyncio.sleep(0.005)


_RESET = [signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def _above(fd: int, least: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
