"""The coordinator on the network: workers register, masters subscribe, each for as long as it stays connected.

What is true is in `registry.py`; here connections come and go.  Whoever is lost (its connection
ends, or is silent for longer than allowed) is off the list at once, and every master hears of it.
Restarting it disturbs nobody: everyone comes back (`wire/coordination.py`).  Loop only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from termite.coordinator.registry import Master, Registry, Worker
from termite.errors import Refused
from termite.wire.address import format_address, host_of
from termite.wire.auth import Purpose
from termite.wire.messages import VERSION, Message, Ok, Register, Status, StatusText, Subscribe, WorkerInfo, Workers
from termite.wire.rpc import Connection
from termite.wire.transport import Accepted, Listener, listen

log = logging.getLogger(__name__)

PURPOSES = (Purpose.WORKER_REGISTER, Purpose.MASTER_SUBSCRIBE)
MAX_PEERS = 10_000


@dataclass(frozen=True)
class CoordinatorOptions:
    key: bytes = field(repr=False)  # contents of the secret file
    host: str  # address to listen on; empty: all
    port: int  # 0: any free one
    heartbeat_s: float  # between two signs of life
    silence_limit_s: float  # after which a peer is lost
    greeting_limit_s: float  # for a new connection to say who it is


@dataclass(eq=False)
class _Peer:
    """One connection."""

    purpose: Purpose
    host: str  # of the peer
    reached_at: str  # our address on this connection
    conn: Connection | None = None


class Coordinator:
    """`start`, then `stop`."""

    def __init__(self, options: CoordinatorOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.registry = Registry()
        self._clock = clock
        self._started = clock()
        self._listener: Listener | None = None
        self._peers: dict[_Peer, asyncio.Task[None]] = {}
        self._to_tell: set[_Peer] = set()  # masters that have not got the present list

    @property
    def host(self) -> str:
        return self._listener.host if self._listener else self.options.host

    @property
    def port(self) -> int:
        return self._listener.port if self._listener else self.options.port

    async def start(self) -> None:
        """Listens; TermiteError with the remedy if the port cannot be had."""
        options = self.options
        self._listener = await listen(options.host, options.port, options.key, self._admit, purposes=PURPOSES)
        log.info("listening on %s", format_address(self.host, self.port))

    async def stop(self) -> None:
        """Says goodbye to everyone."""
        if self._listener is not None:
            await self._listener.close()
        closing = [peer.conn.close("the coordinator was stopped") for peer in self._peers if peer.conn is not None]
        await asyncio.gather(*closing)
        await asyncio.gather(*self._peers.values())
        log.info("stopped")

    def status(self) -> bytes:
        """Everything countable, as JSON."""
        now = self._clock()
        return msgspec.json.encode({"up_s": round(now - self._started, 3), **self.registry.status(now)})

    # -- connections ---------------------------------------------------------------------------------

    async def _admit(self, accepted: Accepted) -> None:
        if len(self._peers) >= MAX_PEERS:
            raise Refused(f"came when {MAX_PEERS} others were connected")
        peer = _Peer(accepted.purpose, accepted.host, host_of(accepted.sock.getsockname()))
        peer.conn = conn = await accepted.connect(
            lambda _, message, body: self._serve(peer, message),
            heartbeat_s=self.options.heartbeat_s,
            silence_limit_s=self.options.silence_limit_s,
        )
        self._peers[peer] = asyncio.get_running_loop().create_task(self._watch(peer, conn))

    async def _watch(self, peer: _Peer, conn: Connection) -> None:
        """Stays until the connection ends, then forgets what it stood for."""
        limit_s = self.options.greeting_limit_s
        limit = asyncio.get_running_loop().call_later(limit_s, self._expect_greeting, peer, conn)
        await conn.wait_closed()
        limit.cancel()
        del self._peers[peer]
        self._to_tell.discard(peer)
        gone = self.registry.drop(peer)
        if isinstance(gone, Worker):
            log.info("worker %s is gone: %s", gone.info.name, conn.close_reason)
            self._tell_soon(self._masters())
        elif isinstance(gone, Master):
            log.info("master %s is gone: %s", gone.name, conn.close_reason)

    def _expect_greeting(self, peer: _Peer, conn: Connection) -> None:
        if not self.registry.knows(peer):
            log.warning("%s did not say who it is", conn.name)
            conn.abort("it did not say who it is")

    def _serve(self, peer: _Peer, message: Message) -> Message:
        match message:
            case Register() if peer.purpose is Purpose.WORKER_REGISTER:
                _check_version(message.version)
                self._register(peer, message.info)
                return Ok()
            case Subscribe() if peer.purpose is Purpose.MASTER_SUBSCRIBE:
                _check_version(message.version)
                self.registry.subscribe(peer, message.master, peer.host, self._clock())
                log.info("master %s at %s", message.master, peer.host)
                self._tell_soon([peer])
                return Ok()
            case Status():
                return StatusText(self.status())
        raise Refused(f"the coordinator does not serve {type(message).__name__} to a {peer.purpose.name}")

    def _register(self, peer: _Peer, info: WorkerInfo) -> None:
        if not info.host:
            info = msgspec.structs.replace(info, host=peer.host)
        listed = self.registry.register(peer, info, self._clock())
        where = format_address(listed.host, listed.port)
        log.info("worker %s at %s: %d jobs, %s", listed.name, where, listed.jobs, listed.arch)
        self._tell_soon(self._masters())

    # -- the list ------------------------------------------------------------------------------------

    def _masters(self) -> list[_Peer]:
        return [peer for peer in self.registry.subscribers() if isinstance(peer, _Peer)]

    def _tell_soon(self, masters: list[_Peer]) -> None:
        """However many workers come and go in one turn of the loop, each master gets one list."""
        if masters and not self._to_tell:
            asyncio.get_running_loop().call_soon(self._tell)
        self._to_tell.update(masters)

    def _tell(self) -> None:
        masters, self._to_tell = self._to_tell, set()
        workers = self.registry.workers()
        for master in masters:
            if master.conn is not None:
                master.conn.notify(Workers([_seen_from(master, info) for info in workers]))


def _seen_from(master: _Peer, info: WorkerInfo) -> WorkerInfo:
    """A worker beside the coordinator registers from 127.0.0.1; a master elsewhere finds it where it found us."""
    if _is_loopback(info.host) and not _is_loopback(master.host):
        return msgspec.structs.replace(info, host=master.reached_at)
    return info


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_version(version: int) -> None:
    if version != VERSION:
        raise Refused(
            f"it speaks version {version} of the messages, the coordinator {VERSION}; install the same everywhere"
        )
