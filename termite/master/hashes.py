"""Which contents a file has, remembered so that nothing is read twice.

In memory for every file that was asked for, with the signature it had then; and, for files of this user
below the given roots, in the xattr `user.termattr`, so that the next master need not read them either.
Loop only.

Setting an xattr changes a file's ctime, and programs notice that (tar: "file changed as we read it").  So
nothing is set while commands run: what is to be saved queues up, bounded, and `save_some` is called in
quiet moments.  The signature in memory is taken again afterwards, in the same step, so that nobody sees a
file that seems to have changed.

An xattr cannot hold the ctime that its own setting brings about.  It holds the time at which it was set: a
file whose ctime is later than that was changed in some way since, and is hashed anew.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import struct
import time
from collections.abc import Sequence

from termite import paths
from termite.attr.fileattr import Signature, signature_of
from termite.errors import TermiteError, WireError
from termite.master.hashfile import HashFile
from termite.store.manifest import MAX_BYTES, Manifest, cut, decode_manifest

log = logging.getLogger(__name__)

XATTR = b"user.termattr"

MAX_UNSAVED = 50_000
"""Files that wait for their xattr; of more, the oldest are hashed anew by the next master."""

RACY_NS = 20_000_000
"""A file hashed this soon after its last change may change again with no visible difference."""

_VERSION = 1
_RECORD = struct.Struct("<BQqQq32s")  # version, size, mtime in ns, inode, when it was set in ns, SHA-256
_SET_SLACK_NS = 10_000_000
"""A ctime is taken from a clock that ticks every 1 to 10 ms, a moment after the time in the xattr."""

_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS)


KEPT_BYTES = 128 << 10
"""Smaller files are read to be sent, so that knowing their hash would spare nothing."""

PIECED_BYTES = 1 << 20
"""A larger file that is not the project's is named by its manifest.  One of the project is had as a whole: commands
replace it, and whoever reads it meanwhile must go on reading what it was."""


class Hashes:
    """`roots`: below these, hashes are kept in xattrs; none: in memory only.  `project`: its trees.

    `file`: where hashes of large files that are not the project's are kept; None: in memory only.
    """

    def __init__(
        self, roots: Sequence[bytes] = (), project: Sequence[bytes] = (), file: HashFile | None = None
    ) -> None:
        self._root_prefixes = tuple(root + b"/" if root else b"" for root in roots)
        self._file = file
        self._project = tuple(project)
        self.manifests: dict[bytes, Manifest] = {}  # by hash, of the files that are named by one
        self._uid = os.geteuid()
        self._known: dict[bytes, tuple[Signature, bytes, int]] = {}  # path -> signature, hash, when (ns)
        self._where: dict[bytes, bytes] = {}  # hash -> a path that held it
        self._unsaved: dict[bytes, None] = {}  # paths, the oldest first
        self._without: set[int] = set()  # st_dev of file systems that keep no xattrs
        self.files = 0  # read and hashed
        self.bytes = 0
        self.in_roots = 0  # of these files, those whose hash a warm tree has in xattrs
        self.recalled = 0  # found in xattrs
        self.saved = 0  # put into xattrs
        self.found = 0  # in the user's file

    # -- memory --------------------------------------------------------------------------------------

    def known(self, path: bytes, st: os.stat_result, *, recall: bool = False) -> bytes:
        """The hash of a file that has this stat result; b"" if it is not known.

        `recall`: look into its xattr as well, which costs a system call.
        """
        entry = self._known.get(path)
        if entry is not None and entry[0] == signature_of(st):
            return entry[1]
        if not recall:
            return b""
        return self._recall(path, st) if self._is_ours(path, st) else self._find_kept(path, st)

    def hash_contents(self, path: bytes, fd: int, size: int) -> bytes:
        """What names the contents of this open file of this size.  Reads it; on any thread."""
        if not PIECED_BYTES < size <= MAX_BYTES or any(paths.is_inside(path, root) for root in self._project):
            return hash_file(fd)
        manifest = cut(fd, size)
        digest = hashlib.sha256(manifest.encode()).digest()
        self.manifests[digest] = manifest
        return digest

    def count(self, path: bytes, size: int, *, again: bool = False) -> None:
        """A file of this size was read to be hashed; `again`: to be sure of a hash that was known."""
        self.files += 1
        self.bytes += size
        self.in_roots += not again and (path + b"/").startswith(self._root_prefixes)

    def remember(self, path: bytes, st: os.stat_result, digest: bytes) -> None:
        """Notes a file's hash, and that its xattr is to be set."""
        signature = signature_of(st)
        entry = self._known.get(path)
        if entry is not None and entry[0] == signature and entry[1] == digest and not self.is_racy(path):
            return
        self._known[path] = (signature, digest, time.time_ns())
        self._where[digest] = path
        self._keep(path, st, digest)
        if self._is_ours(path, st):
            self._unsaved.pop(path, None)
            self._unsaved[path] = None
            if len(self._unsaved) > MAX_UNSAVED:
                del self._unsaved[next(iter(self._unsaved))]

    def forget(self, path: bytes) -> None:
        self._known.pop(path, None)
        self._unsaved.pop(path, None)

    def is_racy(self, path: bytes) -> bool:
        """True if a known file may have changed since it was hashed without looking different."""
        signature, _, hashed_at = self._known[path]
        return hashed_at - signature.ctime_ns < RACY_NS

    def path_of(self, digest: bytes) -> bytes | None:
        """A path that held these contents when it was last hashed."""
        return self._where.get(digest)

    # -- the user's file -----------------------------------------------------------------------------

    def _is_kept(self, path: bytes, st: os.stat_result) -> bool:
        """Is this file's hash kept in the user's file?"""
        return (
            self._file is not None
            and st.st_size > KEPT_BYTES
            and not any(paths.is_inside(path, root) for root in self._project)
        )

    def _keep(self, path: bytes, st: os.stat_result, digest: bytes) -> None:
        if self._file is not None and self._is_kept(path, st) and not self.is_racy(path):
            manifest = self.manifests.get(digest)
            self._file.keep(path, signature_of(st), digest, manifest.encode() if manifest is not None else b"")

    def _find_kept(self, path: bytes, st: os.stat_result) -> bytes:
        kept = self._file.find(path, signature_of(st)) if self._is_kept(path, st) and self._file is not None else None
        if kept is None:
            return b""
        if kept.manifest:
            try:
                self.manifests[kept.hash] = decode_manifest(kept.manifest, st.st_size)
            except WireError:
                return b""
        self.found += 1
        self.remember(path, st, kept.hash)
        return kept.hash

    def save_file(self) -> None:
        """What the user's file lacks is put into it."""
        if self._file is not None:
            self._file.save()

    # -- xattrs --------------------------------------------------------------------------------------

    @property
    def unsaved(self) -> int:
        return len(self._unsaved)

    def _is_ours(self, path: bytes, st: os.stat_result) -> bool:
        """May this file have an xattr of ours?"""
        return (
            (path + b"/").startswith(self._root_prefixes)
            and self._uid in (0, st.st_uid)
            and st.st_mode & stat.S_IWUSR != 0
            and st.st_dev not in self._without
        )

    def _recall(self, path: bytes, st: os.stat_result) -> bytes:
        try:
            record = os.getxattr(paths.absolute(path), XATTR, follow_symlinks=False)
        except OSError as error:
            self._note_unsupported(error, path, st)
            return b""
        digest = recorded_hash(record, st)
        if digest:
            self.recalled += 1
            self._known[path] = (signature_of(st), digest, max(time.time_ns(), st.st_ctime_ns + RACY_NS))
            self._where[digest] = path
        return digest

    def _note_unsupported(self, error: OSError, path: bytes, st: os.stat_result) -> None:
        if error.errno in _UNSUPPORTED and st.st_dev not in self._without:
            self._without.add(st.st_dev)
            where = paths.for_people(paths.absolute(paths.split(path)[0]))
            log.info("the file system of %s keeps no user xattrs: a new master hashes its files again", where)

    def save_some(self, limit: int, large: int) -> int:
        """Sets the xattrs of up to `limit` files; how many it looked at.

        A file that was hashed too soon after its last change is hashed again first, if it is at most
        `large` bytes long; a longer one is left out.
        """
        looked_at = 0
        while self._unsaved and looked_at < limit:
            path = next(iter(self._unsaved))
            del self._unsaved[path]
            looked_at += 1
            try:
                self._save(path, large)
            except (OSError, TermiteError) as error:
                log.debug("no xattr for %s: %s", paths.for_people(paths.absolute(path)), error)
        return looked_at

    def _save(self, path: bytes, large: int) -> None:
        signature, digest, _ = self._known[path]
        fd = os.open(paths.absolute(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            st = os.fstat(fd)
            if signature_of(st) != signature or not self._is_ours(path, st):
                return
            if self.is_racy(path):
                if st.st_size > large:
                    return
                digest = hash_file(fd)
                self.count(path, st.st_size, again=True)
                if signature_of(os.fstat(fd)) != signature:
                    return
            after = self._set(fd, path, st, digest)
            self._known[path] = (signature_of(after), digest, max(time.time_ns(), after.st_ctime_ns + RACY_NS))
            self._where[digest] = path
        finally:
            os.close(fd)

    def _set(self, fd: int, path: bytes, st: os.stat_result, digest: bytes) -> os.stat_result:
        """Writes the record; the file's stat result afterwards."""
        stamp = time.time_ns()
        for _ in range(2):  # again where a file server stamps with a clock of its own, or we were held up
            try:
                os.setxattr(fd, XATTR, _RECORD.pack(_VERSION, st.st_size, st.st_mtime_ns, st.st_ino, stamp, digest))
            except OSError as error:
                self._note_unsupported(error, path, st)
                return os.fstat(fd)
            after = os.fstat(fd)
            if after.st_ctime_ns <= stamp + _SET_SLACK_NS:
                break
            stamp = after.st_ctime_ns + _SET_SLACK_NS
        self.saved += 1
        return after

    def status(self) -> dict[str, int]:
        """For people: `files` and `bytes` were read (`project`: files of the project), `recalled` came from
        xattrs, `saved` went there; `found`: of the system's files, in the user's file.
        """
        return {
            "files": self.files,
            "bytes": self.bytes,
            "project": self.in_roots,
            "recalled": self.recalled,
            "saved": self.saved,
            "found": self.found,
        }

    # -- invariants ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Asserts the invariants."""
        assert len(self._unsaved) <= MAX_UNSAVED, len(self._unsaved)
        assert self._unsaved.keys() <= self._known.keys(), "a file waits for its xattr but has no hash"
        for path, (signature, digest, _) in self._known.items():
            assert len(digest) == 32, f"{paths.for_people(path)}: hash of {len(digest)} bytes"
            assert stat.S_ISREG(signature.mode), f"{paths.for_people(path)}: hash of mode {signature.mode:o}"


def recorded_hash(record: bytes, st: os.stat_result) -> bytes:
    """The hash in an xattr, if it is about the file with this stat result as it is now; else b""."""
    if len(record) != _RECORD.size or record[0] != _VERSION:
        return b""
    _, size, mtime_ns, ino, stamp, digest = _RECORD.unpack(record)
    if (size, mtime_ns, ino) != (st.st_size, st.st_mtime_ns, st.st_ino) or st.st_ctime_ns > stamp + _SET_SLACK_NS:
        return b""
    return bytes(digest)


def hash_file(fd: int) -> bytes:
    """SHA-256 of an open file, read from its start with pread; the file's offset does not move."""
    digest = hashlib.sha256()
    offset = 0
    while piece := os.pread(fd, 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.digest()
