"""Contents for the threads that answer the kernel."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from pathlib import Path

from termite.attr.cache import AttrCache
from termite.attr.fileattr import FileAttr
from termite.store.local import ContentStore
from termite.wire.messages import DirListing
from termite.worker.contents import Contents
from termite.worker.files import Files


def test_what_is_in_the_store_is_read_while_the_loop_does_something_else(tmp_path: Path) -> None:
    async def scene() -> None:
        store = ContentStore(str(tmp_path), 1 << 30)
        attr = FileAttr(stat.S_IFREG | 0o644, 8, 1, hash=store.add(b"contents"))
        cache = AttrCache()
        cache.put_listing(b"", DirListing(True, FileAttr(stat.S_IFDIR | 0o755), {b"a.o": attr}))
        files = Files(Contents(store, lambda message: None), cache, store, lambda error: None)
        found: list[bytes] = []

        def ask() -> None:
            told, opened = files.ask_file(b"a.o")
            assert told == attr and isinstance(opened, int)
            found.append(os.read(opened, 100))
            os.close(opened)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(20)  # and the loop waits meanwhile
        assert found == [b"contents"]
        assert (files.cached, files.cached_bytes, files.asked) == (1, 8, 0)

    asyncio.run(scene())
