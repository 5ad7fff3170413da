"""Where a mirror gets contents from: its store, a peer, or the master; each content once at a time.

The daemon talks to the peers (`worker/peers.py`), because it holds the secret and all mirrors of a
worker share its connections and its store.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Sequence

from termite.errors import WireError
from termite.mirror.pieces import PiecedContent
from termite.store.local import ContentStore
from termite.store.manifest import Manifest, decode_manifest, manifest_bytes
from termite.wire.messages import Elsewhere, Fetch, Fetched, FileInfo, Have, OpenFile, Peer
from termite.wire.rpc import Connection
from termite.worker import control

QUESTION_LIMIT_S = 60.0
"""A question about a file that takes longer fails with EIO instead of hanging the command."""

DAEMON_BASE_S, DAEMON_BYTES_PER_S = 20.0, 128 << 10
"""How long the daemon may be busy with peers before we ask the master, by size: it has tighter limits itself."""


Opened = int | PiecedContent
"""A file's contents: a descriptor, or what reads them piece by piece."""


class Contents:
    """`obtain`, `stored`, `obtain_pieces`; the counters are bytes."""

    def __init__(self, store: ContentStore, tell_daemon: Callable[[control.ControlMessage], None]) -> None:
        self._store = store
        self._tell_daemon = tell_daemon
        self._fetching: dict[bytes, asyncio.Task[None]] = {}
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._numbers = itertools.count(1)
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
            conn.notify(Have(digest))
        else:
            await self._once(conn, digest, path, info.attr.size)
        return info

    def _keep(self, data: bytes, path: bytes, digest: bytes) -> None:
        if self._store.add(data) != digest:
            raise WireError(f"the contents of {path!r} do not have the hash that was told")

    def stored(self, digest: bytes, size: int) -> int | Manifest:
        """Of a file of this hash and size, what is in the store: all of it, or its manifest; KeyError if neither is."""
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
        """These pieces of a file are in the store when this returns."""
        lacking = [index for index in indices if not self._store.has(manifest.pieces[index])]
        await asyncio.gather(
            *(
                self._once(conn, manifest.pieces[index], path, manifest.range_of(index)[1], index)
                for index in lacking
            )
        )

    async def _once(self, conn: Connection, digest: bytes, path: bytes, size: int, piece: int = -1) -> None:
        """However many commands open it now, it is fetched once."""
        fetching = self._fetching.get(digest)
        if fetching is None:
            fetching = asyncio.get_running_loop().create_task(self._fetch(conn, digest, path, size, piece))
            self._fetching[digest] = fetching
            fetching.add_done_callback(lambda _: self._fetching.pop(digest, None))
        await asyncio.shield(fetching)

    async def _fetch(self, conn: Connection, digest: bytes, path: bytes, size: int, piece: int) -> None:
        failed: list[Peer] = []
        while (
            peers := await self._ask_master(conn, Fetch(digest, path, failed=failed, piece=piece), size)
        ) is not None:
            if await self._ask_peers(digest, size, peers):
                self.from_peers += size
                break
            failed = [*failed, *peers]
        conn.notify(Have(digest))

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
