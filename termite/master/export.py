"""What workers may see of this machine, and what they have been told of it so far.

Workers ask one question per directory; the answers are remembered here, so that `note` and `refresh.py`
can compare them with the disk and say what changed.  Never shown: the contents of files and
directories without any group or other permission, excluded trees, sockets and devices.  A name that
is private or excluded is told with mode 0, so that a command that trips over it reads "Permission denied"
and not "No such file".

Called from the event loop only.  Paths are relative to /.  What contents a file has is `hashes.py`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, attr_of, signature_of
from termite.attr.fingerprint import Look
from termite.errors import PathError, PrivateError, Refused
from termite.master.hashes import Hashes
from termite.master.hashfile import HashFile
from termite.master.names import Names
from termite.master.staging import TEMP_PREFIX
from termite.web.counting import Sizes
from termite.wire.messages import Change, DirListing

INLINE_BYTES = 128 << 10
"""Contents up to this size travel with the answer to `OpenFile`."""

SMALL_HASH_BYTES = 1 << 20
"""Files up to this size are hashed on the event loop; larger ones deserve a thread."""

BOX_OWN = (b"proc", b"sys", b"dev", b"tmp", b"var/tmp")
"""Every box has its own of these."""

SECRETS = (b"etc/shadow", b"etc/shadow-", b"etc/gshadow", b"etc/gshadow-", b"etc/sudoers")
"""Group permission or not: a master that runs as root must not hand these out."""


@dataclass
class Reading:
    """A directory that is read piece by piece (`reading.py`)."""

    task: asyncio.Task[None]
    noted: set[bytes] = field(default_factory=set)  # names that changed since it began


class Export:
    """The exported view of the file system below /, as told to the mirrors.

    `listed` holds a directory's names with the attributes that were told, `marks` what `attr/fingerprint.py` said of
    it before they were looked at, `touched` those names of which something else was told since then.  `sources`: other
    trees that are part of the project, which nobody changes; `xattrs`: keep the hashes of the project's files there.
    """

    def __init__(
        self,
        writable_root: bytes,
        exclude: Sequence[bytes] = (),
        sources: Sequence[bytes] = (),
        *,
        xattrs: bool = False,
        hash_file: HashFile | None = None,
    ) -> None:
        self.writable_root = paths.checked(writable_root)
        self.roots = (self.writable_root, *map(paths.checked, sources))
        self._exclude = [paths.checked(e) for e in (*BOX_OWN, *SECRETS, *exclude)]
        self._root_prefixes = tuple(root + b"/" if root else b"" for root in self.roots)
        self.on_question: Callable[[bytes], None] | None = None  # a new mirror asked for a file's contents
        self._excluded_prefixes = tuple(excluded + b"/" for excluded in self._exclude)
        self.listed: dict[bytes, dict[bytes, FileAttr]] = {}
        self.dir_attrs: dict[bytes, FileAttr] = {}
        self._names = Names()
        self.marks: dict[bytes, bytes] = {}
        self.touched: dict[bytes, set[bytes]] = {}
        self.readings: dict[bytes, Reading] = {}  # large directories that are being read
        self.hashes = Hashes(self.roots if xattrs else (), self.roots, hash_file)
        self.listings_told = 0
        self.told = Sizes()  # files in listings, once each
        self.served = Sizes()  # contents sent, each time

    # -- what may be seen ----------------------------------------------------------------------------

    def is_of_project(self, path: bytes) -> bool:
        """True if the path lies below one of the roots."""
        return (path + b"/").startswith(self._root_prefixes)

    def is_excluded(self, path: bytes) -> bool:
        """True if the path lies in an excluded tree and does not lead to one of the project's roots."""
        return (path + b"/").startswith(self._excluded_prefixes) and any(
            paths.is_inside(path, excluded) and not self._is_branch(path, excluded) for excluded in self._exclude
        )

    def _is_branch(self, path: bytes, excluded: bytes) -> bool:
        """A root lies in the excluded tree: its branch stays visible, the rest does not."""
        for root in self.roots:
            if paths.is_inside(root, excluded):
                below = root[len(excluded) :].lstrip(b"/").split(b"/", 1)[0]
                if path == excluded or paths.is_inside(path, paths.join(excluded, below)):
                    return True
        return False

    def check_directory(self, path: bytes) -> FileAttr:
        """The attributes of a directory that may be listed; every ancestor is checked as well."""
        known = self.dir_attrs.get(path)
        if known is not None:
            return known
        paths.checked(path)
        if self.is_excluded(path):
            raise PrivateError(f"{paths.for_people(paths.absolute(path))} is not exported")
        if path:
            self.check_directory(paths.split(path)[0])
        st = os.lstat(paths.absolute(path))
        attr = attr_of(st)
        if not attr.is_dir():
            raise PathError(f"{paths.for_people(paths.absolute(path))} is not a directory")
        if attr.is_private():
            raise PrivateError(f"{paths.for_people(paths.absolute(path))} has no group or other permission")
        return attr

    def is_hidden(self, path: bytes) -> bool:
        """True if it is a directory that is there, but not to be looked into."""
        try:
            self.check_directory(path)
        except PrivateError:
            return True
        except (OSError, PathError):
            pass
        return False

    def _told_attr(self, path: bytes, st: os.stat_result, recall: bool = False) -> FileAttr:
        """What to tell of a name with this `lstat` result; ABSENT if it is not to be seen at all."""
        kind = stat.S_IFMT(st.st_mode)
        if kind in (stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            return ABSENT
        if kind == stat.S_IFLNK:
            return attr_of(st, target=os.readlink(paths.absolute(path)))
        if st.st_mode & 0o077 == 0:
            return FileAttr(mode=kind, mtime_ns=st.st_mtime_ns, nlink=st.st_nlink)
        if kind == stat.S_IFREG:
            if paths.is_inside(path, self.writable_root):
                self._names.see(path, st)
            return attr_of(st, hash=self.hashes.known(path, st, recall=recall))
        return attr_of(st)

    def hides_some_of(self, directory: bytes) -> bool:
        """True if something excluded lies in this directory."""
        return any(paths.is_inside(e, directory) for e in self._exclude)

    def attr_now(self, path: bytes, *, check_excluded: bool) -> FileAttr:
        """What is to be told of a name in a directory that may be listed; ABSENT: nothing."""
        try:
            st = os.lstat(paths.absolute(path))
            if check_excluded and self.is_excluded(path):
                return FileAttr(mode=stat.S_IFMT(st.st_mode))
            return self._told_attr(path, st)
        except OSError:
            return ABSENT

    def scan(self, path: bytes) -> Iterator[tuple[bytes, FileAttr]]:
        """What is in a directory and will be told, with hashes from xattrs."""
        check_excluded = self.hides_some_of(path)
        with os.scandir(paths.absolute(path)) as scan:
            for entry in scan:
                if entry.name.startswith(TEMP_PREFIX):
                    continue
                child = paths.join(path, entry.name)
                try:
                    st = entry.stat(follow_symlinks=False)
                    if check_excluded and self.is_excluded(child):
                        attr = FileAttr(mode=stat.S_IFMT(st.st_mode))
                    else:
                        attr = self._told_attr(child, st, recall=True)
                except OSError:
                    continue  # gone since the scan began
                if attr.mode:
                    if attr.is_regular() and not attr.is_private():
                        self.told.add(attr.size)
                    yield entry.name, attr

    # -- questions of the mirrors --------------------------------------------------------------------

    def read_dir(self, path: bytes) -> DirListing:
        """Answers `ReadDir`.  A directory that may not be seen is answered as an empty one.

        Takes as long as the directory is large; `reading.py` does the same in pieces.
        """
        try:
            attr = self.check_directory(path)
            if path not in self.listed:
                marks = marks_of(path)
                self.record(path, attr, dict(self.scan(path)), marks)
        except PrivateError:
            return DirListing(exists=True, attr=FileAttr(mode=stat.S_IFDIR))
        except (OSError, PathError):
            return DirListing(exists=False, attr=ABSENT)
        self.listings_told += 1
        return DirListing(exists=True, attr=attr, entries=self.listed[path])

    def record(self, path: bytes, attr: FileAttr, entries: dict[bytes, FileAttr], marks: bytes | None) -> None:
        """The directory is about to be told; `marks` were taken before it was scanned."""
        self.listed[path] = entries
        self.dir_attrs[path] = attr
        if marks is not None:
            self.marks[path] = marks

    def open_for_reading(self, path: bytes) -> tuple[int, os.stat_result]:
        """(fd, fstat) of a regular file that may be shown; the caller closes the fd."""
        self.check_directory(paths.split(paths.checked(path))[0])
        if self.is_excluded(path):
            raise PrivateError(f"{paths.for_people(paths.absolute(path))} is not exported")
        fd = os.open(paths.absolute(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise PathError(f"{paths.for_people(paths.absolute(path))} is not a regular file")
            if st.st_mode & 0o077 == 0:
                raise PrivateError(f"{paths.for_people(paths.absolute(path))} has no group or other permission")
        except BaseException:
            os.close(fd)
            raise
        return fd, st

    def known_hash(self, path: bytes, st: os.stat_result) -> bytes:
        """The remembered hash of a file that still has this stat result; b"" if there is none."""
        return self.hashes.known(path, st, recall=True)

    def remember_hash(self, path: bytes, st: os.stat_result, digest: bytes) -> FileAttr:
        """Notes a file's hash and returns the attributes to tell."""
        self.hashes.remember(path, st, digest)
        attr = attr_of(st, hash=digest)
        directory, name = paths.split(path)
        entries = self.listed.get(directory)
        if entries is not None:
            old = entries.get(name, ABSENT)
            entries[name] = attr
            if msgspec.structs.replace(old, hash=digest) != attr:
                self._touch(directory, name)
        return attr

    def path_of(self, digest: bytes) -> bytes | None:
        """A path that held these contents when it was last hashed."""
        return self.hashes.path_of(digest)

    # -- what changed --------------------------------------------------------------------------------

    def tell(self, directory: bytes, name: bytes, attr: FileAttr) -> None:
        """Something else is told of a name in a directory that was told."""
        if attr.mode:
            self.listed[directory][name] = attr
        else:
            self.listed[directory].pop(name, None)
        self._touch(directory, name)

    def _touch(self, directory: bytes, name: bytes) -> None:
        self.touched.setdefault(directory, set()).add(name)

    def note(self, changed: Iterable[bytes], hashes: dict[bytes, bytes]) -> list[Change]:
        """Looks at these paths again after a replay or a shortcut; returns what mirrors must hear.

        `hashes` gives the contents of files that were just written, so that they are not read again.
        """
        changes: dict[bytes, Change] = {}
        hashes = dict(hashes)
        waiting = list(changed)
        seen = set(waiting)
        for path in waiting:  # grows: what was written through one name of a file shows in all
            directory, name = paths.split(path)
            self._look_again(path, directory, name, hashes.get(path, b""), changes)
            for other in self._names.others(path):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
                    hashes[other] = hashes.get(path, b"")
            if directory not in changes:
                self._look_at_directory(directory, changes)
        return list(changes.values())

    def _look_again(
        self, path: bytes, directory: bytes, name: bytes, digest: bytes, changes: dict[bytes, Change]
    ) -> None:
        if self.is_excluded(path):
            return
        entries = self.listed.get(directory)
        old = entries.get(name, ABSENT) if entries is not None else None
        try:
            st = os.lstat(paths.absolute(path))
            attr = self._told_attr(path, st)
            if digest and attr.is_regular() and not attr.is_private():
                attr = self.remember_hash(path, st, digest)
        except OSError:
            attr = ABSENT
            self._names.forget(path)
        if path in self.listed and not (attr.is_dir() and old is not None and old.is_dir()):
            self.forget_below(path)
        if entries is None:
            if attr.mode == 0:
                changes[path] = Change(path, ABSENT)
            if directory in self.readings:
                self.readings[directory].noted.add(name)
            return  # nobody was told of this directory
        if attr != old:
            self.tell(directory, name, attr)
            changes[path] = Change(path, attr)

    def _look_at_directory(self, directory: bytes, changes: dict[bytes, Change]) -> None:
        """A directory's own times change with its children."""
        told = self.dir_attrs.get(directory)
        if told is None:
            return
        try:
            attr = attr_of(os.lstat(paths.absolute(directory)))
        except OSError:
            return
        if attr != told and attr.is_dir():
            self.dir_attrs[directory] = attr
            parent, name = paths.split(directory)
            if parent in self.listed and directory:
                self.tell(parent, name, attr)
            changes[directory] = Change(directory, attr)

    def forget_below(self, path: bytes) -> None:
        """Drops what is remembered of a directory that is one no more, or another one."""
        if path not in self.listed:
            self.hashes.forget(path)
            return
        for name, attr in self.listed[path].items():
            child = paths.join(path, name)
            if attr.is_dir():
                self.forget_below(child)
            else:
                self.hashes.forget(child)
        del self.listed[path]
        self.dir_attrs.pop(path, None)
        self.marks.pop(path, None)
        self.touched.pop(path, None)

    # -- for the suspicious ------------------------------------------------------------------------

    def look(self, path: bytes) -> FileAttr:
        """What would be told of this path, were it looked at now; OSError if it is not there."""
        return self._told_attr(path, os.lstat(paths.absolute(path)))

    def check(self, directories: Iterable[bytes] | None = None) -> None:
        """Asserts the invariants, of these directories only if they are given."""
        if directories is None:
            directories = list(self.listed)
            self.hashes.check()
            assert self.listed.keys() == self.dir_attrs.keys(), "directories are listed without attributes"
            assert self.listed.keys() >= self.marks.keys() | self.touched.keys(), "of a directory that is not listed"
        for directory in directories:
            entries = self.listed.get(directory)
            if entries is None:
                continue
            shown = paths.for_people(paths.absolute(directory))
            assert not self.is_excluded(directory), f"{shown}: listed, but excluded"
            parent, own = paths.split(directory)
            above = self.listed.get(parent, {}).get(own, self.dir_attrs[directory])
            assert not directory or above.is_dir(), f"{shown}: listed as a directory, told as {above}"
            for name, attr in entries.items():
                assert name and b"/" not in name, f"{shown}: holds the name {name!r}"
                assert attr.mode, f"{shown}/{paths.for_people(name)}: listed as {attr}"
                readable = attr.is_regular() and not attr.is_private()
                assert readable or not attr.hash, f"{shown}/{paths.for_people(name)}: a hash for {attr}"


def marks_of(path: bytes) -> bytes | None:
    """To be taken before the directory is read: what happens meanwhile must show at the next refresh."""
    return next((looked.marks for looked in Look([path], {})), None)


def read_whole(fd: int, st: os.stat_result) -> bytes:
    """The contents of a small file; `Refused` if it changed while it was read."""
    data = os.pread(fd, st.st_size + 1, 0)
    if len(data) != st.st_size or signature_of(os.fstat(fd)) != signature_of(st):
        raise Refused("the file changed while it was read")
    return data


def read_and_hash(fd: int, st: os.stat_result) -> tuple[bytes, bytes]:
    """(contents, hash) of a small file; `Refused` if it changed while it was read."""
    data = read_whole(fd, st)
    return data, hashlib.sha256(data).digest()
