"""What a file contains, for the FUSE threads: from the store if it has it, otherwise from the master.

`ask_file` blocks and is for FUSE threads, and so is what it returns; `obtain` is for the loop.  What is in the store
is opened on the thread that asks: an object that is to be linked waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

from termite.attr.cache import AttrCache
from termite.attr.fileattr import FileAttr
from termite.errors import Refused, StoreError
from termite.mirror.pieces import PiecedContent
from termite.store.local import ContentStore
from termite.store.manifest import Manifest
from termite.wire.rpc import Connection
from termite.worker.contents import Contents, Opened
from termite.worker.ownfiles import OwnFiles
from termite.worker.paranoia import Paranoia

PIECE_TRIES = 5
"""How often a piece is fetched that is gone from the store before it could be opened."""


class Files:
    """`on_broken` is told when the store fails: what is not there cannot be had any more.

    `own`: where pieces may come from without being asked for.
    `learn`: the view's; told when the master has another file now where pieces of one were being read.
    """

    conn: Connection  # the master's; set before the first question
    learn: Callable[[bytes, FileAttr, FileAttr], bool]  # set before the first question

    def __init__(
        self,
        contents: Contents,
        cache: AttrCache,
        store: ContentStore,
        on_broken: Callable[[StoreError], None],
        paranoia: Paranoia | None = None,
        own: OwnFiles | None = None,
    ) -> None:
        self._contents = contents
        self._cache = cache
        self._store = store
        self._on_broken = on_broken
        self._paranoia = paranoia
        self._own = own
        self._loop = asyncio.get_running_loop()
        self.asked = 0  # files that the master was asked for
        self.cached = 0  # files that were in the store
        self.cached_bytes = 0
        self._counting = threading.Lock()  # for the last two

    def ask_file(self, path: bytes) -> tuple[FileAttr, Opened]:
        """(attributes, contents)."""
        if self._paranoia is None:
            with contextlib.suppress(StoreError):  # the loop will meet it too, and tell
                stored = self._stored(path)
                if stored is not None:
                    return stored
        return asyncio.run_coroutine_threadsafe(self._ask(path), self._loop).result()

    async def _ask(self, path: bytes) -> tuple[FileAttr, Opened]:
        try:
            attr, opened = self._stored(path) or await self.obtain(path)
        except StoreError as e:
            self._on_broken(e)
            raise
        if self._paranoia is not None:
            whole = None if isinstance(opened, PiecedContent) else opened
            self._paranoia.after_reading(self.conn, path, attr.hash, whole)
        return attr, opened

    async def obtain(self, path: bytes) -> tuple[FileAttr, Opened]:
        """From the master, in any case."""
        self.asked += 1
        info = await self._contents.obtain(self.conn, path)
        return info.attr, self._opened(path, info.attr)

    def _stored(self, path: bytes) -> tuple[FileAttr, Opened] | None:
        known = self._cache.lookup(path)
        if known is not None and known.hash:
            with contextlib.suppress(KeyError):
                opened = self._opened(path, known)
                with self._counting:
                    self.cached += 1
                    self.cached_bytes += known.size
                return known, opened
        return None

    def _opened(self, path: bytes, attr: FileAttr) -> Opened:
        found = self._contents.stored(attr.hash, attr.size)
        if not isinstance(found, Manifest):
            return found
        own = partial(self._own.read_into, path, found) if self._own is not None else None
        return PiecedContent(attr.hash, found, partial(self._open_pieces, path, found), own)

    # -- pieces, on FUSE threads -----------------------------------------------------------------------

    def _open_pieces(self, path: bytes, manifest: Manifest, indices: Sequence[int]) -> list[int]:
        fds: list[int] = []
        try:
            for index in indices:
                fds.append(self._open_piece(path, manifest, index, indices))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def _open_piece(self, path: bytes, manifest: Manifest, index: int, indices: Sequence[int]) -> int:
        """Where one is missing, all of `indices` are asked for that are."""
        for _ in range(PIECE_TRIES):
            with contextlib.suppress(KeyError):
                return self._store.open(manifest.pieces[index], manifest.range_of(index)[1])
            asyncio.run_coroutine_threadsafe(self._obtain_pieces(path, manifest, indices), self._loop).result()
        raise StoreError("the content store loses contents before they are read; give this worker a larger -cachesize")

    async def _obtain_pieces(self, path: bytes, manifest: Manifest, indices: Sequence[int]) -> None:
        try:
            await self._contents.obtain_pieces(self.conn, path, manifest, indices)
        except StoreError as e:
            self._on_broken(e)
            raise
        except Refused as e:
            await self._look_again(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from e

    async def _look_again(self, path: bytes) -> None:
        """The file is another one by now: whoever opens it next shall read that."""
        known = self._cache.lookup(path)
        attr, opened = await self.obtain(path)
        if isinstance(opened, int):
            os.close(opened)
        if known is not None:
            self.learn(path, known, attr)
