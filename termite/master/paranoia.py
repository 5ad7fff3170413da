"""-paranoia, the master's part: what the disk says of a path now, beside what mirrors were told of it."""

from __future__ import annotations

import asyncio
import os
import stat

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, attr_of, signature_of
from termite.errors import PathError, PrivateError
from termite.master.export import Export
from termite.wire.messages import Checked


async def check_path(export: Export, path: bytes, settled: bool) -> Checked:
    """Reads and hashes the file anew, whatever is remembered of it; not settled if it changes meanwhile."""
    told = _told(export, path)
    disk, steady = await _look(export, path)
    return Checked(disk, told, settled and steady and _told(export, path) == told)


def _told(export: Export, path: bytes) -> FileAttr:
    directory, name = paths.split(path)
    return export.listed.get(directory, {}).get(name, ABSENT)


async def _look(export: Export, path: bytes) -> tuple[FileAttr, bool]:
    """(attributes with hash, did it keep still while it was read)."""
    try:
        st = os.lstat(paths.absolute(paths.checked(path)))
        if stat.S_ISLNK(st.st_mode):
            return attr_of(st, target=os.readlink(paths.absolute(path))), True
        if not stat.S_ISREG(st.st_mode):
            return attr_of(st), True
        fd, st = export.open_for_reading(path)
    except (OSError, PathError, PrivateError):
        return ABSENT, True
    try:
        found = await asyncio.to_thread(export.hashes.hash_contents, path, fd, st.st_size)
        return attr_of(st, hash=found), signature_of(os.fstat(fd)) == signature_of(st)
    finally:
        os.close(fd)
