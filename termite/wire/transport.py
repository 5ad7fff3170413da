"""TCP: dialing a peer, listening for peers, and letting nobody in who does not hold the secret.

`key` is everywhere the contents of the secret file (`wire/secret.py`); if it is an SSH private key,
everything below runs inside SSH (`wire/ssh.py`).  A listener proves each peer in a small task of its
own, within five seconds, so many at a time, and disturbs nobody else; only then the program hears of
it, as an `Accepted`: a socket and its `Session`, to be made a `Connection` here or carried on with in
another process.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import cast

from termite.errors import AuthError, PeerLost, TermiteError, Timeout
from termite.wire import auth, handshake
from termite.wire.address import bind, format_address, host_of
from termite.wire.address import parse_address as parse_address
from termite.wire.auth import HANDSHAKE_LIMIT_S, Purpose
from termite.wire.framing import MAX_PAYLOAD, Session
from termite.wire.kinds import DEFAULT_LIMITS, Limits
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S, Connection, Handler, refuse
from termite.wire.secret import is_ssh_key

__all__ = ["Accepted", "Listener", "dial", "format_address", "listen", "parse_address"]

log = logging.getLogger(__name__)

MAX_UNPROVEN = 64
_BACKLOG = 256
_GRACE_S = 0.5  # an unproven peer that took longer makes room for the next one
_ACCEPT_PAUSE_S = 0.1  # when the system is out of descriptors
_LOG_EVERY_S = 10.0
_MAX_LOG_HOSTS = 1000


async def dial(
    host: str,
    port: int,
    key: bytes,
    purpose: Purpose,
    *,
    handler: Handler = refuse,
    timeout_s: float = HANDSHAKE_LIMIT_S,
    name: str = "",
    heartbeat_s: float = HEARTBEAT_S,
    silence_limit_s: float = SILENCE_LIMIT_S,
    limits: Limits = DEFAULT_LIMITS,
) -> Connection:
    """A proven connection, within `timeout_s`; PeerLost if nobody is there, AuthError if the wrong one is."""
    where = format_address(host, port)
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _connect(host, port, timeout_s)
            if is_ssh_key(key):
                sock = await _ssh().dial(sock, key)
            session = await handshake.dial_in(sock, auth.handshake_key(key), purpose)
    except BaseException as exc:
        if sock is not None:
            sock.close()
        if isinstance(exc, TimeoutError):
            raise Timeout(f"{where} did not answer within {timeout_s:g} s; is it the right address?") from None
        if isinstance(exc, TermiteError):
            raise type(exc)(f"{where} {exc}") from None
        if isinstance(exc, OSError):
            raise PeerLost(f"{where} cannot be reached: {_reason(exc)}; is the program running there?") from None
        raise
    return await Connection.from_socket(
        sock,
        session,
        handler,
        name=name or where,
        heartbeat_s=heartbeat_s,
        silence_limit_s=silence_limit_s,
        limits=limits,
    )


@dataclass
class Accepted:
    """A peer that has proven itself.  Whoever gets it owns the socket; nothing beyond the handshake has been read.

    With SSH the socket is the near end of a tunnel that this process carries, even after another
    one took the socket over, until either side closes it or this process ends.
    """

    sock: socket.socket
    session: Session
    purpose: Purpose
    host: str  # of the peer, as a name to dial
    port: int  # of the peer's end
    local_host: str = ""  # the address of ours that it dialed
    connection: Connection | None = None  # once there is one

    def __repr__(self) -> str:
        return f"<Accepted {self.purpose.name} from {self.address}>"

    @property
    def address(self) -> str:
        return format_address(self.host, self.port)

    async def connect(
        self,
        handler: Handler = refuse,
        *,
        name: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Connection:
        """Carry on in this process."""
        self.connection = await Connection.from_socket(
            self.sock,
            self.session,
            handler,
            name=name or self.address,
            heartbeat_s=heartbeat_s,
            silence_limit_s=silence_limit_s,
            limits=limits,
        )
        return self.connection

    def drop(self, reason: str) -> None:
        """End it, whatever it has become."""
        if self.connection is not None:
            self.connection.abort(reason)
        else:
            self.sock.close()


OnAccept = Callable[[Accepted], Awaitable[object] | None]
"""Called once per proven peer, each in a task of its own; it may return at once or last as long as
the connection.  An exception ends the connection, and so does closing the listener before it returned."""


async def listen(
    host: str,
    port: int,
    key: bytes,
    on_accept: OnAccept,
    *,
    purposes: Collection[Purpose] = tuple(Purpose),
    retries: int = 0,
    sock: socket.socket | None = None,
    handshake_limit_s: float = HANDSHAKE_LIMIT_S,
    max_unproven: int = MAX_UNPROVEN,
) -> Listener:
    """Listen on `port`, or the first free one of the `retries` after it; host "" is every address, port 0 any port.

    `sock` is one that listens already, in place of all that.
    """
    sock = sock or listening_socket(host, port, retries)
    return Listener(sock, key, on_accept, purposes, handshake_limit_s, max_unproven)


def listening_socket(host: str, port: int, retries: int) -> socket.socket:
    """For `listen`, but before there is a loop."""
    return bind(host, port, retries, _BACKLOG)


class Listener:
    """A listening socket and the peers that have not proven themselves yet."""

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        on_accept: OnAccept,
        welcome: Collection[Purpose],
        handshake_limit_s: float,
        max_unproven: int,
    ) -> None:
        self.host, self.port = sock.getsockname()[:2]
        self._sock = sock
        self._key = auth.handshake_key(key)
        self._ssh_key = key if is_ssh_key(key) else None
        self._on_accept = on_accept
        self._welcome = frozenset(welcome)
        self._limit_s = handshake_limit_s
        self._max_unproven = max_unproven
        self._unproven: dict[asyncio.Task[None], float] = {}  # since when, oldest first
        self._proven: set[asyncio.Task[None]] = set()
        self._refusals = _RefusalLog()
        self._accepting = asyncio.get_running_loop().create_task(self._accept_all())

    def __repr__(self) -> str:
        return f"<Listener {format_address(self.host, self.port)}, {len(self._unproven)} unproven>"

    def duplicate(self) -> socket.socket:
        """The listening socket once more: it goes on taking connections, which wait, when this is closed."""
        return self._sock.dup()

    async def close(self) -> None:
        """Stop listening; connections whose `on_accept` has returned go on."""
        tasks = [self._accepting, *self._unproven, *self._proven]
        for task in tasks:
            task.cancel()
        # A task that cancels us (an on_accept that closes its listener) must not wait for itself.
        await asyncio.gather(*(t for t in tasks if t is not asyncio.current_task()), return_exceptions=True)
        self._sock.close()

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._sock)
            except OSError as exc:
                if exc.errno in (errno.ECONNABORTED, errno.EPROTO, errno.EINTR):
                    continue  # that peer has gone again
                log.error("cannot accept connections on port %s: %s", self.port, _reason(exc))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._make_room():
                stranger = _Stranger(sock, host_of(address), address[1])
                task = loop.create_task(self._admit(stranger))
                self._unproven[task] = loop.time()
                task.add_done_callback(functools.partial(self._ended, stranger))
            else:
                sock.close()
                self._refusals.note(host_of(address), "came while too many others were waiting for admission")

    def _make_room(self) -> bool:
        """An honest peer proves itself in milliseconds: whoever has held a place longer loses it to the next."""
        if len(self._unproven) < self._max_unproven:
            return True
        oldest, since = next(iter(self._unproven.items()))
        if asyncio.get_running_loop().time() - since < _GRACE_S:
            return False
        del self._unproven[oldest]
        oldest.cancel()
        return True

    def _ended(self, stranger: _Stranger, task: asyncio.Task[None]) -> None:
        """Closes a stranger's socket only now: its number must not be used again while the loop still watches it."""
        self._unproven.pop(task, None)
        if task in self._proven:
            self._proven.remove(task)
        else:
            stranger.sock.close()

    async def _admit(self, stranger: _Stranger) -> None:
        """From stranger to `Accepted`."""
        try:
            accepted = await self._prove(stranger)
        except (TermiteError, OSError) as exc:
            self._refusals.note(stranger.host, str(exc))
            return
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._unproven.pop(task, None)
        self._proven.add(task)
        try:
            waiting = self._on_accept(accepted)
            if waiting is not None:
                await waiting
        except TermiteError as exc:
            accepted.drop(str(exc))
            log.warning("dropped %s: %s", accepted, exc)
        except Exception:
            accepted.drop("internal error")
            log.exception("dropped %s", accepted)
        except BaseException:
            accepted.drop("not listening any more")
            raise

    async def _prove(self, stranger: _Stranger) -> Accepted:
        _prepare(stranger.sock)
        local_host = host_of(stranger.sock.getsockname())
        try:
            async with asyncio.timeout(self._limit_s):
                if self._ssh_key is not None:
                    stranger.sock = await _ssh().accept(stranger.sock, self._ssh_key)
                purpose, session = await handshake.accept(stranger.sock, self._key, self._welcome)
        except TimeoutError:
            raise AuthError(f"did not prove that it holds our secret within {self._limit_s:g} s") from None
        return Accepted(stranger.sock, session, purpose, stranger.host, stranger.port, local_host)


@dataclass
class _Stranger:
    sock: socket.socket  # of the connection, then of its tunnel
    host: str
    port: int


class _RefusalLog:
    """One line per refused peer, but at most one per host and ten seconds; the rest is counted."""

    def __init__(self) -> None:
        self._hosts: dict[str, tuple[float, int]] = {}  # when the last line was, how many since

    def note(self, host: str, reason: str) -> None:
        now = time.monotonic()
        last, unsaid = self._hosts.get(host, (-_LOG_EVERY_S, 0))
        if now - last < _LOG_EVERY_S:
            self._hosts[host] = (last, unsaid + 1)
            return
        if len(self._hosts) >= _MAX_LOG_HOSTS:
            self._hosts.clear()
        self._hosts[host] = (now, 0)
        more = f" ({unsaid} more refusals since the last such line)" if unsaid else ""
        log.warning("refused %s: it %s%s", host, reason, more)


async def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """To the first address that answers; one that swallows everything must not use up the time of the others."""
    loop = asyncio.get_running_loop()
    failure = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, proto, _, address in found:
        sock = socket.socket(family, kind, proto)
        try:
            _prepare(sock)
            async with asyncio.timeout(timeout_s / len(found)):
                await loop.sock_connect(sock, address)
            return sock
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
    raise failure


def _ssh() -> ModuleType:
    """Loaded when first needed: paramiko takes a quarter of a second."""
    from termite.wire import ssh

    return ssh


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The kernel takes megabytes otherwise, and a small message would wait behind all of them.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_PAYLOAD)


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc) or type(exc).__name__
