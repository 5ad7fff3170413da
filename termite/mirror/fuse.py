"""A `View`, mounted: the only user of fusepy, and of libfuse 2 through it.

Nothing is decided here: callbacks turn paths and structs into calls of the view, one table turns its
exceptions into errno.  fusepy supplies the library and the layout of its structs for every machine; its
`FUSE` class is not used, for three reasons:

- It lets libfuse 2 agree with the kernel on the features of 2012, see `greeting.py`.
- Its callback threads are made by libfuse, and Python builds and frees a thread state for each call on
  such a thread.  Here Python threads run the loop.
- Its wrappers build a dict, a str and a copy per call.

The kernel keeps every answer without limit of time: names, attributes, that a name does not exist,
links, pages, what a directory holds.  `open` answers ENOSYS, after which the kernel neither opens nor
releases and keeps pages across opens; `mkbox/fuse_loop.c`, which all threads run, does so for directories.
What is not registered is answered by libfuse, in C, once: "not supported".

A directory may change between two reads of one listing.  So a name's place in it (the offset that the
kernel comes back with) hangs on the name alone, as in ext4: what stays is neither left out nor told twice.

`Mount.forget` makes the kernel drop what is no longer true; `forget.py` says how, and on which thread.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import functools
import importlib
import logging
import os
import stat
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from termite import paths
from termite.attr.cache import Stale
from termite.attr.fileattr import FileAttr
from termite.errors import Canceled, MountError, PathError, PrivateError, TermiteError
from termite.mirror.answers import Answers
from termite.mirror.forget import Forgetter
from termite.mirror.greeting import MAX_READ, NO_OPENDIR, ChannelOps, greet
from termite.mirror.view import View

log = logging.getLogger(__name__)

ERRNO: tuple[tuple[type[BaseException], int], ...] = (  # first match; an OSError keeps its own
    (PrivateError, errno.EACCES),
    (PathError, errno.ENOENT),
    (Canceled, errno.EINTR),
    (TermiteError, errno.EIO),
    (MemoryError, errno.ENOMEM),
    (BaseException, errno.EIO),
)

DEVICE = "/dev/fuse"

SWITCH_INTERVAL_S = 0.0002
"""How long a busy thread may keep a callback waiting for the interpreter (Python's default: 5 ms)."""

THREADS = 16
"""How many requests are answered at once; the rest waits in the kernel."""

FOR_EVER_S = 1_000_000_000
BLOCK_SIZE = 4096

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_FORCE, MNT_DETACH = 1, 2, 4, 1, 2

# -- callbacks --------------------------------------------------------------------------------------

GETATTR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
READLINK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
OPEN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
RMDIR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
READ = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong, ctypes.c_void_p
)
FILLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_longlong)
READDIR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, FILLER, ctypes.c_longlong, ctypes.c_void_p)


Entry = tuple[int, bytes, int]
"""Of a listing: the place, which fits into 31 bits for the sake of old programs, the name, and the mode."""

DIRECTORY = stat.S_IFDIR | 0o755

LISTINGS = 64
"""How many listings are kept while they are being read; one that is not is put into order again."""


def errno_of(error: BaseException) -> int:
    """What the calling process sees; what can only be a mistake of ours is logged."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if not isinstance(error, TermiteError):
        log.error("mirror: a file system call failed", exc_info=error)
    return next(number for kind, number in ERRNO if isinstance(error, kind))


def in_order(listing: dict[bytes, FileAttr]) -> list[Entry]:
    """All that a directory holds, each name in a place of its own, the least of which is 1."""
    entries: list[Entry] = [(1, b".", DIRECTORY), (2, b"..", DIRECTORY)]
    last = 2
    for wanted, name in sorted((zlib.crc32(name) >> 1, name) for name in listing):
        last = max(wanted, last + 1)  # two names in two million share a place
        entries.append((last, name, listing[name].mode))
    return entries


class Callbacks:
    """The operations; each returns 0 or a length, or minus an errno, and never raises.

    Paths arrive as bytes with a leading slash: every name the kernel allows passes unchanged.
    """

    def __init__(self, view: View, stat_type: Any) -> None:
        self._view = view
        self._stat = stat_type
        self._lock = threading.Lock()  # for the listings
        self._listings: dict[bytes, list[Entry]] = {}  # of directories that are being read

    def _fill(self, address: int, attr: FileAttr) -> None:
        st = self._stat.from_address(address)  # libfuse has zeroed it
        st.st_mode = attr.mode
        # One for files: overlay marks a copied-up file with its origin only then, see overlay.py.
        st.st_nlink = attr.nlink if attr.is_dir() else 1
        st.st_uid = attr.uid
        st.st_gid = attr.gid
        st.st_size = size = attr.size
        st.st_blocks = (size + 4095 >> 12) * 8
        st.st_blksize = BLOCK_SIZE
        seconds, nanoseconds = divmod(attr.mtime_ns, 1_000_000_000)
        for when in (st.st_atimespec, st.st_mtimespec, st.st_ctimespec):
            when.tv_sec = seconds
            when.tv_nsec = nanoseconds

    def getattr(self, path: bytes, address: int) -> int:
        try:
            attr = self._view.look(path[1:])
            if not attr.mode:
                return -errno.ENOENT
            self._fill(address, attr)
            return 0
        except BaseException as error:
            return -errno_of(error)

    def readlink(self, path: bytes, address: int, size: int) -> int:
        try:
            target = self._view.readlink(path[1:])[: size - 1] + b"\0"
            ctypes.memmove(address, target, len(target))
            return 0
        except BaseException as error:
            return -errno_of(error)

    def open(self, path: bytes, info: int) -> int:
        return -errno.ENOSYS

    def rmdir(self, path: bytes) -> int:
        """Never the kernel's (the mount is read-only), only `Forgetter`'s: the name is gone already."""
        return 0

    def read(self, path: bytes, address: int, size: int, offset: int, info: int) -> int:
        try:
            return self._view.read_into(path[1:], (ctypes.c_char * size).from_address(address), offset)
        except BaseException as error:
            return -errno_of(error)

    def readdir(self, path: bytes, buffer: int, fill: Callable[..., int], offset: int, info: int) -> int:
        try:
            entries = self._listing(path, offset)
            st = self._stat()
            entry = ctypes.byref(st)
            for place, name, mode in entries[bisect.bisect_right(entries, offset, key=itemgetter(0)) :]:
                st.st_mode = mode
                if fill(buffer, name, entry, place):
                    return 0  # the kernel will ask for the rest
            with self._lock:
                self._listings.pop(path, None)
            return 0
        except BaseException as error:
            return -errno_of(error)

    def _listing(self, path: bytes, offset: int) -> list[Entry]:
        """As it was when somebody last began to read it, for those who go on."""
        with self._lock:
            entries = self._listings.get(path) if offset else None
        if entries is None:
            entries = in_order(self._view.readdir(path[1:]))
            with self._lock:
                self._listings[path] = entries
                if len(self._listings) > LISTINGS:
                    del self._listings[next(iter(self._listings))]
        return entries


# -- libfuse ----------------------------------------------------------------------------------------


class _Args(ctypes.Structure):
    _fields_ = [("argc", ctypes.c_int), ("argv", ctypes.POINTER(ctypes.c_char_p)), ("allocated", ctypes.c_int)]


@functools.cache
def _load() -> tuple[Any, Any]:
    """fusepy's module, and its library with the functions declared that fusepy leaves out."""
    try:
        module = importlib.import_module("fuse")
    except ImportError as error:
        raise MountError("the Python package fusepy is missing: pip install fusepy") from error
    except OSError as error:
        raise MountError("libfuse 2 is missing: apt-get install libfuse2") from error
    if not hasattr(module, "fuse_operations") or not hasattr(module, "_libfuse"):
        raise MountError(f"{module.__file__} is not fusepy: pip uninstall fuse-python; pip install fusepy")
    lib = ctypes.CDLL(module._libfuse._name)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, result, arguments in (
        ("fuse_kern_chan_new", pointer, (number,)),
        ("fuse_chan_new", pointer, (ctypes.POINTER(ChannelOps), number, size, pointer)),
        ("fuse_chan_bufsize", size, (pointer,)),
        ("fuse_chan_destroy", None, (pointer,)),
        ("fuse_new", pointer, (pointer, ctypes.POINTER(_Args), pointer, size, pointer)),
        ("fuse_destroy", None, (pointer,)),
        ("fuse_get_session", pointer, (pointer,)),
        ("fuse_get_context", pointer, ()),
        ("fuse_session_process", None, (pointer, ctypes.c_char_p, size, pointer)),
        ("fuse_lowlevel_notify_inval_entry", number, (pointer, ctypes.c_uint64, ctypes.c_char_p, size)),
        ("fuse_lowlevel_notify_inval_inode", number, (pointer, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64)),
    ):
        setattr(lib, name, ctypes.CFUNCTYPE(result, *arguments)(_address(lib, name)))
    return module, lib


class _Loop(ctypes.Structure):
    """struct loop of mkbox/fuse_loop.c"""

    _fields_ = [
        ("session", ctypes.c_void_p), ("channel", ctypes.c_void_p), ("process", ctypes.c_void_p),
        ("new_channel", ctypes.c_void_p), ("destroy_channel", ctypes.c_void_p), ("buffer_size", ctypes.c_size_t),
        ("device", ctypes.c_int), ("opens_directories", ctypes.c_int),
    ]  # fmt: skip


@functools.cache
def _load_own() -> tuple[Any, Any]:
    """Our half of it: the loop of mkbox/fuse_loop.c, and the library of fuse_answers.c."""
    path = Path(sysconfig.get_path("data")) / "lib" / "termite" / "libtermite-fuse-loop.so"
    try:
        library = ctypes.CDLL(str(path))
        answers = ctypes.PyDLL(str(path))
        loop = library.termite_fuse_loop
    except (OSError, AttributeError) as error:
        raise MountError(f"cannot use {path}: {error}; install termite again") from error
    loop.argtypes = (ctypes.POINTER(_Loop),)
    return loop, answers


def load_early() -> None:
    """Spares the first `Mount` the time that loading the library takes; what is amiss it will say itself."""
    with contextlib.suppress(MountError):
        _load()
        _load_own()


def _address(lib: Any, name: str) -> int:
    """Where a function is.  Plain look-up finds the interface of 2005 where libfuse still carries it."""
    libc = ctypes.CDLL(None)
    libc.dlvsym.restype = ctypes.c_void_p
    libc.dlvsym.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    found = libc.dlvsym(lib._handle, name.encode(), b"FUSE_2.6")
    return found or ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0


# -- the mount --------------------------------------------------------------------------------------


class Mount:
    """One view at one directory, from `start` to `stop`; neither may be called on a FUSE thread."""

    def __init__(self, view: View, mountpoint: bytes, threads: int = THREADS) -> None:
        self.mountpoint = mountpoint
        self._view = view
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._forgetting = threading.Lock()  # held by forget; stop takes it before it frees anything
        self._forgetter: Forgetter | None = None  # None: not mounted
        self._channel: int = 0  # libfuse's channel and session; 0: none
        self._fuse: int = 0
        self._answers: Answers | None = None
        self._kept_alive: list[Any] = []  # what libfuse has pointers into
        self._libc = ctypes.CDLL(None, use_errno=True)

    def start(self) -> None:
        """Mount and serve on threads of its own; returns when the mount answers.  MountError: nothing is left."""
        module, self._lib = _load()
        loop, answers = _load_own()
        sys.setswitchinterval(min(SWITCH_INTERVAL_S, sys.getswitchinterval()))
        device = _open_device()
        try:
            self._mount(device)
        except BaseException:
            os.close(device)
            raise
        self._channel = self._lib.fuse_kern_chan_new(device)  # owns the device from here on
        try:
            session = self._new_session(module, answers)
            offered = greet(self._lib, device, self._channel, session)
            serve = loop, self._loop(device, session, bool(offered & NO_OPENDIR))
            for number in range(self._count):
                self._threads.append(
                    threading.Thread(
                        target=self._serve, args=serve, name=f"fuse-{number}", daemon=True
                    )
                )
                self._threads[-1].start()
            self._forgetter = Forgetter(self._lib, session, self._channel, self.mountpoint)
            os.statvfs(self.mountpoint)  # answered by libfuse itself, without the view
            self._read_ahead(self._forgetter.device())
        except BaseException:
            self.stop()
            raise

    def _mount(self, device: int) -> None:
        options = (
            f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},"
            f"default_permissions,allow_other,max_read={MAX_READ}"
        )
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV
        where = paths.for_people(self.mountpoint)
        if self._libc.mount(b"termite-mirror", self.mountpoint, b"fuse", flags, options.encode()) == 0:
            return
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES):
            raise MountError(f"not permitted to mount on {where}: run the worker as root or with CAP_SYS_ADMIN")
        if number == errno.ENODEV:
            raise MountError("this kernel has no FUSE: modprobe fuse")
        raise MountError(f"cannot mount on {where}: {os.strerror(number)}")

    def _new_session(self, module: Any, answers: Any) -> int:
        callbacks = Callbacks(self._view, module.c_stat)
        types = {field[0]: field[1] for field in module.fuse_operations._fields_}
        operations = module.fuse_operations()  # the rest stays NULL: libfuse refuses it without asking us
        for name, prototype in (
            ("getattr", GETATTR),
            ("readlink", READLINK),
            ("open", OPEN),
            ("read", READ),
            ("readdir", READDIR),
            ("rmdir", RMDIR),
        ):
            function = prototype(getattr(callbacks, name))
            self._kept_alive.append(function)
            setattr(operations, name, ctypes.cast(function, types[name]))
        self._answers = Answers(answers, operations.getattr, operations.read, self._lib.fuse_get_context)
        operations.getattr = ctypes.cast(self._answers.getattr, types["getattr"])
        operations.read = ctypes.cast(self._answers.read, types["read"])
        self._view.answers = self._answers
        timeouts = ",".join(f"{kind}_timeout={FOR_EVER_S}" for kind in ("entry", "attr", "negative"))
        argv = (ctypes.c_char_p * 4)(b"termite-mirror", b"-o", timeouts.encode(), None)
        args = _Args(3, argv, 0)
        self._kept_alive += [operations, argv, args]
        self._fuse = self._lib.fuse_new(
            self._channel,
            ctypes.byref(args),
            ctypes.byref(operations),
            ctypes.sizeof(operations),
            self._answers.handle,
        )
        if not self._fuse:
            raise MountError("libfuse refused the session; is /usr/lib's libfuse.so.2 version 2.9?")
        session: int = self._lib.fuse_get_session(self._fuse)
        return session

    def _loop(self, device: int, session: int, knows_no_opendir: bool) -> _Loop:
        lib = self._lib
        functions = (
            ctypes.cast(function, ctypes.c_void_p)
            for function in (lib.fuse_session_process, lib.fuse_chan_new, lib.fuse_chan_destroy)
        )
        size = lib.fuse_chan_bufsize(self._channel)
        return _Loop(session, self._channel, *functions, size, device, not knows_no_opendir)

    def _serve(self, run: Any, loop: _Loop) -> None:
        """One of the threads."""
        error = run(ctypes.byref(loop))
        if error:
            log.error("mirror: cannot read the kernel's requests: %s", os.strerror(error))

    def _read_ahead(self, device: str) -> None:
        """Let the kernel read a first-time file in pieces of 1 MiB; where that is not allowed, it takes 128 KiB."""
        try:
            with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as limit:
                limit.write(str(MAX_READ >> 10))
        except OSError as error:
            log.debug("mirror: read-ahead stays at the kernel's default: %s", error)

    # -- forgetting ----------------------------------------------------------------------------

    def forget(self, stale: Sequence[Stale]) -> None:
        """Make the kernel drop what it holds of these; see forget.py: blocks, needs a thread of its own.

        When it returns, whoever looks afterwards sees what the view has now.
        """
        with self._forgetting:
            if self._forgetter is not None:
                self._forgetter.forget(stale)

    # -- the end -------------------------------------------------------------------------------

    def stop(self, limit_s: float = 10.0) -> None:
        """Unmount, whoever still uses it, and end the threads; safe to repeat.

        Questions that FUSE threads have asked must be failed by their owner, or this waits for them up
        to the limit; then the threads and what they use are left behind, and the log says so.
        """
        if not self._channel:
            return
        # MNT_FORCE ends all requests under way with an error, so that nobody hangs in the mount; in a
        # user namespace it is not ours to use.
        if self._libc.umount2(self.mountpoint, MNT_FORCE | MNT_DETACH) and ctypes.get_errno() == errno.EPERM:
            self._libc.umount2(self.mountpoint, MNT_DETACH)
        if self._forgetting.acquire(timeout=limit_s):
            try:
                if self._forgetter is not None:
                    self._forgetter.close()
                self._forgetter = None
            finally:
                self._forgetting.release()
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        channel, self._channel, fuse = self._channel, 0, self._fuse
        if left or self._forgetter is not None:
            log.error("mirror: %s still busy in %r after unmounting", ", ".join(left) or "forget", self.mountpoint)
            return
        self._threads.clear()
        self._view.forget_answers()
        if self._answers is not None:
            self._answers.close()
        self._lib.fuse_chan_destroy(channel)
        if fuse:
            self._lib.fuse_destroy(fuse)
        self._view.close()


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise MountError(
                "there is no /dev/fuse: modprobe fuse (in a container: start it with --device /dev/fuse)"
            ) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise MountError(
                "not permitted to open /dev/fuse: run the worker as root or with CAP_SYS_ADMIN"
                " (in a container: start it with --device /dev/fuse)"
            ) from error
        raise MountError(f"cannot open /dev/fuse: {error.strerror}") from error


def check_fuse() -> None:
    """MountError, with the remedy, if a mirror could not be mounted for want of /dev/fuse or a library."""
    os.close(_open_device())
    _load()
    _load_own()
