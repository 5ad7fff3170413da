"""What a task's file system means: names, attributes, links and contents of the master's files.

No FUSE in here: `fuse.py` turns calls of the kernel into these methods and their exceptions into
errno.  All methods may be called on any thread, but those that read may block on the master, so never
on the event loop.  The loop's own methods are `put_listing` and `apply`.

Two rules keep old answers from overwriting newer news:

- A directory's answer enters the cache where it arrives (the RPC layer calls `put_listing` in order of
  arrival).  `ask_dir` returns nothing; the thread that asked looks into the cache again.
- A file's answer comes back to the thread that asked, later.  It enters the cache only if nothing else
  has meanwhile touched that name (`AttrCache.learn`); otherwise the thread looks again.

The order towards the kernel is: `apply` first, then `Mount.forget` with what it returned.  Whatever the
kernel asks in between is answered with the news, and whatever it was answered before is in `asked`.

A READ of the kernel names a path and brings the size it believes in; an answer of another size would be
cut off or padded with zeros.  So contents are served only while their size is the one that was last
answered for that name.  Otherwise (the file changed between its listing and its first read, or news of
it have not reached the kernel yet) the read fails with ESTALE, the kernel keeps no page, `on_stale`
makes it drop the attributes, and whoever opens the file next asks for them and reads the new contents.
New contents of the same size are served; a process that is reading while a file changes may see some of
both, as on any disk, but nothing of the old outlives `forget`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import msgspec

from termite import paths
from termite.attr.cache import AttrCache, Listing, Stale, Told, What, staleness
from termite.attr.fileattr import ABSENT, FileAttr
from termite.errors import TermiteError, Timeout
from termite.mirror.answers import MOST, Answers
from termite.mirror.pieces import PiecedContent

T = TypeVar("T")

ATTEMPTS = 10
"""How often a question is asked again because the answer was outrun by news."""


class Owner(NamedTuple):
    """Whose files appear as whose: the master's user becomes the task's; others stay who they are."""

    master_uid: int = 0
    master_gid: int = 0
    task_uid: int = 0
    task_gid: int = 0


SAME_OWNER = Owner()


class Counters:
    """Calls of the kernel that came here, and questions to the master so far; read by anyone, exact when idle."""

    __slots__ = ("ask_dir", "ask_file", "changed_while_served", "getattr", "read", "read_bytes", "readdir", "readlink")

    def __init__(self) -> None:
        self.getattr = self.readdir = self.readlink = self.read = self.read_bytes = 0
        self.ask_dir = self.ask_file = self.changed_while_served = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class OpenContent:
    """A content store file, open as long as anyone holds this object.

    CPython's reference count is the count of readers: the descriptor is closed by the last one, never
    under one that is inside pread().
    """

    __slots__ = ("fd", "hash", "size")

    def __init__(self, hash: bytes, fd: int) -> None:
        self.hash = hash
        self.fd = fd
        self.size = os.fstat(fd).st_size if fd >= 0 else 0

    def read_into(self, buffer: Any, offset: int) -> int:
        return os.preadv(self.fd, [buffer], offset)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class SmallContent:
    """Contents that are in memory."""

    __slots__ = ("_data", "hash", "size")

    def __init__(self, hash: bytes, data: bytes) -> None:
        self.hash = hash
        self._data = data
        self.size = len(data)

    def read_into(self, buffer: Any, offset: int) -> int:
        piece = self._data[offset : offset + len(buffer)]
        memoryview(buffer).cast("B")[: len(piece)] = piece
        return len(piece)


Content = OpenContent | SmallContent | PiecedContent


class View:
    """See the module; `cache` is shared with whoever fills it."""

    def __init__(
        self,
        cache: AttrCache,
        ask_dir: Callable[[bytes], None],  # returns when the answer has been put into the cache
        ask_file: Callable[[bytes], tuple[FileAttr, int | bytes | PiecedContent]],  # hash set; the descriptor is ours
        *,
        owner: Owner = SAME_OWNER,
        on_stale: Callable[[Sequence[Stale]], None] = lambda stale: None,  # found while asking; must not block
        max_open: int = 512,
        ask_limit_s: float = 600.0,  # how long to wait for the answer that another thread asked for
        place_of: Callable[[bytes, int], bytes] = lambda hash, size: b"",  # a file with contents of this hash and size
    ) -> None:
        self.cache = cache
        self.counters = Counters()
        self._lock = threading.Lock()  # for all below, and for changing the cache; never held while asking
        # the size last answered for each name that the kernel may hold
        self.asked: dict[bytes, int] = {}
        # directories of which the kernel may hold what stands in them
        self.listed: set[bytes] = set()
        self._ask_dir = ask_dir
        self._ask_file = ask_file
        self._uids = {owner.master_uid: owner.task_uid} if owner.master_uid != owner.task_uid else {}
        self._gids = {owner.master_gid: owner.task_gid} if owner.master_gid != owner.task_gid else {}
        self._on_stale = on_stale
        self._max_open = max_open
        self._ask_limit_s = ask_limit_s
        self._place_of = place_of
        self.answers: Answers | None = None  # while it is mounted; changed under the lock alone
        self._flights: dict[tuple[str, bytes], Future[Any]] = {}
        self._open: OrderedDict[bytes, Content] = OrderedDict()  # most recently used last

    # -- what the kernel asks ------------------------------------------------------------------

    def look(self, path: bytes) -> FileAttr:
        """The attributes as a task sees them; ABSENT if there is nothing."""
        self.counters.getattr += 1
        attr = self._find(path, True)
        if not attr.mode:
            return ABSENT
        if attr.uid in self._uids or attr.gid in self._gids or attr.target:
            return self._as_seen(attr)
        return attr

    def getattr(self, path: bytes) -> FileAttr:
        """The attributes as a task sees them; FileNotFoundError if there is nothing."""
        attr = self.look(path)
        if attr is ABSENT:
            raise _error(errno.ENOENT, path)
        return attr

    def readdir(self, path: bytes) -> dict[bytes, FileAttr]:
        """Every name in the directory (without `.` and `..`), the attributes as on the master."""
        self.counters.readdir += 1
        for _ in range(ATTEMPTS):
            with self._lock:  # one step, as in _find
                listing = self.cache.listing(path)
                if listing is not None:
                    self.listed.add(path)
                    return listing
            self._share("dir", path, self._asking_dir)
            attr = self.cache.lookup(path)
            if attr is not None and not attr.is_dir():
                raise _error(errno.ENOTDIR if attr.exists() else errno.ENOENT, path)
        raise _outrun(path)

    def readlink(self, path: bytes) -> bytes:
        self.counters.readlink += 1
        attr = self._find(path)
        if not attr.is_symlink():
            raise _error(errno.EINVAL if attr.exists() else errno.ENOENT, path)
        return attr.target

    def read(self, path: bytes, size: int, offset: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.read_into(path, memoryview(buffer), offset)])

    def read_into(self, path: bytes, buffer: Any, offset: int) -> int:
        """Fill `buffer` with the file's current contents; the number of bytes, less only at the end."""
        self.counters.read += 1
        content = self._content(path)
        if self._believed(path, content.size) != content.size:
            self._on_stale([Stale(path, What.CONTENTS)])
            raise _error(errno.ESTALE, path)
        done = content.read_into(buffer, offset)
        self.counters.read_bytes += done
        return done

    def _believed(self, path: bytes, unknown: int) -> int:
        """The size that the kernel was told last."""
        with self._lock:
            told = self.answers.told(path) if self.answers is not None else -1
            return told if told >= 0 else self.asked.get(path, unknown)

    # -- what the master tells (event loop) ----------------------------------------------------

    def put_listing(self, path: bytes, told: Listing) -> None:
        """Take a directory's answer, in its order of arrival; to be called by the RPC layer."""
        with self._lock:
            stale = self.cache.put_listing(path, told)
        self._stale(stale)

    def apply(self, changes: Iterable[Told]) -> list[Stale]:
        """Take news; returns what the kernel must be told to forget (and only that)."""
        with self._lock:
            stale = self.cache.apply(changes)
        return self._forgotten(stale)

    def learn(self, path: bytes, known: FileAttr, told: FileAttr) -> bool:
        """Take the answer for a file that was looked up as `known`; False: news came first.  Any thread."""
        with self._lock:
            if not self.cache.learn(path, known, told):
                return False
        if told != msgspec.structs.replace(known, hash=told.hash) or known.hash not in (b"", told.hash):
            self.counters.changed_while_served += 1
            self._stale([staleness(path, known, told)])
        return True

    def forget_answers(self) -> None:
        """When it is mounted no more."""
        with self._lock:
            self.answers = None

    def close(self) -> None:
        """Close the contents that are open; readers under way finish theirs."""
        with self._lock:
            self._open.clear()

    def counts(self) -> dict[str, int]:
        """The counters by name, with what was answered beforehand."""
        counts = self.counters.as_dict()
        with self._lock:
            reads, size = self.answers.counts() if self.answers is not None else (0, 0)
        return {**counts, "read": counts["read"] + reads, "read_bytes": counts["read_bytes"] + size}

    def seen(self, path: bytes) -> FileAttr | None:
        """As `look`, but without asking, and not for the kernel: None if it is not known."""
        attr = self.cache.lookup(path)
        return None if attr is None else self._as_seen(attr) if attr.exists() else ABSENT

    # -- attributes ----------------------------------------------------------------------------

    def _find(self, path: bytes, answering: bool = False) -> FileAttr:
        for _ in range(ATTEMPTS):
            with self._lock:  # looking and noting what was answered are one step, before or after any news
                attr = self.cache.lookup(path)
                if attr is not None:
                    if answering:
                        self.asked[path] = attr.size
                    return attr
            self._share("dir", paths.split(path)[0], self._asking_dir)
        raise _outrun(path)

    def _as_seen(self, attr: FileAttr) -> FileAttr:
        # The kernel cuts a cached link off at its size, so the size must be the target's length (in
        # /proc-like places lstat says 0).
        size = len(attr.target) if attr.target else attr.size
        uid = self._uids.get(attr.uid, attr.uid)
        gid = self._gids.get(attr.gid, attr.gid)
        return FileAttr(attr.mode, size, attr.mtime_ns, attr.nlink, uid, gid, attr.target, attr.hash)

    def _asking_dir(self, path: bytes) -> None:
        self.counters.ask_dir += 1
        self._ask_dir(path)

    def _stale(self, stale: list[Stale]) -> None:
        stale = self._forgotten(stale)
        if stale:
            self._on_stale(stale)

    def _forgotten(self, stale: list[Stale]) -> list[Stale]:
        """Drop what this view holds open of them; those of them that the kernel may hold."""
        for item in stale:
            if item.what in (What.CONTENTS, What.GONE):
                with self._lock:
                    self._open.pop(item.path, None)
            if item.was_dir and self._open:
                inside = item.path + b"/"
                with self._lock:
                    for path in [path for path in self._open if path.startswith(inside)]:
                        del self._open[path]
        known = [item for item in stale if item.path in self.asked]
        if known:
            self._answer_beforehand(known)
        return known + self._relisted(stale)

    def _answer_beforehand(self, stale: list[Stale]) -> None:
        """The kernel will ask for what it is to forget, and for the directories of names that come and go."""
        asked_for = {item.path for item in stale}
        above = {paths.split(item.path)[0] for item in stale if item.what in (What.NEW, What.GONE)}
        asked_for |= {directory for directory in above if directory in self.asked}  # later news find them again
        with self._lock:
            if self.answers is None:
                return
            if len(asked_for) > MOST:
                asked_for = {path for path in asked_for if path in self.answers}
            for item in stale:
                if item.was_dir:
                    for path in self.answers.below(item.path):
                        self._noted(path, self.answers.drop(path))
            for path in asked_for:
                # What is not there because its directory is not may come back with it, unmentioned.
                is_listed = not path or self.cache.knows(paths.split(path)[0])
                attr = self.cache.lookup(path) if is_listed else None
                if attr is None:
                    told = self.answers.drop(path)
                elif attr.exists():
                    contents = self._place_of(attr.hash, attr.size) if attr.hash else b""
                    told = self.answers.put(path, self._as_seen(attr), contents)
                else:
                    told = self.answers.put(path, ABSENT)
                self._noted(path, told)
            while (oldest := self.answers.oldest()) is not None:
                self._noted(oldest, self.answers.drop(oldest))

    def _noted(self, path: bytes, told: int) -> None:
        if told >= 0:
            self.asked[path] = told

    def _relisted(self, stale: list[Stale]) -> list[Stale]:
        """Directories that the kernel has read, in which names have come or gone."""
        if not self.listed:
            return []
        changed: list[Stale] = []
        for item in stale:
            if item.what not in (What.NEW, What.GONE):
                continue
            directory = paths.split(item.path)[0]
            with self._lock:
                if directory in self.listed:
                    self.listed.discard(directory)  # until it is read again
                    changed.append(Stale(directory, What.NAMES))
        return changed

    # -- contents ------------------------------------------------------------------------------

    def _content(self, path: bytes) -> Content:
        for _ in range(ATTEMPTS):
            attr = self.cache.lookup(path)
            if attr is not None and attr.hash:
                with self._lock:
                    content = self._open.get(path)
                    if content is not None and content.hash == attr.hash:
                        self._open.move_to_end(path)
                        return content
            fetched = self._share("file", path, self._fetch)
            if fetched is not None:
                return fetched
        raise _outrun(path)

    def _fetch(self, path: bytes) -> Content | None:
        """Ask for the contents; None: the news came first, look again."""
        attr = self._find(path)
        if not attr.is_regular():
            raise _error(errno.EISDIR if attr.is_dir() else errno.EINVAL if attr.exists() else errno.ENOENT, path)
        self.counters.ask_file += 1
        told, given = self._ask_file(path)
        content = _content_of(told.hash, given)  # from here on it closes itself
        if told.is_regular() and content.size != told.size:
            raise TermiteError(f"contents of the wrong length for {paths.for_people(path)}; the cache may be damaged")
        if not self.learn(path, attr, told):
            return None
        if not told.is_regular():
            raise _error(errno.ESTALE, path)
        self._keep(path, content)
        return content

    def _keep(self, path: bytes, content: Content) -> None:
        evicted: list[Content] = []  # closed after the lock is let go
        with self._lock:
            evicted.append(self._open.pop(path, content))
            self._open[path] = content
            while len(self._open) > self._max_open:
                evicted.append(self._open.popitem(last=False)[1])

    # -- one question at a time ----------------------------------------------------------------

    def _share(self, kind: str, path: bytes, ask: Callable[[bytes], T]) -> T:
        """Ask, or wait for the answer to the same question of another thread; failures reach all of them."""
        with self._lock:
            flight = self._flights.get((kind, path))
            if flight is None:
                self._flights[kind, path] = Future()
        if flight is not None:
            try:
                answer: T = flight.result(self._ask_limit_s)
                return answer
            except TimeoutError:
                raise Timeout(f"no answer within {self._ask_limit_s:g} s for {paths.for_people(path)}") from None
            finally:
                del flight  # it may hold the exception, whose traceback holds this frame: a circle
        try:
            answer = ask(path)
        except BaseException as error:
            self._land(kind, path).set_exception(error)
            raise
        self._land(kind, path).set_result(answer)
        return answer

    def _land(self, kind: str, path: bytes) -> Future[Any]:
        with self._lock:
            return self._flights.pop((kind, path))


def _content_of(hash: bytes, given: int | bytes | PiecedContent) -> Content:
    if isinstance(given, int):
        return OpenContent(hash, given)
    return SmallContent(hash, given) if isinstance(given, bytes) else given


def _error(number: int, path: bytes) -> OSError:
    return OSError(number, os.strerror(number), paths.for_people(path))


def _outrun(path: bytes) -> TermiteError:
    return TermiteError(f"{paths.for_people(path)} changes faster than it can be read; gave up after {ATTEMPTS} times")
