"""A master in memory for a view under test: it answers questions, counts them, and tells its changes."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from termite import paths
from termite.attr.cache import AttrCache, Stale
from termite.attr.fileattr import ABSENT, FileAttr, attr_of
from termite.errors import PrivateError
from termite.mirror.view import Owner, View
from termite.wire.messages import Change, DirListing


class FakeMaster:
    """Files by path; `change` tells the view as an `Update` would and returns what is stale."""

    def __init__(self, **view_options: object) -> None:
        self.attrs: dict[bytes, FileAttr] = {b"": FileAttr(stat.S_IFDIR | 0o755, nlink=2)}
        self.contents: dict[bytes, bytes] = {}
        self.questions: Counter[bytes] = Counter()
        self.noticed: list[Stale] = []
        self.before_dir: Callable[[bytes], None] = lambda path: None  # called on the thread that asks
        self.before_file: Callable[[bytes], None] = lambda path: None
        self.before_file_answer: Callable[[bytes], None] = lambda path: None
        self._clock = 10**18
        self._lock = threading.RLock()  # also keeps answers and news in order, as a connection does
        self.view = View(
            AttrCache(),
            self.ask_dir,
            self.ask_file,
            on_stale=self.noticed.extend,
            **view_options,  # type: ignore[arg-type]
        )

    # -- what is on the master's disk --------------------------------------------------------------

    def now(self) -> int:
        self._clock += 1_000_000_007
        return self._clock

    def directory(self, path: bytes, mode: int = 0o755) -> FileAttr:
        return self._put(path, FileAttr(stat.S_IFDIR | mode, nlink=2, mtime_ns=self.now()))

    def file(self, path: bytes, contents: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> FileAttr:
        with self._lock:
            self.contents[path] = contents
        return self._put(path, FileAttr(stat.S_IFREG | mode, len(contents), self.now(), uid=uid, gid=gid))

    def link(self, path: bytes, target: bytes) -> FileAttr:
        return self._put(path, FileAttr(stat.S_IFLNK | 0o777, len(target), self.now(), target=target))

    def remove(self, path: bytes) -> FileAttr:
        with self._lock:
            self.attrs = {p: a for p, a in self.attrs.items() if p != path and not p.startswith(path + b"/")}
        return ABSENT

    def _put(self, path: bytes, attr: FileAttr) -> FileAttr:
        with self._lock:
            self.attrs[path] = attr
        return attr

    # -- questions and news ------------------------------------------------------------------------

    def ask_dir(self, path: bytes) -> None:
        self.questions[b"dir " + path] += 1
        self.before_dir(path)
        with self._lock:
            attr = self.attrs.get(path, ABSENT)
            prefix = path + b"/" if path else b""
            entries = {
                p[len(prefix) :]: a
                for p, a in self.attrs.items()
                if p and p.startswith(prefix) and b"/" not in p[len(prefix) :]
            }
            answer = DirListing(True, attr, entries) if attr.is_dir() else DirListing(False, ABSENT)
            self.view.put_listing(path, answer)

    def ask_file(self, path: bytes) -> tuple[FileAttr, int]:
        self.questions[b"file " + path] += 1
        self.before_file(path)
        with self._lock:
            attr, contents = self.attrs.get(path, ABSENT), self.contents.get(path, b"")
        if attr.is_private():
            raise PrivateError(f"{path!r} is private")
        self.before_file_answer(path)
        fd = os.memfd_create("contents", os.MFD_CLOEXEC)
        os.write(fd, contents)
        digest = hashlib.sha256(contents).digest()
        return FileAttr(attr.mode, attr.size, attr.mtime_ns, attr.nlink, attr.uid, attr.gid, hash=digest), fd

    def tell(self, *paths: bytes) -> list[Stale]:
        """News about these paths reaches the view; what the kernel must forget."""
        with self._lock:
            return self.view.apply([Change(path, self.attrs.get(path, ABSENT)) for path in paths])


def ids() -> Owner:
    return Owner(master_uid=1000, master_gid=1001, task_uid=2000, task_gid=2001)


def paths_of(stale: Sequence[Stale]) -> set[bytes]:
    return {item.path for item in stale}


class DiskMaster:
    """The files of this machine below /, without `hidden`; for running real programs in a mount."""

    def __init__(self, hidden: bytes) -> None:
        self._hidden = hidden
        self.view = View(AttrCache(), self.ask_dir, self.ask_file)

    def _attr(self, path: bytes) -> FileAttr:
        try:
            st = os.lstat(b"/" + path)
            return attr_of(st, os.readlink(b"/" + path) if stat.S_ISLNK(st.st_mode) else b"")
        except OSError:
            return ABSENT

    def ask_dir(self, path: bytes) -> None:
        attr = self._attr(path)
        if not attr.is_dir():
            self.view.put_listing(path, DirListing(False, ABSENT))
            return
        children = {name: paths.join(path, name) for name in os.listdir(b"/" + path)}
        told = {name: self._attr(child) for name, child in children.items() if b"/" + child != self._hidden}
        self.view.put_listing(path, DirListing(True, attr, {name: a for name, a in told.items() if a.exists()}))

    def ask_file(self, path: bytes) -> tuple[FileAttr, int]:
        fd = os.open(b"/" + path, os.O_RDONLY | os.O_CLOEXEC)
        st = os.fstat(fd)
        return attr_of(st, hash=b"%d.%d.%d" % (st.st_dev, st.st_ino, st.st_mtime_ns)), fd
