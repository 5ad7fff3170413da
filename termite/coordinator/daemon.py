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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from termite import __version__
from termite.coordinator.overview import listed_masters, listed_worker, listed_workers
from termite.coordinator.registry import Master, Registry, Worker
from termite.errors import Refused
from termite.web.pages import Commands, Page, PageServer, Site, WebOptions
from termite.web.status import CoordinatorStatus, ListedWorker
from termite.wire.address import format_address
from termite.wire.auth import Purpose
from termite.wire.messages import (
    VERSION,
    Message,
    Ok,
    Register,
    Status,
    StatusText,
    Subscribe,
    WorkerCommand,
    WorkerInfo,
    WorkerReport,
    Workers,
)
from termite.wire.rpc import Connection
from termite.wire.transport import Accepted, Listener, listen

log = logging.getLogger(__name__)

PURPOSES = (Purpose.WORKER_REGISTER, Purpose.MASTER_SUBSCRIBE)
MAX_PEERS = 10_000

KINDS = ("restart", "kill")
"""What the pages may tell workers to do."""

COMMAND_LIMIT_S = 5.0
_KEPT_NOTES = 10


@dataclass(frozen=True)
class CoordinatorOptions:
    key: bytes = field(repr=False)  # contents of the secret file
    host: str  # address to listen on; empty: all
    port: int  # 0: any free one
    heartbeat_s: float  # between two signs of life
    silence_limit_s: float  # after which a peer is lost
    greeting_limit_s: float  # for a new connection to say who it is
    web: WebOptions | None = None  # None: no pages
    web_password: str = field(default="", repr=False)  # empty: the pages take no commands


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
        self._notes: deque[str] = deque(maxlen=_KEPT_NOTES)  # commands given, newest first
        self.pages = PageServer(options.web, self._site())

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
        self.pages.start()

    async def stop(self) -> None:
        """Says goodbye to everyone."""
        await self.pages.stop()
        if self._listener is not None:
            await self._listener.close()
        closing = [peer.conn.close("the coordinator was stopped") for peer in self._peers if peer.conn is not None]
        await asyncio.gather(*closing)
        await asyncio.gather(*self._peers.values())
        log.info("stopped")

    # -- pages ---------------------------------------------------------------------------------------

    def status(self) -> CoordinatorStatus:
        now = self._clock()
        workers = listed_workers(self.registry, now)
        return CoordinatorStatus(
            version=__version__,
            up_s=round(now - self._started, 3),
            jobs=sum(worker.jobs for worker in workers),
            running=sum(worker.load.running for worker in workers if worker.load is not None),
            workers=workers,
            masters=listed_masters(self.registry, workers, now),
            notes=list(self._notes),
            takes_commands=bool(self.options.web_password),
        )

    def _worker_status(self, name: str) -> ListedWorker | None:
        now = self._clock()
        return next((listed_worker(w, now) for w in self.registry.listing() if w.info.name == name), None)

    def _site(self) -> Site:
        pages = {
            "/": Page("coordinator.html", lambda _: self.status()),
            "/worker/{name:.+}": Page("coordinator_worker.html", self._worker_status),
        }
        password = self.options.web_password
        return Site("coordinator", pages, Commands(password, KINDS, self.command) if password else None)

    async def command(self, kind: str, name: str = "") -> str:
        """Tells a worker, or all (name empty), to end or to begin anew; KeyError if there is no such worker.

        Says what was done; a TermiteError if the worker did not take it.
        """
        peers = [peer for peer in self.registry.connections(name) if isinstance(peer, _Peer) and peer.conn is not None]
        if name and not peers:
            raise KeyError(name)
        conns = [peer.conn for peer in peers if peer.conn is not None]
        told = [conn.call(WorkerCommand(kind), timeout_s=COMMAND_LIMIT_S) for conn in conns]
        outcomes = await asyncio.gather(*told, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if name and failures:
            raise failures[0]
        said = f"{kind}: {name or f'{len(outcomes) - len(failures)} of {len(outcomes)} workers'}"
        log.info("told %s", said)
        self._notes.appendleft(f"{time.strftime('%H:%M:%S')} {said}")
        return said

    # -- connections ---------------------------------------------------------------------------------

    async def _admit(self, accepted: Accepted) -> None:
        if len(self._peers) >= MAX_PEERS:
            raise Refused(f"came when {MAX_PEERS} others were connected")
        peer = _Peer(accepted.purpose, accepted.host, accepted.local_host)
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
            case WorkerReport() if peer.purpose is Purpose.WORKER_REGISTER:
                self.registry.report(peer, message, self._clock())
                return Ok()
            case Status():
                return StatusText(msgspec.json.encode(self.status()))
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
