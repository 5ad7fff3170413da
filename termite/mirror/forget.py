"""Making the kernel drop what it holds of names that have changed.

**Blocks, and needs a thread of its own.**  inval_entry takes the lock of the parent directory, and
inval_inode the lock of each page; a LOOKUP or READ under way holds that until it is answered.  On a FUSE
thread, or on the event loop that carries the view's questions to the master, this would wait for an
answer that only that same thread can give.

Which node is meant is asked of the kernel: libfuse's node id is `st_ino` through the mount.  News are in
the view before this is called, so whatever the kernel looks up from then on is new: a node found now is
either the one that holds the old copy, or needs nothing.  libfuse never uses an id twice, so one that
the kernel has dropped meanwhile does no harm.

The kernel's answers (ENOENT: it held nothing) are of no interest.
"""

from __future__ import annotations

import ctypes
import stat
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from termite import paths
from termite.attr.cache import Stale

_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x100, 0x800, 0x1000, 0x4000
_STATX_TYPE, _STATX_INO = 0x1, 0x100
_STATX_RESULT = struct.Struct("=28xH2xQ216x")  # of struct statx: mode, ino


class Node(NamedTuple):
    """What the kernel knows under a name."""

    id: int  # 0: nothing
    is_link: bool


def _declared_statx() -> Any:
    statx = ctypes.CDLL(None).statx
    statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    return statx


_statx = _declared_statx()


def forget(lib: Any, channel: int, root_fd: int, stale: Sequence[Stale]) -> None:
    """When this returns, whoever looks afterwards sees what the view has now."""
    # All nodes first: after inval_entry a name leads elsewhere, and the kernel asks for the parent's
    # attributes again before it finds the next name in it.
    nodes: dict[bytes, Node] = {}
    for item in stale:
        if item.content or not item.entry:
            nodes[item.path] = find(root_fd, item.path)
        if item.entry:
            directory = paths.split(item.path)[0]
            if directory not in nodes:
                nodes[directory] = find(root_fd, directory)
    for item in stale:
        if item.entry:
            _drop_name(lib, channel, nodes, item.path)
        if item.content or not item.entry:
            _drop_node(lib, channel, nodes[item.path].id, item.content)
    for item in stale:
        if item.entry and item.content and nodes[item.path].is_link:
            # Kernels before 6.14 cut a cached link off at the size they know.  A walk that was past the
            # name already may have read the new target under the old size.  Finding it makes the kernel
            # look again, so the size is right now; if it is still the same node, that page must go.
            again = find(root_fd, item.path)
            if again.id == nodes[item.path].id:
                _drop_node(lib, channel, again.id, True)


def find(root_fd: int, path: bytes) -> Node:
    """The node under a path; does not make the kernel ask for attributes that it knows to be outdated."""
    result = ctypes.create_string_buffer(_STATX_RESULT.size)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _statx(root_fd, path, flags, _STATX_TYPE | _STATX_INO, result):
        return Node(0, False)
    mode, ino = _STATX_RESULT.unpack_from(result)
    return Node(ino, stat.S_ISLNK(mode))


def _drop_name(lib: Any, channel: int, nodes: dict[bytes, Node], path: bytes) -> None:
    directory, name = paths.split(path)
    parent = nodes[directory].id
    if parent:
        lib.fuse_lowlevel_notify_inval_entry(channel, parent, name, len(name))


def _drop_node(lib: Any, channel: int, node: int, content: bool) -> None:
    if node:
        lib.fuse_lowlevel_notify_inval_inode(channel, node, 0 if content else -1, 0)  # -1: attributes only
