"""Where a mirror gets contents from: its store, a peer, or the master; each content once at a time.

The daemon talks to the peers (`worker/peers.py`), because it holds the secret and all mirrors of a
worker share its connections and its store.  Loop only, but for `stored`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial

from termite.errors import WireError
from termite.mirror.pieces import PiecedContent
from termite.store.local import ContentStore
from termite.store.manifest import Manifest, decode_manifest, manifest_bytes
from termite.wire.messages import Elsewhere, Fetch, Fetched, FileInfo, Have, OpenFile, Peer
from termite.wire.rpc import Connection
from termite.worker import control

QUESTION_LIMIT_S = 60.0
"""A question about a file that takes longer fails with EIO instead of hanging the command."""

HAVE_AFTER_S = 0.005

PIECES_AHEAD, AHEAD_PER_S, MOST_AHEAD = 3, 0.002, 16
"""Of a file that is read in order, so many pieces more, and one for each of these seconds of a round trip."""

DAEMON_BASE_S, DAEMON_BYTES_PER_S = 20.0, 128 << 10
"""How long the daemon may be busy with peers before we ask the master, by size: it has tighter limits itself."""


Opened = int | bytes | PiecedContent
"""A file's contents: a descriptor, all of them, or what reads them piece by piece."""


class Contents:
    """`obtain`, `stored`, `obtain_pieces`; the counters are bytes."""

    def __init__(self, store: ContentStore, tell_daemon: Callable[[control.ControlMessage], None]) -> None:
        self._store = store
        self._tell_daemon = tell_daemon
        self._fetching: dict[bytes, asyncio.Task[None]] = {}
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._numbers = itertools.count(1)
        self._had: list[bytes] = []  # what the master has not been told of yet
        self.from_master = 0
        self.from_peers = 0
        self.from_store = 0

    def as_dict(self) -> dict[str, int]:
        return {"from_master": self.from_master, "from_peers": self.from_peers, "from_store": self.from_store}

    async def obtain(self, conn: Connection, path: bytes) -> FileInfo:
        """Asks what a file contains; its contents are in the store when this returns."""
        reply = await conn.call(OpenFile(path), timeout_s=QUESTION_LIMIT_S)
        info = reply.message
        if not isinstance(info, FileInfo):
            raise WireError(f"OpenFile was answered with {type(info).__name__}")
        digest = info.attr.hash
        if info.inline:
            assert isinstance(reply.body, bytes)
            self.from_master += len(reply.body)
            self._keep(reply.body, path, digest)
        elif info.pieces:
            assert isinstance(reply.body, bytes)
            decode_manifest(reply.body, info.attr.size)
            self._keep(reply.body, path, digest)
        elif self._store.has(digest):
            self.from_store += info.attr.size
            self._have(conn, digest)
        else:
            await asyncio.shield(self._begin(conn, digest, path, info.attr.size))
        return info

    def _keep(self, data: bytes, path: bytes, digest: bytes) -> None:
        if self._store.add(data) != digest:
            raise WireError(f"the contents of {path!r} do not have the hash that was told")

    def stored(self, digest: bytes, size: int) -> int | bytes | Manifest:
        """Of a file of this hash and size, what is in the store: all of it, or its manifest; KeyError if neither is.

        Any thread.
        """
        data = self._store.get(digest)
        if data is not None:
            return data if len(data) == size else decode_manifest(data, size)
        fd = self._store.open(digest)
        found = os.fstat(fd).st_size
        if found == size:
            return fd
        try:
            if found == manifest_bytes(size):
                with contextlib.suppress(WireError):
                    return decode_manifest(os.pread(fd, found, 0), size)
        finally:
            os.close(fd)
        return self._store.open(digest, size)  # which removes what has the wrong size

    async def obtain_pieces(self, conn: Connection, path: bytes, manifest: Manifest, indices: Sequence[int]) -> None:
        """These pieces of a file are in the store when this returns; soon the next ones too, if it is read in order."""
        first, last = indices[0], indices[-1]
        coming = [self._begin_piece(conn, path, manifest, index) for index in indices]
        if first == 0 or self._store.has(manifest.pieces[first - 1]):
            ahead = min(PIECES_AHEAD + int(conn.rtt_s / AHEAD_PER_S), MOST_AHEAD)
            for index in range(last + 1, min(last + 1 + ahead, len(manifest.pieces))):
                self._begin_piece(conn, path, manifest, index)
        await asyncio.gather(*(asyncio.shield(fetching) for fetching in coming if fetching is not None))

    def _begin_piece(
        self, conn: Connection, path: bytes, manifest: Manifest, index: int
    ) -> asyncio.Task[None] | None:
        digest = manifest.pieces[index]
        if self._store.has(digest):
            return None
        return self._begin(conn, digest, path, manifest.range_of(index)[1], index)

    def _begin(
        self, conn: Connection, digest: bytes, path: bytes, size: int, piece: int = -1
    ) -> asyncio.Task[None]:
        """However many commands want it now, it is fetched once."""
        fetching = self._fetching.get(digest)
        if fetching is None:
            fetching = asyncio.get_running_loop().create_task(self._fetch(conn, digest, path, size, piece))
            self._fetching[digest] = fetching
            fetching.add_done_callback(partial(self._ended, digest))
        return fetching

    def _ended(self, digest: bytes, fetching: asyncio.Task[None]) -> None:
        self._fetching.pop(digest, None)
        if not fetching.cancelled():
            fetching.exception()  # what was fetched ahead may fail unnoticed

    async def _fetch(self, conn: Connection, digest: bytes, path: bytes, size: int, piece: int) -> None:
        failed: list[Peer] = []
        while (
            peers := await self._ask_master(conn, Fetch(digest, path, failed=failed, piece=piece), size)
        ) is not None:
            if await self._ask_peers(digest, size, peers):
                self.from_peers += size
                break
            failed = [*failed, *peers]
        self._have(conn, digest)

    def _have(self, conn: Connection, digest: bytes) -> None:
        """Tells the master, a moment later: there will be more of them."""
        if not self._had:
            asyncio.get_running_loop().call_later(HAVE_AFTER_S, self._tell_had, conn)
        self._had.append(digest)

    def _tell_had(self, conn: Connection) -> None:
        had, self._had = self._had, []
        conn.notify(Have(had))

    async def _ask_master(self, conn: Connection, request: Fetch, size: int) -> list[Peer] | None:
        """None if the contents have come, else who has them."""
        with self._store.writer(request.hash, size) as writer:
            reply = await conn.call(request, timeout_s=None, sink=writer.write)
            match reply.message:
                case Fetched():
                    await asyncio.to_thread(writer.commit)
                    self.from_master += size
                    return None
                case Elsewhere(peers=[_, *_] as peers) if not set(peers) & set(request.failed):
                    return peers
                case other:
                    raise WireError(f"Fetch was answered with {type(other).__name__}")

    # -- peers ---------------------------------------------------------------------------------------

    async def _ask_peers(self, digest: bytes, size: int, peers: list[Peer]) -> bool:
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._tell_daemon(control.Get(number, digest, size, [(peer.host, peer.port) for peer in peers]))
        try:
            async with asyncio.timeout(DAEMON_BASE_S + size / DAEMON_BYTES_PER_S):
                return await answer
        except TimeoutError:
            return False
        finally:
            del self._asked[number]

    def on_got(self, message: control.Got) -> None:
        """What became of a `Get`."""
        answer = self._asked.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message.found)
