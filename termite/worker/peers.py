"""Contents by hash between workers: what the daemon gives to others, and what it gets for its mirrors.

One connection per peer, kept while it is used and a minute longer.  Nothing that comes in is
believed before its hash was looked at, and nothing is waited for without progress: a peer that lies,
dies, is slow or lacks what was asked costs one line in the log, and the mirror asks its master.
Loop only; hashes are looked at on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from termite.errors import Refused, StoreError, TermiteError, WireError
from termite.store.local import ContentStore
from termite.wire import transport
from termite.wire.address import format_address
from termite.wire.auth import Purpose
from termite.wire.messages import Damaged, Fetch, Fetched, Message, Ok, Peer
from termite.wire.rpc import Connection, FileBody, Reply, Result
from termite.wire.secret import is_ssh_key
from termite.wire.transport import Accepted

log = logging.getLogger(__name__)

MAX_SENDING = 16
"""Contents on their way to peers at a time; one more waits, and is refused if it waits too long."""

MAX_PEERS = 256
"""Connections of others that are served at a time."""

MAX_GETTING = 16


@dataclass(frozen=True)
class PeerTimes:
    """Seconds, and bytes per second."""

    connect_s: float = 2.0
    connect_ssh_s: float = 5.0  # a dozen messages and two signatures
    answer_s: float = 2.0  # for the first byte; from one piece to the next
    turn_s: float = 1.5  # for a place among those that are sent
    idle_s: float = 60.0  # how long an unused connection is kept
    avoid_s: float = 30.0  # how long a peer that failed is not asked again
    least_rate: int = 256 << 10  # slower than this over all is too slow

    def limit_s(self, size: int) -> float:
        """For the whole of such contents from one peer."""
        return self.connect_ssh_s + self.answer_s + size / self.least_rate


@dataclass(frozen=True, slots=True)
class _Counted(FileBody):
    """Tells when it has been sent, or will not be."""

    on_close: Callable[[], None]

    def close(self) -> None:
        FileBody.close(self)
        self.on_close()


def _nothing_recent(hash: bytes) -> int:
    raise KeyError(hash)


class Peers:
    """`serve` gives, `get` gets, `close` ends it all.

    `recent` opens what a mirror here has in memory only: a descriptor, or KeyError.
    """

    def __init__(
        self,
        store: ContentStore,
        key: bytes,
        times: PeerTimes | None = None,
        recent: Callable[[bytes], int] | None = None,
    ) -> None:
        self._store = store
        self._recent = recent or _nothing_recent
        self._key = key
        self._times = times or PeerTimes()
        self._sending = asyncio.Semaphore(MAX_SENDING)
        self._served: set[Connection] = set()
        self._getting: dict[bytes, asyncio.Task[bool]] = {}
        self._places = asyncio.Semaphore(MAX_GETTING)
        self._held: dict[Peer, _Held] = {}
        self._avoided: dict[Peer, float] = {}  # until when
        self._verifying: set[asyncio.Task[None]] = set()
        self.bytes_sent = 0
        self.bytes_got = 0

    async def close(self) -> None:
        for getting in list(self._getting.values()):
            getting.cancel()
        for held in list(self._held.values()):
            held.end("the worker stops")
        await asyncio.gather(*(conn.close("the worker stops") for conn in list(self._served)))

    # -- giving --------------------------------------------------------------------------------------

    async def serve(self, accepted: Accepted) -> None:
        """Stays with one peer until it goes."""
        if len(self._served) >= MAX_PEERS:
            raise Refused(f"{MAX_PEERS} other workers are being served")
        conn = await accepted.connect(self._handle, name=f"worker at {accepted.address}")
        self._served.add(conn)
        try:
            await conn.wait_closed()
        finally:
            self._served.discard(conn)

    async def _handle(self, conn: Connection, message: Message, body: bytes) -> Result:
        match message:
            case Fetch():
                return await self._give(message)
            case Damaged():
                task = asyncio.get_running_loop().create_task(self._look_at(message.hash, conn.name))
                self._verifying.add(task)
                task.add_done_callback(self._verifying.discard)
                return Ok()
        raise Refused(f"{type(message).__name__} is not for peers")

    async def _give(self, message: Fetch) -> Result:
        try:
            async with asyncio.timeout(self._times.turn_s):
                await self._sending.acquire()
        except TimeoutError:
            raise Refused("it is sending to too many others") from None
        try:
            try:
                try:
                    fd = self._store.open(message.hash)
                except KeyError:
                    fd = self._recent(message.hash)
            except KeyError:
                raise Refused("it does not have them") from None
            size = os.fstat(fd).st_size
            if not 0 <= message.offset <= size:
                os.close(fd)
                raise Refused("the offset lies behind the end")
        except BaseException:
            self._sending.release()
            raise
        self.bytes_sent += size - message.offset
        return Reply(Fetched(size), _Counted(fd, message.offset, size - message.offset, self._sending.release))

    async def _look_at(self, digest: bytes, who: str) -> None:
        """Somebody got wrong contents from us: perhaps the disk has changed them."""
        with contextlib.suppress(StoreError, OSError):
            if self._store.has(digest) and not await asyncio.to_thread(self._store.verify, digest):
                log.error("contents %s were damaged in our store, as %s noticed; removed", digest.hex()[:16], who)

    # -- getting -------------------------------------------------------------------------------------

    async def get(self, digest: bytes, size: int, peers: Sequence[Peer]) -> bool:
        """Gets contents into the store from the first of these that gives them; False if none did."""
        if self._store.has(digest):
            return True
        getting = self._getting.get(digest)
        if getting is None:
            getting = asyncio.get_running_loop().create_task(self._get(digest, size, list(peers)))
            self._getting[digest] = getting
            getting.add_done_callback(lambda _: self._getting.pop(digest, None))
        return await asyncio.shield(getting)

    async def _get(self, digest: bytes, size: int, peers: list[Peer]) -> bool:
        loop = asyncio.get_running_loop()
        async with self._places:
            for peer in peers:
                if self._avoided.get(peer, 0.0) > loop.time():
                    continue
                where = format_address(peer.host, peer.port)
                try:
                    async with asyncio.timeout(self._times.limit_s(size)):
                        await self._get_from(peer, digest, size)
                except (TermiteError, TimeoutError, OSError) as error:
                    reason = str(error) or "too slow"
                    log.warning("peer %s did not give contents %s: %s", where, digest.hex()[:16], reason)
                    if not isinstance(error, Refused):
                        self._avoided[peer] = loop.time() + self._times.avoid_s
                else:
                    self.bytes_got += size
                    return True
        return False

    async def _get_from(self, peer: Peer, digest: bytes, size: int) -> None:
        held = self._held.get(peer)
        if held is None:
            held = self._held[peer] = _Held(self, peer, self._key, self._times)
        with held.in_use():
            conn = await held.connection()
            with self._store.writer(digest, size) as writer:
                try:
                    reply = await conn.call(Fetch(digest), timeout_s=self._times.answer_s, sink=writer.write)
                    if not isinstance(reply.message, Fetched) or reply.message.size != size:
                        raise WireError(f"it has something else under this hash, not {size} bytes")
                    await asyncio.to_thread(writer.commit)
                except (StoreError, WireError):
                    conn.notify(Damaged(digest))
                    raise

    def forget(self, peer: Peer) -> None:
        """A kept connection has ended."""
        self._held.pop(peer, None)


class _Held:
    """The connection to one peer, made when it is first needed."""

    def __init__(self, owner: Peers, peer: Peer, key: bytes, times: PeerTimes) -> None:
        self._owner = owner
        self._peer = peer
        self._key = key
        self._times = times
        self._users = 0
        self._dialing: asyncio.Task[Connection] | None = None
        self._idle: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        self._users += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle = asyncio.get_running_loop().call_later(self._times.idle_s, self.end, "idle")

    async def connection(self) -> Connection:
        """A live one."""
        if self._dialing is None or (self._dialing.done() and not self._lives(self._dialing)):
            self._dialing = asyncio.get_running_loop().create_task(
                transport.dial(
                    self._peer.host,
                    self._peer.port,
                    self._key,
                    Purpose.PEER_FETCH,
                    timeout_s=self._times.connect_ssh_s if is_ssh_key(self._key) else self._times.connect_s,
                    name=f"peer {format_address(self._peer.host, self._peer.port)}",
                )
            )
        return await asyncio.shield(self._dialing)

    @staticmethod
    def _lives(dialing: asyncio.Task[Connection]) -> bool:
        return not dialing.cancelled() and dialing.exception() is None and dialing.result().is_open()

    def end(self, reason: str) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._owner.forget(self._peer)
        if self._dialing is None:
            return
        if not self._dialing.done():
            self._dialing.cancel()
        elif self._lives(self._dialing):
            self._dialing.result().abort(reason)
