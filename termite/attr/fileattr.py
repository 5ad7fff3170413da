"""What is known of one file: the attributes that cross the network and the ones that do not.

`FileAttr` is what a worker is told.  `Signature` is how the master recognises, with one `lstat`,
that a file is still the one it described.  Pure data; reads no disk.
"""

from __future__ import annotations

import os
import stat

import msgspec


class FileAttr(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    """One name in one directory.  Times are nanoseconds since the epoch, sizes are bytes."""

    mode: int  # st_mode, file type included; 0: the name does not exist
    size: int = 0  # 0 for everything but regular files and symlinks
    mtime_ns: int = 0
    nlink: int = 1
    uid: int = 0  # as on the master
    gid: int = 0
    target: bytes = b""  # a symlink's target; empty for everything else
    hash: bytes = b""  # SHA-256 of a regular file's contents; empty: not known yet

    def exists(self) -> bool:
        return self.mode != 0

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def is_private(self) -> bool:
        """True if neither group nor others may do anything: such a thing never leaves the master."""
        return not stat.S_ISLNK(self.mode) and self.mode & 0o077 == 0


ABSENT = FileAttr(mode=0)
"""The answer for a name that does not exist."""


class Signature(msgspec.Struct, frozen=True, gc=False):
    """Changes whenever a file's contents, mode or identity change (short of a rewound clock)."""

    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    ino: int


def signature_of(st: os.stat_result) -> Signature:
    return Signature(st.st_mode, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino)


def attr_of(st: os.stat_result, target: bytes = b"", hash: bytes = b"") -> FileAttr:
    """The attributes to tell of a file with this `lstat` result."""
    sized = stat.S_ISREG(st.st_mode) or stat.S_ISLNK(st.st_mode)
    return FileAttr(
        mode=st.st_mode,
        size=st.st_size if sized else 0,
        mtime_ns=st.st_mtime_ns,
        nlink=st.st_nlink,
        uid=st.st_uid,
        gid=st.st_gid,
        target=target,
        hash=hash,
    )
