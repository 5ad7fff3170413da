"""Answers `ReadDir` for directories of any size, without holding up the event loop.

Most directories are read in one go.  A large one is read in pieces; meanwhile results may be replayed in it, which is
noted (`Export.readings`) and looked at again at the end.  What it holds is remembered in the same step in which it is
answered, like any other.  Loop only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.errors import PathError, PrivateError
from termite.master.export import Export, Reading, marks_of
from termite.wire.messages import DirListing

LARGE_NAMES = 128
"""A directory of more names than this is read in pieces."""

HOLD_S = 0.001
"""How long one stretch of such work may hold the event loop; a timer of the loop may have to wait for two."""

T = TypeVar("T")


async def in_pieces(items: Iterable[T]) -> AsyncIterator[T]:
    """The same items, with pauses in which the event loop runs."""
    pause_at = time.monotonic() + HOLD_S
    for item in items:
        yield item
        if time.monotonic() > pause_at:
            await asyncio.sleep(0)
            pause_at = time.monotonic() + HOLD_S


def answer(export: Export, path: bytes) -> DirListing | Awaitable[DirListing]:
    if path in export.listed or not _is_large(export, path):
        return export.read_dir(path)
    return _answer_large(export, path)


async def readings_end(export: Export) -> None:
    """Returns when all that is being read now has been: a refresh compares only what was told."""
    if export.readings:
        await asyncio.wait([reading.task for reading in export.readings.values()])


def _is_large(export: Export, path: bytes) -> bool:
    try:
        export.check_directory(path)
        with os.scandir(paths.absolute(path)) as scan:
            return sum(1 for _ in islice(scan, LARGE_NAMES + 1)) > LARGE_NAMES
    except (OSError, PathError, PrivateError):
        return False


async def _answer_large(export: Export, path: bytes) -> DirListing:
    reading = export.readings.get(path)
    if reading is None:
        reading = export.readings[path] = Reading(asyncio.get_running_loop().create_task(_read(export, path)))
        reading.task.add_done_callback(lambda _: export.readings.pop(path))
    await asyncio.wait([reading.task])  # who asked may be gone before it is done, others wait for it as well
    return export.read_dir(path)  # from memory, unless it has just been removed, or replaced


async def _read(export: Export, path: bytes) -> None:
    with suppress(OSError, PathError, PrivateError):
        before = os.lstat(paths.absolute(path))
        marks = await asyncio.to_thread(marks_of, path)
        entries: dict[bytes, FileAttr] = {}
        async for name, attr in in_pieces(export.scan(path)):
            entries[name] = attr
        attr = export.check_directory(path)
        if path in export.listed or not os.path.samestat(before, os.lstat(paths.absolute(path))):
            return
        for name in export.readings[path].noted:
            entries[name] = export.attr_now(paths.join(path, name), check_excluded=True)
            if not entries[name].mode:
                del entries[name]
        export.record(path, attr, entries, marks)
