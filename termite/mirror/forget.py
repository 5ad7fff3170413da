"""Making the kernel drop what it holds of names that have changed.

**Blocks, and needs a thread of its own.**  inval_entry takes the lock of the parent directory, and
inval_inode the lock of each page; a LOOKUP or READ under way holds that until it is answered.  On a FUSE
thread, or on the event loop that carries the view's questions to the master, this would wait for an
answer that only that same thread can give.

Which node is meant is asked of the kernel: libfuse's node id is `st_ino` through the mount.  News are in
the view before this is called, so whatever the kernel looks up from then on is new: a node found now is
either the one that holds the old copy, or needs nothing.  libfuse never uses an id twice, so one that
the kernel has dropped meanwhile does no harm.

What is gone must be gone for libfuse too.  Somebody may still be in a directory that was removed (a
working directory, an overlay that looked into it), so that the kernel keeps it with the names it holds.
If libfuse gave a new directory of that name the same id, the kernel would take the old one out of the
drawer, old names included.  So libfuse is made to believe that it was asked for an RMDIR, its only way
to forget a name; the answer goes to /dev/null.

What a directory holds (`What.NAMES`) the kernel forgets with any name in it that it knows.  So it is made
to look for one first.  inval_entry waits for those who are reading the directory; else what they were
told before could be kept after.

The kernel's own answers (ENOENT: it held nothing) are of no interest otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from termite import paths
from termite.attr.cache import Stale, What
from termite.mirror.greeting import IN_HEADER

_RMDIR = 11

SOME_NAME = b".termite-looks-here"
"""There need be no such file."""

NAMES_TRIES = 5

_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x100, 0x800, 0x1000, 0x4000
_HERE = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
_STATX_TYPE, _STATX_INO = 0x1, 0x100
_STATX_RESULT = struct.Struct("=28xH2xQ216x")  # of struct statx: mode, ino


class Node(NamedTuple):
    """What the kernel knows under a name."""

    id: int  # 0: nothing
    is_link: bool


class Forgetter:
    """For one mount, until `close`; one call at a time."""

    def __init__(self, lib: Any, session: int, channel: int, mountpoint: bytes) -> None:
        self._lib = lib
        self._session = session
        self._channel = channel
        self._root = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._nowhere = lib.fuse_kern_chan_new(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
        self._statx = ctypes.CDLL(None).statx
        self._statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)

    def close(self) -> None:
        os.close(self._root)
        self._lib.fuse_chan_destroy(self._nowhere)

    def forget(self, stale: Sequence[Stale]) -> None:
        """When this returns, whoever looks afterwards sees what the view has now."""
        # All nodes first: after inval_entry a name leads elsewhere, and the kernel asks for the parent's
        # attributes again before it finds the next name in it.
        for path, what, _ in stale:
            if what is What.NAMES:
                self._drop_listing(path)
        nodes: dict[bytes, Node] = {}
        for path, what, _ in stale:
            if what is What.NAMES:
                continue
            if what not in (What.NEW, What.GONE):
                nodes[path] = self._find(path)
            if what not in (What.ATTRIBUTES, What.CONTENTS):
                directory = paths.split(path)[0]
                if directory not in nodes:
                    nodes[directory] = self._find(directory)
        for path, what, _ in stale:
            if what in (What.ATTRIBUTES, What.CONTENTS):
                self._drop_node(nodes[path], what is What.CONTENTS)
            elif what is not What.NAMES:
                self._drop_name(nodes[paths.split(path)[0]], paths.split(path)[1], what is What.GONE)
        for path, what, _ in stale:
            if what is What.TARGET:
                self._drop_target(nodes[path], path)

    def device(self) -> str:
        """The mount's device, as major:minor."""
        with open(f"/proc/self/fdinfo/{self._root}") as info:
            mount_id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo") as mounts:
            return next(fields[2] for fields in map(str.split, mounts) if fields[0] == mount_id)

    def _find(self, path: bytes) -> Node:
        """The node under a path; does not make the kernel ask for attributes that it knows to be outdated."""
        result = ctypes.create_string_buffer(_STATX_RESULT.size)
        if self._statx(self._root, path, _HERE, _STATX_TYPE | _STATX_INO, result):
            return Node(0, False)
        mode, ino = _STATX_RESULT.unpack_from(result)
        return Node(ino, stat.S_ISLNK(mode))

    def _drop_node(self, node: Node, contents: bool) -> None:
        if node.id:
            start = 0 if contents else -1  # -1: the attributes only
            self._lib.fuse_lowlevel_notify_inval_inode(self._channel, node.id, start, 0)

    def _drop_listing(self, directory: bytes) -> None:
        for _ in range(NAMES_TRIES):
            self._find(paths.join(directory, SOME_NAME))
            if self._drop_name(self._find(directory), SOME_NAME, False) != -errno.ENOENT:
                return  # else the kernel was short of memory, and has dropped the name by itself

    def _drop_name(self, parent: Node, name: bytes, gone: bool) -> int:
        """The kernel's answer; 0, too, if it does not know the directory."""
        if not parent.id:
            return 0
        if gone:
            size = IN_HEADER.size + len(name) + 1
            request = IN_HEADER.pack(size, _RMDIR, 0, parent.id, 0, 0, 0, 0) + name + b"\0"
            self._lib.fuse_session_process(self._session, request, size, self._nowhere)
        answer: int = self._lib.fuse_lowlevel_notify_inval_entry(self._channel, parent.id, name, len(name))
        return answer

    def _drop_target(self, node: Node, path: bytes) -> None:
        """A link stays the node it was, so that whoever has it open follows the new target.

        Kernels before 6.14 cut a cached target off at the size they know of the link, and a walk that was
        past the name already reads the new target under the old size.  Finding the link makes the kernel
        look again; with the right size known, that page is dropped.
        """
        again = self._find(path)
        if again.id == node.id and node.is_link:
            self._drop_node(again, True)
