"""A daemon that begins anew: same process, same command line, same listening socket, fresh memory.

The new program is whatever is installed now.  Its process id stays, so whoever supervises it notices
nothing; the listening socket stays open, so no connection is refused meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import MutableMapping
from typing import NoReturn

from termite.errors import TermiteError

log = logging.getLogger(__name__)

VARIABLE = "TERMITE_KEPT_SOCKET"
"""PID:FD of the socket that a predecessor in the same process left open."""


def restart(sock: socket.socket | None) -> NoReturn:
    """Becomes the program again; everything but the socket must have been closed before."""
    if sock is not None:
        os.set_inheritable(sock.fileno(), True)
        os.environ[VARIABLE] = f"{os.getpid()}:{sock.fileno()}"
    for handler in logging.getLogger().handlers:
        handler.flush()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as e:
        raise TermiteError(f"cannot start {sys.executable} again: {e.strerror}; start the program by hand") from None


def kept_socket(port: int, environ: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """What a predecessor left for us, if it listens where we want to (`port` 0: anywhere)."""
    pid, _, number = environ.pop(VARIABLE, "").partition(":")
    if pid != str(os.getpid()) or not number.isdecimal():
        return None
    try:
        sock = socket.socket(fileno=int(number))
    except OSError as e:
        log.warning("the listening socket was not kept: %s", e.strerror)
        return None
    os.set_inheritable(sock.fileno(), False)
    sock.setblocking(False)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and (not port or sock.getsockname()[1] >= port):
        return sock
    sock.close()
    return None
